"""Which backend serves a call, and which rounding `precision=None` stands for."""

from types import ModuleType

import torch
from torch import Tensor

from dskd_fast.backends import torch_tiled

BACKENDS: dict[str, ModuleType] = {"torch": torch_tiled}
PRECISIONS = ("ieee", "tf32", "bf16", "fp16")
# PyTorch's setting for float32 products, looked up when the operator runs: torch.compile can neither trace it nor
# notice that it has changed.
AMBIENT = "ambient"


def resolve_backend(backend: str) -> str:
    """The name of the backend that serves `backend`, which is one of `BACKENDS` or "auto"."""
    if backend == "auto":
        return "torch"
    if backend not in BACKENDS:
        accepted = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend={backend!r} is not known: use one of {accepted}")
    return backend


def resolve_precision(precision: str | None, student: Tensor, teacher: Tensor) -> str:
    """Turn `precision` into one of `PRECISIONS`, or `AMBIENT`.

    None follows PyTorch: under autocast its dtype; else bf16 or fp16 where both inputs have that dtype; else `AMBIENT`.
    float64 inputs are never rounded unless a precision is forced.
    """
    if precision is not None:
        if precision not in PRECISIONS:
            accepted = ", ".join(repr(name) for name in PRECISIONS)
            raise ValueError(f"precision={precision!r} is not known: use None or one of {accepted}")
        return precision
    if torch.float64 in (student.dtype, teacher.dtype):
        return "ieee"
    device = student.device.type
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return half.get(torch.get_autocast_dtype(device), "ieee")
    if student.dtype == teacher.dtype and student.dtype in half:
        return half[student.dtype]
    return AMBIENT


def ambient_precision(device: str) -> str:
    """The precision that PyTorch is set to use for float32 products.

    `torch.get_float32_matmul_precision()` "highest" is "ieee", "high" is "tf32" on CUDA and "ieee" where there is no
    tf32, "medium" is "bf16".
    """
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer torch.backends.*.fp32_precision, which this function refuses to read
        backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
        setting = {"tf32": "high", "bf16": "medium"}.get(backend.matmul.fp32_precision, "highest")
    return {"highest": "ieee", "high": "tf32" if device == "cuda" else "ieee", "medium": "bf16"}[setting]
