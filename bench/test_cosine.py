"""The cosine distance at the paper's levels."""

from bench.contestants import COSINE
from bench.lab import Comparison
from bench.work import LEVELS, MODES


def cases(is_full: bool) -> list[Comparison]:
    return [
        Comparison("cosine", work, mode, index)
        for work in LEVELS
        for mode in MODES
        for index, contestant in enumerate(COSINE)
        if is_full or (work.is_quick and mode != "forward" and not contestant.name.startswith("torch.compile"))
    ]


def test_cosine(benchmark, lab, case):
    lab.compare(benchmark, case)
