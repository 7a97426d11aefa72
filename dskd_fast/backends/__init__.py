"""Implementations of the operators, one module per backend.

Each takes (B, N, C) tensors of any strides and returns plain results; autograd, argument checks and the choice among
backends live above, in `dskd_fast.ops`.
"""
