"""Training steps of the methods that are trained: which images, how many, and when to stop."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dskd_fast.errors import TrainingStopped, UserError
from dskd_fast.progress import Progress, silent

if TYPE_CHECKING:
    from dskd_fast.paper.baselines.protocol import Images

_RATE = 1e-3


@dataclass(frozen=True)
class Fitting:
    """How a method is fitted.

    Attributes:
        steps: that the paper's method takes by the same recipe.
        batch_size: images in a step.
        seed: of the order of the images. (PyTorch's own generator is seeded by who calls `fit`.)
        progress: called as progress(stage, done, total).
        stopped: gives the number of the signal that asked to stop, or 0.
    """

    steps: int
    batch_size: int
    seed: int = 0
    progress: Progress = silent
    stopped: Callable[[], int] = lambda: 0

    def batches(self, images: "Images", relative_steps: float, stage: str) -> Iterator["Images"]:
        """Batches of `batch_size` images for `relative_steps` times as many steps, each pass in another order."""
        n_steps = self.n_steps(relative_steps)
        generator = torch.Generator().manual_seed(self.seed)
        waiting: list[int] = []
        for step in range(n_steps):
            # A pass may end within a batch: one of a single image has no batch statistics.
            while len(waiting) < self.batch_size:
                waiting += torch.randperm(len(images), generator=generator).tolist()
            yield images.of(waiting[: self.batch_size])
            waiting = waiting[self.batch_size :]
            self.heed(stage, step + 1, n_steps)

    def train(
        self,
        parameters: Iterable[nn.Parameter],
        images: "Images",
        relative_steps: float,
        loss_of: Callable[["Images"], Tensor],
        stage: str = "training",
    ) -> None:
        """Minimise a loss of batches by Adam, at a rate of 0.001 that falls to 0 by a cosine (ours, for few steps).

        Raises:
            UserError: the loss is no longer finite.
            TrainingStopped: by a signal.
        """
        optimiser = torch.optim.Adam(parameters, lr=_RATE)
        n_steps = self.n_steps(relative_steps)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
        for batch in self.batches(images, relative_steps, stage):
            descend(optimiser, loss_of(batch))
            schedule.step()

    def n_steps(self, relative_steps: float) -> int:
        """As many as `batches` gives."""
        return max(1, round(self.steps * relative_steps))

    def heed(self, stage: str, done: int, total: int) -> None:
        """Tell how far it is, and end if a signal came."""
        self.progress(stage, done, total)
        if number := self.stopped():
            raise TrainingStopped(f"stopped while {stage}, {done} of {total}", number)


def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of an optimiser.

    Raises:
        UserError: the loss is not finite.
    """
    if not math.isfinite(loss.item()):
        raise UserError(f"the training diverged (loss {loss.item():g}): try another --batch-size, or leave it out")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
