"""Gradients under DistributedDataParallel, in all its ways, in one go: to start two processes takes long."""

import contextlib

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dskd_fast import AffinityDistillationLoss, ContextualAffinityLoss, CosineDistanceLoss

BATCH = 4
KEYS = torch.randn((10, 7), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CASES = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "accumulated": {},
    "compiled": {},
}


class Student(nn.Module):
    def __init__(self, with_unused):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3, stride=2)
        self.unused = nn.Conv2d(1, 1, 1) if with_unused else None

    def forward(self, images):
        first = self.first(images)
        return [first, self.second(first.tanh())]


def loss(student, teacher):
    of_keys = AffinityDistillationLoss(0.2, 0.1)(student[1], teacher[1], KEYS)
    return ContextualAffinityLoss(0.5)(student, teacher) + CosineDistanceLoss()(student, teacher) + of_keys


def gradients(case, rank, world_size):
    """By name, after two steps without an update (a static graph is known from the second on); of one process plain."""
    torch.manual_seed(0)
    # In float64 what rounding leaves is far below any difference that averaging or sharding could make.
    student = Student(case == "unused parameters").double()
    images = torch.randn(BATCH, 3, 9, 8, dtype=torch.float64)
    teacher = [torch.randn_like(x) for x in student(images)]
    alone = world_size == 1
    module = student if alone else DistributedDataParallel(student, **CASES[case])
    network, criterion = module, loss
    if case == "compiled" and not alone:
        network, criterion = (torch.compile(f, backend="aot_eager") for f in (module, loss))
    parts = 2 if case == "accumulated" and not alone else 1
    size = BATCH // world_size // parts
    for _ in range(2):
        student.zero_grad()
        for part in range(parts):
            start = (rank * parts + part) * size
            with contextlib.nullcontext() if part == parts - 1 else module.no_sync():
                own_teacher = [t[start : start + size] for t in teacher]
                (criterion(network(images[start : start + size]), own_teacher) / parts).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def test_distributed_gradients_are_those_of_one_process(in_two, tmp_path):
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")

    def work():
        distributed.init_process_group("gloo")
        rank = distributed.get_rank()
        averaged = {case: gradients(case, rank, 2) for case in CASES}
        distributed.destroy_process_group()
        torch.save(averaged, tmp_path / f"{rank}.pt")

    codes, texts = in_two(work)
    assert codes == [0, 0], texts
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for case in CASES:
        whole = gradients(case, 0, 1)
        assert first[case].keys() == second[case].keys() == whole.keys()
        assert len(whole) == 4
        for name, gradient in whole.items():
            assert gradient.norm() > 0, case
            # Both are float64: what differs by less than float32 could tell is its rounding.
            assert (first[case][name] - gradient).norm() <= torch.finfo(torch.float32).eps * gradient.norm(), case
            assert torch.equal(first[case][name], second[case][name]), case
