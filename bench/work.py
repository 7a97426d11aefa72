"""What is computed: shapes, and features for them that are the same in every process."""

from typing import NamedTuple

import torch
from torch import Tensor

N_PHOTOGRAPHS, BATCH = 24, 8
"""From image files to decisions: files, and images in a batch."""
MODES = ("scoring", "forward", "forward+backward")
# What the mathematics needs, in N x N x C matrix products: both affinities, and the gradient's. All contestants are
# credited with the same, whatever they compute.
UNITS = {"scoring": 2, "forward": 2, "forward+backward": 3}


class Work(NamedTuple):
    """A shape (B, C, H, W) and how it is called; `is_quick` ones are run without --bench-full."""

    label: str
    shape: tuple[int, int, int, int]
    is_quick: bool = False

    @property
    def positions(self) -> int:
        return self.shape[2] * self.shape[3]


_PAPER = ((256, 64), (512, 32), (1024, 16))
_LITE = ((144, 64), (240, 32), (672, 16))
# The cheapest first: what they take foretells what the dearer ones would.
LEVELS = sorted(
    (
        *(Work(f"256 px, level {i}", (2, c, h, h), True) for i, (c, h) in enumerate(_PAPER, 1)),
        *(Work(f"256 px, level {i}", (b, c, h, h)) for b in (1, 16) for i, (c, h) in enumerate(_PAPER, 1)),
        *(Work(f"512 px, level {i}", (1, c, 2 * h, 2 * h)) for i, (c, h) in enumerate(_PAPER, 1)),
        *(Work(f"lite teacher, 256 px, level {i}", (2, c, h, h)) for i, (c, h) in enumerate(_LITE, 1)),
    ),
    key=lambda work: work.shape[0] * work.shape[1] * work.positions**2,
)
GROWTH = tuple(Work(f"N = {side**2:,}", (1, 256, side, side), side <= 128) for side in (32, 64, 128, 256))


def features(shape: tuple[int, ...], noise: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """A student and a teacher (B, C, H, W): rectified Gaussian features, and the same with Gaussian noise of a size."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(shape, generator=generator).relu_()
    student = teacher + noise * torch.randn(shape, generator=generator)
    return student.to(device), teacher.to(device)


def run(function, student: Tensor, teacher: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
    """One call as `mode` has it: the map, and the gradient of its mean with respect to the student, if any."""
    if mode == "scoring":
        with torch.inference_mode():
            return function(student, teacher), None
    student = student.detach().requires_grad_()
    values = function(student, teacher)
    if mode == "forward+backward":
        values.mean().backward()
    return values, student.grad


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
