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
    if isinstance(keys, Tensor) and (reason := dtype_refusal(keys, keys, _DTYPES)) is not None:
        return reason
    return refusal(student, teacher, precision)


def prepare_keys(keys: Tensor, normalize: bool, precision: str, centre: Tensor | None = None) -> list[Tensor]:
    """Keys (B', K, C) as the kernels read them, the centre (B', C) last; see `dskd_fast.backends`."""
    return _prepare(keys, None, normalize, precision, centre, is_wide=False, with_rows=True)


def update_keys(packed: list[Tensor], keys: Tensor, start: int, normalize: bool, precision: str) -> None:
    """Write keys (B', P, C) over the prepared ones from `start` on, about the same centre."""
    torch.ops.dskd_fast_cpu.update_distillation_keys(packed, keys, start, normalize, precision)


def affinity_distillation(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor | PreparedKeys,
    student_temperature: float,
    teacher_temperature: float,
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
    counts, count = None, keys.shape[1]
    key_mask, row_mask = (None if mask is None else mask.contiguous() for mask in (key_mask, row_mask))
    if isinstance(keys, Tensor):
        left_out = None
        # Keys of an image's own that are left out are not even prepared.
        if key_mask is not None and len(key_mask) <= len(keys):
            left_out = key_mask.expand(len(keys), -1).contiguous()
            key_mask, counts = None, left_out.sum(1)
        packed = _prepare(keys, left_out, normalize, precision, None, dtype == torch.float64, with_gradient)
    else:
        packed = keys.packed
    torch.ops.dskd_fast_cpu.affinity_distillation(
        student, teacher, packed, count, counts, student_temperature, teacher_temperature, key_mask, row_mask,
        normalize, precision, kl, gradient,
    )  # fmt: skip
    return kl, gradient


def _prepare(
    keys: Tensor,
    mask: Tensor | None,
    normalize: bool,
    precision: str,
    centre: Tensor | None,
    is_wide: bool,
    with_rows: bool,
) -> list[Tensor]:
    return torch.ops.dskd_fast_cpu.prepare_distillation_keys(
        keys, mask, centre, normalize, precision, is_wide and precision == "fp32", with_rows
    )
