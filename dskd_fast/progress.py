"""What long work says of itself: sentences to the logger "dskd_fast", counts to a function that the caller passes."""

import logging
from typing import Protocol

log = logging.getLogger("dskd_fast")


class Progress(Protocol):
    """Called as progress(stage, done, total) after each piece of a stage."""

    def __call__(self, stage: str, done: int, total: int, /) -> None: ...


def silent(stage: str, done: int, total: int, /) -> None:
    """Show nothing."""
