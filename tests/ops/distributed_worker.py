"""One of the processes of `test_operators.test_distributed_*`.

`python distributed_worker.py RANK WORLD_SIZE STORE OUT` writes the gradients of a small student, averaged over the
processes, each of which sees its part of a batch, and those of one process that sees the whole.
"""

import contextlib
import sys
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dskd_fast import AffinityDistillationLoss, ContextualAffinityLoss, CosineDistanceLoss

# Longer than a busy machine takes to start the other process, so that only one that has died is waited for in vain.
TIMEOUT = timedelta(seconds=120)

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


def run(case, rank, world_size):
    """Gradients by name, after two steps without an update (a static graph is known from the second on).

    One process alone does without anything that the cases are about.
    """
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


def main(rank, world_size, store, out):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    gradients = {case: run(case, rank, world_size) for case in CASES}
    torch.save({"averaged": gradients, "whole": {case: run(case, 0, 1) for case in CASES}}, out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
