"""The session's laboratory: gates, times and measures contestants, and keeps what pytest-benchmark has no place for."""

import datetime
import functools
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil
import pytest
import torch
from torch import Tensor

from bench import accuracy, memory
from bench.contestants import AFFINITY, COSINE, Contestant
from bench.work import UNITS, Work, features, run, synchronise
from dskd_fast.device import has_fast_bf16
from dskd_fast.versions import commit, versions

# A contestant is run until this many seconds have passed, but at least and at most so many times.
_SECONDS = 0.5
_ROUNDS = (3, 100)
# What takes longer than this needs no second call to be warm.
_WARM = 1.0
# What takes longer than this is timed once, and not again in turn with what is compared with it.
_SLOW = 3.0
# What would take longer than this is not run at all: with the gate and the memory it is about ten calls.
_LONGEST = 30.0
_NOT_QUICK = "not in the quick run: --bench-full"
# After this many seconds the quick run begins no further row, so that it ends within five minutes on any machine.
_QUICK_SECONDS = 240.0
_OVER = "the quick run's time is over, on this machine: --bench-full"
_SLOW_BF16 = "this processor has no bf16 multiplication, and the quick run no time for it: --bench-full"
_REFERENCE = ("eager", "fp32")
_OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Comparison(NamedTuple):
    """A contestant of a kernel, by its index in that kernel's list, on a work in a mode."""

    kind: str
    work: Work
    mode: str
    index: int

    @property
    def kernel(self) -> str:
        return "cosine" if self.kind == "cosine" else "affinity"

    @property
    def key(self) -> tuple[str, int]:
        """What its times are kept by: the contestant, whatever the work and the mode."""
        return self.kernel, self.index

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        return COSINE if self.kernel == "cosine" else AFFINITY

    @property
    def contestant(self) -> Contestant:
        return self.contestants[self.index]

    @property
    def reference(self) -> "Comparison":
        """What speed-ups are relative to, on the same work in the same mode."""
        return self._replace(index=[c[:2] for c in self.contestants].index(_REFERENCE))

    @property
    def id(self) -> str:
        name, precision = self.contestant[:2]
        return f"{self.kind}-{self.work.label}-b{self.work.shape[0]}-{self.mode}-{name}-{precision}"

    @property
    def group(self) -> str:
        return f"{self.kind}: {self.work.label}, {'x'.join(map(str, self.work.shape))}, {self.mode}"

    def row(self) -> dict:
        name, precision = self.contestant[:2]
        return row(
            self.kind,
            self.work.label,
            self.mode,
            name,
            precision,
            ours=self.contestant.ours,
            reference=(name, precision) == _REFERENCE,
            shape=self.work.shape,
        )

    def cost(self, shape: tuple[int, ...]) -> int:
        """What the time of a call is in proportion to: B N^2 C, or B N C."""
        positions = shape[2] * shape[3]
        return shape[0] * shape[1] * positions ** (2 if self.kernel == "affinity" else 1)


class Lab:
    """What is measured once and used by several benchmarks of a session.

    Cases, of whatever module, have a `group` and a `row()`.

    Attributes:
        device: on which all runs.
        started: when it was made, by `time.monotonic`.
        not_timed: what was not timed, with the reason.
        only_full: the groups of which the quick run times nothing.
    """

    def __init__(self, device: torch.device, is_full: bool) -> None:
        self.device = device
        self.is_full = is_full
        self.not_timed: list[dict] = []
        self.only_full: list[str] = []
        self.started = time.monotonic()
        self._not_quick: set = set()
        self._verdicts: dict[tuple, tuple] = {}
        self._longest: dict[tuple, tuple[float, float, str]] = {}

    def choose(self, quick: list, full: list) -> list:
        """The cases of a session: without --bench-full also those that get a row with that reason and no time."""
        if self.is_full:
            return full
        groups = {case.group for case in quick}
        self._not_quick.update(set(full) - set(quick))
        self.only_full += dict.fromkeys(case.group for case in full if case.group not in groups)
        return [case for case in full if case.group in groups]

    def compare(self, benchmark, case: Comparison) -> None:
        """Benchmark a contestant on a work, or note why not."""
        contestant, shape, mode = case.contestant, case.work.shape, case.mode
        info = case.row()
        if reason := contestant.refusal(shape, self.device, self.free_memory()):
            self.leave_out(info, case.group, reason)
        self.leave_out_of_quick(case)
        # The gate makes calls with the gradient, whatever the mode.
        if reason := self.too_long(case.key, case.cost(shape)):
            self.leave_out(info, case.group, reason)
        try:
            function, info["errors"], complaint = self._verdict(case)
        except Exception as error:
            if contestant.ours:
                raise
            said = (str(error).strip() or "no message").splitlines()[0][:200]
            self.leave_out(info, case.group, f"it failed: {type(error).__name__}: {said}")
        if complaint is not None:
            self.leave_out(info, case.group, complaint)
        info["extra_bytes"], info["extra_bytes_note"] = memory.extra_bytes(
            memory.call_of, (case.kernel, case.index, shape, mode), self.device
        )
        student, teacher = features(shape, 1.0, self.device)
        call = functools.partial(run, function, student, teacher, mode)
        seconds = self.time(benchmark, case.group, info, call, reference=self._reference(case, student, teacher))
        if mode == "forward+backward":
            self.note_time(case.key, case.cost(shape), seconds, _shape_text(shape))
        if case.kernel == "affinity":
            n = case.work.positions
            product = self.product_seconds((shape[0], n, n, shape[1]), contestant.precision)
            info["percent_of_product"] = 100 * UNITS[mode] * product / benchmark.stats.stats.median

    def time(
        self,
        benchmark,
        group: str,
        info: dict,
        call: Callable[[], object],
        warm_up: int = 1,
        reference: Callable[[], object] | None = None,
    ) -> float:
        """Time a call, after so many or more that are not counted; returns about how many seconds it takes.

        Calls of `reference` are timed between its rounds, so that a machine whose speed changes changes both.
        """
        for _ in range(warm_up):
            seconds = self._seconds_of(call)
            if seconds > _LONGEST:
                self.leave_out(info, group, f"it takes {_duration(seconds)} a call")
        if seconds <= _WARM:
            seconds = self._seconds_of(call)
        rounds = min(_ROUNDS[1], max(_ROUNDS[0], int(_SECONDS / seconds)))
        benchmark.group = group
        benchmark.extra_info = info
        rounds = 1 if seconds > _SLOW else rounds
        if reference is None:
            benchmark.pedantic(self._waited, (call,), rounds=rounds)
            return seconds
        done, turns = itertools.count(1), []

        def take_turns() -> None:
            share = next(done) / rounds
            fewest, most = (share * count for count in _ROUNDS)
            while len(turns) < fewest or (len(turns) < most and sum(turns) < share * _SECONDS):
                turns.append(self._seconds_of(reference))

        benchmark.pedantic(self._waited, (call,), setup=take_turns, rounds=rounds)
        info["reference_seconds"] = statistics.median(turns)
        return seconds

    def leave_out(self, info: dict, group: str, reason: str) -> None:
        """Note that something gets no time, with what is known of it, and end its test as skipped."""
        self.not_timed.append({**info, "group": group, "reason": reason})
        pytest.skip(reason)

    def leave_out_of_quick(self, case) -> None:
        """End the test of a case that --bench-full alone times."""
        if self.is_full:
            return
        info = case.row()
        if case in self._not_quick:
            self.leave_out(info, case.group, _NOT_QUICK)
        if info["precision"] == "bf16" and not has_fast_bf16(self.device):
            self.leave_out(info, case.group, _SLOW_BF16)
        if time.monotonic() - self.started > _QUICK_SECONDS:
            self.leave_out(info, case.group, _OVER)

    def note_time(self, key: tuple, cost: float, seconds: float, label: str) -> None:
        """Keep what a call of `cost` took; the largest cost of a key is what others are predicted from."""
        if key not in self._longest or cost > self._longest[key][0]:
            self._longest[key] = cost, seconds, label

    def too_long(self, key: tuple, cost: float) -> str | None:
        """Why a call of `cost` would take too long, None if it would not or nothing is known."""
        expected = self._expected(key, cost)
        if expected <= _LONGEST:
            return None
        _, seconds, label = self._longest[key]
        return f"it would take about {_duration(expected)} a call (from {_duration(seconds)} for {label})"

    def is_slow(self, key: tuple, cost: float) -> bool:
        """Whether a call of `cost` is known to take so long that nothing takes turns with it."""
        return self._expected(key, cost) > _SLOW

    def _expected(self, key: tuple, cost: float) -> float:
        """Seconds of a call of `cost`, 0 where nothing is known."""
        known, seconds, _ = self._longest.get(key, (1, 0.0, ""))
        return seconds * cost / known

    def _reference(self, case: Comparison, student: Tensor, teacher: Tensor) -> Callable[[], object] | None:
        """A warm call of the reference to take turns with, None with itself and where it would take too long."""
        reference, shape = case.reference, case.work.shape
        if reference == case or reference.contestant.refusal(shape, self.device, self.free_memory()):
            return None
        if self.is_slow(reference.key, reference.cost(shape)):
            return None
        call = functools.partial(run, reference.contestant.make(), student, teacher, case.mode)
        call()
        return call

    def _waited(self, call: Callable[[], object]) -> None:
        call()
        synchronise(self.device)

    def _seconds_of(self, call: Callable[[], object]) -> float:
        started = time.perf_counter()
        self._waited(call)
        return time.perf_counter() - started

    def product_seconds(self, shape: tuple[int, ...], precision: str) -> float:
        """Time of a (B, N, C) x (B, C, K) product, shape (B, N, K, C), in a precision, from 1,024 of its N rows."""
        dtype = _OPERANDS.get(precision, torch.float32)
        if self.device.type == "cpu" and dtype == torch.float16:
            dtype = torch.float32  # processors multiply it as that, or slower
        batch, n, keys, channels = shape
        rows = min(n, 1024)
        left = torch.randn(batch, rows, channels, device=self.device).to(dtype)
        right = torch.randn(batch, keys, channels, device=self.device).to(dtype).mT
        out = torch.empty(batch, rows, keys, device=self.device, dtype=dtype)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        try:
            seconds = []
            while len(seconds) < 3 or (sum(seconds) < 0.2 and len(seconds) < 100):
                started = time.perf_counter()
                torch.bmm(left, right, out=out)
                synchronise(self.device)
                seconds.append(time.perf_counter() - started)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        return sorted(seconds)[len(seconds) // 2] * n / rows

    def _verdict(self, case: Comparison) -> tuple:
        key = (case.kernel, case.index, case.work.shape)
        if key not in self._verdicts:
            function = case.contestant.make()
            found = accuracy.errors(function, case.kernel, case.work.shape, self.device)
            self._verdicts[key] = (function, found, accuracy.complaint(case.contestant, found, case.work.shape))
        return self._verdicts[key]

    def free_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return psutil.virtual_memory().available


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
    """What `bench.tables` knows of a row besides its time, before anything is measured."""
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
        "reference_seconds": None,
        "percent_of_product": None,
        "p95_seconds": None,
    }


def environment(device: torch.device) -> dict:
    """Machine, versions and commit of a run."""
    found = commit()
    return {
        "commit": found and found[:7] + found[40:],
        "command": shlex.join(["pytest", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **versions("torch", "triton", "pykeops", "anomalib"),
    }
