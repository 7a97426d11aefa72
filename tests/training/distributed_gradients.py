"""One training step on five fixed images, alone or under torchrun: WEIGHTS OUT, which gets the gradients."""

import sys
from pathlib import Path

import torch

from dskd_fast.models import DSKD
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training.distributed import group
from dskd_fast.training.trainer import Trainer

torch.set_num_threads(1)


def main(weights, out):
    with group(torch.device("cpu")) as processes:
        torch.manual_seed(processes.rank)  # the first one's weights count
        model = DSKD("test_resnet", image_size=64, gccb=8, teacher_weights=weights)
        options = TrainingOptions("test_resnet", image_size=64, gccb=8)
        trainer = Trainer(model.double().to(memory_format=torch.channels_last), options, processes)
        batch = torch.rand(5, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        part = batch[processes.share(5)].contiguous(memory_format=torch.channels_last)
        trainer.step(part, processes.size * len(part) / 5)
        if processes.is_first:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            torch.save(gradients, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
