"""How far a training has come, kept in a file, so that it survives being killed, interrupted or out of luck."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from dskd_fast.data.category import Category
from dskd_fast.errors import UserError
from dskd_fast.files import in_shell, load_tensors, save_tensors
from dskd_fast.runs.history import Epoch
from dskd_fast.runs.options import ADDED_OPTIONS, CHANGEABLE, TrainingOptions
from dskd_fast.training.distributed import is_launched

# At most so much of a training is lost when it is killed, unless writing takes so long that it would cost too much.
CHECKPOINT_SECONDS = 60.0


class Resumable(Protocol):
    """What can be saved: a `Trainer`."""

    def state(self) -> dict[str, torch.Tensor]: ...

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None: ...


def owners(category: Category, options: TrainingOptions) -> tuple[str, ...]:
    """What tells a training from others with the same networks, as this version and as earlier ones write it."""
    fixed = {name: value for name, value in dataclasses.asdict(options).items() if name not in CHANGEABLE}
    # A checkpoint of an earlier version names none of them.
    fixed = {name: value for name, value in fixed.items() if (name, value) not in ADDED_OPTIONS.items()}
    return tuple(f"{images}, {json.dumps(fixed)}" for images in (category.fingerprint, category.names_and_sizes))


@dataclass
class Position:
    """How far a training has come.

    Attributes:
        totals: each student's loss, summed over the images seen in this epoch.
        history: the finished epochs.
        seen: how many images of this epoch.
        seconds: spent on them.
        order: of this epoch's images.
    """

    totals: list[float]
    history: list[Epoch] = field(default_factory=list)
    seen: int = 0
    seconds: float = 0.0
    order: list[int] = field(default_factory=list)

    def epoch(self, students: Sequence[str]) -> Epoch:
        """The epoch so far; `students` in the order of the totals."""
        means = {name: total / self.seen for name, total in zip(students, self.totals, strict=True)}
        return Epoch(means.get("local"), means.get("global"), self.seen / self.seconds)


class Checkpoints:
    """The state of a training in a file, which is rewritten often enough to lose little and seldom enough to cost less
    than a twentieth of the time.

    Args:
        path: of the file; None keeps nothing.
        owner: what tells this training from others with the same networks.
        former_owner: how an earlier version would have written that; its files are taken, too.

    Attributes:
        found: what the file held at the start; None if there was none.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path | None, owner: str = "", former_owner: str = "") -> None:
        self.path = path
        self.owner = owner
        self.former_owner = former_owner
        self.found: tuple[dict[str, torch.Tensor], Any] | None = None
        self._saved = time.monotonic()
        self._cost = 0.0
        if path is not None:
            try:
                self.found = load_tensors(path)
            except FileNotFoundError:
                pass
            except UserError as error:
                raise UserError(f"{error}: restore it, or train again into another folder") from None

    @property
    def run(self) -> str:
        assert self.path is not None
        return in_shell(self.path.parent)

    def is_due(self) -> bool:
        return self.path is not None and time.monotonic() - self._saved >= max(CHECKPOINT_SECONDS, 20 * self._cost)

    def save(self, trainer: Resumable, at: Position, random: torch.Generator) -> None:
        assert self.path is not None
        started = time.monotonic()
        tensors = trainer.state() | {"random": random.get_state()}
        save_tensors(self.path, tensors, {"owner": self.owner, "at": dataclasses.asdict(at)})
        self._saved = time.monotonic()
        self._cost = self._saved - started

    def restore(self, trainer: Resumable, random: torch.Generator) -> Position:
        """Put a training where the file says."""
        assert self.found is not None
        tensors, state = self.found
        self.found = None  # as large as the model and its optimiser
        try:
            if state["owner"] not in (self.owner, self.former_owner):
                raise ValueError("its images or its options are others")
            random.set_state(tensors.pop("random"))
            trainer.load_state(tensors)
            at = state["at"]
            return Position(**at | {"history": [Epoch(**epoch) for epoch in at["history"]]})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{self.path} belongs to another training ({' '.join(str(error).split())[:200]}): restore the one of "
                "this run, or train again into another folder"
            ) from None

    def check_room(self, model: torch.nn.Module) -> None:
        """Raise UserError if the disk has no room for two checkpoints, of which one is being written."""
        if self.path is None:
            return
        n_bytes = sum(t.nbytes for t in model.state_dict().values())
        n_bytes += 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
        there = self.path.stat().st_size if self.path.exists() else 0
        free = shutil.disk_usage(self.path.parent).free
        if free < 2 * n_bytes - there:
            raise UserError(
                f"a training of this model needs {(2 * n_bytes - there) / 2**30:.2f} GiB on the disk of "
                f"{self.path.parent} to save its state, and {free / 2**30:.2f} GiB are free: make room, or train in "
                "another place"
            )

    def last_saved(self) -> str:
        """What to add to the news of a failure."""
        kept = self.path is not None and self.path.exists()
        return f" (the last good state is kept in {self.path})" if kept else ""


@contextlib.contextmanager
def stopping_signal(
    is_wanted: bool, notice: str = "stopping after this step (Ctrl-C again: at once, without saving)"
) -> Iterator[Callable[[], int]]:
    """Yields a function that gives the first SIGINT or SIGTERM that has come, or 0; of that one, `notice` is said."""
    received: list[int] = []
    if not is_wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def handle(number: int, _: Any) -> None:
        # From torchrun a process gets the terminal's signal a second time.
        if received and number == signal.SIGINT and not is_launched():
            raise KeyboardInterrupt
        received.append(number)
        if len(received) == 1 and not is_launched():
            os.write(2, f"\n{notice}\n".encode())

    # A signal that was ignored at the start, as a script's background job ignores Ctrl-C, stays ignored.
    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
