"""What all steps use: writing results down, going on after errors, the clock."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.driver import LOST_DEVICE, add, read
from bench.gpu.plan import Plan
from bench.work import synchronise

# The second-level cache has to hold nothing of a call's inputs when they come round again.
_CACHES = 4
_LARGEST_ROTATION = 16
# What a spinning GPU does in a second, about; a call that takes the host longer than the other is not waited for.
_CYCLES = 1.7e9
_LONGEST_HOLD = 0.02


class LostDevice(Exception):
    """The GPU answers this process no more."""


class Session:
    """One process of a step, with what it knows of the run.

    Args:
        step: its name.
        out: the folder of the results.
        process, processes: its number, and how many there are.
        begin: the first case that it has to do: those before it were done by a process that died.
    """

    def __init__(self, step: str, plan: Plan, out: Path, process: int = 0, processes: int = 1, begin: int = 0) -> None:
        self.step, self.plan, self.process, self.processes, self.begin = step, plan, process, processes, begin
        self.device = torch.device(plan.device)
        self._out = out

    def note(self, **result: Any) -> None:
        """Write a result down."""
        add(self._out, {"step": self.step, "process": self.process} | {k: _plain(v) for k, v in result.items()})

    def each(self, cases: Iterable[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]) -> None:
        """Do each case, (what it is, its work), and note what that gives, or the error that it ends in.

        Raises:
            LostDevice: nothing runs in this process any more, since an error on the GPU stays.
        """
        for number, (known, work) in list(enumerate(cases))[self.begin :]:
            started = time.perf_counter()
            try:
                found = work()
                synchronise(self.device)
            except Exception as error:
                found = {"error": said(error)}
            self.note(case=number, **known, **found, seconds=time.perf_counter() - started)
            if "error" in found:
                self.check()

    def check(self) -> None:
        """After an error: raise LostDevice if it is one that stays."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.ones(8, device=self.device).sum().item()
        except Exception as error:
            raise LostDevice(said(error)) from error

    def results(self, step: str) -> list[dict[str, Any]]:
        """What a step has written down until now."""
        return [result for result in read(self._out) if result["step"] == step]

    def is_built(self, name: str, patience: float = 0.0) -> str | None:
        """None if an extension is there, or why not: what the step "build" says, after so many seconds at the most."""
        until = time.monotonic() + patience
        while True:
            for result in self.results("build"):
                if result["extension"] == name:
                    return result.get("error") or result.get("reason")
            if time.monotonic() >= until:
                return "it is still being built"
            time.sleep(0.1)


def exit_code(work: Callable[[], object]) -> int:
    """Of a process that does a step's work."""
    try:
        work()
    except LostDevice as error:
        print(f"{error}: a new process goes on")
        return LOST_DEVICE
    return 0


def said(error: BaseException) -> str:
    """An error's name and its first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:300]}"


def rotating(tensors: tuple[torch.Tensor, ...], plan: Plan) -> list[tuple[torch.Tensor, ...]]:
    """Copies of a call's inputs, so many that the second-level cache does not hold them all."""
    size = sum(x.nbytes for x in tensors)
    if plan.device == "cpu":
        count = 2
    else:
        cache = getattr(torch.cuda.get_device_properties(plan.device), "L2_cache_size", 64 << 20)
        count = min(_LARGEST_ROTATION, max(2, math.ceil(_CACHES * cache / size)))
    return [tensors, *(tuple(x.clone() for x in tensors) for _ in range(count - 1))]


def clock(call: Callable[[int], object], plan: Plan, share: float = 1.0, is_held: bool = True) -> dict[str, float]:
    """Times of a call, which gets the number of the round: the median in ms, the quartiles' distance, the host's time.

    Before each round the GPU is made to spin for as long as the host takes to queue the call, so that its own time is
    measured and not the host's; `is_held` False leaves that out. `share` is of the plan's seconds; after five times
    these no further round begins.
    """
    device, seconds = torch.device(plan.device), share * plan.seconds
    for k in range(plan.warm_up):
        call(k)
    synchronise(device)
    started = time.perf_counter()
    call(0)
    host = time.perf_counter() - started
    synchronise(device)
    whole = time.perf_counter() - started
    fewest, most = plan.rounds
    found, of_host = [], []
    begun = time.perf_counter()
    for k in range(min(most, max(fewest, int(seconds / max(whole, 1e-6))))):
        if k >= 2 and time.perf_counter() - begun > 5 * seconds:
            break
        if is_held and host < _LONGEST_HOLD:
            _hold(device, 2 * host + 1e-4)
        before, queued = _stamp(device), time.perf_counter()
        call(k)
        of_host.append(time.perf_counter() - queued)
        after = _stamp(device)
        synchronise(device)
        found.append(_milliseconds(before, after))
    first, _, third = statistics.quantiles(found, n=4)
    return {
        "ms": statistics.median(found),
        "iqr": third - first,
        "rounds": len(found),
        "host_ms": 1e3 * statistics.median(of_host),
    }


def _hold(device: torch.device, seconds: float) -> None:
    if device.type == "cuda" and hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(int(seconds * _CYCLES))


def _stamp(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(before: Any, after: Any) -> float:
    return 1e3 * (after - before) if isinstance(before, float) else before.elapsed_time(after)


def _plain(value: Any) -> Any:
    """For JSON, with six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)
