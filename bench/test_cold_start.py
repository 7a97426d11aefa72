"""What a new process pays before its first result."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from bench.lab import row

_ROOT = Path(__file__).resolve().parents[1]
_CALL = """
import torch
x = torch.rand(1, 64, 16, 16)
"""
_OURS = (
    _CALL + "from dskd_fast.functional import contextual_affinity\ncontextual_affinity(x, x.flip(0), backend={!r})\n"
)
_EAGER = _CALL + "from bench.contestants import textbook\ntextbook(x, x)\n"
_COMPILED = _CALL + "from bench.contestants import textbook\ntorch.compile(textbook)(x, x)\n"


class Case(NamedTuple):
    contestant: str
    script: str
    ours: bool
    builds: bool = False

    @property
    def id(self) -> str:
        return self.contestant


def cases(is_full: bool) -> list[Case]:
    found = [
        Case("import torch", "import torch", False),
        Case("import dskd_fast", "import dskd_fast", True),
        Case("first call, cpu", _OURS.format("cpu"), True),
        Case("first call ever: the cpu kernels are built", _OURS.format("cpu"), True, builds=True),
    ]
    if is_full:
        found.append(Case("first call, eager", _EAGER, False))
        found.append(Case("first call, torch", _OURS.format("torch"), True))
        found.append(Case("first call, torch.compile of eager, empty cache", _COMPILED, False, builds=True))
    return found


def test_cold_start(benchmark, lab, case, tmp_path):
    info = row("cold", "a new process", "start", case.contestant, ours=case.ours)
    environment = dict(os.environ)
    if case.builds:
        environment |= {"DSKD_FAST_CACHE": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def start() -> None:
        command = [sys.executable, "-c", case.script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=_ROOT)
        if done.returncode != 0:
            said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
            lab.leave_out(info, "cold start", f"it failed: {said[:200]}")

    benchmark.group = "cold start"
    benchmark.extra_info = info
    if case.builds:
        benchmark.pedantic(start, rounds=1)
    else:
        start()  # whatever is built or cached at a first start is another row's
        benchmark.pedantic(start, rounds=5 if lab.is_full else 2)
