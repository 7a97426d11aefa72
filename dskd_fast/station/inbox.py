"""A folder into which others write: which of its files are whole, in the order in which they became so.

The folder is looked at again and again. A network folder tells nobody of what other machines write into it, so that
this is the one way that works everywhere. A file may be whole if it was the same, by size, time and number, for the
time between two looks; that it is so is known when it has been decoded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dskd_fast.data.listing import natural_key, walk
from dskd_fast.station.journal import FileState

# As many at a time, so that images that come meanwhile are seen, and sorted in.
_MOST = 32


@dataclass
class Candidate:
    """A file that is not judged yet.

    Attributes:
        path: where it is.
        state: as it was last seen.
        first_seen: when it was first seen, and since when it is the same; in seconds of a steady clock.
        unchanged_since: see there.
        is_read: whether it is of a format that is read, by its suffix.
        next_try: when it may be read.
        pause: seconds until the next try after a failure.
    """

    path: Path
    state: FileState
    first_seen: float
    unchanged_since: float
    is_read: bool
    next_try: float
    pause: float


class Inbox:
    """The files of a folder and its subfolders that are still to be judged.

    Args:
        folder: hidden files and folders in it are left out, and what has no image's suffix.
        leave_out: called with each folder below; true leaves it out.
        is_done: whether a file was judged.
        poll: seconds for which a file has to be the same.
    """

    def __init__(
        self, folder: Path, leave_out: Callable[[Path], bool], is_done: Callable[[FileState], bool], poll: float
    ) -> None:
        self._folder, self._leave_out, self._is_done, self._poll = folder, leave_out, is_done, poll
        self._waiting: dict[str, Candidate] = {}

    def look(self, now: float) -> list[Candidate]:
        """The files that may be whole, by the time of their last change, then by name; not all of many at once.

        Raises:
            UserError: the folder, or one in it, cannot be listed.
        """
        found: dict[str, Candidate] = {}
        for listing in walk(self._folder, self._leave_out):
            below = listing.folder.relative_to(self._folder).as_posix()
            prefix = "" if below == "." else f"{below}/"
            for paths, is_read in ((listing.images, True), (listing.others, False)):
                for path in paths:
                    state = FileState.at(path, prefix + path.name)
                    if state is not None and not self._is_done(state):
                        found[state.name] = self._candidate(path, state, is_read, now)
        # What has gone was taken away, or has another name now.
        self._waiting = found
        ready = [candidate for candidate in found.values() if candidate.next_try <= now]
        ready.sort(key=lambda candidate: (candidate.state.mtime_ns, natural_key(candidate.state.name)))
        return ready[:_MOST]

    def _candidate(self, path: Path, state: FileState, is_read: bool, now: float) -> Candidate:
        candidate = self._waiting.get(state.name)
        if candidate is None:
            return Candidate(path, state, now, now, is_read, now + self._poll, self._poll)
        if candidate.state != state:
            candidate.state, candidate.unchanged_since = state, now
            candidate.next_try, candidate.pause = now + self._poll, self._poll
        return candidate

    def postpone(self, candidate: Candidate, now: float, last_try: float) -> None:
        """Leave a file alone for a while, twice as long each time, but not beyond `last_try` if that is to come."""
        candidate.next_try = now + candidate.pause
        if now < last_try:
            candidate.next_try = min(candidate.next_try, last_try)
        candidate.pause *= 2
