"""Extra memory of a call, measured: what the process grows by beyond its inputs and outputs."""

import ctypes
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from bench import contestants as field
from bench.work import features, run, synchronise


def give_back(device: torch.device) -> None:
    """Give memory that is free, but kept for later, back to the system or the GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's alone
        trim(0)


def extra_bytes(prepare: Callable, arguments: tuple, device: torch.device, is_warm: bool = True) -> tuple:
    """(bytes, None), or (None, why it was not measured), of the call that `prepare(*arguments, device)` returns.

    The call returns its outputs. On a CPU a process of its own makes it once to load what it needs, gives back all free
    memory, and makes it again: the highest resident size during that call, less that before it and the outputs' bytes.
    On a GPU it is PyTorch's own count. `is_warm` False leaves the first call out, of what is large and slow.
    """
    give_back(device)  # what this process keeps, the one that measures may need
    if device.type == "cuda":
        return _measure_cuda(prepare(*arguments, device), device), None
    if sys.platform != "linux":
        return None, "the peak of a process can be reset on Linux alone"
    # A pool of one: what a contestant leaves behind is gone with its process.
    with _context().Pool(1) as pool:
        return pool.apply(_measure, (prepare, arguments, torch.get_num_threads(), is_warm)), None


def call_of(kind: str, index: int, shape: tuple[int, ...], mode: str, device: torch.device) -> Callable:
    """The call of a contestant of one of the paper's losses."""
    student, teacher = features(shape, 1.0, device)
    function = (field.COSINE if kind == "cosine" else field.AFFINITY)[index].make()
    return functools.partial(run, function, student, teacher, mode)


@cache
def _context():
    # Blocks of this size and more are mapped one by one, so that what is freed leaves the process. Both variables are
    # read when the server of processes starts.
    needed = {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    before = {name: os.environ.get(name) for name in needed}
    os.environ.update(needed)
    try:
        context = multiprocessing.get_context("forkserver")
        # PyTorch imports its compiler at the first call of any operator that is written in Python: 2 s a process.
        context.set_forkserver_preload(["bench.memory", "torch._dynamo"])
        with context.Pool(1) as pool:
            pool.apply(torch.get_num_threads)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def _measure(prepare: Callable, arguments: tuple, threads: int, is_warm: bool) -> int:
    torch.set_num_threads(threads)
    call = prepare(*arguments, torch.device("cpu"))
    if is_warm:
        call()
    give_back(torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    outputs = sum(x.nbytes for x in call() if x is not None)
    return max(0, _status("VmHWM") - before - outputs)


def _measure_cuda(call: Callable, device: torch.device) -> int:
    outputs = sum(x.nbytes for x in call() if x is not None)
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before - outputs


def _status(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field_name}")
