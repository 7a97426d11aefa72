"""Kernels over pairs of a row and a key, where any vectors are the keys: the KL map, and its gradient.

With k_j a centred key, t_i the row's teacher vector and delta_i = s_i / T_s - t_i / T_t, each to a constant of its row,

    a[i, j] = <t_i, k_j> / (T_t log 2)      teacher's logit, in units of log 2
    c[i, j] = <delta_i, k_j>                what the student adds to it
    b[i, j] = a + c / log 2                 the student's logit

No key is known to be near the row, so each row keeps running maxima m of a and m_s of b, and a running mean h of c
under the teacher's weights E = 2^(a - m). With x = c - h, and f = 2^(m + h / log 2 - m_s), by which f E exp(x) is
2^(b - m_s),

    Z = sum_j E,  S = sum_j E x (about 0),  V = f sum_j E (expm1(x) - x),  f u = (V + f S) / Z
    KL_i = log1p(u) - u + V / (f Z)         gradient: 1 / (T_s Z_s) sum_j f E (expm1(x) - u) k_j,  Z_s = f Z (1 + u)

V is kept relative to the student's largest term, not the teacher's: it is at most K whatever the temperatures. All its
terms are positive; what leaves float32's range is f alone, downwards, where u, and with it the KL, is large.

A masked key's logit is NEVER, finite, as are then all sums of a row that has seen none but such keys; the first key
that takes part multiplies them by 0.

The keys are split among programs, each of which leaves what it has seen of a row; `merge_kernel` puts them together.
"""

import triton
import triton.language as tl

from dskd_fast.kernels.affinity import products
from dskd_fast.kernels.arithmetic import LN2, LOG2E, RADIUS, expm1_tail, log1p_tail, to_operand
from dskd_fast.kernels.prepare import FP16_EXPONENT
from dskd_fast.kernels.prepare_distillation import NEVER

# Rows and splits of a block of merge_kernel.
MERGE_BLOCK = 32, 16
# What a split leaves of a row, and what the gradient needs of it: places along the first dimension of scratch memory.
PARTIAL = 6  # m, h, Z, S, V, m_s
FINAL = 6  # m, h, m_s less the weights' exponent, and with that exponent f, f u, Z_s / Z
# Above this u the KL comes from the logarithms of its parts.
FAR = tl.constexpr(32768.0)


@triton.jit
def _tile(
    row_queries, row_delta, queries, delta, keys, bias, a_scale, c_scale, offs_i, start_j,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, C_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a and c (BLOCK_M, BLOCK_N), the tile's keys if one block holds all their channels, and where they lie."""
    offs_j = tl.arange(0, BLOCK_N)
    tile = keys + tl.cast(start_j, tl.int64) * C_PAD
    a, c, k = products(row_queries, row_delta, queries, delta, tile, offs_i, offs_j, BLOCK_C, C_PAD, PRECISION)
    a = a * a_scale[:, None] + tl.load(bias + start_j + offs_j)[None, :]
    if PRECISION == "fp16":  # of the others it is 1
        c = c * c_scale[:, None]
    return a, c, k, tile


@triton.jit
def _rebase(z, s, v, m, h, m_s, m_new, h_new, m_s_new):
    """S and V of a row's sums about new maxima and a new mean; and f, 2^(m - m_new)."""
    d = h - h_new
    alpha = tl.exp2(m - m_new)
    f = tl.exp2(m_new + h_new * LOG2E - m_s_new)
    common = alpha * f
    is_close = tl.abs(d) <= RADIUS
    # f alpha exp(d) as one exponent: its factors may leave float32's range where their product does not.
    tail = tl.where(is_close, common * expm1_tail(d), tl.exp2(m + h * LOG2E - m_s_new) - common * (1 + d))
    v = v * tl.exp2(m_s - m_s_new) + tail * z + (tail + common * d) * s
    return alpha * (s + d * z), v, f, alpha


@triton.jit
def forward_kernel(
    queries,  # (B, N_PAD, C_PAD)
    delta,  # (B, N_PAD, C_PAD)
    keys,  # (B', K_PAD, C_PAD)
    bias,  # (B'', K_PAD) float32: 0, of keys that take no part NEVER
    is_row,  # (B, N_PAD) int8: 1 for rows that take part
    a_scale,  # (B, N_PAD) float32
    c_scale,  # (B, N_PAD) float32
    partial,  # (PARTIAL, splits, B, N_PAD) float32 out
    n_pad,
    k_pad,
    split_keys,  # keys of a split
    images,  # B
    key_stride_b,  # rows from one image's keys to the next one's, 0 where all share them; likewise of bias
    bias_stride_b,
    C_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = n_pad // BLOCK_M
    b = (tl.program_id(0) // blocks).to(tl.int64)
    split = tl.program_id(1)
    offs_i = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    rows = b * n_pad + offs_i
    if tl.max(tl.load(is_row + rows).to(tl.int32), 0) == 0:
        return
    queries += b * n_pad * C_PAD
    delta += b * n_pad * C_PAD
    keys += b * key_stride_b * C_PAD
    bias += b * bias_stride_b
    row_a_scale = tl.load(a_scale + rows)
    row_c_scale = tl.load(c_scale + rows)
    row_queries = tl.load(queries + offs_i[:, None] * C_PAD + offs_c[None, :])
    row_delta = tl.load(delta + offs_i[:, None] * C_PAD + offs_c[None, :])
    z = tl.zeros((BLOCK_M,), tl.float32)
    h = tl.zeros((BLOCK_M,), tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    v = tl.zeros((BLOCK_M,), tl.float32)
    m = tl.full((BLOCK_M,), NEVER, tl.float32)
    m_s = tl.full((BLOCK_M,), NEVER, tl.float32)
    for start_j in range(split * split_keys, tl.minimum((split + 1) * split_keys, k_pad), BLOCK_N):
        a, c, _, _ = _tile(
            row_queries, row_delta, queries, delta, keys, bias, row_a_scale, row_c_scale, offs_i, start_j,
            BLOCK_N, BLOCK_C, C_PAD, PRECISION,
        )  # fmt: skip
        logit = a + c * LOG2E
        m_new = tl.maximum(m, tl.max(a, 1))
        m_s_new = tl.maximum(m_s, tl.max(logit, 1))
        e = tl.exp2(a - m_new[:, None])
        z_tile = tl.sum(e, 1)
        alpha = tl.exp2(m - m_new)
        z_new = alpha * z + z_tile
        # In two steps, so that of a row with one large E h is that key's c to the last bit: its x^2 would be all of V.
        share = 1 / z_new
        h_new = h + (tl.sum(e * c, 1) - h * z_tile + alpha * s) * share
        h_new += (tl.sum(e * (c - h_new[:, None]), 1) + alpha * (s + (h - h_new) * z)) * share
        s, v, f, alpha = _rebase(z, s, v, m, h, m_s, m_new, h_new, m_s_new)
        x = c - h_new[:, None]
        s += tl.sum(e * x, 1)
        e *= f[:, None]
        far = tl.exp2(logit - m_s_new[:, None]) - e * (1 + x)
        v += tl.sum(tl.where(tl.abs(x) <= RADIUS, e * expm1_tail(x), far), 1)
        z, h, m, m_s = z_new, h_new, m_new, m_s_new
    stride = tl.full((), n_pad, tl.int64) * images * tl.num_programs(1)
    partial += (split.to(tl.int64) * images + b) * n_pad + offs_i
    tl.store(partial, m)
    tl.store(partial + stride, h)
    tl.store(partial + 2 * stride, z)
    tl.store(partial + 3 * stride, s)
    tl.store(partial + 4 * stride, v)
    tl.store(partial + 5 * stride, m_s)


@triton.jit
def _load_partial(partial, rows, split, splits, stride):
    """m, h, Z, S, V and m_s (splits, rows), of splits that there are not those of one without keys."""
    here = (split < splits)[:, None]
    places = partial + split.to(tl.int64)[:, None] * stride + rows[None, :]
    stride *= splits
    m = tl.load(places, mask=here, other=NEVER)
    h = tl.load(places + stride, mask=here, other=0)
    z = tl.load(places + 2 * stride, mask=here, other=0)
    s = tl.load(places + 3 * stride, mask=here, other=0)
    v = tl.load(places + 4 * stride, mask=here, other=0)
    m_s = tl.load(places + 5 * stride, mask=here, other=NEVER)
    return m, h, z, s, v, m_s


@triton.jit(do_not_specialize=["n", "splits"])  # 1 would become a constant, which has no dtype
def merge_kernel(
    partial,  # (PARTIAL, splits, B, N_PAD) float32: of forward_kernel
    is_row,  # (B, N_PAD) int8
    key_scale,  # (B',) float32
    student_temperature,  # float64 pointer
    kl,  # (B, N) float32 out
    final,  # (FINAL, B, N_PAD) float32 out
    factor,  # (B, N_PAD) float32 out: what the gradient's sums are multiplied by, 0 for rows that take no part
    n,
    n_pad,
    splits,
    images,  # B
    key_stride_b,  # of key_scale
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = n_pad // BLOCK_M
    b = (tl.program_id(0) // blocks).to(tl.int64)
    offs_i = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_s = tl.arange(0, BLOCK_S)
    rows = b * n_pad + offs_i
    stride = tl.full((), n_pad, tl.int64) * images
    m = tl.full((BLOCK_M,), NEVER, tl.float32)
    m_s = tl.full((BLOCK_M,), NEVER, tl.float32)
    h_top = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        m_part, h_part, _, _, _, m_s_part = _load_partial(partial, rows, start + offs_s, splits, stride)
        m_block = tl.max(m_part, 0)
        h_block = tl.max(tl.where(m_part == m_block[None, :], h_part, NEVER), 0)
        h_top = tl.where(m_block > m, h_block, h_top)
        m = tl.maximum(m, m_block)
        m_s = tl.maximum(m_s, tl.max(m_s_part, 0))
    z = tl.zeros((BLOCK_M,), tl.float32)
    first = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        m_part, h_part, z_part, s_part, _, _ = _load_partial(partial, rows, start + offs_s, splits, stride)
        alpha = tl.exp2(m_part - m[None, :])
        z += tl.sum(alpha * z_part, 0)
        first += tl.sum(alpha * (z_part * (h_part - h_top[None, :]) + s_part), 0)
    # About the mean of the split with the largest E: of a row with one large E, h is then that key's c to the last bit.
    h = h_top + first / z
    s = tl.zeros((BLOCK_M,), tl.float32)
    v = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        m_part, h_part, z_part, s_part, v_part, m_s_part = _load_partial(
            partial, rows, start + offs_s, splits, stride
        )  # fmt: skip
        s_part, v_part, _, _ = _rebase(
            z_part, s_part, v_part, m_part, h_part, m_s_part, m[None, :], h[None, :], m_s[None, :]
        )  # fmt: skip
        s += tl.sum(s_part, 0)
        v += tl.sum(v_part, 0)
    f = tl.exp2(m + h * LOG2E - m_s)
    fu = (v + f * s) / z
    student_z = fu + f  # Z_s / Z
    wide = f.to(tl.float64)
    u = tl.where(f > 0, fu / wide, fu.to(tl.float64) * float("inf"))
    mean = s.to(tl.float64) / z
    # Where log1p(u) - u cancels it is summed as a series; where u is large, f has few digits left, or none.
    near = v / wide / z - log1p_tail(u.to(tl.float32))
    distance = (m_s.to(tl.float64) - m - h.to(tl.float64) * LOG2E) * LN2
    divergence = tl.where(u <= FAR, tl.log(1 + u), tl.log(student_z.to(tl.float64)) + distance) - mean
    divergence = tl.where(tl.abs(u) <= 0.0625, near, divergence).to(tl.float32)
    # Rounding may bring V below log1p_tail(u).
    divergence = tl.where(divergence < 0, 0.0, divergence)
    # A row of NaN has no maximum either.
    takes_part = (tl.load(is_row + rows) != 0) & ((m > NEVER / 2) | (z != z))
    tl.store(kl + b * n + offs_i, tl.where(takes_part, divergence, 0.0), mask=offs_i < n)
    exponent = z * 0
    if PRECISION == "fp16":
        # No |f E (expm1(x) - u)| of the row is larger: expm1(x)^2 is at most 4.2 (expm1(x) - x) for |x| <= 1.
        largest = tl.maximum(2.1 * tl.sqrt(f * v) + 3.4 * v, 1e-24)
        exponent = FP16_EXPONENT - tl.ceil(tl.log2(largest))
    final += rows
    scale = tl.exp2(exponent)
    tl.store(final, m)
    tl.store(final + stride, h)
    tl.store(final + 2 * stride, m_s - exponent)
    tl.store(final + 3 * stride, f * scale)
    tl.store(final + 4 * stride, fu * scale)
    tl.store(final + 5 * stride, student_z * scale)
    temperature = tl.load(student_temperature)
    k_scale = tl.load(key_scale + b * key_stride_b)
    share = 1 / (temperature * student_z * z * scale * k_scale)
    tl.store(factor + rows, tl.where(takes_part, share.to(tl.float32), 0.0))


@triton.jit
def gradient_kernel(
    queries,  # (B, N_PAD, C_PAD)
    delta,  # (B, N_PAD, C_PAD)
    keys,  # (B', K_PAD, C_PAD)
    bias,  # (B'', K_PAD) float32
    is_row,  # (B, N_PAD) int8
    a_scale,  # (B, N_PAD) float32
    c_scale,  # (B, N_PAD) float32
    final,  # (FINAL, B, N_PAD) float32: of merge_kernel
    raw,  # (splits, B, N_PAD, C_PAD) float32 out: sum over the split's keys of f E (expm1(x) - u) k_j
    n_pad,
    k_pad,
    split_keys,
    images,
    key_stride_b,
    bias_stride_b,
    C_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = n_pad // BLOCK_M
    b = (tl.program_id(0) // blocks).to(tl.int64)
    split = tl.program_id(1)
    chunk = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    offs_i = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    rows = b * n_pad + offs_i
    if tl.max(tl.load(is_row + rows).to(tl.int32), 0) == 0:
        return
    queries += b * n_pad * C_PAD
    delta += b * n_pad * C_PAD
    keys += b * key_stride_b * C_PAD
    bias += b * bias_stride_b
    row_a_scale = tl.load(a_scale + rows)
    row_c_scale = tl.load(c_scale + rows)
    stride = tl.full((), n_pad, tl.int64) * images
    final += rows
    m = tl.load(final)
    h = tl.load(final + stride)
    m_s = tl.load(final + 2 * stride)
    f = tl.load(final + 3 * stride)
    fu = tl.load(final + 4 * stride)
    student_z = tl.load(final + 5 * stride)
    row_queries = tl.load(queries + offs_i[:, None] * C_PAD + offs_c[None, :])
    row_delta = tl.load(delta + offs_i[:, None] * C_PAD + offs_c[None, :])
    input_precision: tl.constexpr = "tf32" if PRECISION == "tf32" else "ieee"
    g = tl.zeros((BLOCK_M, CHUNK), tl.float32)
    for start_j in range(split * split_keys, tl.minimum((split + 1) * split_keys, k_pad), BLOCK_N):
        a, c, k, tile = _tile(
            row_queries, row_delta, queries, delta, keys, bias, row_a_scale, row_c_scale, offs_i, start_j,
            BLOCK_N, BLOCK_C, C_PAD, PRECISION,
        )  # fmt: skip
        e = tl.exp2(a - m[:, None])
        far = tl.exp2(a + c * LOG2E - m_s[:, None]) - e * student_z[:, None]
        # x has the bits of the forward kernel: of a row with one large E, S is what the rounding of its x has left out.
        x = c - h[:, None]
        weight = tl.where(tl.abs(x) <= RADIUS, e * (f[:, None] * (expm1_tail(x) + x) - fu[:, None]), far)
        if C_PAD != BLOCK_C or C_PAD != CHUNK:
            k = tl.load(tile + tl.arange(0, BLOCK_N)[:, None] * C_PAD + chunk[None, :])
        g = tl.dot(to_operand(weight, k.dtype, PRECISION), k, g, input_precision=input_precision)
    raw += (split.to(tl.int64) * images * n_pad + rows)[:, None] * C_PAD
    tl.store(raw + chunk[None, :], g)
