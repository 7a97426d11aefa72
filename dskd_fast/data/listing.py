"""Which image files lie where: those that are read, and those of formats that are not."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dskd_fast.data.images import is_image_like, list_images, natural_key
from dskd_fast.errors import UserError

PREDICTIONS = "predictions.csv"
PICTURE_FOLDERS = ("overlays", "maps")
# What the first line of every PREDICTIONS begins with, whichever version wrote it.
_HEADER = b"path,score,threshold,decision,overlay,map,"


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
    for name, subfolders, _ in os.walk(folder, onerror=unreadable, followlinks=True):
        here = Path(name)
        if here.resolve() in seen:
            subfolders.clear()
            continue
        seen.add(here.resolve())
        subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and not leave_out(here / s))
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
