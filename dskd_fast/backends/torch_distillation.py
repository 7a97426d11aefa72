"""The "torch" backend's distillation against any keys, in plain PyTorch operations, on any device.

Per row i with unit vectors s_i and t_i, keys k_j less their centre, and delta_i = s_i / T_s - t_i / T_t,

    a_ij = <t_i, k_j> / T_t        c_ij = <delta_i, k_j>        p = softmax(a)        p_s = softmax(a + c)
    KL_i = log sum_j p_ij exp(c_ij - h_i) - sum_j p_ij (c_ij - h_i)    with h_i = sum_j p_ij c_ij
    dKL_i/ds_i = 1/T_s sum_j (p_s - p)_ij k_j

No row need have a key of its own, so that the largest logit and the mean h are found out as keys come, a tile after
another, and the sums so far rescaled (kernels/README.md). The gradient of several tiles computes both logits again.
"""

import math

import torch
from torch import Tensor

from dskd_fast.backends import slabs
from dskd_fast.backends.common import (
    DISTILLATION_TEMPERATURE_LIMITS,
    PreparedKeys,
    accumulation_dtype,
    finite_centre,
    outputs,
)

# A row whose student's weights sum to more than this many times the teacher's has a KL of 10 or more, and takes it from
# two log-sum-exps, whose difference has digits enough.
_FAR = 2.0**15
# Exponents of the student's weights, relative to the teacher's largest, in rows that are not far.
_LARGEST_EXPONENT = 80.0


def affinity_distillation(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor | PreparedKeys,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    normalize: bool,
    precision: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """KL map and, if wanted, its gradient; see `dskd_fast.backends`."""
    dtype = accumulation_dtype(student, teacher, precision)
    kl, gradient = outputs(student, dtype, with_gradient)
    if kl.numel() == 0:
        return kl, gradient
    product = slabs.Product(precision, dtype, student.device)
    temperatures = [_checked(x) for x in (student_temperature, teacher_temperature)]
    packed = _prepare(keys, normalize, product, None) if isinstance(keys, Tensor) else keys.packed
    operand, scale, _ = packed
    operand = operand.to(dtype) if precision in ("fp32", "tf32") else operand
    batch, n_keys = len(student), operand.shape[1]
    x, y = (z.flatten(2).mT for z in (student, teacher))  # (B, N, C)
    n = x.shape[1]
    result = kl.flatten(1)
    target = None if gradient is None else torch.empty((batch, n, x.shape[2]), dtype=dtype, device=student.device)
    rows, tile = slabs.slab_sizes(student.device, n, n_keys)
    with product.flags():
        for b in range(batch):
            image = b if len(operand) > 1 else 0
            right = operand[image : image + 1], scale[image : image + 1]
            mask = None if key_mask is None else key_mask[b if len(key_mask) > 1 else 0]
            for r in range(0, n, rows):
                row = slice(r, r + rows)
                result[b, row], g = _rows(
                    x[b, row], y[b, row], right, mask, temperatures, normalize, tile, product, with_gradient
                )
                if target is not None:
                    target[b, row] = g
    if row_mask is not None:
        result.masked_fill_(~row_mask.flatten(1), 0)
        if target is not None:
            target.masked_fill_(~row_mask.flatten(1).unsqueeze(-1), 0)
    if gradient is not None and target is not None:
        gradient.copy_(target.mT.unflatten(2, student.shape[2:]))
    return kl, gradient


def distillation_refusal(
    student: Tensor, teacher: Tensor, keys: Tensor | PreparedKeys, precision: str | None
) -> str | None:
    """None: this backend serves every call."""


def prepare_keys(keys: Tensor, normalize: bool, precision: str, centre: Tensor | None = None) -> list[Tensor]:
    """Operands (B', K, C), their scale (B', 1, 1) and centre (B', C); see `dskd_fast.backends`."""
    dtype = accumulation_dtype(keys, keys, precision)
    return _prepare(keys, normalize, slabs.Product(precision, dtype, keys.device), centre)


def update_keys(packed: list[Tensor], keys: Tensor, start: int, normalize: bool, precision: str) -> None:
    """Write keys (B', P, C) in place of those from `start` on; see `dskd_fast.backends`."""
    operand, scale, centre = packed
    k = _vectors(keys, normalize)[0] - centre.unsqueeze(1)
    if precision == "fp16":
        k = (k / scale).to(torch.float16)
    else:
        k, _ = slabs.Product(precision, operand.dtype, keys.device).operand(k.float().to(operand.dtype), (1, 2))
    operand[:, start : start + keys.shape[1]] = k


def _prepare(keys: Tensor, normalize: bool, product: slabs.Product, centre: Tensor | None) -> list[Tensor]:
    unit, _ = _vectors(keys, normalize)
    if centre is None:
        centre = finite_centre(unit.mean(dim=1))
    operand, scale = product.operand((unit - centre.unsqueeze(1)).to(product.dtype), (1, 2))
    if scale is None:
        scale = torch.ones((len(keys), 1, 1), dtype=product.dtype, device=keys.device)
    return [operand, scale, centre]


def _vectors(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Unit vectors, or x itself, in the widest type, and what a gradient is multiplied by on its way through."""
    if normalize:
        return slabs.normalise(x)
    x = x.to(slabs.widest_dtype(x.device))
    return x, torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape[:-1])


def _checked(temperature: float | Tensor) -> float | Tensor:
    """Of a tensor nothing is read back: out of range it makes all NaN."""
    if not isinstance(temperature, Tensor):
        return temperature
    lowest, highest = DISTILLATION_TEMPERATURE_LIMITS
    temperature = temperature.to(slabs.widest_dtype(temperature.device))
    return temperature.where((temperature >= lowest) & (temperature <= highest), math.nan)


def _rows(student, teacher, right, mask, temperatures, normalize, tile, product, with_gradient):
    """KL (R,) of rows (R, C) twice, and the gradient (R, C) or None."""
    student_temperature, teacher_temperature = temperatures
    (s, inverse_norm), (t, _) = (_vectors(x, normalize) for x in (student, teacher))
    t = t / teacher_temperature
    delta = s / student_temperature - t
    dtype = product.dtype
    left = [product.operand(x.to(dtype).unsqueeze(0), (2,)) for x in (t, delta)]
    keys, scale = right
    tiles = [slice(k, min(k + tile, keys.shape[1])) for k in range(0, keys.shape[1], tile)]

    def logits(part: slice) -> tuple[Tensor, Tensor]:
        a, c = (product(x, (keys[:, part], scale), transpose=True).squeeze(0) for x in left)
        if mask is not None:
            a.masked_fill_(~mask[part], -math.inf)
        return a, c

    sums = _Sums(len(s), s.dtype, s.device)
    for part in tiles:
        a, c = logits(part)
        sums.add(a, c)
    kl = sums.divergence().to(dtype)
    if not with_gradient:
        return kl, None
    g = torch.zeros((len(s), keys.shape[2]), dtype=dtype, device=s.device)
    for part in tiles:
        if len(tiles) > 1:
            a, c = logits(part)
            sums.centre(a, c)
        weight = sums.weights(a, c)
        g += product(product.operand(weight.unsqueeze(0), (2,)), (keys[:, part], scale)).squeeze(0)
    g /= student_temperature
    if not normalize:
        return kl, g
    unit = s.to(dtype)
    g -= (g * unit).sum(-1, keepdim=True) * unit
    # 1/|student| beyond the largest float32 would turn a gradient of 0 into NaN.
    return kl, g * inverse_norm.clamp(max=torch.finfo(dtype).max).to(dtype).unsqueeze(-1)


class _Sums:
    """Sums over the keys so far, (R, 1) each in the widest type: of weights exp(a - top), with c less its mean."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        zero = torch.zeros((rows, 1), dtype=dtype, device=device)
        self.top = self.student_top = zero - math.inf
        self.mean = self.z = self.first = self.tail = self.z_student = zero
        # Beyond float64's range a row is far whatever comes.
        self.largest = math.log(torch.finfo(dtype).max) - 9

    def add(self, a: Tensor, c: Tensor) -> None:
        """a and c (R, K) of more keys, a = -inf for masked ones; they become a - top and c - mean."""
        top = torch.maximum(self.top, a.amax(-1, keepdim=True).to(self.top.dtype))
        top_start = torch.where(top > -math.inf, top, 0.0)
        decay = (self.top - top_start).exp()
        a.sub_(top_start.to(a.dtype))
        e = a.exp()
        z = decay * self.z + e.sum(-1, keepdim=True)
        c.sub_(self.mean.to(c.dtype))
        shift = (_dot(e, c) / z.where(z > 0, 1.0)).to(c.dtype)
        c.sub_(shift)
        # The earlier keys, whose mean of c now lies `back` away.
        back = -shift.to(z.dtype)
        joint = self._exp(self.top - top_start + back)
        from_back = torch.where(
            back.abs() <= 1, decay * slabs.expm1_tail(back.clamp(-1, 1)), joint - decay * (1 + back)
        )
        tail = joint * self.tail + (joint - decay) * self.first + from_back * self.z
        self.first = decay * (self.first + back * self.z) + _dot(e, c)
        self.top, self.z, self.mean = top, z, self.mean + shift
        logit = a + c
        # The student's largest logit, in the teacher's measure.
        student_top = torch.maximum(self.student_top, logit.amax(-1, keepdim=True).to(z.dtype) + top_start + self.mean)
        student_start = torch.where(student_top > -math.inf, student_top, 0.0)
        relative = student_start - top_start - self.mean
        x = logit.sub_(relative.to(logit.dtype)).exp_()
        self.z_student = (self.student_top - student_start).exp() * self.z_student + x.sum(-1, keepdim=True)
        self.student_top = student_top
        is_close = c.abs() <= 1
        close = torch.where(is_close, e * slabs.expm1_tail(c.clamp(-1, 1)), -e * (1 + c)).sum(-1, keepdim=True)
        tail = tail + close + self._exp(relative) * torch.where(is_close, 0.0, x).sum(-1, keepdim=True)
        self.tail = tail.clamp(max=math.exp(self.largest))

    def centre(self, a: Tensor, c: Tensor) -> None:
        """The same to a and c, when all keys have been added."""
        a.sub_(self.start().to(a.dtype))
        c.sub_(self.mean.to(c.dtype))

    def start(self) -> Tensor:
        return torch.where(self.top > -math.inf, self.top, 0.0)

    def divergence(self) -> Tensor:
        """KL (R,)."""
        u, first = self._means()
        z = self.z.where(self.z > 0, 1.0)
        far = self.student_top + self.z_student.log() - self.start() - z.log() - self.mean
        return torch.where(u > _FAR, far, (u.log1p() - first).clamp(min=0)).squeeze(-1)

    def weights(self, a: Tensor, c: Tensor) -> Tensor:
        """p_s - p (R, K) of a and c as `add` leaves them."""
        u, _ = self._means()
        z = self.z.where(self.z > 0, 1.0)
        share = (1 / (z * (1 + u))).to(a.dtype)
        is_far = u > _FAR
        log_student = self.student_top + self.z_student.log() - self.start() - self.mean
        u, z, log_student = (x.to(a.dtype) for x in (u, z, log_student))
        e = a.exp()
        logit = a + c
        close = e * (slabs.expm1_tail(c.clamp(-1, 1)) + c - u)
        direct = logit.clamp(max=_LARGEST_EXPONENT).exp() - e * (1 + u)
        near = torch.where(c.abs() <= 1, close, direct) * share
        return torch.where(is_far, (logit - log_student).exp() - e / z, near)

    def _means(self) -> tuple[Tensor, Tensor]:
        """u and the mean of c, which is 0 but for rounding, under the teacher."""
        z = self.z.where(self.z > 0, 1.0)
        return (self.tail + self.first) / z, self.first / z

    def _exp(self, x: Tensor) -> Tensor:
        return x.clamp(max=self.largest).exp()


def _dot(e: Tensor, c: Tensor) -> Tensor:
    return torch.linalg.vecdot(e, c).unsqueeze(-1)
