"""One training step on five fixed images, alone and in two processes: WEIGHTS FOLDER, which gets one.pt and two.pt.

The processes are forked, since importing PyTorch takes longer than all they do.
"""

import os
import socket
import sys
from pathlib import Path

import torch

from dskd_fast.models import DSKD
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training.distributed import group
from dskd_fast.training.trainer import Trainer

torch.set_num_threads(1)


def step(weights, out):
    with group(torch.device("cpu")) as processes:
        torch.manual_seed(processes.rank)  # the first one's weights count
        model = DSKD("test_resnet", image_size=64, gccb=8, teacher_weights=weights)
        options = TrainingOptions("test_resnet", image_size=64, gccb=8)
        trainer = Trainer(model.double().to(memory_format=torch.channels_last), options, processes)
        batch = torch.rand(5, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        part = batch[processes.share(5)].contiguous(memory_format=torch.channels_last)
        trainer.step(part, processes.size * len(part) / 5)
        if processes.is_first:
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            torch.save(found | {name: x for name, x in model.named_buffers() if "running" in name}, out)


def worker(rank, port, weights, out):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_RUN_ID"] = "test"  # as torchrun does
    step(weights, out)


def main(weights, folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            worker(rank, port, weights, folder / "two.pt")
            os._exit(0)
    step(weights, folder / "one.pt")
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
