"""Which image files lie where: those that are read, and those of formats that are not."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dskd_fast.errors import UserError

PREDICTIONS = "predictions.csv"
PICTURE_FOLDERS = ("overlays", "maps")
# What the first line of every PREDICTIONS begins with, whichever version wrote it.
_HEADER = b"path,score,threshold,decision,overlay,map,"


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# Formats that people keep images in and that are not read.
IMAGE_LIKE_SUFFIXES = (
    *(".gif", ".apng", ".mpo", ".jfif", ".jpe", ".dib", ".ico", ".svg", ".psd", ".psb", ".xcf"),
    *(".heic", ".heif", ".hif", ".avif", ".jp2", ".j2k", ".jpx", ".jxl", ".jxr", ".jls", ".qoi"),
    *(".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srw", ".orf", ".rw2", ".raf", ".pef"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".pfm", ".tga", ".pcx", ".sgi", ".ras", ".xpm", ".dds"),
    *(".exr", ".hdr", ".btf", ".dcm", ".fits", ".nii", ".czi", ".lif", ".nd2", ".lsm", ".svs"),
)


class Listing(NamedTuple):
    """The image files directly in a folder, in natural order (``2.png`` before ``10.png``); hidden ones are left out.

    Attributes:
        folder: where they lie.
        images: files of formats that are read, by their suffix (`IMAGE_SUFFIXES`, any case). A link that leads nowhere
            is listed, so that reading it fails rather than the image going missing in silence.
        others: image files of formats that are not read (`IMAGE_LIKE_SUFFIXES`).
    """

    folder: Path
    images: list[Path]
    others: list[Path]

    @property
    def all(self) -> list[Path]:
        return [*self.images, *self.others]


def list_folder(folder: Path) -> Listing:
    """The image files directly in a folder.

    Raises:
        UserError: `folder` is not a folder or cannot be read.
    """
    entries = _entries(folder)
    images, others = (
        [entry for entry in entries if entry.suffix.lower() in suffixes and not entry.is_dir()]
        for suffixes in (IMAGE_SUFFIXES, IMAGE_LIKE_SUFFIXES)
    )
    return Listing(folder, images, others)


def list_subfolders(folder: Path) -> list[Path]:
    """The folders directly in a folder, in natural order; hidden ones are left out."""
    return [entry for entry in _entries(folder) if entry.is_dir()]


def walk(folder: Path, leave_out: Callable[[Path], bool] = lambda _: False) -> Iterator[Listing]:
    """List a folder and all folders below it, each once, even where links lead back; hidden folders are left out.

    Args:
        folder: comes first.
        leave_out: called with each folder below; true leaves it out with all that it holds.

    Raises:
        UserError: a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise _unlistable(error) from error

    seen: set[Path] = set()
    for name, below, _ in os.walk(folder, onerror=unreadable, followlinks=True):
        here = Path(name)
        if here.resolve() in seen:
            below.clear()
            continue
        seen.add(here.resolve())
        below[:] = sorted(s for s in below if not s.startswith(".") and not leave_out(here / s))
        yield list_folder(here)


def is_prediction_output(folder: Path) -> bool:
    """Whether a folder holds the overlays or the maps of an earlier prediction: its predictions.csv lies beside it."""
    if folder.name not in PICTURE_FOLDERS:
        return False
    try:
        with (folder.parent / PREDICTIONS).open("rb") as file:
            return file.readline(200).startswith(_HEADER)
    except OSError:
        return False


def has_images(folder: Path) -> bool:
    return next(all_images(walk(folder)), None) is not None


def all_images(listings: Iterable[Listing]) -> Iterator[Path]:
    return (path for listing in listings for path in listing.all)


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """A sort key that compares runs of digits by their value, and the whole name where that leaves a tie."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)], name


def _entries(folder: Path) -> list[Path]:
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise _unlistable(error) from error
    return sorted(entries, key=lambda path: natural_key(path.name))


def _unlistable(error: OSError) -> UserError:
    return UserError(f"cannot list the folder {error.filename}: {error.strerror}")
