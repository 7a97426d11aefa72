"""`python -m bench.in_training`: the memory of the loss in each training of dskd_fast/losses/README.md.

That is what forward and backward take beyond the features, the loss and the gradient, of the dense form (eager, as the
paper prints it) and of ours, as a table in Markdown. Networks, adapters and optimizers are the same with both.
"""

import argparse
import contextlib
from collections.abc import Callable
from typing import NamedTuple

import cpuinfo
import torch
from torch import Tensor

from bench import memory
from bench.contestants import textbook
from bench.tables import significant
from dskd_fast import markdown
from dskd_fast.functional import contextual_affinity
from dskd_fast.versions import commit

_TEMPERATURE = 0.5


class Training(NamedTuple):
    """A section of the document: features of its loss (B, C, H, W), or tokens (B, N, C) after `prefix` others."""

    label: str
    shape: tuple[int, ...]
    autocast: bool = False
    compiled: bool = False
    prefix: int = 0


TRAININGS = (
    Training("segmentation, 512 x 512 at stride 8", (2, 256, 64, 64)),
    Training("Lightning, or accumulation, in bf16: the same", (2, 256, 64, 64), autocast=True),
    Training("DistributedDataParallel on two: the same, a process", (1, 256, 64, 64)),
    Training("torch.compile, temperature a tensor: the same", (2, 256, 64, 64), compiled=True),
    Training("ViT-S/14 with registers, 518 x 518", (16, 1369, 384), prefix=5),
)


def call_of(index: int, ours: bool, device: torch.device) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """Forward and backward of the loss in one of `TRAININGS`."""
    training = TRAININGS[index]
    shape = list(training.shape)
    shape[1] += training.prefix
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(shape, generator=generator).to(device)
    student = (teacher + torch.randn(shape, generator=generator).to(device)).requires_grad_()
    temperature = torch.tensor(_TEMPERATURE)

    def dense(s: Tensor, t: Tensor, temperature: Tensor) -> Tensor:
        s, t = (x if x.dim() == 4 else x.mT.unsqueeze(-1) for x in (s, t))
        return textbook(s, t, temperature).mean()

    def streamed(s: Tensor, t: Tensor, temperature: Tensor) -> Tensor:
        return contextual_affinity(s, t, temperature).mean()

    function = streamed if ours else dense
    function = torch.compile(function, fullgraph=True) if training.compiled else function

    def call() -> tuple[Tensor, Tensor | None]:
        autocast = torch.autocast(device.type, torch.bfloat16) if training.autocast else contextlib.nullcontext()
        with autocast:
            loss = function(student[:, training.prefix :], teacher[:, training.prefix :], temperature)
        loss.backward()
        gradient, student.grad = student.grad, None
        return loss.detach(), gradient

    return call


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.in_training", description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    device = parser.parse_args().device
    rows = []
    for index, training in enumerate(TRAININGS):
        cells = []
        for ours in (False, True):
            n_bytes, reason = memory.extra_bytes(call_of, (index, ours), device)
            cells.append(reason if n_bytes is None else significant(n_bytes / 2**20, 2))
        rows.append((training.label, " x ".join(map(str, training.shape)), *cells))
    print(markdown.table(("training", "features of the loss", "dense, MiB", "ours, MiB"), rows, words=2))
    print(f"\n{_machine(device)}, PyTorch {torch.__version__}, commit {commit()}")


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpuinfo.get_cpu_info().get('brand_raw')}, {torch.get_num_threads()} thread(s)"


if __name__ == "__main__":
    main()
