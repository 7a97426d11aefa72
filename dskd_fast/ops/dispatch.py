"""Which backend serves a call, and which rounding `precision=None` stands for."""

import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dskd_fast.backends.common import PreparedKeys
from dskd_fast.errors import UserError

# Each is a module of `dskd_fast.backends`.
BACKENDS = ("triton", "cuda", "cpu", "torch")
# In the order of preference. Under Triton's interpreter "triton" takes CPU tensors, too, but only if asked: it is slow.
AUTOMATIC = {"cuda": ("triton", "cuda", "torch"), "cpu": ("cpu", "torch")}
AUTOMATIC_ELSEWHERE = ("torch",)
BACKEND_VARIABLE = "DSKD_FAST_BACKEND"

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
# PyTorch's setting for float32 products, looked up when the operator runs: torch.compile can neither trace it nor
# notice that it has changed.
AMBIENT = "ambient"


class BackendError(UserError, RuntimeError):
    """A backend that was asked for by name cannot serve a call, or the variable names none."""


class Choice(NamedTuple):
    """The backend for a call, and those that were preferred to it with the reason why they cannot serve it."""

    name: str
    passed_over: dict[str, str]


def load(name: str) -> ModuleType:
    """The module of one of `BACKENDS`.

    Raises:
        ImportError: what it is built on is missing.
    """
    # Imported late: the kernels are defined when they are imported, and most processes need one backend only.
    return importlib.import_module(f"dskd_fast.backends.{name}")


def refusal(
    name: str,
    student: Tensor,
    teacher: Tensor,
    precision: str | None,
    keys: Tensor | PreparedKeys | None = None,
) -> str | None:
    """Why a backend cannot serve a call, None if it can.

    Precision None stands for the cosine distance; keys are those of the distillation against any keys.
    """
    try:
        module = load(name)
    except ImportError as error:
        if error.name == "dskd_fast.kernels":
            return "dskd_fast is imported from its repository, without its kernels: pip install -e . there"
        return str(error)
    except Exception as error:  # a broken installation raises anything
        return f"importing it failed: {type(error).__name__}: {error}"
    if keys is not None:
        return module.distillation_refusal(student, teacher, keys, precision)
    return module.refusal(student, teacher, precision)


def choose(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    precision: str | None,
    keys: Tensor | PreparedKeys | None = None,
) -> Choice:
    """The backend that serves a call on (B, C, H, W) tensors.

    Args:
        backend: one of `BACKENDS`, which is then used or is an error; or "auto": the one that the environment variable
            DSKD_FAST_BACKEND names, under the same rule, or else the first of the device's that can serve the call.
        student, teacher, precision, keys: of the call, as for `refusal`.

    Raises:
        ValueError: the backend is not known.
        BackendError: the named backend cannot serve the call, or the variable's is not known.
    """
    check_backend(backend)
    asked, remedy = f"backend={backend!r}", "leave the choice to backend='auto'"
    if backend == "auto" and (default := os.environ.get(BACKEND_VARIABLE)):
        check_variable(default)
        asked, remedy, backend = f"{BACKEND_VARIABLE}={default}", "unset it", default
    if backend != "auto":
        if (reason := refusal(backend, student, teacher, precision, keys)) is not None:
            raise BackendError(f"{asked} cannot serve this call: {reason}; {remedy}")
        return Choice(backend, {})
    passed_over: dict[str, str] = {}
    for name in AUTOMATIC.get(student.device.type, AUTOMATIC_ELSEWHERE):
        if (reason := refusal(name, student, teacher, precision, keys)) is None:
            return Choice(name, passed_over)
        passed_over[name] = reason
    raise BackendError(f"no backend can serve this call: {passed_over}")


def layout(name: str, device: torch.device) -> str:
    """What `PreparedKeys` of a backend on a device are marked with; the number rises when a backend's form changes."""
    kind = device.type
    if kind in ("cpu", "cuda"):
        of_cpu = torch.backends.cpu.get_cpu_capability
        kind += f" ({of_cpu() if kind == 'cpu' else torch.cuda.get_device_name(device)})"
    return f"layout 1 of backend {name!r} on {kind}"


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or one of `BACKENDS`."""
    if backend != "auto" and backend not in BACKENDS:
        accepted = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend={backend!r} is not known: use one of {accepted}")


def check_variable(value: str) -> None:
    """Raise BackendError unless the value of DSKD_FAST_BACKEND is one of `BACKENDS`."""
    if value not in BACKENDS:
        raise BackendError(f"{BACKEND_VARIABLE}={value} is not known: use one of {', '.join(BACKENDS)}, or unset it")


def resolve_precision(precision: str | None, student: Tensor, teacher: Tensor) -> str:
    """Turn `precision` into one of `PRECISIONS`, or `AMBIENT`.

    None follows PyTorch: under autocast its dtype; else bf16 or fp16 where both inputs have that dtype; else `AMBIENT`.
    float64 inputs are never rounded unless a precision is forced.
    """
    if precision is not None:
        precision = current_name(precision)
        if precision not in PRECISIONS:
            accepted = ", ".join(repr(name) for name in PRECISIONS)
            raise ValueError(f"precision={precision!r} is not known: use None or one of {accepted}")
        return precision
    if torch.float64 in (student.dtype, teacher.dtype):
        return "fp32"
    device = student.device.type
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    # Which devices have autocast the compiler of torch 2.11 cannot trace; of those that compiled code runs on, all do.
    has_autocast = device != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device)
    if has_autocast and torch.is_autocast_enabled(device):
        return half.get(torch.get_autocast_dtype(device), "fp32")
    if student.dtype == teacher.dtype and student.dtype in half:
        return half[student.dtype]
    return AMBIENT


def current_name(precision: str) -> str:
    """The precision; "fp32" was called "ieee" before, as callers and exported programs still may."""
    return "fp32" if precision == "ieee" else precision


def ambient_precision(device: str) -> str:
    """The precision that PyTorch is set to use for float32 products.

    `torch.get_float32_matmul_precision()` "highest" is "fp32", "high" is "tf32" on CUDA and "fp32" where there is no
    tf32, "medium" is "bf16".
    """
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer torch.backends.*.fp32_precision, which this function refuses to read
        backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
        setting = {"tf32": "high", "bf16": "medium"}.get(backend.matmul.fp32_precision, "highest")
    return {"highest": "fp32", "high": "tf32" if device == "cuda" else "fp32", "medium": "bf16"}[setting]
