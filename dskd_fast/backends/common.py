"""What the backends share."""

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

# A float32's rounding of the ends of `choices.TEMPERATURE_RANGE` is in range, too: it has no 0.01.
TEMPERATURE_LIMITS = (0.00999999, 100.0001)
DISTILLATION_TEMPERATURE_LIMITS = (0.00499999, 100.0001)


class PreparedKeys(NamedTuple):
    """Keys as one backend's kernels read them, made once for many calls by `dskd_fast.functional.prepare_keys`."""

    packed: list[Tensor]
    """What this backend alone understands; the last is the centre (B', C), which was subtracted from all keys."""
    shape: tuple[int, int, int]
    """(B', K, C) of the keys that they were made of; B' is 1 where all images share them."""
    normalize: bool
    precision: str
    backend: str
    layout: str = ""
    """Which kernels can read `packed`: those of another kind of device, or of another version, cannot."""

    def to(self, *_: object, **__: object) -> NoReturn:
        """Refused: what one device's kernels read, another's may not."""
        raise TypeError("prepared keys stay on their device: move the keys, and prepare them again there")


# So that torch.load reads them with weights_only=True.
torch.serialization.add_safe_globals([PreparedKeys])


def finite_centre(centre: Tensor) -> Tensor:
    """0 in place of what is not finite: such a key may be replaced, the centre stays, and any centre is right."""
    return centre.nan_to_num(0.0, 0.0, 0.0)


def accumulation_dtype(student: Tensor, teacher: Tensor, precision: str) -> torch.dtype:
    """float64 where an input is float64 and nothing is to be rounded below it, else float32."""
    double = precision == "fp32" and torch.float64 in (student.dtype, teacher.dtype)
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
