"""What a training was like, epoch by epoch: history.json."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """One epoch's mean losses and speed; the loss of a missing student is None."""

    local_loss: float | None
    global_loss: float | None
    images_per_second: float


@dataclass(frozen=True)
class TrainingState:
    """After a step, for a progress bar."""

    step: int
    steps: int
    epoch: int
    local_loss: float | None
    global_loss: float | None
    images_per_second: float
