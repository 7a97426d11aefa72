"""Where and in which number format the networks run."""

import contextlib
from collections.abc import Iterator

import torch

from dskd_fast.errors import UserError

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "tf32", "bf16")


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA if there is a usable GPU, else the CPU.

    Raises:
        UserError: "cuda" was asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch finds no usable GPU here: use --device cpu or auto")
    return torch.device(name)


@contextlib.contextmanager
def numerics(precision: str, device: torch.device) -> Iterator[None]:
    """Run networks and losses in `precision`: "fp32", "tf32" (matrix products only) or "bf16" (autocast)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
