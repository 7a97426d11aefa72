"""Implementations of the operators, one module per backend.

Each module has

    contextual_affinity(student, teacher, temperature, precision, with_gradient) -> map, gradient or None
    cosine_distance(student, teacher, with_gradient) -> map, gradient or None
    refusal(student, teacher, precision) -> why it cannot serve this call, None if it can; precision None: the cosine

on tensors (B, C, H, W) of any strides, of one device and any floating dtypes it does not refuse. The temperature is a
number in `TEMPERATURE_RANGE`, or a tensor () in the memory of a device that is not the CPU: its value is not read back,
since that would stall the queue; out of range it makes all results NaN. The map is (B, H, W), contiguous, the gradient
of each entry with respect to its own student vector (B, C, H, W), laid out like `torch.empty_like(student)`, both in
`accumulation_dtype`. Inputs are never written to. Autograd, argument checks and the choice among backends live above,
in `dskd_fast.ops`.
"""

import torch
from torch import Tensor

TEMPERATURE_RANGE = (0.01, 100.0)
# A float32's rounding of the ends is in range, too: it has no 0.01.
TEMPERATURE_LIMITS = (0.00999999, 100.0001)


def accumulation_dtype(student: Tensor, teacher: Tensor, precision: str) -> torch.dtype:
    """float64 where an input is float64 and nothing is to be rounded below it, else float32."""
    double = precision == "ieee" and torch.float64 in (student.dtype, teacher.dtype)
    return torch.float64 if double else torch.float32


def outputs(student: Tensor, dtype: torch.dtype, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Memory for the map (B, H, W) and, if wanted, for the gradient, laid out as they are to be."""
    values = torch.empty((student.shape[0], *student.shape[2:]), dtype=dtype, device=student.device)
    return values, torch.empty_like(student, dtype=dtype) if with_gradient else None


def dtype_refusal(student: Tensor, teacher: Tensor, accepted: tuple[torch.dtype, ...]) -> str | None:
    """The refusal of a backend that does not take an input's dtype, None if it takes both."""
    for dtype in (student.dtype, teacher.dtype):
        if dtype not in accepted:
            return f"it does not take {str(dtype).removeprefix('torch.')}"
    return None
