"""The distillation against any keys: a queue, a memory of pixels, masked tokens."""

import functools
import math
from typing import NamedTuple

import torch

from bench import memory
from bench.distillation import CONTESTANTS, MODES, UNITS, WORKS, Contestant, Work, call_of, complaint, errors
from bench.lab import row

# The memory of what takes longer is measured with its first call in a process, and of what takes very long not at all.
_WARM = 1.0
_LONGEST_MEASURED = 15.0


class Case(NamedTuple):
    work: Work
    mode: str
    index: int

    @property
    def contestant(self) -> Contestant:
        return CONTESTANTS[self.index]

    @property
    def cost(self) -> int:
        """What its time is in proportion to."""
        return UNITS[self.mode] * math.prod(self.work.shape)

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
    if reason := contestant.refusal(work, lab.device, lab.free_memory()):
        lab.leave_out(info, case.group, reason)
    lab.leave_out_of_quick(case)
    key, reference = ("distillation", case.index), ("distillation", 0)
    if reason := lab.too_long(key, case.cost):
        lab.leave_out(info, case.group, reason)
    info["errors"] = _errors(work, case.index, lab.device)
    if reason := complaint(work, contestant, info["errors"]):
        lab.leave_out(info, case.group, reason)
    call = call_of(work, case.mode, case.index, lab.device)
    turns = None
    if case.index and not lab.is_slow(reference, case.cost):
        turns = call_of(work, case.mode, 0, lab.device)
        turns()
    seconds = lab.time(benchmark, case.group, info, call, reference=turns)
    lab.note_time(key, case.cost, seconds, f"{work.label}, {case.mode}")
    info["extra_bytes_note"] = f"not measured: a call takes {seconds:.0f} s"
    if seconds <= _LONGEST_MEASURED:
        call = turns = None  # what they hold is given back
        of_case = work, case.mode, case.index
        info["extra_bytes"], info["extra_bytes_note"] = memory.extra_bytes(
            call_of, of_case, lab.device, is_warm=seconds <= _WARM
        )
    product = lab.product_seconds(work.shape, contestant.precision)
    info["percent_of_product"] = 100 * UNITS[case.mode] * product / benchmark.stats.stats.median


@functools.cache
def _errors(work: Work, index: int, device: torch.device) -> dict[str, list[float]]:
    return errors(work, CONTESTANTS[index], device)
