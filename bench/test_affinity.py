"""The contextual affinity at the paper's levels and others', and how its cost grows with N."""

from bench.contestants import AFFINITY, Contestant
from bench.lab import Comparison
from bench.work import GROWTH, LEVELS, MODES, Work

# Without --bench-full: what people choose between. The rest takes minutes to compile or to run.
_QUICK_PRECISIONS = {"cpu": ("fp32", "bf16"), "torch": ("fp32",), "triton": ("bf16",), "cuda": ("bf16",)}
_GROWING = ("eager", "tiles of rows, checkpointed", "KeOps", "triton", "cuda", "cpu", "torch")
_QUICK_MODES = ("scoring", "forward+backward")


def _is_quick(contestant: Contestant, work: Work, mode: str) -> bool:
    if not work.is_quick or mode not in _QUICK_MODES:
        return False
    level = int(work.label[-1])
    if contestant.ours:
        return contestant.precision in _QUICK_PRECISIONS[contestant.name]
    if contestant.name == "KeOps":
        return level == 3 and mode == "scoring"
    if contestant.name == "torch.compile of eager":
        return level == 1 and mode == "forward+backward"
    if contestant.name == "eager, difference form":
        return level > 1
    return not contestant.name.startswith("torch.compile")


def _is_quick_growth(contestant: Contestant, work: Work) -> bool:
    if contestant.name == "KeOps" or (contestant.name, contestant.precision) == ("torch", "bf16"):
        return False
    # What takes bf16 alone is fast enough for the largest.
    return work.is_quick and (work.positions <= 4096 or contestant.precision == "bf16")


def cases(is_full: bool) -> list[Comparison]:
    found = []
    for work in LEVELS:
        for mode in MODES:
            for index, contestant in enumerate(AFFINITY):
                if is_full or _is_quick(contestant, work, mode):
                    found.append(Comparison("affinity", work, mode, index))
    for work in GROWTH:
        for index, contestant in enumerate(AFFINITY):
            is_kept = contestant.name in _GROWING and contestant.precision in ("fp32", "bf16")
            if is_kept and contestant[:2] != ("eager", "bf16") and (is_full or _is_quick_growth(contestant, work)):
                found.append(Comparison("growth", work, "forward+backward", index))
    return found


def test_affinity(benchmark, lab, case):
    lab.compare(benchmark, case)
