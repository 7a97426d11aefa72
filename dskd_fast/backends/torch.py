"""The "torch" backend: the difference form in plain PyTorch, a slab of rows at a time, on any device.

What is computed, per position i with unit vectors s_i and t_i, centred keys k_j = t_j - mean_j t_j and m = 1/T:

    a_ij = <t_i, k_j> m                           p_ij = exp(a_ij - a_ii) / sum_j exp(a_ij - a_ii)
    d_ij = <s_i - t_i, k_j> m, less its mean      v_i = sum_j p_ij (expm1(d_ij) - d_ij)
    over j with weights p_ij
    KL_i = T^2 log1p(v_i)                         dKL_i/ds_i = T sum_j p_ij (expm1(d_ij) - v_i) / (1 + v_i) k_j

Equal to the textbook form (a softmax row ignores a constant, so the keys and d may be centred), but every term is
positive and of the KL's own order, where the textbook subtracts two log-sum-exps that agree in all their digits. A slab
holds whole rows, so one visit yields both the KL and its gradient, with three products instead of the five of a
recomputing backward.
"""

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from dskd_fast.backends.common import TEMPERATURE_LIMITS, accumulation_dtype

# On a CPU a slab's working set should stay in the second-level cache; on a GPU it should fill the device.
_SLAB_ELEMENTS = {"cpu": 1 << 18}
_SLAB_ELEMENTS_ELSEWHERE = 1 << 23
# But fewer rows would have all keys read from memory for little work: with 16, N = 16,384 took twice as long.
_FEWEST_ROWS = 64

# |d| up to which expm1(d) - d is summed as a series.
_SERIES_RADIUS = 1.0
# Largest logit, relative to the teacher's own position, that is exponentiated as it is; a row beyond it has a large KL
# and is evaluated through its log-sum-exp, where nothing overflows and nothing cancels.
_LOGIT_LIMIT = 30.0

# Two calls at once must not restore each other's settings.
_SETTINGS_LOCK = threading.RLock()


def refusal(student: Tensor, teacher: Tensor, precision: str | None) -> None:
    """None: this backend serves every call."""


def contextual_affinity(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, precision: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """KL map and, if wanted, its gradient; see `dskd_fast.backends`.

    Accumulation is in float32, or in float64 for "fp32" with a float64 input.
    """
    if isinstance(temperature, Tensor):
        lowest, highest = TEMPERATURE_LIMITS
        temperature = temperature.to(_widest_dtype(temperature.device))
        temperature = temperature.where((temperature >= lowest) & (temperature <= highest), math.nan)
    kl, gradient = _contextual_affinity(
        student.flatten(2).mT, teacher.flatten(2).mT, temperature, precision, with_gradient
    )
    return _as_maps(kl, gradient, student)


def cosine_distance(student: Tensor, teacher: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cosine distance map and, if weights are given, its gradient; see `dskd_fast.backends`.

    1 - <s, t> = |s - t|^2 / 2 for unit vectors: the right-hand side keeps its digits when s is close to t.
    """
    distance, gradient = _cosine_distance(
        student.flatten(2).mT, teacher.flatten(2).mT, None if weights is None else weights.flatten(1)
    )
    return _as_maps(distance, gradient, student)


def _as_maps(values: Tensor, gradient: Tensor | None, student: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, N) and (B, N, C) -> (B, H, W) and (B, C, H, W), the latter laid out as is expected of it."""
    values = values.unflatten(1, student.shape[2:])
    if gradient is None:
        return values, None
    gradient = gradient.mT.unflatten(2, student.shape[2:])
    # They differ for a student whose rows and columns cannot be flattened without a copy.
    expected = torch.empty_like(student, dtype=gradient.dtype, device="meta").stride()
    if gradient.stride() != expected:
        gradient = torch.empty_like(student, dtype=gradient.dtype).copy_(gradient)
    return values, gradient


def _contextual_affinity(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, precision: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The same on rows: (B, N, C) twice -> (B, N) and (B, N, C) or None."""
    batch, n, _ = student.shape
    dtype = accumulation_dtype(student, teacher, precision)
    kl = torch.empty((batch, n), dtype=dtype, device=student.device)
    gradient = torch.empty_like(student, dtype=dtype) if with_gradient else None
    if kl.numel() == 0:
        return kl, gradient
    slab = _SLAB_ELEMENTS.get(student.device.type, _SLAB_ELEMENTS_ELSEWHERE)
    images = max(1, slab // (n * n))
    rows = n if images > 1 else min(n, max(_FEWEST_ROWS, slab // n))
    product = _Product(precision, dtype, student.device)
    with product.flags():
        for b in range(0, batch, images):
            part = slice(b, b + images)
            s, t, delta, inverse_norm = directions(student[part], teacher[part])
            keys = t - t.mean(dim=1, keepdim=True)
            # float64 up to here, where it costs N*C; the N*N work below is in `dtype`.
            a_own, c_own = (((x * keys).sum(-1) / temperature).to(dtype) for x in (t, delta))
            s, t, delta, keys = (x.to(dtype) for x in (s, t, delta, keys))
            # 1/|student| beyond the largest float32 would turn a gradient of 0 into NaN.
            inverse_norm = inverse_norm.clamp(max=torch.finfo(dtype).max).to(dtype)
            right = product.operand(keys, scale_dims=(1, 2))
            for r in range(0, n, rows):
                row = slice(r, r + rows)
                a = product(product.operand(t[:, row], (2,)), right, transpose=True).div_(temperature)
                c = product(product.operand(delta[:, row], (2,)), right, transpose=True).div_(temperature)
                # Where T is small, the softmax is all but one-hot at j = i and the KL comes from the other, tiny
                # weights: relative to j = i, whose entries are then exactly 0, they keep their digits.
                for x, own in ((a, a_own), (c, c_own)):
                    x.sub_(own[:, row, None]).diagonal(offset=r, dim1=1, dim2=2).zero_()
                row_kl, weight = _rows(a, c, with_gradient)
                kl[part, row] = row_kl.mul_(temperature**2)
                if gradient is not None and weight is not None:
                    g = product(product.operand(weight, (2,)), right).mul_(temperature)
                    unit = s[:, row]
                    g -= (g * unit).sum(-1, keepdim=True) * unit
                    gradient[part, row] = g.mul_(inverse_norm[:, row, None])
    return kl, gradient


def _cosine_distance(student: Tensor, teacher: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same on rows: (B, N, C) twice -> (B, N) and (B, N, C) or None."""
    dtype = accumulation_dtype(student, teacher, "fp32")
    distance = torch.empty(student.shape[:2], dtype=dtype, device=student.device)
    gradient = None if weights is None else torch.empty_like(student, dtype=dtype)
    for b in range(student.shape[0]):
        s, t, delta, inverse_norm = directions(student[b], teacher[b])
        has_direction = (s != 0).any(-1) & (t != 0).any(-1)
        distance[b] = torch.where(has_direction, delta.square().sum(-1) / 2, 1.0)
        if gradient is not None and weights is not None:
            projected = delta - (delta * s).sum(-1, keepdim=True) * s
            gradient[b] = (torch.where(has_direction, inverse_norm, 0.0) * weights[b])[:, None] * projected
    return distance, gradient


def directions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors s and t, their difference s - t, and 1/|student|, in float64 where the device has it.

    In float32 the difference of two nearly equal unit vectors would already have lost the digits that the difference
    form exists to keep. A zero vector stays zero, with 1/|student| = 0: it has no direction and takes no gradient.
    """
    s, inverse_norm = _normalise(student)
    t, _ = _normalise(teacher)
    return s, t, s - t, inverse_norm


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(_widest_dtype(x.device))
    norm = torch.linalg.vector_norm(x, dim=-1)
    inverse_norm = torch.where(norm > 0, 1 / norm, 0.0)
    return x * inverse_norm.unsqueeze(-1), inverse_norm


def _widest_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def _rows(a: Tensor, c: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL / T^2 of each row and, if wanted, the weights p_s - p_t; `a` and `c`, up to a constant, are overwritten."""
    e = a.exp()
    z = e.sum(-1, keepdim=True)
    c.sub_(torch.linalg.vecdot(e, c).unsqueeze(-1).div_(z))
    # Reading two scalars back costs nothing on a CPU and saves most of the passes once the student is close. Elsewhere
    # it would stall the queue, so the general form is used.
    if c.device.type == "cpu":
        radius = max(abs(x.item()) for x in c.aminmax())
        if radius <= _SERIES_RADIUS:
            return _rows_near(e, z, c, radius, with_gradient)
    return _rows_general(e, z, a.add_(c), c, with_gradient)


def _rows_near(e: Tensor, z: Tensor, c: Tensor, radius: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    tail = _expm1_tail_series(c, radius)
    v = torch.linalg.vecdot(e, tail).unsqueeze(-1).div_(z)
    weight = tail.add_(c).sub_(v).mul_(e).div_(z * (1 + v)) if with_gradient else None
    return v.log1p().squeeze(-1), weight


def _rows_general(e: Tensor, z: Tensor, logit: Tensor, c: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The same for any c: rows that have drifted far are evaluated through the student's own log-sum-exp."""
    top = logit.amax(-1, keepdim=True)
    x = (logit - top).exp_()
    z_student = x.sum(-1, keepdim=True)
    is_near = top <= _LOGIT_LIMIT

    series = e * _expm1_tail_series(c.clamp(-_SERIES_RADIUS, _SERIES_RADIUS), _SERIES_RADIUS)
    direct = x * top.clamp(max=_LOGIT_LIMIT).exp() - e * (1 + c)
    tail = torch.where(c.abs() <= _SERIES_RADIUS, series, direct)
    v = tail.sum(-1, keepdim=True).div_(z)
    kl = torch.where(is_near, v.log1p(), top + z_student.log() - z.log()).squeeze(-1)
    if not with_gradient:
        return kl, None
    ratio_form = (tail + e * (c - v)).div_(z * (1 + v))
    return kl, torch.where(is_near, ratio_form, x / z_student - e / z)


def _expm1_tail_series(c: Tensor, radius: float) -> Tensor:
    """expm1(c) - c = c^2/2! + c^3/3! + ... for |c| <= radius <= 1, to the last bit or two."""
    # Horner on c^2 (1/2! + c/3! + c^2/4! + ...), cut where the next term is below half an ulp of the first.
    last = 2
    while 2 * radius ** (last - 1) / math.factorial(last + 1) > torch.finfo(c.dtype).eps / 2:
        last += 1
    tail = torch.full_like(c, 1 / math.factorial(last))
    for k in range(last - 1, 1, -1):
        torch.addcmul(torch.full((), 1 / math.factorial(k), dtype=c.dtype, device=c.device), tail, c, out=tail)
    return tail.mul_(c).mul_(c)


class _Product:
    """Matrix products of rounded operands with accumulation in `dtype`, whatever the process-wide settings say."""

    def __init__(self, precision: str, dtype: torch.dtype, device: torch.device) -> None:
        self.precision = precision
        self.dtype = dtype
        self.device = device

    @contextlib.contextmanager
    def flags(self) -> Iterator[None]:
        """Hold off autocast and the process-wide float32 product settings, either of which would round behind our back.

        Where the settings are as they should be, as they are by default, they are only read. Changing them is what
        torch offers, but other threads' products see it while it lasts.
        """
        with torch.autocast(self.device.type, enabled=False):
            if self.device.type == "cuda":
                setting, wanted = torch.backends.cuda.matmul, "tf32" if self.precision == "tf32" else "ieee"
            elif self.device.type == "cpu":
                # torch's own types leave it out.
                setting, wanted = torch.backends.mkldnn.matmul, "ieee"  # type: ignore[attr-defined]
            else:
                yield
                return
            with _SETTINGS_LOCK:
                before = setting.fp32_precision
                if before == wanted or (before, wanted) == ("none", "ieee"):
                    yield
                    return
                setting.fp32_precision = wanted
                try:
                    yield
                finally:
                    setting.fp32_precision = before

    def operand(self, x: Tensor, scale_dims: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Round x to the operand type; returns (operand, scale) with x = operand * scale.

        fp16 alone has a range to mind: x is brought to a largest magnitude in [1/2, 1) over `scale_dims`, by a power
        of two, since differences of unit vectors reach below fp16's smallest normal number.
        """
        if self.precision == "fp32":
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
        if x_scale is not None and y_scale is not None:
            out.mul_(x_scale * y_scale)
        return out


def _round_to_tf32(x: Tensor) -> Tensor:
    """Nearest value with tf32's 10-bit mantissa, so that every device multiplies the same operands."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
