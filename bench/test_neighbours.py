"""Exact nearest neighbours of patches: ours, scikit-learn's brute force, and torch.cdist with topk."""

from typing import NamedTuple

import pytest
import torch

from bench.lab import row
from dskd_fast.paper.baselines.neighbours import nearest

_OURS = "dskd-fast, tiles"


class Case(NamedTuple):
    queries: int
    keys: int
    channels: int
    k: int
    contestant: str

    @property
    def id(self) -> str:
        return f"{self.queries}x{self.keys}x{self.channels}-k{self.k}-{self.contestant}"

    @property
    def work(self) -> str:
        return f"{self.k} of {self.keys} keys for {self.queries} queries, {self.channels} channels"

    @property
    def group(self) -> str:
        return f"nearest {self.work}"

    def row(self) -> dict:
        is_reference = self.contestant == "torch.cdist, topk"
        return row(
            "neighbours", self.work, "nearest", self.contestant, ours=self.contestant == _OURS, reference=is_reference
        )


def _sklearn(queries: torch.Tensor, keys: torch.Tensor, k: int) -> torch.Tensor:
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(keys.numpy())
    return torch.from_numpy(search.kneighbors(queries.numpy())[0])


_CONTESTANTS = {
    _OURS: lambda queries, keys, k: nearest(queries, keys, k).distances,
    "scikit-learn, brute": _sklearn,
    "torch.cdist, topk": lambda queries, keys, k: torch.cdist(queries, keys).topk(k, largest=False).values,
}


def cases(is_full: bool) -> list[Case]:
    works = [(2048, 12_800, 912, 1), (2048, 12_800, 912, 9), (1024, 51_200, 1056, 1)]
    return [Case(*work, contestant) for work in works[: 3 if is_full else 2] for contestant in _CONTESTANTS]


def test_neighbours(benchmark, lab, case):
    info, key = case.row(), ("neighbours", case.contestant)
    if lab.device.type != "cpu":
        pytest.skip("scikit-learn's is for a CPU")
    n = case.queries * case.keys * case.channels
    if reason := lab.too_long(key, n):
        lab.leave_out(info, case.group, reason)
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(m, case.channels, generator=generator) for m in (case.queries, case.keys))
    call = _CONTESTANTS[case.contestant]
    few = call(queries[:64], keys, case.k).double()
    truth = torch.cdist(queries[:64].double(), keys.double()).topk(case.k, largest=False).values
    info["errors"] = {"distance": [float((few - truth).norm() / truth.norm()), None]}
    assert info["errors"]["distance"][0] < 1e-4
    lab.note_time(key, n, lab.time(benchmark, case.group, info, lambda: call(queries, keys, case.k)), case.work)
