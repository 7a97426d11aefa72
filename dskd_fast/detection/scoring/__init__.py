"""Scores that keep what each student finds: parts, each calibrated on normal images, and one soft maximum of them."""
