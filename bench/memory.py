"""Extra memory of a call, measured: what the process grows by beyond its inputs and outputs."""

import ctypes
import multiprocessing
import os
import sys
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


def extra_bytes(kind: str, index: int, shape: tuple[int, ...], mode: str, device: torch.device) -> tuple:
    """(bytes, None), or (None, why it was not measured), of the contestant `index` of a kind.

    On a CPU a process of its own makes the call once to load what it needs, gives back all free memory, and makes it
    again: the highest resident size during that call, less that before it and the outputs' bytes. On a GPU it is
    PyTorch's own count.
    """
    give_back(device)  # what this process keeps, the one that measures may need
    if device.type == "cuda":
        return _measure_cuda(kind, index, shape, mode, device), None
    if sys.platform != "linux":
        return None, "the peak of a process can be reset on Linux alone"
    # A pool of one: what a contestant leaves behind is gone with its process.
    with _context().Pool(1) as pool:
        return pool.apply(_measure, (kind, index, shape, mode, torch.get_num_threads())), None


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


def _contestant(kind: str, index: int):
    return (field.COSINE if kind == "cosine" else field.AFFINITY)[index].make()


def _measure(kind: str, index: int, shape: tuple[int, ...], mode: str, threads: int) -> int:
    torch.set_num_threads(threads)
    student, teacher = features(shape, 1.0, torch.device("cpu"))
    function = _contestant(kind, index)
    first = run(function, student, teacher, mode)
    outputs = sum(x.nbytes for x in first if x is not None)
    del first
    give_back(torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run(function, student, teacher, mode)
    return max(0, _status("VmHWM") - before - outputs)


def _measure_cuda(kind: str, index: int, shape: tuple[int, ...], mode: str, device: torch.device) -> int:
    student, teacher = features(shape, 1.0, device)
    function = _contestant(kind, index)
    outputs = sum(x.nbytes for x in run(function, student, teacher, mode) if x is not None)
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(function, student, teacher, mode)
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before - outputs


def _status(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field_name}")
