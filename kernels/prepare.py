"""Kernels over single positions: the operands of the products before, the normalisation's Jacobian after.

Inputs and outputs may have any strides (given in elements, in the order batch, channel, row, column of the image);
position n is row n // width, column n % width. All arithmetic on them is in float64: it costs N*C, not N*N*C, and the
difference of two nearly equal unit vectors keeps its digits. Operands are (B, N_PAD, C_PAD), contiguous and zero in the
padding, so that the kernels over pairs need no mask.
"""

import math

import triton
import triton.language as tl

from dskd_fast.kernels.arithmetic import LN2, LOG2E, RADIUS, expm1_tail, to_operand

# Positions and channels of a block; channels of one of the centre's, whose positions are GROUP.
BLOCK_P = 32
BLOCK_C = 32
CENTRE_BLOCK_C = 64
# For every launch over positions: x/|x| - y/|y| must be exactly 0 for equal vectors, and a fused multiply-add would
# round one of the two only.
EXACT = {"enable_fp_fusion": False}

# The keys are centred with the mean over at most this many positions, GROUP of them per program.
SAMPLE = tl.constexpr(256)
GROUP = tl.constexpr(16)
GROUPS = tl.constexpr(16)

# fp16 operands: powers of two that bring unit vectors, and rows of differences and of weights, to the upper end of
# fp16's range.
FP16_SCALE = tl.constexpr(16384.0)
FP16_EXPONENT = tl.constexpr(14)

# Temperatures outside of these give NaN. A float32's rounding of the ends, 0.01 and 100, is inside.
LOWEST = tl.constexpr(0.00999999)
HIGHEST = tl.constexpr(100.0001)
NAN = tl.constexpr(math.nan)
# Below this temperature c is taken relative to its value for the row's own key, else relative to 0 (README.md).
OWN_SHIFT_BELOW = tl.constexpr(0.15)
# Below 1/FAR_BELOW a row's logits may leave float32's range (affinity.py).
FAR_BELOW = tl.constexpr(32)

# What the kernels over pairs read of the temperature, and how much of it there is: places in float32 scratch memory.
TEMPERATURE = tl.constexpr(0)
LOGIT_SCALE = tl.constexpr(1)  # 1 / (T log 2), less the scale of fp16 operands
IS_FAR = tl.constexpr(2)  # 1 where T < 1/FAR_BELOW, else 0
SCALARS = 3

# Stands for minus infinity in logits: its exp2 is 0, and 0 times it is 0 rather than NaN.
NEVER = tl.constexpr(-1e4)


@triton.jit
def _places(positions, channels, n, n_channels, width, stride_c, stride_h, stride_w):
    """Offsets (positions, channels) within one image, and which of them lie inside of it."""
    rows = positions.to(tl.int64)
    place = (rows // width) * stride_h + (rows % width) * stride_w
    inside = (positions < n)[:, None] & (channels < n_channels)[None, :]
    return place[:, None] + (channels.to(tl.int64) * stride_c)[None, :], inside


@triton.jit
def load(x, positions, channels, n, n_channels, width, stride_c, stride_h, stride_w):
    """(positions, channels) of one image, float64, 0 outside of it."""
    places, inside = _places(positions, channels, n, n_channels, width, stride_c, stride_h, stride_w)
    # In two steps, since Triton's interpreter knows no other way out of bfloat16.
    return tl.load(x + places, mask=inside, other=0).to(tl.float32).to(tl.float64)


@triton.jit
def store(x, values, positions, channels, n, n_channels, width, stride_c, stride_h, stride_w):
    """The reverse: writes (positions, channels) of one image, nothing outside of it."""
    places, inside = _places(positions, channels, n, n_channels, width, stride_c, stride_h, stride_w)
    tl.store(x + places, values, mask=inside)


@triton.jit
def squares_and_product(
    student, teacher, positions, n, n_channels, width, s_stride_c, s_stride_h, s_stride_w,
    t_stride_c, t_stride_h, t_stride_w, C_END, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """|student|^2, |teacher|^2 and <student, teacher> of each position, in one sweep over the channels below C_END."""
    ss = tl.zeros((BLOCK_P,), tl.float64)
    tt = tl.zeros((BLOCK_P,), tl.float64)
    st = tl.zeros((BLOCK_P,), tl.float64)
    offs_c = tl.arange(0, BLOCK_C)
    for start_c in range(0, C_END, BLOCK_C):
        x = load(student, positions, start_c + offs_c, n, n_channels, width, s_stride_c, s_stride_h, s_stride_w)
        y = load(teacher, positions, start_c + offs_c, n, n_channels, width, t_stride_c, t_stride_h, t_stride_w)
        ss += tl.sum(x * x, 1)
        tt += tl.sum(y * y, 1)
        st += tl.sum(x * y, 1)
    return ss, tt, st


@triton.jit
def inverse_root(squares):
    """1/|x| from |x|^2; 0 for a vector of zeros, which has no direction."""
    return tl.where(squares > 0, 1 / tl.sqrt(tl.where(squares > 0, squares, 1.0)), squares * 0)


@triton.jit
def sample(group, n):
    """A group's share (GROUP,) of at most SAMPLE of n positions, n where it has fewer; and how many all groups have."""
    samples = tl.minimum(n, SAMPLE)
    i = group * GROUP + tl.arange(0, GROUP)
    # One position in each of `samples` equal stretches of the image, at a place within it that changes from one to the
    # next so that no period of the image is hit. Every position, where there are no more than SAMPLE.
    within = tl.where(n > SAMPLE, (i * 40503) % 65536, 0).to(tl.int64)
    positions = (((i.to(tl.int64) * 65536 + within) * n) // (samples.to(tl.int64) * 65536)).to(tl.int32)
    return tl.where(i < samples, positions, n), samples


@triton.jit(do_not_specialize=["n"])  # n = 1 would become a constant, which has no dtype
def centre_kernel(
    teacher,  # (B, C, H, W)
    partial_mean,  # (B, GROUPS, C_PAD) float32: sums of unit teacher vectors over a group, / number of samples
    n,
    n_channels,
    width,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    positions, samples = sample(group, n)
    teacher += b * stride_b
    offs_c = tl.arange(0, BLOCK_C)
    squares = tl.zeros((GROUP,), tl.float64)
    for start_c in range(0, C_PAD, BLOCK_C):
        y = load(teacher, positions, start_c + offs_c, n, n_channels, width, stride_c, stride_h, stride_w)
        squares += tl.sum(y * y, 1)
    weight = inverse_root(squares) / samples
    partial_mean += (b * GROUPS + group) * C_PAD
    for start_c in range(0, C_PAD, BLOCK_C):
        y = load(teacher, positions, start_c + offs_c, n, n_channels, width, stride_c, stride_h, stride_w)
        tl.store(partial_mean + start_c + offs_c, tl.sum(y * weight[:, None], 0).to(tl.float32))


@triton.jit(do_not_specialize=["n"])  # n = 1 would become a constant, which has no dtype
def prepare_kernel(
    student,  # (B, C, H, W)
    teacher,  # (B, C, H, W)
    partial_mean,  # (B, GROUPS, C_PAD) float32
    keys,  # (B, N_PAD, C_PAD) out: t_j - mean, times FP16_SCALE for fp16
    delta,  # (B, N_PAD, C_PAD) out: s_i - t_i, times a power of two per row for fp16
    bias,  # (B, N_PAD) float32 out: <mean, k_j> / (T log 2), NEVER in the padding
    own_logit,  # (B, N_PAD) float32 out: <t_i, k_i> / (T log 2)
    c_shift,  # (B, N_PAD) float32 out: what is subtracted from <delta_i, k_j> / T to give c: its own value or 0
    c_scale,  # (B, N_PAD) float32 out: what a product of a row of delta with a key is multiplied by
    c_bound,  # (B, N_PAD) float32 out: no |c| is larger
    c_own,  # (B, N_PAD) float32 out: c of the row's own key
    inverse_norm,  # (B, N_PAD) float64 out: 1/|student_i|
    scalars,  # (SCALARS,) float32 out
    temperature,  # T, and what the host makes of it; IN_MEMORY a pointer to it, float64, and the others are not used
    inverse_temperature,
    logit_scale,
    is_far,
    n,
    n_pad,
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
    C_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    OWN_SHIFT: tl.constexpr,
):
    own_shift = OWN_SHIFT
    if IN_MEMORY:
        wide = tl.load(temperature)
        wide = tl.where((wide >= LOWEST) & (wide <= HIGHEST), wide, NAN)
        operand_scale: tl.constexpr = FP16_SCALE if PRECISION == "fp16" else 1.0
        temperature = wide.to(tl.float32)
        inverse_temperature = (1 / wide).to(tl.float32)
        # The constants in full: they would be float32.
        ln2, own_shift_below = tl.full((), LN2, tl.float64), tl.full((), OWN_SHIFT_BELOW, tl.float64)
        logit_scale = (1 / (wide * ln2 * (operand_scale * operand_scale))).to(tl.float32)
        is_far = tl.where(wide * FAR_BELOW < 1, 1.0, 0.0)
        own_shift = wide < own_shift_below
    if tl.program_id(0) == 0:
        tl.store(scalars + TEMPERATURE, temperature)
        tl.store(scalars + LOGIT_SCALE, logit_scale)
        tl.store(scalars + IS_FAR, is_far)
    blocks = n_pad // BLOCK_P
    b = (tl.program_id(0) // blocks).to(tl.int64)
    positions = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    student += b * s_stride_b
    teacher += b * t_stride_b
    partial_mean += b * GROUPS * C_PAD
    rows = b * n_pad + positions
    offs_c = tl.arange(0, BLOCK_C)
    groups = tl.arange(0, GROUPS)
    ss, tt, st = squares_and_product(
        student, teacher, positions, n, n_channels, width, s_stride_c, s_stride_h, s_stride_w,
        t_stride_c, t_stride_h, t_stride_w, C_PAD, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    s_inverse = inverse_root(ss)
    t_inverse = inverse_root(tt)
    if PRECISION == "fp16":
        # From |s|^2 + |t|^2 - 2<s, t>, which cancels; above its rounding error it is needed to within a factor only.
        size = (ss * s_inverse * s_inverse + tt * t_inverse * t_inverse - 2 * st * s_inverse * t_inverse).to(tl.float32)
        exponent = FP16_EXPONENT - 1 - tl.ceil(0.5 * tl.log2(tl.maximum(size, 1e-15)))
        scale = tl.exp2(exponent)
        key_scale = FP16_SCALE
    else:
        scale = tl.full((BLOCK_P,), 1.0, tl.float32)
        key_scale = 1.0
    kk = tl.zeros((BLOCK_P,), tl.float64)
    mk = tl.zeros((BLOCK_P,), tl.float64)
    dk = tl.zeros((BLOCK_P,), tl.float64)
    dd = tl.zeros((BLOCK_P,), tl.float64)
    is_position = positions < n
    for start_c in range(0, C_PAD, BLOCK_C):
        x = load(student, positions, start_c + offs_c, n, n_channels, width, s_stride_c, s_stride_h, s_stride_w)
        y = load(teacher, positions, start_c + offs_c, n, n_channels, width, t_stride_c, t_stride_h, t_stride_w)
        mean = tl.sum(tl.load(partial_mean + groups[:, None] * C_PAD + (start_c + offs_c)[None, :]).to(tl.float64), 0)
        t = y * t_inverse[:, None]
        k = tl.where(is_position[:, None], t - mean[None, :], 0.0)
        d = x * s_inverse[:, None] - t
        kk += tl.sum(k * k, 1)
        mk += tl.sum(k * mean[None, :], 1)
        dk += tl.sum(d * k, 1)
        dd += tl.sum(d * d, 1)
        place = rows[:, None] * C_PAD + (start_c + offs_c)[None, :]
        dtype = keys.dtype.element_ty
        tl.store(keys + place, to_operand(k * key_scale, dtype, PRECISION))
        tl.store(delta + place, to_operand(d * scale[:, None], dtype, PRECISION))
    tl.store(bias + rows, tl.where(is_position, (mk * inverse_temperature * LOG2E).to(tl.float32), NEVER))
    tl.store(own_logit + rows, tl.where(is_position, ((kk + mk) * inverse_temperature * LOG2E).to(tl.float32), -NEVER))
    own = (dk * inverse_temperature).to(tl.float32)
    tl.store(c_shift + rows, tl.where(own_shift, own, own * 0))
    tl.store(c_own + rows, tl.where(own_shift, own * 0, own))
    tl.store(c_scale + rows, inverse_temperature / (scale * key_scale))
    tl.store(c_bound + rows, (tl.sqrt(dd) * 2).to(tl.float32) * inverse_temperature)
    tl.store(inverse_norm + rows, s_inverse)


@triton.jit
def _unit_gradient(raw, keys, rows, channels, own_weight, shift, factor, C_PAD: tl.constexpr):
    place = rows[:, None] * C_PAD + channels[None, :]
    g = tl.load(raw + place) + own_weight[:, None] * tl.load(keys + place).to(tl.float32)
    # The shift first: the factor alone may be too small for float32 to carry both.
    return g * tl.exp2(-shift)[:, None] * factor[:, None]


@triton.jit(do_not_specialize=["n"])  # n = 1 would become a constant, which has no dtype
def project_kernel(
    raw,  # (B, N_PAD, C_PAD) float32: of gradient_kernel
    keys,  # (B, N_PAD, C_PAD)
    c_own,  # (B, N_PAD) float32
    u,  # (B, N_PAD) float32, as are the next three: of forward_kernel
    teacher_shift,
    student_shift,
    factor,
    inverse_norm,  # (B, N_PAD) float64
    student,  # (B, C, H, W)
    gradient,  # (B, C, H, W) float32 out: (g_i - <g_i, s_i> s_i) / |student_i|, with g_i that of the unit vector s_i
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
):
    blocks = n_pad // BLOCK_P
    b = (tl.program_id(0) // blocks).to(tl.int64)
    positions = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    rows = b * n_pad + positions
    offs_c = tl.arange(0, BLOCK_C)
    inverse = tl.load(inverse_norm + rows)
    shift = tl.load(teacher_shift + rows)
    row_factor = tl.load(factor + rows)
    # E = 1 for a row's own key; of a far row, the weight is the difference of two probabilities.
    own = tl.load(c_own + rows)
    small = tl.where(tl.abs(own) <= RADIUS, own, 0.0)
    expm1_own = tl.where(tl.abs(own) <= RADIUS, expm1_tail(small) + small, tl.exp2(own * LOG2E) - 1)
    own_weight = tl.exp2(tl.load(student_shift + rows)) - tl.exp2(shift)
    own_weight += tl.exp2(shift) * (expm1_own - tl.load(u + rows))
    student += b * s_stride_b
    along = tl.zeros((BLOCK_P,), tl.float32)
    for start_c in range(0, C_PAD, BLOCK_C):
        x = load(student, positions, start_c + offs_c, n, n_channels, width, s_stride_c, s_stride_h, s_stride_w)
        g = _unit_gradient(raw, keys, rows, start_c + offs_c, own_weight, shift, row_factor, C_PAD)
        along += tl.sum(g * (x * inverse[:, None]).to(tl.float32), 1)
    # 1/|student| beyond the largest float32 would turn a gradient of 0 into NaN.
    scale = tl.minimum(inverse, 3.4028234663852886e38).to(tl.float32)
    gradient += b * g_stride_b
    for start_c in range(0, C_PAD, BLOCK_C):
        channels = start_c + offs_c
        x = load(student, positions, channels, n, n_channels, width, s_stride_c, s_stride_h, s_stride_w)
        g = _unit_gradient(raw, keys, rows, channels, own_weight, shift, row_factor, C_PAD)
        g = (g - along[:, None] * (x * inverse[:, None]).to(tl.float32)) * scale[:, None]
        store(gradient, g, positions, channels, n, n_channels, width, g_stride_c, g_stride_h, g_stride_w)
