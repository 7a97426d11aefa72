"""Judges the images of a folder as they appear: whole ones only, each once, whatever happens in between."""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dskd_fast.data.images import ImageError, decode_image, n_bytes_in_header
from dskd_fast.data.listing import PICTURE_FOLDERS, is_prediction_output
from dskd_fast.detection.detector import Detector
from dskd_fast.detection.overlay import colour_range
from dskd_fast.detection.pictures import drawable, write_overlay
from dskd_fast.detection.prediction import Prediction, caption, is_drawn, judge, map_to_draw
from dskd_fast.errors import UserError
from dskd_fast.progress import log
from dskd_fast.station.inbox import Candidate, Inbox
from dskd_fast.station.journal import DECISIONS, JUDGED_AS, FileState, Journal
from dskd_fast.workers import Workers

Result = TypeVar("Result")

# Seconds: of sleep at a time, so that a signal is heeded soon, and between tries of what does not work.
_NAP, _RETRY = 0.1, 1.0
# So many looks at a folder fail before that is said: one that fails may have met a subfolder just removed.
_LOOKS = 2
# Of an overlay's name, in characters: with what is added to them they have at most 255 bytes.
_STEM = 58


class _Stopped(Exception):
    """While something is waited for."""


class _Image(NamedTuple):
    """A whole file: its checksum, the photograph, and as the networks see it; None for what was judged before."""

    sha256: str
    pixels: NDArray[np.uint8] | None
    resized: torch.Tensor | None
    seconds: float


class _Unreadable(NamedTuple):
    """Why a file cannot be used, by now; without a reason since it has changed, and is looked at again."""

    reason: str | None
    sha256: str | None = None


def watch(
    detector: Detector,
    folder: Path,
    out: Path,
    *,
    threshold: float,
    emit: Callable[[str], None],
    is_stopped: Callable[[], object],
    overlays: str = "anomalous",
    overlay_format: str = "jpg",
    poll: float = 0.5,
    patience: float = 10.0,
) -> None:
    """Judge images as they appear in a folder, until it is stopped.

    An image has one line in `out`/decisions.jsonl. What makes it one image is its content under its name, or the same
    file under another: a rename, a second hard link, a new time or the same bytes written again make no second one (but
    a line without a decision that names the first, in the file alone); a copy under another name does, and so does
    another image under an old name. Images that are there at the start and have no line yet are judged first.

    Args:
        detector: calibrated.
        folder: into which images are written, with its subfolders; hidden ones, and hidden files, are left out.
        out: folder of decisions.jsonl and overlays; it may lie in `folder`, but not be it.
        threshold: of the decisions.
        emit: called with each line once it is on the disk.
        is_stopped: asked before each image and at least every second in between; true ends the call.
        overlays: of which images: "all", "anomalous" (suspect ones, too) or "none".
        overlay_format: "jpg" or "png".
        poll: seconds between two looks at the folder, and for which a file has to be the same before it is read.
        patience: seconds for which a file that cannot be decoded has to be the same before its line says so.

    A file that has gone before it was read is not judged and has no line. Where a folder cannot be listed or written,
    as one that has vanished or a full disk, the logger "dskd_fast" says so once, and it is waited for.

    Raises:
        UserError: `folder` is no folder, or overlays would be drawn into it; another process writes into `out`, it
            cannot be written at the start, or what is there is not from here.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: check the path")
    here, pictures = folder.resolve(), {(out / name).resolve() for name in PICTURE_FOLDERS}
    if here == out.resolve() or not pictures.isdisjoint((here, *here.parents)):
        raise UserError(f"what is drawn into {out} would lie among the images of {folder}: choose another --out")

    def is_left_out(path: Path) -> bool:
        is_of_watch = path.name in PICTURE_FOLDERS and (path.parent / DECISIONS).exists()
        return is_of_watch or is_prediction_output(path) or path.resolve() in (out.resolve(), *pictures)

    with Journal(out / DECISIONS) as journal, Workers() as workers:
        log.info("watching %s, decisions in %s, %d of them from before", folder, journal.path, len(journal))
        if journal.thresholds - {threshold}:
            log.warning(
                "warning: %s has decisions of another run or threshold, whose images are not judged again: choose "
                "another --out if they should be",
                journal.path,
            )
        inbox = Inbox(folder, is_left_out, journal.knows, poll)
        station = _Station(detector, out, journal, inbox, threshold, overlays, overlay_format, patience, is_stopped)
        try:
            while not is_stopped():
                ready = _when_possible(lambda: inbox.look(time.monotonic()), is_stopped, poll, _LOOKS)
                if not ready:
                    _sleep(poll, is_stopped)
                read = workers.ahead(ready, station.read, lambda candidate: n_bytes_in_header(candidate.path))
                try:
                    for candidate in ready:
                        if is_stopped():
                            break
                        line = station.finish(candidate, next(read))
                        if line is not None:
                            emit(line)
                finally:
                    read.close()
        except _Stopped:
            return


class _Station(NamedTuple):
    """What makes a line of a file; see `watch`."""

    detector: Detector
    out: Path
    journal: Journal
    inbox: Inbox
    threshold: float
    overlays: str
    overlay_format: str
    patience: float
    is_stopped: Callable[[], object]

    def read(self, candidate: Candidate) -> _Image | _Unreadable:
        """In a thread: the image, or why not yet."""
        started = time.monotonic()
        if not candidate.is_read:
            suffix = candidate.path.suffix.lower()
            return _Unreadable(f"{suffix} files are not read: convert it to png, jpg, bmp, tif or webp")
        try:
            data = _content(candidate)
        except OSError as error:
            return _Unreadable(f"it cannot be opened ({error.strerror or error})")
        if data is None:
            return _Unreadable(None)
        sha256 = hashlib.sha256(data).hexdigest()
        if self.journal.judged_as(candidate.state, sha256) is not None:
            return _Image(sha256, None, None, 0)
        try:
            pixels = decode_image(data, candidate.path, bits=self.detector.bits)
        except ImageError as error:
            return _Unreadable("; ".join(reason for _, reason in error.failures), sha256)
        return _Image(sha256, pixels, self.detector.resized(pixels), time.monotonic() - started)

    def finish(self, candidate: Candidate, found: _Image | _Unreadable) -> str | None:
        """In the thread that computes: the line; None where there is none, or not yet."""
        name = candidate.state.name
        if isinstance(found, _Unreadable):
            now = time.monotonic()
            last_try = candidate.unchanged_since + self.patience
            if found.reason is None or (candidate.is_read and now < last_try):
                self.inbox.postpone(candidate, now, last_try)
                return None
            if FileState.at(candidate.path, name) != candidate.state:
                return None
            return self._line(candidate, found.sha256, Prediction(name, error=found.reason), 0)
        # Asked again, since the one before may have been the same file under another name.
        judged_as = self.journal.judged_as(candidate.state, found.sha256)
        if judged_as is not None or found.pixels is None or found.resized is None:
            self._patiently(lambda: self.journal.append(candidate.state, found.sha256, {JUDGED_AS: judged_as}))
            return None
        started = time.monotonic()
        (prediction,), findings = judge(self.detector, found.resized[None], [name], self.threshold)
        if is_drawn(prediction, self.overlays):
            # With a piece of the checksum, since another image may come under this name.
            overlay = Path("overlays", name)
            overlay = overlay.with_name(f"{overlay.stem[:_STEM]}-{found.sha256[:8]}.{self.overlay_format}")
            drawn = drawable(self.detector, map_to_draw(prediction, findings.maps, 0), found.pixels.shape[:2])
            pixels, text, limits = found.pixels, caption(prediction), colour_range(self.threshold)
            try:
                self._patiently(lambda: write_overlay(self.out / overlay, pixels, drawn, text, limits))
                prediction = replace(prediction, overlay=overlay.as_posix())
            except UserError as error:
                prediction = replace(prediction, error=str(error))
        return self._line(candidate, found.sha256, prediction, found.seconds + time.monotonic() - started)

    def _line(self, candidate: Candidate, sha256: str | None, prediction: Prediction, seconds: float) -> str:
        found = {name: value for name, value in asdict(prediction).items() if name not in ("path", "map", "skipped")}

        def append() -> str:
            latency = time.monotonic() - candidate.first_seen
            timed = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "latency": round(latency, 4),
                "seconds": round(seconds, 4),
            }
            return self.journal.append(candidate.state, sha256, found | timed)

        return self._patiently(append)

    def _patiently(self, work: Callable[[], Result]) -> Result:
        return _when_possible(work, self.is_stopped, _RETRY, 1)


def _when_possible(work: Callable[[], Result], is_stopped: Callable[[], object], pause: float, most: int) -> Result:
    """What `work` returns, as soon as the system lets it; of `most` failures and what follows it is said once.

    Raises:
        UserError: of `work`, that the system has no part in.
        _Stopped: while it waits.
    """
    n_failures = 0
    while True:
        try:
            result = work()
        except (OSError, UserError) as error:
            if isinstance(error, UserError) and not isinstance(error.__cause__, OSError):
                raise
            n_failures += 1
            if n_failures == most:
                log.warning("%s; waiting until that is mended", _said(error))
            if is_stopped():
                raise _Stopped from None
            _sleep(pause, is_stopped)
        else:
            if n_failures >= most:
                log.warning("mended: it goes on")
            return result


def _said(error: OSError | UserError) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{error.filename or 'the file of decisions'} cannot be used: {error.strerror or error}"


def _content(candidate: Candidate) -> bytes | None:
    """The bytes of a file; None if it is not as it was seen, before or after."""
    if not candidate.path.is_file() and candidate.path.exists():  # to open a pipe would wait for a writer
        raise OSError("it is not a regular file")
    with candidate.path.open("rb") as file:
        if FileState.of(candidate.state.name, os.fstat(file.fileno())) != candidate.state:
            return None
        data = file.read()
        is_same = FileState.of(candidate.state.name, os.fstat(file.fileno())) == candidate.state
        return data if is_same and len(data) == candidate.state.size else None


def _sleep(seconds: float, is_stopped: Callable[[], object]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not is_stopped():
        time.sleep(min(left, _NAP))
