"""Scalar functions that the kernels share. Their derivation and error bounds are in README.md."""

import triton
import triton.language as tl

# |c| up to which expm1(c) - c comes from its polynomial.
RADIUS = tl.constexpr(1.0)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def expm1_tail(c):
    """expm1(c) - c for |c| <= RADIUS: minimax polynomial times c^2, off by at most 1.2e-7 before rounding."""
    p = 2.496081287972629e-05
    p = p * c + 0.00020325483637861907
    p = p * c + 0.0013891335111111403
    p = p * c + 0.008330930024385452
    p = p * c + 0.04166651517152786
    p = p * c + 0.16666695475578308
    p = p * c + 0.5
    return p * c * c


@triton.jit
def log1p_tail(u):
    """u - log1p(u) for |u| <= 1/16: its Taylor series, relative error below 1e-8. Finite elsewhere, too."""
    u = tl.where(tl.abs(u) <= 0.0625, u, 0.0)
    p = 0.1111111111111111 - u * 0.1
    p = 0.125 - u * p
    p = 0.14285714285714285 - u * p
    p = 0.16666666666666666 - u * p
    p = 0.2 - u * p
    p = 0.25 - u * p
    p = 0.3333333333333333 - u * p
    p = 0.5 - u * p
    return p * u * u


@triton.jit
def to_operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """float32 or float64 -> the type that the products take, rounded to nearest.

    tf32 operands are float32 whose other fraction bits are 0: the tensor cores would cut them off, always towards zero.
    So are bf16 operands under Triton's interpreter, whose products take bfloat16 for integers.
    """
    x = x.to(tl.float32)
    if dtype == tl.float32 and PRECISION == "tf32":
        x = _round_fraction(x, 13)
    elif dtype == tl.float32 and PRECISION == "bf16":
        x = _round_fraction(x, 16)
    return x.to(dtype)


@triton.jit
def _round_fraction(x, BITS: tl.constexpr):
    """Nearest float32 with the last BITS bits 0, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    half: tl.constexpr = (1 << (BITS - 1)) - 1
    rounded = (bits + half + ((bits >> BITS) & 1)) & -(1 << BITS)
    # The carry would turn a NaN with all fraction bits set into a number.
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
