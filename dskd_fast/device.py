"""Where and in which number format the networks run."""

import contextlib
import ctypes
import re
import sys
import threading
from collections.abc import Iterator

import torch

from dskd_fast.errors import UserError

# Precision is a setting of the whole process: two threads that changed it at once would compute in each other's, and
# leave one behind.
_SETTINGS_LOCK = threading.RLock()


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


def has_fast_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware; where it does not, bf16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older torch cannot tell: then float32, which is right everywhere.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in the words of Python, of PyTorch's CPU allocator or of CUDA, that memory ran out."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|can't allocate memory", str(error)))


def keep_freed_memory() -> None:
    """Have the process keep the memory it frees, for the rest of its life.

    A step on a CPU allocates the same gigabytes as the one before. glibc gives large blocks back when they are freed,
    and the system clears them page by page when they are wanted again: up to a third of a step.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never


@contextlib.contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Have cuDNN take algorithms that give the same bits every time; all else in a training does so anyway."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def numerics(precision: str, device: torch.device) -> Iterator[None]:
    """Run networks and losses in `precision`: "fp32", "tf32" (where the device has it) or "bf16" (autocast).

    One thread at a time: another that wants to enter waits.
    """
    with _SETTINGS_LOCK, _settings(precision, device):
        yield


@contextlib.contextmanager
def _settings(precision: str, device: torch.device) -> Iterator[None]:
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        # The host program uses torch.backends.*.fp32_precision, with which this older setting must not be mixed: its
        # own choice then stands.
        with autocast:
            yield
        return
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    # Convolutions have a setting of their own, which is on by default.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        with autocast:
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
