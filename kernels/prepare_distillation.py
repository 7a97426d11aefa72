"""Kernels over single keys and single rows of the distillation against any keys, before and after those over pairs.

As in `dskd_fast.kernels.prepare`, inputs may have any strides, all arithmetic on them is in float64, and operands are
zero in the padding. With NORMALIZE vectors are divided by their lengths, else they are taken as they are.
"""

import triton
import triton.language as tl

from dskd_fast.kernels.arithmetic import LN2, to_operand
from dskd_fast.kernels.prepare import (
    FP16_EXPONENT,
    GROUP,
    GROUPS,
    HIGHEST,
    NAN,
    inverse_root,
    load,
    sample,
    squares_and_product,
    store,
)

# Temperatures from this to HIGHEST, a float32's rounding of 0.005 among them; others give NaN.
LOWEST = tl.constexpr(0.00499999)
# A masked key's logit, which absorbs any other (distillation.py).
NEVER = tl.constexpr(-1e30)
# Keys of a block of bias_kernel; splits and elements of one of sum_kernel.
BIAS_BLOCK = 128
SUM_BLOCK = 16, 128
# fp16 operands: the largest of the sampled keys has a length of at most 2^8. Others may be 255 times as long before a
# channel leaves fp16's range, as keys may be that replace some later; and channels 2^-22 of it have all their digits.
KEY_EXPONENT = 8


@triton.jit(do_not_specialize=["n"])  # n = 1 would become a constant, which has no dtype
def centre_kernel(
    keys,  # (B', K, C)
    partial_mean,  # (B', GROUPS, C_PAD) float32 out: sums of the keys of a group, / number of samples
    partial_length,  # (B', GROUPS) float32 out: the largest length in the group
    n,  # K
    n_channels,
    stride_b,
    stride_n,
    stride_c,
    C_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    positions, samples = sample(group, n)
    keys += b * stride_b
    offs_c = tl.arange(0, BLOCK_C)
    squares = tl.zeros((GROUP,), tl.float64)
    for start_c in range(0, C_PAD, BLOCK_C):
        y = load(keys, positions, start_c + offs_c, n, n_channels, n, stride_c, 0, stride_n)
        squares += tl.sum(y * y, 1)
    length = tl.sqrt(squares)
    weight = tl.full((GROUP,), 1.0, tl.float64)
    if NORMALIZE:
        weight = inverse_root(squares)
        length = length * weight
    weight = weight / samples
    tl.store(partial_length + b * GROUPS + group, tl.max(length, 0).to(tl.float32))
    partial_mean += (b * GROUPS + group) * C_PAD
    for start_c in range(0, C_PAD, BLOCK_C):
        y = load(keys, positions, start_c + offs_c, n, n_channels, n, stride_c, 0, stride_n)
        tl.store(partial_mean + start_c + offs_c, tl.sum(y * weight[:, None], 0).to(tl.float32))


@triton.jit(do_not_specialize=["n", "n_out", "first"])  # these change from call to call
def keys_kernel(
    keys,  # (B', K, C)
    centre,  # (B', C) float32
    key_scale,  # (B',) float32
    operands,  # (B', K_PAD, C_PAD) out, from `first` on: (key - centre) times the scale
    n,  # K
    n_out,  # how many are written: those beyond K are 0
    first,
    k_pad,
    n_channels,
    stride_b,
    stride_n,
    stride_c,
    C_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    blocks = tl.cdiv(n_out, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    positions = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    keys += b * stride_b
    centre += b * n_channels
    rows = b * k_pad + first + positions
    offs_c = tl.arange(0, BLOCK_C)
    scale = tl.load(key_scale + b).to(tl.float64)
    inverse = tl.full((BLOCK_P,), 1.0, tl.float64)
    if NORMALIZE:
        squares = tl.zeros((BLOCK_P,), tl.float64)
        for start_c in range(0, C_PAD, BLOCK_C):
            y = load(keys, positions, start_c + offs_c, n, n_channels, n, stride_c, 0, stride_n)
            squares += tl.sum(y * y, 1)
        inverse = inverse_root(squares)
    for start_c in range(0, C_PAD, BLOCK_C):
        channels = start_c + offs_c
        y = load(keys, positions, channels, n, n_channels, n, stride_c, 0, stride_n)
        mean = tl.load(centre + channels, mask=channels < n_channels, other=0).to(tl.float64)
        k = tl.where((positions < n)[:, None], (y * inverse[:, None] - mean[None, :]) * scale, 0.0)
        place = rows[:, None] * C_PAD + channels[None, :]
        k = to_operand(k, operands.dtype.element_ty, PRECISION)
        tl.store(operands + place, k, mask=(positions < n_out)[:, None])


@triton.jit(do_not_specialize=["n"])  # n = 1 would become a constant, which has no dtype
def bias_kernel(
    mask,  # (B'', K) uint8: 0 for keys that take no part; any pointer unless WITH_MASK
    bias,  # (B'', K_PAD) float32 out: 0, of keys that take no part NEVER
    n,  # K
    k_pad,
    stride_b,
    stride_n,
    BLOCK_P: tl.constexpr,
    WITH_MASK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    positions = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    takes_part = positions < n
    if WITH_MASK:
        places = mask + b * stride_b + positions.to(tl.int64) * stride_n
        takes_part = tl.load(places, mask=takes_part, other=0) != 0
    tl.store(bias + b * k_pad + positions, tl.where(takes_part, 0.0, NEVER))


@triton.jit
def _operand_scale(squares):
    """float32 power of two that brings vectors of these squared lengths to the upper end of fp16's range."""
    exponent = FP16_EXPONENT - 1 - tl.ceil(0.5 * tl.log2(tl.maximum(squares.to(tl.float32), 1e-30)))
    return tl.exp2(exponent)


@triton.jit(do_not_specialize=["n"])  # n = 1 would become a constant, which has no dtype
def rows_kernel(
    student,  # (B, C, H, W)
    teacher,  # (B, C, H, W)
    row_mask,  # (B, N) uint8: 0 for rows that take no part; any pointer unless WITH_MASK
    key_scale,  # (B',) float32
    queries,  # (B, N_PAD, C_PAD) out: t_i, times a power of two per row for fp16
    delta,  # (B, N_PAD, C_PAD) out: s_i / T_s - t_i / T_t, likewise
    a_scale,  # (B, N_PAD) float32 out: what a product of a row of the queries with a key is multiplied by to give a
    c_scale,  # (B, N_PAD) float32 out: likewise of delta and c
    inverse_norm,  # (B, N_PAD) float64 out: 1/|student_i|
    is_row,  # (B, N_PAD) int8 out: 1 for rows that take part
    student_temperature,  # float64 pointers
    teacher_temperature,
    n,
    n_pad,
    n_channels,
    width,
    key_stride_b,  # of key_scale: 0 where all images share the keys
    s_stride_b,
    s_stride_c,
    s_stride_h,
    s_stride_w,
    t_stride_b,
    t_stride_c,
    t_stride_h,
    t_stride_w,
    C_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WITH_MASK: tl.constexpr,
):
    s_temperature = tl.load(student_temperature)
    t_temperature = tl.load(teacher_temperature)
    s_temperature = tl.where((s_temperature >= LOWEST) & (s_temperature <= HIGHEST), s_temperature, NAN)
    t_temperature = tl.where((t_temperature >= LOWEST) & (t_temperature <= HIGHEST), t_temperature, NAN)
    blocks = n_pad // BLOCK_P
    b = (tl.program_id(0) // blocks).to(tl.int64)
    positions = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    student += b * s_stride_b
    teacher += b * t_stride_b
    rows = b * n_pad + positions
    offs_c = tl.arange(0, BLOCK_C)
    s_inverse = tl.full((BLOCK_P,), 1.0, tl.float64)
    t_inverse = s_inverse
    t_scale = tl.full((BLOCK_P,), 1.0, tl.float32)
    d_scale = t_scale
    if NORMALIZE or PRECISION == "fp16":
        ss, tt, st = squares_and_product(
            student, teacher, positions, n, n_channels, width, s_stride_c, s_stride_h, s_stride_w,
            t_stride_c, t_stride_h, t_stride_w, C_PAD, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        if NORMALIZE:
            s_inverse = inverse_root(ss)
            t_inverse = inverse_root(tt)
        if PRECISION == "fp16":
            # |delta|^2 from a sum that cancels; above its rounding error it is needed to within a factor only.
            s_factor, t_factor = s_inverse / s_temperature, t_inverse / t_temperature
            both = ss * s_factor * s_factor + tt * t_factor * t_factor
            t_scale = _operand_scale(tt * t_inverse * t_inverse)
            d_scale = _operand_scale(tl.maximum(both - 2 * st * s_factor * t_factor, both * 1e-15))
    s_factor, t_factor = s_inverse / s_temperature, t_inverse / t_temperature
    dtype = queries.dtype.element_ty
    for start_c in range(0, C_PAD, BLOCK_C):
        x = load(student, positions, start_c + offs_c, n, n_channels, width, s_stride_c, s_stride_h, s_stride_w)
        y = load(teacher, positions, start_c + offs_c, n, n_channels, width, t_stride_c, t_stride_h, t_stride_w)
        t = y * t_inverse[:, None] * t_scale[:, None]
        d = (x * s_factor[:, None] - y * t_factor[:, None]) * d_scale[:, None]
        place = rows[:, None] * C_PAD + (start_c + offs_c)[None, :]
        tl.store(queries + place, to_operand(t, dtype, PRECISION))
        tl.store(delta + place, to_operand(d, dtype, PRECISION))
    k_scale = tl.load(key_scale + b * key_stride_b).to(tl.float64)
    ln2 = tl.full((), LN2, tl.float64)  # in full: it would be float32
    tl.store(a_scale + rows, (1 / (t_temperature * ln2 * k_scale * t_scale)).to(tl.float32))
    tl.store(c_scale + rows, (1 / (k_scale * d_scale)).to(tl.float32))
    tl.store(inverse_norm + rows, s_inverse)
    takes_part = positions < n
    if WITH_MASK:
        takes_part = tl.load(row_mask + b * n + positions, mask=takes_part, other=0) != 0
    tl.store(is_row + rows, takes_part.to(tl.int8))


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(
    raw,  # (splits, elements) float32, in and out: the first becomes the sum of all
    splits,
    elements,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        places = raw + split.to(tl.int64)[:, None] * elements + offs[None, :]
        total += tl.sum(tl.load(places, mask=(split < splits)[:, None], other=0), 0)
    tl.store(raw + offs, total)


@triton.jit
def _row_gradient(raw, rows, channels, factor, C_PAD: tl.constexpr):
    """The sums times the row's factor; 0 where that is, whatever the sums are."""
    g = tl.load(raw + rows[:, None] * C_PAD + channels[None, :])
    return tl.where((factor == 0)[:, None], 0.0, g * factor[:, None])


@triton.jit(do_not_specialize=["n"])  # n = 1 would become a constant, which has no dtype
def project_kernel(
    raw,  # (B, N_PAD, C_PAD) float32: of sum_kernel, or of gradient_kernel where the keys are not split
    factor,  # (B, N_PAD) float32: of merge_kernel
    inverse_norm,  # (B, N_PAD) float64
    student,  # (B, C, H, W)
    gradient,  # (B, C, H, W) float32 out: g_i, that of s_i; normalised, (g_i - <g_i, s_i> s_i) / |student_i|
    n,
    n_pad,
    n_channels,
    width,
    s_stride_b,
    s_stride_c,
    s_stride_h,
    s_stride_w,
    g_stride_b,
    g_stride_c,
    g_stride_h,
    g_stride_w,
    C_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    blocks = n_pad // BLOCK_P
    b = (tl.program_id(0) // blocks).to(tl.int64)
    positions = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    rows = b * n_pad + positions
    offs_c = tl.arange(0, BLOCK_C)
    row_factor = tl.load(factor + rows)
    student += b * s_stride_b
    gradient += b * g_stride_b
    inverse = tl.load(inverse_norm + rows)
    along = tl.zeros((BLOCK_P,), tl.float32)
    if NORMALIZE:
        for start_c in range(0, C_PAD, BLOCK_C):
            x = load(student, positions, start_c + offs_c, n, n_channels, width, s_stride_c, s_stride_h, s_stride_w)
            g = _row_gradient(raw, rows, start_c + offs_c, row_factor, C_PAD)
            along += tl.sum(g * (x * inverse[:, None]).to(tl.float32), 1)
    # 1/|student| beyond the largest float32 would turn a gradient of 0 into NaN.
    scale = tl.minimum(inverse, 3.4028234663852886e38).to(tl.float32)
    for start_c in range(0, C_PAD, BLOCK_C):
        channels = start_c + offs_c
        g = _row_gradient(raw, rows, channels, row_factor, C_PAD)
        if NORMALIZE:
            x = load(student, positions, channels, n, n_channels, width, s_stride_c, s_stride_h, s_stride_w)
            g = (g - along[:, None] * (x * inverse[:, None]).to(tl.float32)) * scale[:, None]
            g = tl.where((row_factor == 0)[:, None], 0.0, g)
        store(gradient, g, positions, channels, n, n_channels, width, g_stride_c, g_stride_h, g_stride_w)
