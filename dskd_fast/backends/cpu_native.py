"""The "cpu" backend: the C++ kernels of csrc/cpu, built at first use (`dskd_fast.backends.native_build`)."""

import torch
from torch import Tensor

from dskd_fast.backends import accumulation_dtype, native_build

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refusal(student: Tensor, teacher: Tensor, precision: str | None) -> str | None:
    """Why this backend cannot serve a call, None if it can; precision None stands for the cosine distance."""
    for x in (student, teacher):
        if x.device.type != "cpu":
            return f"it does not run on {x.device.type} devices"
        if x.dtype not in _DTYPES:
            return f"it does not take {str(x.dtype).removeprefix('torch.')}"
    try:
        native_build.load("cpu")
    except ImportError as error:
        return str(error)
    return None


def contextual_affinity(
    student: Tensor, teacher: Tensor, temperature: float, precision: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """KL map and, if wanted, its gradient; see `dskd_fast.backends`."""
    kl, gradient = _outputs(student, accumulation_dtype(student, teacher, precision), with_gradient)
    torch.ops.dskd_fast_cpu.contextual_affinity(student, teacher, temperature, precision, kl, gradient)
    return kl, gradient


def cosine_distance(student: Tensor, teacher: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Cosine distance map and, if wanted, its gradient; see `dskd_fast.backends`."""
    distance, gradient = _outputs(student, accumulation_dtype(student, teacher, "ieee"), with_gradient)
    torch.ops.dskd_fast_cpu.cosine_distance(student, teacher, distance, gradient)
    return distance, gradient


def _outputs(student: Tensor, dtype: torch.dtype, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    values = torch.empty((student.shape[0], *student.shape[2:]), dtype=dtype)
    return values, torch.empty_like(student, dtype=dtype) if with_gradient else None
