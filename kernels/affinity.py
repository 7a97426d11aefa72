"""Kernels over pairs of positions: the KL map, and its gradient with respect to the unit student vectors.

Index i is a row (a position whose KL is wanted), j a key. With k the centred unit teacher vectors, delta = s - t, and
everything relative to the row's own key j = i:

    a[i, j] = <t_i, k_j - k_i> / (T log 2)      teacher's logit, so that exp2 needs no multiplication
    c[i, j] = <delta_i, k_j> / T - shift_i      what the student adds to it; shift_i is <delta_i, k_i> / T or 0
    E = exp2(a),  Z = sum_j E,  u = sum_j E expm1(c) / Z,  v = sum_j E (expm1(c) - c) / Z
    KL_i = T^2 (log1p(u) - u + v)               gradient: (T/Z) sum_j E (expm1(c) - u)/(1 + u) k_j

A row's own key, with E = 1, is left out of the tiles and added exactly afterwards.

Each kernel comes in three kinds. NEAR serves the blocks of rows in which no |c| can exceed RADIUS, and needs no
exponential but the teacher's; the others serve the rest, WITH_FAR where T is so low that logits may leave float32's
range. All that may be needed are launched over all blocks and each leaves the others' alone: which rows are near is
known on the device only, as T may be, and reading it back would stall the queue.
"""

import triton
import triton.language as tl

from dskd_fast.kernels.arithmetic import LN2, LOG2E, RADIUS, expm1_tail, log1p_tail, to_operand
from dskd_fast.kernels.prepare import FP16_EXPONENT, FP16_SCALE, IS_FAR, LOGIT_SCALE, NEVER, TEMPERATURE

# The student's logits c + a reach 2/T. Up to FAR their exponentials, and sums of 2^17 of them, are in float32's range;
# they cannot exceed it unless T < 1/FAR_BELOW (prepare.py). There a second sum is kept, lowered by FAR_SHIFT, in which
# everything from FAR to 2/T = 289 (T = 0.01) is in range. All in units of log 2.
FAR = tl.constexpr(95.0)
FAR_SHIFT = tl.constexpr(190.0)


@triton.jit
def products(
    row_queries, row_delta, queries, delta, keys, offs_i, offs_j,
    BLOCK_C: tl.constexpr, C_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<query_i, k_j> and <delta_i, k_j> (rows, keys), and the keys if one block holds all their channels.

    It then has the rows' operands, too; else pieces of them are read again.
    """
    a = tl.zeros((offs_i.shape[0], offs_j.shape[0]), tl.float32)
    c = tl.zeros((offs_i.shape[0], offs_j.shape[0]), tl.float32)
    offs_c = tl.arange(0, BLOCK_C)
    input_precision: tl.constexpr = "tf32" if PRECISION == "tf32" else "ieee"
    k = row_queries
    if C_PAD == BLOCK_C:
        k = tl.load(keys + offs_j[:, None] * C_PAD + offs_c[None, :])
        a = tl.dot(row_queries, tl.trans(k), a, input_precision=input_precision)
        c = tl.dot(row_delta, tl.trans(k), c, input_precision=input_precision)
    else:
        for start_c in range(0, C_PAD, BLOCK_C):
            channels = (start_c + offs_c)[None, :]
            part = tl.trans(tl.load(keys + offs_j[:, None] * C_PAD + channels))
            a = tl.dot(tl.load(queries + offs_i[:, None] * C_PAD + channels), part, a, input_precision=input_precision)
            c = tl.dot(tl.load(delta + offs_i[:, None] * C_PAD + channels), part, c, input_precision=input_precision)
    return a, c, k


@triton.jit
def _tile(
    row_keys, row_delta, keys, delta, row_constant, c_shift, c_scale, bias, logit_scale, start_i, start_j,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, C_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a and c (BLOCK_M, BLOCK_N), and the tile's keys if one block holds all their channels."""
    offs_i = start_i + tl.arange(0, BLOCK_M)
    offs_j = start_j + tl.arange(0, BLOCK_N)
    a, c, k = products(row_keys, row_delta, keys, delta, keys, offs_i, offs_j, BLOCK_C, C_PAD, PRECISION)
    a = a * logit_scale + (tl.load(bias + offs_j)[None, :] - row_constant[:, None])
    c = c * c_scale[:, None] - c_shift[:, None]
    if (start_j < start_i + BLOCK_M) & (start_i < start_j + BLOCK_N):
        a = tl.where(offs_i[:, None] == offs_j[None, :], NEVER, a)
    return a, c, k


@triton.jit(do_not_specialize=["n"])  # n = 1 would become a constant, which has no dtype
def forward_kernel(
    keys,  # (B, N_PAD, C_PAD)
    delta,  # (B, N_PAD, C_PAD)
    bias,  # (B, N_PAD) float32, as are the next five
    own_logit,
    c_shift,
    c_scale,
    c_bound,
    c_own,
    kl,  # (B, N) float32 out
    u_out,  # (B, N_PAD) float32 out, as are the next three: what the gradient needs of a row
    teacher_shift,
    student_shift,
    factor,
    scalars,  # of prepare_kernel, as for the gradient
    n,
    n_pad,
    C_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    NEAR: tl.constexpr,
    WITH_FAR: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    blocks = n_pad // BLOCK_M
    b = (tl.program_id(0) // blocks).to(tl.int64)
    start_i = (tl.program_id(0) % blocks) * BLOCK_M
    offs_i = start_i + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    rows = b * n_pad + offs_i
    # A block of NaN alone is near: where all others must be, nothing else would write its results.
    is_near = (tl.max(tl.load(c_bound + rows), 0) > RADIUS) == 0
    if is_near != NEAR:
        return
    if not NEAR and (tl.load(scalars + IS_FAR) > 0) != WITH_FAR:
        return
    keys += b * n_pad * C_PAD
    delta += b * n_pad * C_PAD
    bias += b * n_pad
    temperature = tl.load(scalars + TEMPERATURE)
    logit_scale = tl.load(scalars + LOGIT_SCALE)
    row_constant = tl.load(own_logit + rows)
    row_c_shift = tl.load(c_shift + rows)
    row_c_scale = tl.load(c_scale + rows)
    row_keys = tl.load(keys + offs_i[:, None] * C_PAD + offs_c[None, :])
    row_delta = tl.load(delta + offs_i[:, None] * C_PAD + offs_c[None, :])
    z = tl.zeros((BLOCK_M,), tl.float32)
    first = tl.zeros((BLOCK_M,), tl.float32)
    tail = tl.zeros((BLOCK_M,), tl.float32)
    z_student = tl.zeros((BLOCK_M,), tl.float32)
    z_far = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.zeros((BLOCK_M,), tl.float32)
    SCALE_WEIGHTS: tl.constexpr = WITH_GRADIENT and PRECISION == "fp16"
    for start_j in range(0, n_pad, BLOCK_N):
        a, c, _ = _tile(
            row_keys, row_delta, keys, delta, row_constant, row_c_shift, row_c_scale, bias, logit_scale,
            start_i, start_j, BLOCK_M, BLOCK_N, BLOCK_C, C_PAD, PRECISION,
        )  # fmt: skip
        e = tl.exp2(a)
        z += tl.sum(e, 1)
        first += tl.sum(e * c, 1)
        term = e * expm1_tail(c)
        if not NEAR:
            logit = a + c * LOG2E
            x = tl.exp2(tl.minimum(logit, FAR)) if WITH_FAR else tl.exp2(logit)
            term = tl.where(tl.abs(c) <= RADIUS, term, x - e * (1 + c))
            z_student += tl.sum(x, 1)
            if WITH_FAR:
                z_far += tl.sum(tl.exp2(logit - FAR_SHIFT), 1)
        tail += tl.sum(term, 1)
        if SCALE_WEIGHTS:
            largest = tl.maximum(largest, tl.max(tl.abs(term + e * c), 1))
    others = z
    own = tl.load(c_own + rows)
    own_tail = expm1_tail(own)
    if not NEAR:
        own_x = tl.exp2(own * LOG2E)
        own_tail = tl.where(tl.abs(own) <= RADIUS, own_tail, own_x - 1 - own)
        z_student += own_x
        if WITH_FAR:
            z_far += tl.exp2(own * LOG2E - FAR_SHIFT)
    z += 1
    first += own
    tail += own_tail
    v = tail / z
    u = v + first / z
    # Where the difference log1p(u) - u cancels it is summed as a series, elsewhere taken in float64; and where most of
    # the student's weight has left the row's own key, 1 + u has lost its digits.
    wide = z.to(tl.float64)
    mean = first.to(tl.float64) / wide
    ratio = 1 + (tail.to(tl.float64) / wide + mean)
    if not NEAR:
        ratio = tl.where(u > -0.5, ratio, z_student.to(tl.float64) / wide)
    divergence = tl.where(tl.abs(u) <= 0.0625, v - log1p_tail(u), (tl.log(ratio) - mean).to(tl.float32))
    if WITH_FAR and not NEAR:
        is_far = z_far >= 2.0 ** (95 - 190)
        log_student = tl.log2(z_far) + FAR_SHIFT
        divergence = tl.where(is_far, (log_student - tl.log2(z)) * LN2 - first / z, divergence)
    # Rounding may bring v below log1p_tail(u). T^2 as one factor would underflow with the smallest.
    divergence = tl.where(divergence < 0, 0.0, divergence)
    tl.store(kl + b * n + offs_i, divergence * temperature * temperature, mask=offs_i < n)
    if WITH_GRADIENT:
        teacher_exponent = z * 0
        key_scale = 1.0
        top = 0
        if SCALE_WEIGHTS:
            # No |E (expm1(c) - u)| of the row is larger than this, nor are all smaller than a fraction 1/(2N) of it.
            largest += tl.abs(u) * tl.minimum(others, 1.0)
            teacher_exponent = FP16_EXPONENT - tl.ceil(tl.log2(tl.maximum(largest, 1e-30)))
            key_scale = FP16_SCALE
            top = FP16_EXPONENT
        student_exponent = teacher_exponent
        share = (1 / (wide * ratio)).to(tl.float32)
        if WITH_FAR and not NEAR:
            # A far row's weights are the difference of two probabilities: 2^(a - log2 z), and likewise the student's.
            teacher_exponent = tl.where(is_far, top - tl.log2(z), teacher_exponent)
            student_exponent = tl.where(is_far, top - log_student, student_exponent)
            share = tl.where(is_far, 1 / z, share)
            u = tl.where(is_far, 0.0, u)
        tl.store(u_out + rows, u)
        tl.store(teacher_shift + rows, teacher_exponent)
        tl.store(student_shift + rows, student_exponent)
        tl.store(factor + rows, share * temperature / key_scale)


@triton.jit
def gradient_kernel(
    keys,  # (B, N_PAD, C_PAD)
    delta,  # (B, N_PAD, C_PAD)
    bias,  # (B, N_PAD) float32, as are the next seven
    own_logit,
    c_shift,
    c_scale,
    c_bound,
    u_in,
    teacher_shift,
    student_shift,
    raw,  # (B, N_PAD, C_PAD) float32 out: sum over the other positions j of 2^shift E (expm1(c) - u) k_j
    scalars,  # of prepare_kernel
    n_pad,
    C_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    NEAR: tl.constexpr,
    WITH_FAR: tl.constexpr,
):
    blocks = n_pad // BLOCK_M
    b = (tl.program_id(0) // blocks).to(tl.int64)
    start_i = (tl.program_id(0) % blocks) * BLOCK_M
    offs_i = start_i + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    chunk = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    rows = b * n_pad + offs_i
    # A block of NaN alone is near: where all others must be, nothing else would write its results.
    is_near = (tl.max(tl.load(c_bound + rows), 0) > RADIUS) == 0
    if is_near != NEAR:
        return
    if not NEAR and (tl.load(scalars + IS_FAR) > 0) != WITH_FAR:
        return
    keys += b * n_pad * C_PAD
    delta += b * n_pad * C_PAD
    bias += b * n_pad
    row_shift = tl.load(teacher_shift + rows)
    row_constant = tl.load(own_logit + rows) - row_shift
    row_c_shift = tl.load(c_shift + rows)
    row_c_scale = tl.load(c_scale + rows)
    u = tl.load(u_in + rows)
    relative_shift = u
    if WITH_FAR:
        relative_shift = tl.load(student_shift + rows) - row_shift
    row_keys = tl.load(keys + offs_i[:, None] * C_PAD + offs_c[None, :])
    row_delta = tl.load(delta + offs_i[:, None] * C_PAD + offs_c[None, :])
    input_precision: tl.constexpr = "tf32" if PRECISION == "tf32" else "ieee"
    logit_scale = tl.load(scalars + LOGIT_SCALE)
    g = tl.zeros((BLOCK_M, CHUNK), tl.float32)
    for start_j in range(0, n_pad, BLOCK_N):
        a, c, k = _tile(
            row_keys, row_delta, keys, delta, row_constant, row_c_shift, row_c_scale, bias, logit_scale,
            start_i, start_j, BLOCK_M, BLOCK_N, BLOCK_C, C_PAD, PRECISION,
        )  # fmt: skip
        e = tl.exp2(a)
        weight = e * (expm1_tail(c) + (c - u[:, None]))
        if not NEAR:
            logit = a + c * LOG2E
            is_close = tl.abs(c) <= RADIUS
            if WITH_FAR:
                logit += relative_shift[:, None]
                is_close = is_close & (relative_shift == 0)[:, None]
            weight = tl.where(is_close, weight, tl.exp2(logit) - e * (1 + u[:, None]))
        if C_PAD != BLOCK_C or C_PAD != CHUNK:
            offs_j = start_j + tl.arange(0, BLOCK_N)
            k = tl.load(keys + offs_j[:, None] * C_PAD + chunk[None, :])
        g = tl.dot(to_operand(weight, k.dtype, PRECISION), k, g, input_precision=input_precision)
    tl.store(raw + rows[:, None] * C_PAD + chunk[None, :], g)
