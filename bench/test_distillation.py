"""The distillation against any keys: a queue, a memory of pixels, masked tokens."""

import functools
from typing import NamedTuple

import torch

from bench import memory
from bench.distillation import CONTESTANTS, MODES, UNITS, WORKS, Contestant, Work, call_of, errors
from bench.lab import row

# Largest errors of the map and of the gradient at 100 % noise with which a contestant passes; at T = 0.01 the rounding
# of bf16 operands alone comes to a hundredth.
_ALLOWED = {"fp32": 1e-4, "bf16": 3e-2}
_OTHERS_ALLOWED = 0.1


class Case(NamedTuple):
    work: Work
    mode: str
    index: int

    @property
    def contestant(self) -> Contestant:
        return CONTESTANTS[self.index]

    @property
    def id(self) -> str:
        return f"{self.work.label}-{self.mode}-{self.contestant.name}-{self.contestant.precision}"

    @property
    def group(self) -> str:
        return f"distillation: {self.work.label}, {'x'.join(map(str, self.work.shape))}, {self.mode}"

    def row(self) -> dict:
        name, precision = self.contestant[:2]
        return row(
            "distillation", self.work.label, self.mode, name, precision,
            ours=self.contestant.ours, reference=self.index == 0, shape=self.work.shape,
        )  # fmt: skip


def cases(is_full: bool) -> list[Case]:
    quick = ("eager", "as published", "cpu", "cpu, keys prepared", "triton, keys prepared", "cuda, keys prepared")
    return [
        Case(work, mode, index)
        for work in WORKS
        for mode in MODES
        for index, contestant in enumerate(CONTESTANTS)
        if is_full or (work is WORKS[0] and contestant.name in quick)
    ]


def test_distillation(benchmark, lab, case):
    work, contestant, info = case.work, case.contestant, case.row()
    if reason := contestant.refuse(work.shape, lab.device):
        lab.leave_out(info, case.group, reason)
    if work.keys is None and contestant.name.endswith("keys prepared"):
        lab.leave_out(info, case.group, "the keys are the teacher's own, new in every call")
    if work.masked and contestant.name == "as published":
        lab.leave_out(info, case.group, "no published code that masks is known")
    lab.leave_out_of_quick(case)
    info["errors"] = _errors(case.work, case.index, lab.device)
    allowed = _ALLOWED[contestant.precision] if contestant.ours else _OTHERS_ALLOWED
    worst = max(error for error in info["errors"]["100 %"] if error is not None)
    if not worst <= allowed:
        lab.leave_out(info, case.group, f"it is wrong: off by {worst:.2g} at 100 % noise, {allowed:.2g} allowed")
    info["extra_bytes"], info["extra_bytes_note"] = memory.extra_bytes(call_of, case, lab.device)
    call, reference = (call_of(work, case.mode, index, lab.device) for index in (case.index, 0))
    seconds = lab.time(benchmark, case.group, info, call, reference=None if case.index == 0 else _warm(reference))
    lab.note_time(("distillation", case.index), 1, seconds, work.label)
    product = lab.product_seconds(work.shape, contestant.precision)
    info["percent_of_product"] = 100 * UNITS[case.mode] * product / benchmark.stats.stats.median


@functools.cache
def _errors(work: Work, index: int, device: torch.device) -> dict[str, list[float]]:
    return errors(work, CONTESTANTS[index], device)


def _warm(call):
    call()
    return call
