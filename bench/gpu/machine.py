"""The machine itself, and building the extensions for it."""

import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from bench.gpu.measure import Session, clock
from dskd_fast.backends import native_build
from dskd_fast.device import has_fast_bf16
from dskd_fast.ops import dispatch
from dskd_fast.versions import commit, versions

_DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
_PACKAGES = ("dskd-fast", "torch", "triton", "numpy", "timm", "torchvision", "scipy", "scikit-learn", "ninja", "pytest")


def build(session: Session) -> None:
    """Each process builds one extension, or says why it cannot be had; where it was built ahead, that one is taken."""

    def load(name: str) -> dict[str, Any]:
        reason = None
        try:
            native_build.load(name)
        except ImportError as error:
            reason = str(error)
        state = native_build.state(name)
        library = os.path.basename(state.library) if state else ""
        return {"reason": reason, "library": library}

    name = native_build.EXTENSIONS[session.process]
    if not session.begin:
        session.each([({"extension": name}, lambda: load(name))])


def device(session: Session) -> None:
    """Versions, the device, and what it reaches in plain products and copies."""
    session.each(
        [
            ({"what": "versions"}, lambda: {"facts": {"commit": commit()} | versions(*_PACKAGES) | _compilers()}),
            ({"what": "device"}, lambda: {"facts": _facts(session.device)}),
            ({"what": "backends"}, lambda: {"facts": _backends(session)}),
            *(({"what": "product", "precision": name}, lambda name=name: product(session, name)) for name in _DTYPES),
            ({"what": "copy"}, lambda: copy(session)),
        ]
    )


def product(session: Session, precision: str) -> dict[str, Any]:
    """One square matrix product: what all times are related to."""
    n, dtype = session.plan.square, _DTYPES[precision]
    left, right = (torch.randn(n, n, device=session.device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        found = clock(lambda k: torch.matmul(left, right), session.plan)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return found | {"side": n, "tflops": 2 * n**3 / found["ms"] / 1e9}


def copy(session: Session) -> dict[str, Any]:
    """Bytes read and written by a copy in the device's memory."""
    source = torch.randn(session.plan.square, session.plan.square, 4, device=session.device)
    target = torch.empty_like(source)
    found = clock(lambda k: target.copy_(source), session.plan)
    return found | {"gigabytes_per_second": 2 * source.nbytes / found["ms"] / 1e6}


def _facts(device: torch.device) -> dict[str, Any]:
    host = {"system": platform.platform(), "cores": os.cpu_count(), "bf16": has_fast_bf16(device)}
    if device.type != "cuda":
        return host | {"name": platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    return host | {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory, GiB": properties.total_memory / 2**30,
        "L2, MiB": getattr(properties, "L2_cache_size", 0) / 2**20,
        "CUDA of PyTorch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "driver and clocks": _says("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit"),
    }


def _backends(session: Session) -> dict[str, str]:
    """Whether each serves a small call, the one that has to be built left out."""
    x = torch.empty(1, 64, 8, 8, device=session.device)
    names = [name for name in session.plan.backends if name not in native_build.EXTENSIONS]
    return {name: dispatch.refusal(name, x, x, "bf16") or "serves" for name in names}


def _compilers() -> dict[str, str | None]:
    return {program: _says(program, "--version") for program in ("nvcc", "c++")}


def _says(program: str, *arguments: str) -> str | None:
    """The telling line of what a program prints, None where there is none of that name."""
    if shutil.which(program) is None:
        return None
    query = ["--format=csv,noheader"] if program == "nvidia-smi" else []
    done = subprocess.run([program, *arguments, *query], capture_output=True, text=True, timeout=10)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    release = [line for line in lines if "release" in line]
    return (release or lines or [f"code {done.returncode}"])[0]
