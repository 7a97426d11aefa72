"""Kernel of the local branch's cosine distance map and its gradient."""

import triton
import triton.language as tl

from dskd_fast.kernels.prepare import load, squares_and_product, store


@triton.jit(do_not_specialize=["n"])  # n = 1 would become a constant, which has no dtype
def cosine_kernel(
    student,  # (B, C, H, W)
    teacher,  # (B, C, H, W)
    distance,  # (B, N) float32 out: 1 - <s, t>, 1 where either vector is zero
    weights,  # (B, N) float32, if WITH_GRADIENT: of the positions' gradients
    gradient,  # (B, C, H, W) float32 out, if WITH_GRADIENT: weight (<s, t> s - t) / |student|
    n,
    n_channels,
    width,
    s_stride_b,
    s_stride_c,
    s_stride_h,
    s_stride_w,
    t_stride_b,
    t_stride_c,
    t_stride_h,
    t_stride_w,
    g_stride_b,
    g_stride_c,
    g_stride_h,
    g_stride_w,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """One sweep over the channels for the map, a second over the same, cached values for the gradient.

    The sums are in float64, where subtracting <s, t> from 1 leaves nine digits even at an angle of 1e-3.
    """
    blocks = tl.cdiv(n, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    positions = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    student += b * s_stride_b
    teacher += b * t_stride_b
    offs_c = tl.arange(0, BLOCK_C)
    ss, tt, st = squares_and_product(
        student, teacher, positions, n, n_channels, width, s_stride_c, s_stride_h, s_stride_w,
        t_stride_c, t_stride_h, t_stride_w, n_channels, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    # One root of the product, and a division by it, are exact where the student is its teacher times a power of two.
    product = ss * tt
    root = tl.sqrt(tl.where(product > 0, product, 1.0))
    cosine = tl.where(product > 0, st / root, product * 0)
    scale = tl.where(product > 0, 1 / root, product * 0)
    value = 1 - cosine
    tl.store(distance + b * n + positions, tl.where(value < 0, 0.0, value).to(tl.float32), mask=positions < n)
    if WITH_GRADIENT:
        weight = tl.load(weights + b * n + tl.minimum(positions, n - 1))  # a mask would spill registers
        # Two numbers a position are kept through the sweep: x along - y across = (x share - y) across.
        across = weight * scale
        share = tl.where(ss > 0, st / tl.where(ss > 0, ss, 1.0), ss * 0)
        gradient += b * g_stride_b
        for start_c in range(0, n_channels, BLOCK_C):
            channels = start_c + offs_c
            x = load(student, positions, channels, n, n_channels, width, s_stride_c, s_stride_h, s_stride_w)
            y = load(teacher, positions, channels, n, n_channels, width, t_stride_c, t_stride_h, t_stride_w)
            g = ((x * share[:, None] - y) * across[:, None]).to(tl.float32)
            store(gradient, g, positions, channels, n, n_channels, width, g_stride_c, g_stride_h, g_stride_w)
