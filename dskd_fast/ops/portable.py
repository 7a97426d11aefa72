"""The operators in plain PyTorch operations, for files that a runtime without this package is to run.

`without_operators` has `torch.export.export` trace these in the operators' place.
What is traced may depend neither on the data nor on the number of images, and all of it is float32: some runtimes know
no float64, others take float32 in its place without saying so. None of ONNX's knows expm1 or log1p either. So nothing
may cancel: the difference of two unit vectors is made from a difference that is exact (`_directions`), and the rest is
the form of dskd_fast/backends/torch.py, in which all terms are positive and of the KL's own order.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dskd_fast.ops import distillation, operators

# Rows are traced in slabs of at most so many entries, whose arrays take 8 MiB per image each. Every slab adds its
# operations to the file, so that beyond some number they grow instead.
_SLAB_ELEMENTS = 1 << 21
_MAX_SLABS = 16
# Up to here expm1(c) - c is a series that ends with c^8/8!, off by 4e-8 of it; above, the rounding of 1 + c is 7e-7.
_SERIES_RADIUS = 0.5
_SERIES_END = 8
# Largest logit, relative to the teacher's own position, that is exponentiated as it is (dskd_fast/backends/torch.py).
_LOGIT_LIMIT = 30.0
# Logits of keys that take no part: finite, as differences of infinities are not numbers.
_EXCLUDED = -1e30
# Of the largest entry of a vector that is scaled once: int64 holds the powers of two that are looked up.
_MAX_EXPONENT = 30
# Products of numbers with so many bits after the point, and few before it, are exact in float32.
_SHORT = 2.0**10


def contextual_affinity(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, precision: str, backend: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) twice, float32 -> KL (B, H, W), float32, and an empty tensor.

    Precision and backend are without meaning here.
    """
    _refuse_gradient(with_gradient)
    t, delta, _ = _directions(student, teacher)
    keys = t - t.mean(dim=1, keepdim=True)
    temperature = temperature.float() if isinstance(temperature, Tensor) else t.new_full((), temperature)
    t, delta = t / temperature, delta / temperature
    a_own, c_own = ((x * keys).sum(-1, keepdim=True) for x in (t, delta))
    keys = keys.mT
    n = t.shape[1]
    position = torch.arange(n, device=t.device)
    rows = max(_SLAB_ELEMENTS // n, math.ceil(n / _MAX_SLABS))
    slabs = []
    for r in range(0, n, rows):
        row = slice(r, r + rows)
        # Exactly 0: where T is small, the own key has all but all of the weight, and the KL comes from the others.
        is_own = position == position[row, None]
        a, c = (torch.where(is_own, 0.0, x[:, row] @ keys - own[:, row]) for x, own in ((t, a_own), (delta, c_own)))
        slabs.append(_rows(a, c))
    kl = torch.cat(slabs, dim=1) * temperature**2
    return kl.unflatten(1, student.shape[2:]), kl.new_empty(0)


def affinity_distillation(
    student: Tensor,
    teacher: Tensor,
    keys: list[Tensor],
    count: int | None,
    student_temperature: Tensor,
    teacher_temperature: Tensor,
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    normalize: bool,
    precision: str,
    backend: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) twice and keys (B or 1, K, C), float32 -> KL (B, H, W), float32, and an empty tensor."""
    _refuse_gradient(with_gradient)
    if count is not None:
        raise NotImplementedError("an exported file cannot read prepared keys: export with the keys themselves")
    k = keys[0]
    if normalize:
        t, difference, _ = _directions(student, teacher)
        k, _, _ = _directions(*(k.mT.unsqueeze(-1),) * 2)
    else:
        t, difference = (x.flatten(2).mT for x in (teacher, student - teacher))
    k = (k - k.mean(dim=1, keepdim=True)).mT
    of_student, of_teacher = student_temperature.float(), teacher_temperature.float()
    # Where both are the same, the second term is exactly 0.
    delta = difference / of_student + t * ((of_teacher - of_student) / (of_student * of_teacher))
    t = t / of_teacher
    n, count = t.shape[1], k.shape[2]
    rows = max(_SLAB_ELEMENTS // count, math.ceil(n / _MAX_SLABS))
    slabs = []
    for r in range(0, n, rows):
        a, c = (x[:, r : r + rows] @ k for x in (t, delta))
        if key_mask is not None:
            a = torch.where(key_mask.unsqueeze(1), a, _EXCLUDED)
        slabs.append(_rows(a - a.amax(-1, keepdim=True), c))
    kl = torch.cat(slabs, dim=1)
    if key_mask is not None:
        kl = torch.where(key_mask.any(-1, keepdim=True), kl, 0.0)
    kl = kl.unflatten(1, student.shape[2:])
    return kl if row_mask is None else torch.where(row_mask, kl, 0.0), kl.new_empty(0)


def cosine_distance(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    """(B, C, H, W) twice, float32 -> distance (B, H, W), float32."""
    _, delta, has_direction = _directions(student, teacher)
    distance = torch.where(has_direction, delta.square().sum(-1) / 2, 1.0)
    return distance.unflatten(1, student.shape[2:])


@contextmanager
def without_operators() -> Iterator[None]:
    """Have the losses compute in plain operations, in this thread, while a program is traced with `strict=False`."""
    token = operators.REPLACED.set(
        {
            operators.contextual_affinity: contextual_affinity,
            distillation.affinity_distillation: affinity_distillation,
            operators.cosine_distance: cosine_distance,
        }
    )
    try:
        yield
    finally:
        operators.REPLACED.reset(token)


def _directions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors t (B, N, C), the difference s - t from them, and where both have a direction (B, N).

    s and t rounded to float32 would differ by that rounding alone where they are close. Instead, with any factor f,

        r = x - f y      s - t = (r - h y) / |x|      h = (2 f <r, y> + |r|^2) / ((f |y| + |x|) |y|)

    for x and y of any length. f is |x| / |y| with few bits, and y the sum of y_1 with few bits and the small rest y_2,
    so that f y_1 is exact and x - f y_1 - f y_2 is off by its own rounding only; r is then as short as s - t.
    """
    # Twice, for vectors whose largest entry lies between 2^-61 and 2^60.
    x, y = _near_one(_near_one(torch.stack([student, teacher]).flatten(3).mT))
    # In that range none but zero vectors is as short as the limit; shorter ones are taken for less than unit vectors.
    x_norm, y_norm = (z.square().sum(-1, keepdim=True).sqrt() for z in (x, y))
    has_x, has_y = x_norm > 0, y_norm > 0
    x_norm, y_norm = x_norm.clamp(min=0.25), y_norm.clamp(min=0.25)
    t = y / y_norm
    # Beyond 4 the vectors are far from each other, and any factor does.
    factor = _shortened((x_norm / y_norm).clamp(max=4))
    y_short = _shortened(y)
    r = (x - factor * y_short) - factor * (y - y_short)
    h = (2 * factor * (r * y).sum(-1, keepdim=True) + r.square().sum(-1, keepdim=True)) / (factor * y_norm + x_norm)
    delta = torch.where(has_x, (r - h * t) / x_norm, -t)
    return t, delta, (has_x & has_y).squeeze(-1)


def _near_one(x: Tensor) -> Tensor:
    """Vectors (..., C) times a power of two each, up to 2^30, so that their largest entry is between 1/2 and 2."""
    largest = x.abs().amax(-1, keepdim=True).clamp(2.0**-_MAX_EXPONENT, 2.0**_MAX_EXPONENT)
    exponent = (largest.log() / math.log(2)).floor()
    # Looked up, since runtimes' own powers are off: 2^-30 to 2^31, of which rounded logarithms may take the last.
    whole = torch.ones(2 * _MAX_EXPONENT + 2, dtype=torch.int64, device=x.device)
    powers = torch.bitwise_left_shift(whole, torch.arange(len(whole), device=x.device)).float() * 2.0**-_MAX_EXPONENT
    return x * powers[(_MAX_EXPONENT - exponent).long()]


def _shortened(x: Tensor) -> Tensor:
    return (x * _SHORT + 0.5).floor() / _SHORT


def _rows(a: Tensor, c: Tensor) -> Tensor:
    """KL / T^2 (B, R) of the teacher's logits and the student's differences from them, (B, R, N) each."""
    e = a.exp()
    z = e.sum(-1, keepdim=True)
    c = c - (e * c).sum(-1, keepdim=True) / z
    logit = a + c
    top = logit.amax(-1, keepdim=True)
    x = (logit - top).exp()
    tail = e * _expm1_tail_series(c.clamp(-_SERIES_RADIUS, _SERIES_RADIUS))
    direct = x * top.clamp(max=_LOGIT_LIMIT).exp() - e * (1 + c)
    v = torch.where(c.abs() <= _SERIES_RADIUS, tail, direct).sum(-1, keepdim=True) / z
    far = top + x.sum(-1, keepdim=True).log() - z.log()
    return torch.where(top <= _LOGIT_LIMIT, _log1p(v), far).squeeze(-1)


def _expm1_tail_series(c: Tensor) -> Tensor:
    """expm1(c) - c = c^2/2! + c^3/3! + ... for |c| up to `_SERIES_RADIUS`."""
    total = torch.full_like(c, 1 / math.factorial(_SERIES_END))
    for k in range(_SERIES_END - 1, 1, -1):
        total = total * c + 1 / math.factorial(k)
    return total * c * c


def _log1p(v: Tensor) -> Tensor:
    """log(1 + v) for v >= 0: up to 1/2 by the series of 2 artanh(v / (2 + v)), off by 2e-8 of it."""
    u = v.clamp(max=0.5)
    u = u / (2 + u)
    square = u * u
    near = 2 * u * (1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square / 9))))
    return torch.where(v <= 0.5, near, (1 + v).log())


def _refuse_gradient(with_gradient: bool) -> None:
    if with_gradient:
        raise NotImplementedError("an exported detector has no gradients: export it under torch.no_grad()")
