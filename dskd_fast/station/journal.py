"""What has been judged: a file of JSON lines that is the result and the memory in one.

A line is in it, on the disk, before anybody hears of it, and a line that a kill or a power cut has left half written is
cut off at the next start: its image is judged again. So each image has one line, whatever happened in between. A file
that was judged under another name has a line that says so, without a decision.
"""

import contextlib
import errno
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from dskd_fast.errors import UserError
from dskd_fast.files import unwritable
from dskd_fast.progress import log

DECISIONS = "decisions.jsonl"
JUDGED_AS = "judged_as"
"""In a line without a decision: the name under which the file has its line."""

_LOCK = ".dskd_fast.lock"


class FileState(NamedTuple):
    """A file as a folder lists it: its path below that, with "/", and what the file system says of it."""

    name: str
    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, name: str, status: os.stat_result) -> "FileState":
        return cls(name, status.st_size, status.st_mtime_ns, status.st_ino)

    @classmethod
    def at(cls, path: Path, name: str) -> "FileState | None":
        """None where there is no file; a link that leads nowhere is one, so that it is not missing in silence."""
        for status_of in (os.stat, os.lstat):
            with contextlib.suppress(OSError):
                return cls.of(name, status_of(path))
        return None


class Journal:
    """The file of decisions, for one process at a time.

    Args:
        path: of the file. It is made, with its folder, if it is not there; else what it holds counts as judged.

    Attributes:
        thresholds: of all decisions in it.

    Raises (on entering):
        UserError: another process writes it, it cannot be written, or a line in it is none of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path.with_name(_LOCK))
        self._file = -1
        self._length = self._n_judged = 0
        self.thresholds: set[float] = set()
        self._states: set[tuple[str, int, int]] = set()
        self._contents: dict[tuple[str, str], str] = {}
        self._files: dict[tuple[int, int, int], tuple[str, str]] = {}

    def __enter__(self) -> "Journal":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"another process writes into {self.path.parent}: stop it, or choose another --out"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise unwritable(self.path, error if isinstance(error, OSError) else OSError(str(error))) from error
        try:
            self._open()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._lock.release()

    def __len__(self) -> int:
        """How many images were judged."""
        return self._n_judged

    def knows(self, state: FileState) -> bool:
        """Whether the file was judged, by its name, size and time."""
        return state[:3] in self._states

    def judged_as(self, state: FileState, sha256: str) -> str | None:
        """The name under which the file has its line, if it was judged with this content; else None.

        It may have been renamed since, be a second hard link, have a new time, or have been written again. A copy under
        another name was not judged.
        """
        if (state.name, sha256) in self._contents:
            return self._contents[state.name, sha256]
        content, name = self._files.get(state[1:], (None, None))
        return name if content == sha256 and state.inode != 0 else None  # some file systems have no numbers

    def append(self, state: FileState, sha256: str | None, content: dict[str, Any]) -> str:
        """Write a line, and have it on the disk.

        Returns:
            The line, without its end.

        Raises:
            OSError: it cannot be written, as on a full disk, or the file is no longer there; nothing of it then counts,
                and the same call may be made again.
        """
        of_file = {"size": state.size, "mtime_ns": state.mtime_ns, "inode": state.inode, "sha256": sha256}
        text = json.dumps({"path": state.name} | content | of_file, allow_nan=False)
        self._require_there()
        left = memoryview(f"{text}\n".encode("ascii"))
        length = self._length + len(left)
        try:
            # What an earlier failure has left.
            os.ftruncate(self._file, self._length)
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._length)
            raise
        self._length = length
        self._note(state, sha256, content)
        return text

    def _note(self, state: FileState, sha256: str | None, content: dict[str, Any]) -> None:
        self._n_judged += JUDGED_AS not in content
        if content.get("threshold") is not None:
            self.thresholds.add(content["threshold"])
        self._states.add(state[:3])
        if sha256 is not None:
            first = content.get(JUDGED_AS, state.name)
            self._contents[state.name, sha256] = first
            self._files[state[1:]] = sha256, first

    def _open(self) -> None:
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
            self._read()
            if hasattr(os, "O_DIRECTORY"):  # the name of a new file is on the disk when its folder is
                folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _read(self) -> None:
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    state = FileState(*(entry[name] for name in ("path", "size", "mtime_ns", "inode")))
                    self._note(state, entry["sha256"], entry)
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.path} has a line {number} that was not written by this program: move the "
                        "file away, or choose another --out"
                    ) from None
                self._length += len(line)
        if os.fstat(self._file).st_size > self._length:
            os.ftruncate(self._file, self._length)
            log.warning("%s ended in half a line, which was cut off: its image is judged again", self.path)

    def _require_there(self) -> None:
        """Raise OSError where the file is gone: what is written into a removed one is lost without an error."""
        there, ours = os.stat(self.path), os.fstat(self._file)
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino) or ours.st_size < self._length:
            raise OSError(errno.ESTALE, "it is another file than before: put it back, or stop and start again")
