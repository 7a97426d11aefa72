"""What this machine has, and which backend serves which calls here and why."""

import os
import platform
import sys
from typing import NamedTuple

import torch

import dskd_fast
from dskd_fast.backends import native_build
from dskd_fast.errors import UserError
from dskd_fast.ops import dispatch
from dskd_fast.versions import versions


class Service(NamedTuple):
    """What a backend says to a call: `reason` is None if it can serve it, `is_choice` whether it would be chosen."""

    device: str
    dtype: str
    backend: str
    reason: str | None
    is_choice: bool


def description() -> dict[str, str]:
    """What is installed and what it runs on, by name."""
    found = {"dskd-fast": dskd_fast.__version__, "Python": platform.python_version(), "system": platform.platform()}
    installed = versions("torch", "triton", "torchvision", "timm", "numpy")
    found |= {package: version or "not installed" for package, version in installed.items()}
    found["CUDA of torch"] = torch.version.cuda or torch.version.hip or "none (a CPU build)"
    found["CPU"] = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        found["GPU"] = "torch finds none that it can use"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found[f"cuda:{index}"] = (
            f"{properties.name}, {memory:.0f} GiB, capability {properties.major}.{properties.minor}"
        )
    found["folder"] = os.path.dirname(dskd_fast.__file__)
    found["interpreter"] = sys.executable
    return found


def services() -> list[Service]:
    """Every backend's answer to a small call of each kind, on the CPU and each GPU."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    found = []
    for device in devices:
        for dtype in (torch.float32, torch.float64):
            example = torch.empty((1, 64, 8, 8), device=device, dtype=dtype)
            try:
                choice = dispatch.choose("auto", example, example, "fp32").name
            except UserError:
                choice = None
            for name in dispatch.BACKENDS:
                reason = dispatch.refusal(name, example, example, "fp32")
                label = "float64" if dtype == torch.float64 else "float32, bfloat16, float16"
                found.append(Service(device, label, name, reason, name == choice))
    return found


def builds() -> list[str]:
    """What became of each extension, a line each; to be asked after `services`, which builds what is needed."""
    found = []
    for name in native_build.EXTENSIONS:
        state = native_build.state(name)
        result = "not needed here, so not built" if state is None else state.reason or state.library
        found.append(f"{name} kernels: {result}")
    return found


def default_backend() -> str:
    """In a sentence, what backend="auto" does here.

    Raises:
        UserError: DSKD_FAST_BACKEND names none.
    """
    default = os.environ.get(dispatch.BACKEND_VARIABLE)
    if not default:
        return (
            f"{dispatch.BACKEND_VARIABLE} is not set: a call takes the first of its device's backends that can serve it"
        )
    dispatch.check_variable(default)
    return f"{dispatch.BACKEND_VARIABLE}={default}: every call takes it, and is an error where it cannot serve"
