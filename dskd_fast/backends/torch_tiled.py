"""The "torch" backend: the difference form in plain PyTorch, a slab of rows at a time, on any device.

What is computed, per position i with unit vectors s_i and t_i, centred keys k_j = t_j - mean_j t_j and m = 1/T:

    a_ij = <t_i, k_j> m        d_ij = <s_i - t_i, k_j> m        E = exp(a - a_ii)
    Z = sum_j E                u = sum_j E expm1(d) / Z         v = sum_j E (expm1(d) - d) / Z
    KL_i = T^2 (log1p(u) - u + v)                               dKL_i/ds_i = T sum_j (p_s - p_t)_ij k_j

Equal to the textbook form (a softmax row ignores a constant, so the keys may be centred), but every term is of the
KL's own order, where the textbook subtracts two log-sum-exps that agree in all their digits. A slab holds whole rows,
so one visit yields both the KL and its gradient, with three products instead of the five of a recomputing backward.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# On a CPU a slab's working set should stay in the second-level cache; on a GPU it should fill the device.
_SLAB_ELEMENTS = {"cpu": 1 << 18}
_SLAB_ELEMENTS_ELSEWHERE = 1 << 23

# |d| up to which expm1(d) - d is summed as a series.
_SERIES_RADIUS = 1.0
# Below this temperature a row's softmax is all but one-hot at j = i. The KL then comes from the other, tiny weights,
# and d_ii is subtracted from the row (a constant, which a softmax ignores), so that the large weight adds exactly 0.
_PEAKED_TEMPERATURE = 0.1
# |d| from which a row is evaluated through its own log-sum-exp: exp(d) may overflow, and nothing cancels there.
_DIFFERENCE_LIMIT = 30.0


def contextual_affinity(
    student: Tensor, teacher: Tensor, temperature: float, precision: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """KL map and, if wanted, its gradient with respect to the raw student features.

    Args:
        student, teacher: (B, N, C), floating, any strides, one device.
        temperature: T.
        precision: rounding of the matrix operands: "ieee", "tf32", "bf16" or "fp16". Accumulation is in float32, or in
            float64 for "ieee" with a float64 input.
        with_gradient: whether to compute the gradient too.

    Returns:
        KL (B, N) and dKL_i/dstudent_i (B, N, C, strides of `student`) or None, both in the accumulation dtype.
    """
    batch, n, _ = student.shape
    dtype = accumulation_dtype(student, teacher, precision)
    kl = torch.empty((batch, n), dtype=dtype, device=student.device)
    gradient = torch.empty_like(student, dtype=dtype) if with_gradient else None
    if kl.numel() == 0:
        return kl, gradient
    slab = _SLAB_ELEMENTS.get(student.device.type, _SLAB_ELEMENTS_ELSEWHERE)
    images = max(1, slab // (n * n))
    rows = n if images > 1 else max(1, min(n, slab // n))
    product = _Product(precision, dtype, student.device)
    with product.flags():
        for b in range(0, batch, images):
            part = slice(b, b + images)
            s, t, delta, inverse_norm = directions(student[part], teacher[part])
            keys = t - t.mean(dim=1, keepdim=True)
            # float64 up to here, where it costs N*C; the N*N work below is in `dtype`.
            shift = (t * keys).sum(-1).to(dtype)
            s, t, delta, keys, inverse_norm = (x.to(dtype) for x in (s, t, delta, keys, inverse_norm))
            right = product.operand(keys, scale_dims=(1, 2))
            for r in range(0, n, rows):
                row = slice(r, r + rows)
                a = product(product.operand(t[:, row], (2,)), right, transpose=True).div_(temperature)
                a.sub_(shift[:, row, None] / temperature)
                d = product(product.operand(delta[:, row], (2,)), right, transpose=True).div_(temperature)
                if temperature < _PEAKED_TEMPERATURE:
                    d.sub_(d.diagonal(offset=r, dim1=1, dim2=2).unsqueeze(-1).clone())
                row_kl, weight = _rows(a, d, with_gradient)
                kl[part, row] = row_kl.mul_(temperature**2)
                if gradient is not None:
                    g = product(product.operand(weight, (2,)), right).mul_(temperature)
                    unit = s[:, row]
                    g -= (g * unit).sum(-1, keepdim=True) * unit
                    gradient[part, row] = g.mul_(inverse_norm[:, row, None])
    return kl, gradient


def cosine_distance(student: Tensor, teacher: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Cosine distance map and, if wanted, its gradient with respect to the raw student features.

    1 - <s, t> = |s - t|^2 / 2 for unit vectors: the right-hand side keeps its digits when s is close to t.

    Returns:
        (B, N) and (B, N, C, strides of `student`) or None, in float32 (float64 if an input is float64).
    """
    dtype = accumulation_dtype(student, teacher, "ieee")
    distance = torch.empty(student.shape[:2], dtype=dtype, device=student.device)
    gradient = torch.empty_like(student, dtype=dtype) if with_gradient else None
    for b in range(student.shape[0]):
        s, t, delta, inverse_norm = directions(student[b], teacher[b])
        has_direction = (s != 0).any(-1) & (t != 0).any(-1)
        distance[b] = torch.where(has_direction, delta.square().sum(-1) / 2, 1.0)
        if gradient is not None:
            projected = delta - (delta * s).sum(-1, keepdim=True) * s
            gradient[b] = torch.where(has_direction, inverse_norm, 0.0)[:, None] * projected
    return distance, gradient


def directions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors s and t, their difference s - t, and 1/|student|, in float64.

    In float32 the difference of two nearly equal unit vectors would already have lost the digits that the difference
    form exists to keep. A zero vector stays zero, with 1/|student| = 0: it has no direction and takes no gradient.
    """
    s, inverse_norm = _normalise(student)
    t, _ = _normalise(teacher)
    return s, t, s - t, inverse_norm


def accumulation_dtype(student: Tensor, teacher: Tensor, precision: str) -> torch.dtype:
    """float64 where an input is float64 and nothing is to be rounded below it, else float32."""
    double = precision == "ieee" and torch.float64 in (student.dtype, teacher.dtype)
    return torch.float64 if double else torch.float32


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(torch.float64)
    norm = torch.linalg.vector_norm(x, dim=-1)
    inverse_norm = torch.where(norm > 0, 1 / norm, 0.0)
    return x * inverse_norm.unsqueeze(-1), inverse_norm


def _rows(a: Tensor, d: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL / T^2 of each row and, if wanted, the weights p_s - p_t; `a` (a_ij - a_ii) and `d` are overwritten."""
    # Reading two scalars back costs nothing on a CPU and saves most of the passes once the student is close. Elsewhere
    # it would stall the queue, so the general form is used.
    if d.device.type == "cpu":
        radius = max(abs(x.item()) for x in d.aminmax())
        if radius <= _SERIES_RADIUS:
            return _rows_near(a, d, radius, with_gradient)
    return _rows_general(a, d, with_gradient)


def _rows_near(a: Tensor, d: Tensor, radius: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    teacher = a.exp_()
    z = teacher.sum(-1, keepdim=True)
    tail = _expm1_tail_series(d, radius)
    v = torch.linalg.vecdot(teacher, tail).unsqueeze(-1) / z
    expm1 = tail.add_(d)
    u = torch.linalg.vecdot(teacher, expm1).unsqueeze(-1) / z
    kl = (_log1p_tail(u) + v).squeeze(-1)
    return kl, expm1.sub_(u).mul_(teacher).div_(z * (1 + u)) if with_gradient else None


def _rows_general(a: Tensor, d: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The same for any d: rows that have drifted far are evaluated through the student's own log-sum-exp."""
    teacher = a.exp()
    z = teacher.sum(-1, keepdim=True)
    logit = a.add_(d)
    top = logit.amax(-1, keepdim=True)
    student = logit.sub_(top).exp_()
    student_z = student.sum(-1, keepdim=True)
    log_ratio = top + student_z.log() - z.log()

    near = d.clamp(-_DIFFERENCE_LIMIT, _DIFFERENCE_LIMIT)
    tail = torch.where(near.abs() <= _SERIES_RADIUS, _expm1_tail_series(near, _SERIES_RADIUS), near.exp() - 1 - near)
    u = (teacher * (near + tail)).sum(-1, keepdim=True) / z
    v = (teacher * tail).sum(-1, keepdim=True) / z
    is_near = (d.abs().amax(-1, keepdim=True) <= _DIFFERENCE_LIMIT) & (u.abs() <= 0.5)
    mean_d = (teacher * d).sum(-1, keepdim=True) / z
    kl = torch.where(is_near, _log1p_tail(u) + v, log_ratio - mean_d).squeeze(-1)
    if not with_gradient:
        return kl, None
    u = u.clamp(-0.5, 0.5)  # other rows take the other branch; this keeps inf and nan out of the unused one
    ratio_form = (near + tail - u).mul_(teacher / z).div_(1 + u)
    return kl, torch.where(is_near, ratio_form, student / student_z - teacher / z)


def _expm1_tail_series(d: Tensor, radius: float) -> Tensor:
    """expm1(d) - d = d^2/2! + d^3/3! + ... for |d| <= radius <= 1, to the last bit or two."""
    # Horner on d^2 (1/2! + d/3! + d^2/4! + ...), cut where the next term is below half an ulp of the first.
    last = 2
    while 2 * radius ** (last - 1) / math.factorial(last + 1) > torch.finfo(d.dtype).eps / 2:
        last += 1
    tail = torch.full_like(d, 1 / math.factorial(last))
    for k in range(last - 1, 1, -1):
        torch.addcmul(d.new_tensor(1 / math.factorial(k)), tail, d, out=tail)
    return tail.mul_(d).mul_(d)


def _log1p_tail(u: Tensor) -> Tensor:
    """log1p(u) - u for u > -1, keeping its digits near 0."""
    # Horner on -u^2 (1/2 - u/3 + u^2/4 - ...); 0.125^18 is below float64's rounding.
    series = torch.zeros_like(u)
    for k in range(20, 1, -1):
        series = 1 / k - u * series
    return torch.where(u.abs() <= 0.125, -u.square() * series, torch.log1p(u) - u)


class _Product:
    """Matrix products of rounded operands with accumulation in `dtype`, whatever the process-wide settings say."""

    def __init__(self, precision: str, dtype: torch.dtype, device: torch.device) -> None:
        self.precision = precision
        self.dtype = dtype
        self.device = device

    @contextlib.contextmanager
    def flags(self) -> Iterator[None]:
        """Hold off autocast and the global float32 product settings, either of which would round behind our back."""
        with torch.autocast(self.device.type, enabled=False):
            if self.device.type == "cuda":
                setting, value = torch.backends.cuda.matmul, "tf32" if self.precision == "tf32" else "ieee"
            elif self.device.type == "cpu":
                # Operands are already bf16 values, so oneDNN's bf16 mode loses nothing and is several times faster.
                setting, value = torch.backends.mkldnn.matmul, "bf16" if self.precision == "bf16" else "ieee"
            else:
                yield
                return
            before = setting.fp32_precision
            setting.fp32_precision = value
            try:
                yield
            finally:
                setting.fp32_precision = before

    def operand(self, x: Tensor, scale_dims: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Round x to the operand type; returns (operand, scale) with x = operand * scale.

        fp16 alone has a range to mind: x is brought to a largest magnitude in [1/2, 1) over `scale_dims`, by a power
        of two, since differences of unit vectors reach below fp16's smallest normal number.
        """
        if self.precision == "ieee":
            return x, None
        if self.precision == "tf32":
            return _round_to_tf32(x), None
        if self.precision == "bf16":
            rounded = x.to(torch.bfloat16)
            return (rounded if self.device.type == "cuda" else rounded.float()), None
        exponent = torch.frexp(x.abs().amax(scale_dims, keepdim=True)).exponent
        scale = torch.ldexp(torch.ones_like(exponent, dtype=x.dtype), exponent)
        rounded = (x / scale).to(torch.float16)
        return (rounded if self.device.type == "cuda" else rounded.float()), scale

    def __call__(
        self,
        left: tuple[Tensor, Tensor | None],
        right: tuple[Tensor, Tensor | None],
        transpose: bool = False,
    ) -> Tensor:
        (x, x_scale), (y, y_scale) = left, right
        y = y.mT if transpose else y
        out = torch.bmm(x, y) if x.dtype == self.dtype else torch.bmm(x, y, out_dtype=self.dtype)
        if x_scale is not None:
            out.mul_(x_scale * y_scale)
        return out


def _round_to_tf32(x: Tensor) -> Tensor:
    """Nearest value with tf32's 10-bit mantissa, so that every device multiplies the same operands."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
