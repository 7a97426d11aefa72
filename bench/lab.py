"""The session's laboratory: gates, times and measures contestants, and keeps what pytest-benchmark has no place for."""

import datetime
import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from bench import accuracy, memory
from bench.contestants import Contestant
from bench.work import UNITS, Work, features, run, synchronise

# A contestant is run until this many seconds have passed, but at least and at most so many times.
_SECONDS = {False: 0.5, True: 3.0}
_ROUNDS = (3, 100)
# What takes longer than this is run once.
_SLOW = 8.0
_OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Lab:
    """What is measured once and used by several benchmarks of a session.

    Attributes:
        device: on which all runs.
        not_timed: what was not timed, with the reason.
    """

    def __init__(self, device: torch.device, is_full: bool) -> None:
        self.device = device
        self.is_full = is_full
        self.not_timed: list[dict] = []
        self._products: dict[tuple, float] = {}
        self._verdicts: dict[tuple, tuple] = {}

    def compare(self, benchmark, kind: str, index: int, contestant: Contestant, work: Work, mode: str) -> None:
        """Benchmark a contestant on a work, or note why not."""
        group = f"{kind}: {work.label}, {'x'.join(map(str, work.shape))}, {mode}"
        info = row(
            kind,
            work.label,
            mode,
            contestant.name,
            contestant.precision,
            ours=contestant.ours,
            reference=(contestant.name, contestant.precision) == ("eager", "float32"),
            shape=work.shape,
        )
        kernel = "cosine" if kind == "cosine" else "affinity"
        if reason := contestant.refusal(work.shape, self.device, mode != "scoring", self._free_memory()):
            self.leave_out(info, group, reason)
        try:
            function, found, complaint = self._verdict(kernel, index, contestant, work.shape)
        except Exception as error:
            if contestant.ours:
                raise
            self.leave_out(
                info,
                group,
                f"it failed: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}",
            )
        info["errors"] = found
        if complaint is not None:
            self.leave_out(info, group, complaint)
        info["extra_bytes"], info["extra_bytes_note"] = memory.extra_bytes(kernel, index, work.shape, mode, self.device)
        student, teacher = features(work.shape, 1.0, self.device)
        if not benchmark.enabled:
            benchmark(run, function, student, teacher, mode)
            return
        self.time(benchmark, group, info, lambda: run(function, student, teacher, mode))
        if kernel == "affinity":
            seconds = self.product_seconds(work.shape, contestant.precision)
            info["product_seconds"] = seconds
            info["percent_of_product"] = 100 * UNITS[mode] * seconds / benchmark.stats.stats.median
            benchmark.extra_info = info

    def time(self, benchmark, group: str, info: dict, call: Callable[[], object], is_warm: bool = False) -> None:
        """Time a call, after one that is not counted unless it `is_warm`."""

        def waited() -> None:
            call()
            synchronise(self.device)

        if not is_warm:
            waited()
        started = time.perf_counter()
        waited()
        seconds = time.perf_counter() - started
        rounds = min(_ROUNDS[1], max(_ROUNDS[0], int(_SECONDS[self.is_full] / seconds)))
        benchmark.group = group
        benchmark.extra_info = info
        benchmark.pedantic(waited, rounds=1 if seconds > _SLOW else rounds)

    def leave_out(self, info: dict, group: str, reason: str) -> None:
        """Note that something gets no time, and end its test as skipped."""
        kept = ("kind", "work", "shape", "mode", "contestant", "precision", "ours")
        self.not_timed.append({**{key: info.get(key) for key in kept}, "group": group, "reason": reason})
        pytest.skip(f"{info['contestant']} ({info['precision']}): {reason}")

    def product_seconds(self, shape: tuple[int, ...], precision: str) -> float:
        """Time of one (B, N, C) x (B, C, N) product with operands of a precision, at most 4,096 rows at a time."""
        dtype = _OPERANDS.get(precision, torch.float32)
        if self.device.type == "cpu" and dtype == torch.float16:
            dtype = torch.float32  # processors multiply it as that, or slower
        if (key := (shape, dtype, precision == "tf32")) in self._products:
            return self._products[key]
        batch, channels, n = shape[0], shape[1], shape[2] * shape[3]
        rows = min(n, 4096)
        left = torch.randn(batch, rows, channels, device=self.device).to(dtype)
        right = torch.randn(batch, n, channels, device=self.device).to(dtype).mT
        out = torch.empty(batch, rows, n, device=self.device, dtype=dtype)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        try:
            seconds = []
            while len(seconds) < 5 or (sum(seconds) < 0.3 and len(seconds) < 100):
                started = time.perf_counter()
                torch.bmm(left, right, out=out)
                synchronise(self.device)
                seconds.append(time.perf_counter() - started)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        self._products[key] = sorted(seconds)[len(seconds) // 2] * n / rows
        return self._products[key]

    def _verdict(self, kernel: str, index: int, contestant: Contestant, shape: tuple[int, ...]) -> tuple:
        key = (kernel, index, shape)
        if key not in self._verdicts:
            function = contestant.make()
            found = accuracy.errors(function, kernel, shape, self.device)
            self._verdicts[key] = (function, found, accuracy.complaint(contestant, found, shape))
        return self._verdicts[key]

    def _free_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return psutil.virtual_memory().available


def row(
    kind: str,
    work: str,
    mode: str,
    contestant: str,
    precision: str | None = None,
    *,
    ours: bool,
    reference: bool = False,
    shape: tuple[int, ...] | None = None,
    images: int | None = None,
) -> dict:
    """What `bench.report` knows of a row besides its time, before anything is measured."""
    return {
        "kind": kind,
        "work": work,
        "shape": shape and list(shape),
        "mode": mode,
        "contestant": contestant,
        "precision": precision,
        "ours": ours,
        "reference": reference,
        "images": images,
        "errors": None,
        "extra_bytes": None,
        "extra_bytes_note": None,
        "product_seconds": None,
        "percent_of_product": None,
    }


def environment(device: torch.device) -> dict:
    """Machine, versions and commit of a run."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or None
    if commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    return {
        "commit": commit,
        "command": " ".join(["pytest", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **{name: version(name) for name in ("torch", "triton", "pykeops", "anomalib")},
    }
