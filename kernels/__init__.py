"""Triton kernels of the loss, installed as `dskd_fast.kernels`. README.md in this folder derives what they compute.

Importing this package imports nothing: Triton is loaded, and nothing compiled, when a kernel's module is imported.
"""
