"""The cosine distance at the paper's levels."""

from typing import NamedTuple

from bench.contestants import COSINE
from bench.work import LEVELS, MODES, Work


class Case(NamedTuple):
    work: Work
    mode: str
    index: int

    @property
    def id(self) -> str:
        return f"{self.work.label}-b{self.work.shape[0]}-{self.mode}-{COSINE[self.index].name}"


def cases(is_full: bool) -> list[Case]:
    return [
        Case(work, mode, index)
        for work in LEVELS
        for mode in MODES
        for index, contestant in enumerate(COSINE)
        if is_full or (work.is_quick and mode != "forward" and not contestant.name.startswith("torch.compile"))
    ]


def test_cosine(benchmark, lab, case):
    lab.compare(benchmark, "cosine", case.index, COSINE[case.index], case.work, case.mode)
