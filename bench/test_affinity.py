"""The contextual affinity at the paper's levels and others', and how its cost grows with N."""

from typing import NamedTuple

from bench.contestants import AFFINITY, EAGER
from bench.work import GROWTH, LEVELS, MODES, Work


class Case(NamedTuple):
    kind: str
    work: Work
    mode: str
    index: int

    @property
    def id(self) -> str:
        contestant = AFFINITY[self.index]
        return (
            f"{self.kind}-{self.work.label}-b{self.work.shape[0]}-{self.mode}-{contestant.name}-{contestant.precision}"
        )


# Without --bench-full: what people choose between. The rest takes minutes to compile or to run.
_QUICK_PRECISIONS = {"cpu": ("ieee", "bf16"), "torch": ("ieee",), "triton": ("bf16",), "cuda": ("bf16",)}
_QUICK_MODES = ("scoring", "forward+backward")


def cases(is_full: bool) -> list[Case]:
    found = []
    for work in LEVELS:
        for mode in MODES:
            for index, contestant in enumerate(AFFINITY):
                is_quick = work.is_quick and mode in _QUICK_MODES
                if contestant.ours:
                    is_quick &= contestant.precision in _QUICK_PRECISIONS[contestant.name]
                elif contestant.name.startswith("torch.compile"):
                    is_quick &= work.label.endswith("level 1") and mode == "forward+backward"
                elif contestant.name == "KeOps":
                    is_quick &= work.label.endswith("level 3")  # at level 1 it takes minutes
                if is_quick or is_full:
                    found.append(Case("affinity", work, mode, index))
    for work in GROWTH:
        for index, contestant in enumerate(AFFINITY):
            if contestant.ours:
                is_kept = contestant.precision in ("ieee", "bf16")
                is_quick = contestant.name == "cpu"
            else:
                is_kept = contestant.name in ("eager", "tiles of rows, checkpointed", "KeOps")
                is_quick = contestant == EAGER
            if is_kept and (is_full or (is_quick and work.is_quick)):
                found.append(Case("growth", work, "forward+backward", index))
    return found


def test_affinity(benchmark, lab, case):
    lab.compare(benchmark, case.kind, case.index, AFFINITY[case.index], case.work, case.mode)
