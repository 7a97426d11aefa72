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
    """The image files directly in a folder, in natural order.

    Attributes:
        folder: where they lie.
        images: files of formats that are read, see `list_images`.
        others: image files of formats that are not read, see `is_image_like`.
    """

    folder: Path
    images: list[Path]
    others: list[Path]

    @property
    def all(self) -> list[Path]:
        return [*self.images, *self.others]


def list_folder(folder: Path) -> Listing:
    """The image files directly in a folder; hidden ones are left out.

    Raises:
        UserError: `folder` is not a folder or cannot be read.
    """
    images = list_images(folder)
    others = [entry for entry in folder.iterdir() if is_image_like(entry) and not entry.name.startswith(".")]
    others = [entry for entry in others if not entry.is_dir()]
    return Listing(folder, images, sorted(others, key=lambda path: natural_key(path.name)))


def walk(folder: Path, leave_out: Callable[[Path], bool] = lambda _: False) -> Iterator[Listing]:
    """List a folder and all folders below it, each once, even where links lead back; hidden folders are left out.

    Args:
        folder: comes first.
        leave_out: called with each folder below; true leaves it out with all that it holds.

    Raises:
        UserError: a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise UserError(f"cannot list the folder {error.filename}: {error.strerror}") from error

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


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """A sort key that compares runs of digits by their value, and the whole name where that leaves a tie."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)], name


def is_image_like(path: Path) -> bool:
    """Whether a file is, by its suffix (any case), an image of a format that is not read (`IMAGE_LIKE_SUFFIXES`)."""
    return Path(path).suffix.lower() in IMAGE_LIKE_SUFFIXES


def list_images(folder: Path) -> list[Path]:
    """The image files directly in ``folder``, in natural order (``2.png`` before ``10.png``).

    A file is an image by its suffix (`IMAGE_SUFFIXES`, any case). Hidden files and folders are left out. A
    link that leads nowhere is listed, so that reading it fails rather than the image going missing in
    silence.

    Raises:
        UserError: ``folder`` is not a folder or cannot be read.
    """
    try:
        entries = list(Path(folder).iterdir())
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error
    images = [
        entry
        for entry in entries
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".") and not entry.is_dir()
    ]
    return sorted(images, key=lambda path: natural_key(path.name))


def list_subfolders(folder: Path) -> list[Path]:
    try:
        folders = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error
    return sorted(folders, key=lambda path: natural_key(path.name))


def has_images(folder: Path) -> bool:
    return next(all_images(walk(folder)), None) is not None


def all_images(listings: Iterable[Listing]) -> Iterator[Path]:
    return (path for listing in listings for path in listing.all)
