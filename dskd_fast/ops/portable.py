"""The operators in plain PyTorch operations, for files that a runtime without this package is to run.

`DECOMPOSITIONS` replaces them in an exported program: `torch.export.export(...).run_decompositions(DECOMPOSITIONS)`.
What is traced may depend neither on the data nor on the number of images, and has to keep its digits in runtimes that
know no expm1 and no log1p, as those of ONNX. So the logits are products in float32 of the difference form's operands,
and all sums are taken in float64, where no exponential overflows from T = 0.01 up. With c_ij = <s_i - t_i, k_j - k_i>/T
(0 at j = i), E_ij = exp(<t_i, k_j>/T) and Z_i = sum_j E_ij:

    M = sum_j E c / Z      v = sum_j E (expm1(c) - c) / Z      KL_i = T^2 (log(1 + M + v) - M)

What cancels there is 1 in 4,096 at most where there are as many positions (kernels/README.md, "Which shift").
"""

import math

import torch
from torch import Tensor

import dskd_fast.ops.operators  # noqa: F401 - registers what is replaced
from dskd_fast.backends.torch import directions

# Rows are traced in slabs of at most so many entries, whose float64 arrays take 16 MiB per image each. Every slab adds
# its operations to the file, so that beyond some number they grow instead.
_SLAB_ELEMENTS = 1 << 21
_MAX_SLABS = 16
# Below this, expm1(c) - c is a series of two terms (off by 1e-9 at most), above it loses no more than 2e-8 in float64.
_SERIES_RADIUS = 1e-4


def contextual_affinity(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, precision: str, backend: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) twice, float32 -> KL (B, H, W), float32, and an empty tensor.

    Precision and backend are without meaning here: the products are in float32.
    """
    _refuse_gradient(with_gradient)
    _, t, delta, _ = directions(student.flatten(2).mT, teacher.flatten(2).mT)
    keys = t - t.mean(dim=1, keepdim=True)
    t, delta = t / temperature, delta / temperature
    c_own = (delta * keys).sum(-1, keepdim=True)
    t, delta, keys = t.float(), delta.float(), keys.mT.float()
    n = t.shape[1]
    position = torch.arange(n, device=t.device)
    rows = max(_SLAB_ELEMENTS // n, math.ceil(n / _MAX_SLABS))
    slabs = []
    for r in range(0, n, rows):
        row = slice(r, r + rows)
        c = (delta[:, row] @ keys).double() - c_own[:, row]
        # Exactly: where T is small, the own key has all but all of the weight, and the KL comes from the others.
        c = torch.where(position == position[row, None], 0.0, c)
        slabs.append(_rows((t[:, row] @ keys).double(), c))
    kl = (torch.cat(slabs, dim=1) * temperature**2).float()
    return kl.unflatten(1, student.shape[2:]), kl.new_empty(0)


def cosine_distance(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    """(B, C, H, W) twice, float32 -> distance (B, H, W), float32."""
    s, t, delta, _ = directions(student.flatten(2).mT, teacher.flatten(2).mT)
    has_direction = (s != 0).any(-1) & (t != 0).any(-1)
    distance = torch.where(has_direction, delta.square().sum(-1) / 2, 1.0).float()
    return distance.unflatten(1, student.shape[2:])


DECOMPOSITIONS = {
    torch.ops.dskd_fast.contextual_affinity.tensor: contextual_affinity,
    torch.ops.dskd_fast.contextual_affinity.default: contextual_affinity,
    torch.ops.dskd_fast.cosine_distance.default: cosine_distance,
}


def _rows(a: Tensor, c: Tensor) -> Tensor:
    """KL / T^2 (B, R) of the teacher's logits and the student's differences from them, (B, R, N) each, float64."""
    weight = a.exp()
    z = weight.sum(-1)
    mean = (weight * c).sum(-1) / z
    tail = torch.where(c.abs() < _SERIES_RADIUS, c * c * (0.5 + c / 6), c.exp() - (1 + c))
    v = (weight * tail).sum(-1) / z
    u = mean + v
    near = v - u * u * (0.5 - u * (1 / 3 - u * (0.25 - u / 5)))
    # Rounding alone could bring a KL of 0 below it.
    return torch.where(u.abs() < 1e-3, near, (1 + u).log() - mean).clamp(min=0)


def _refuse_gradient(with_gradient: bool) -> None:
    if with_gradient:
        raise NotImplementedError("an exported detector has no gradients: export it under torch.no_grad()")
