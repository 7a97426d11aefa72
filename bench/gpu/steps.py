"""The steps by name: each is a function of its `Session`."""

import importlib
from pathlib import Path

import torch

from bench.gpu.measure import Session, exit_code
from bench.gpu.plan import Plan

# Modules are imported with their step, so that what one of them lacks is missing in its own steps alone.
_MODULES = {
    "build": "machine",
    "device": "machine",
    "correct": "losses",
    "warm": "ahead",
    "times": "losses",
    "keys": "keys",
    "key_times": "keys",
    "model": "networks",
    "train": "networks",
    "blocks": "losses",
    "tests": "suite",
}


def run(name: str, plan: Plan, out: Path, process: int, processes: int, begin: int) -> int:
    """Do a process's part of a step; returns its exit code."""
    session = Session(name, plan, out, process, processes, begin)
    if plan.device == "cuda" and name != "build" and not torch.cuda.is_available():
        print("PyTorch finds no usable GPU here: --rehearse does all on the CPU")
        return 2
    if plan.is_rehearsal:
        torch.set_num_threads(1)
        # Compiling takes minutes on a CPU, and is left out there.
        torch.compiler.set_stance("force_eager")
    step = getattr(importlib.import_module(f"bench.gpu.{_MODULES[name]}"), name)
    return exit_code(lambda: step(session))
