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

import math

import torch
from torch import Tensor

from dskd_fast.backends import slabs
from dskd_fast.backends.common import TEMPERATURE_LIMITS, accumulation_dtype
from dskd_fast.backends.torch_distillation import (  # noqa: F401 - the backend's other loss
    affinity_distillation,
    distillation_refusal,
    prepare_keys,
    update_keys,
)

# Largest logit, relative to the teacher's own position, that is exponentiated as it is; a row beyond it has a large KL
# and is evaluated through its log-sum-exp, where nothing overflows and nothing cancels.
_LOGIT_LIMIT = 30.0


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
        temperature = temperature.to(slabs.widest_dtype(temperature.device))
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
    slab = slabs.SLAB_ELEMENTS.get(student.device.type, slabs.SLAB_ELEMENTS_ELSEWHERE)
    images = max(1, slab // (n * n))
    rows = n if images > 1 else min(n, max(slabs.FEWEST_ROWS, slab // n))
    product = slabs.Product(precision, dtype, student.device)
    with product.flags():
        for b in range(0, batch, images):
            part = slice(b, b + images)
            s, t, delta, inverse_norm = slabs.directions(student[part], teacher[part])
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
        s, t, delta, inverse_norm = slabs.directions(student[b], teacher[b])
        has_direction = (s != 0).any(-1) & (t != 0).any(-1)
        half_square = delta.square().sum(-1) / 2
        distance[b] = torch.where(has_direction | half_square.isnan(), half_square, 1.0)
        if gradient is not None and weights is not None:
            projected = delta - (delta * s).sum(-1, keepdim=True) * s
            gradient[b] = (torch.where(has_direction, inverse_norm, 0.0) * weights[b])[:, None] * projected
    return distance, gradient


def _rows(a: Tensor, c: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL / T^2 of each row and, if wanted, the weights p_s - p_t; `a` and `c`, up to a constant, are overwritten."""
    e = a.exp()
    z = e.sum(-1, keepdim=True)
    c.sub_(torch.linalg.vecdot(e, c).unsqueeze(-1).div_(z))
    # Reading two scalars back costs nothing on a CPU and saves most of the passes once the student is close. Elsewhere
    # it would stall the queue, so the general form is used.
    if c.device.type == "cpu":
        radius = max(abs(x.item()) for x in c.aminmax())
        if radius <= slabs.SERIES_RADIUS:
            return _rows_near(e, z, c, radius, with_gradient)
    return _rows_general(e, z, a.add_(c), c, with_gradient)


def _rows_near(e: Tensor, z: Tensor, c: Tensor, radius: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    tail = slabs.expm1_tail_series(c, radius)
    v = torch.linalg.vecdot(e, tail).unsqueeze(-1).div_(z)
    weight = tail.add_(c).sub_(v).mul_(e).div_(z * (1 + v)) if with_gradient else None
    return v.log1p().squeeze(-1), weight


def _rows_general(e: Tensor, z: Tensor, logit: Tensor, c: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The same for any c: rows that have drifted far are evaluated through the student's own log-sum-exp."""
    top = logit.amax(-1, keepdim=True)
    x = (logit - top).exp_()
    z_student = x.sum(-1, keepdim=True)
    is_near = top <= _LOGIT_LIMIT

    series = e * slabs.expm1_tail_series(c.clamp(-slabs.SERIES_RADIUS, slabs.SERIES_RADIUS), slabs.SERIES_RADIUS)
    direct = x * top.clamp(max=_LOGIT_LIMIT).exp() - e * (1 + c)
    tail = torch.where(c.abs() <= slabs.SERIES_RADIUS, series, direct)
    v = tail.sum(-1, keepdim=True).div_(z)
    kl = torch.where(is_near, v.log1p(), top + z_student.log() - z.log()).squeeze(-1)
    if not with_gradient:
        return kl, None
    ratio_form = (tail + e * (c - v)).div_(z * (1 + v))
    return kl, torch.where(is_near, ratio_form, x / z_student - e / z)
