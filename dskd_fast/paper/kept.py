"""What tells whether something that was made before still holds: the recipe, and the images that figures are of."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dskd_fast.data.category import Category
from dskd_fast.data.contents import content_digests
from dskd_fast.errors import UserError
from dskd_fast.runs.folder import CALIBRATION, read_json
from dskd_fast.runs.options import ADDED_OPTIONS, TrainingOptions


def record_of(recipe: TrainingOptions) -> dict[str, Any]:
    """What all trainings have in common."""
    return {
        name: value
        for name, value in dataclasses.asdict(recipe).items()
        if name not in ("seed", "augmentation", "device")
    }


def check_recipe(path: Path, record: dict[str, Any]) -> None:
    """Raise UserError if the folder was begun with another recipe, before its tables are replaced by empty ones."""
    if not path.exists():
        return
    there = read_json(path)
    if not isinstance(there, dict):
        raise UserError(f"{path} was not written by this program: choose another --out")
    for name, value in record.items():
        begun_with = there.get(name, ADDED_OPTIONS.get(name))
        if begun_with != value:
            raise UserError(
                f"{path.parent} was begun with {name} {begun_with!r}, not {value!r}: choose another --out, or "
                "give the same options"
            )


def fingerprint(category: Category, folders: Sequence[Path]) -> str:
    """A hash of what figures are of: names and contents of test images and masks, and what the trainings ended with."""
    digest = hashlib.sha256()
    paths = [path for item in category.test for path in (item.path, *item.masks)]
    for path, content in zip(paths, content_digests(paths), strict=True):
        digest.update(os.fsencode(path.relative_to(category.root)) + b"\0" + (content or bytes(32)))
    digest.update(repr((category.defect_types, category.stray_masks, category.unused_summary)).encode())
    for folder in folders:
        # Statistics of millions of pixels: other weights have others.
        digest.update((folder / CALIBRATION).read_bytes())
    return digest.hexdigest()
