"""The "cpu" backend: the C++ kernels of csrc/cpu, built at first use (`dskd_fast.backends.native_build`)."""

import torch
from torch import Tensor

from dskd_fast.backends import native_build
from dskd_fast.backends.common import PreparedKeys, accumulation_dtype, dtype_refusal, outputs

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refusal(student: Tensor, teacher: Tensor, precision: str | None) -> str | None:
    """Why this backend cannot serve a call, None if it can; precision None stands for the cosine distance."""
    if student.device.type != "cpu":
        return f"it does not run on {student.device.type} devices"
    if (reason := dtype_refusal(student, teacher, _DTYPES)) is not None:
        return reason
    try:
        native_build.load("cpu")
    except ImportError as error:
        return str(error)
    return None


def contextual_affinity(
    student: Tensor, teacher: Tensor, temperature: float, precision: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """KL map and, if wanted, its gradient; see `dskd_fast.backends`."""
    kl, gradient = outputs(student, accumulation_dtype(student, teacher, precision), with_gradient)
    torch.ops.dskd_fast_cpu.contextual_affinity(student, teacher, temperature, precision, kl, gradient)
    return kl, gradient


def cosine_distance(student: Tensor, teacher: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cosine distance map and, if weights are given, its gradient; see `dskd_fast.backends`."""
    distance, gradient = outputs(student, accumulation_dtype(student, teacher, "fp32"), weights is not None)
    torch.ops.dskd_fast_cpu.cosine_distance(student, teacher, distance, weights, gradient)
    return distance, gradient


def distillation_refusal(student: Tensor, teacher: Tensor, keys: Tensor | PreparedKeys, precision: str) -> str | None:
    """Why this backend cannot serve a distillation against any keys, None if it can."""
    return "it has no kernels for keys other than the teacher's own"
