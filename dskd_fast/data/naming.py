"""Names that people give the folders of a data set, and errors for images that would be ignored under them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from dskd_fast.data.listing import Listing, has_images, list_subfolders
from dskd_fast.errors import UserError

# Names that people give these folders, as `plain` writes them: the name that is read comes first.
FOLDERS = {
    "train": ("train", "training", "trainset", "trainingset", "traindata", "trainingdata", "trainimages"),
    "validation": ("validation", "val", "valid", "validate", "valset", "validset", "validationset", "validationdata"),
    "test": ("test", "tests", "testing", "testset", "testdata", "testimages"),
    "ground_truth": ("groundtruth", "groundtruths", "gt", "mask", "masks"),
}
GOOD = ("good", "ok", "okay", "normal", "nominal", "pass", "passed", "defectfree", "anomalyfree")
LOGICAL = ("logicalanomalies", "logicalanomaly", "logical")
ANOMALOUS = (
    *("bad", "ng", "nok", "notok", "notgood", "fail", "failed", "faulty", "reject", "rejected", "rejects", "abnormal"),
    *("defect", "defects", "defective", "anomaly", "anomalies", "anomalous", "broken", "damaged"),
)


def plain(name: str) -> str:
    """A name without case and separators: "Good Parts" and "good_parts" are the same."""
    return re.sub(r"[-_. ]", "", name.casefold())


def meant_folder(name: str, names: Mapping[str, Iterable[str]]) -> str | None:
    """Which of the folders this name stands for; None for none of them."""
    return next((folder for folder, variants in names.items() if plain(name) in variants), None)


def refuse_other_names(parent: Path, names: Mapping[str, Iterable[str]]) -> None:
    """Raise UserError for a folder of images whose name is nearly one of those that are read."""
    for folder in list_subfolders(parent):
        meant = meant_folder(folder.name, names)
        # Another spelling may be the same folder: by a link, or where the file system takes no account of case.
        if meant in (None, folder.name) or ((parent / meant).is_dir() and folder.samefile(parent / meant)):
            continue
        if has_images(folder):
            raise UserError(
                f"{folder} is not read under this name, though it looks like the folder {meant}; rename it to "
                f"{parent / meant}, or move its images there"
            )


def refuse_images(listings: Iterable[Listing], advice: str) -> None:
    """Raise UserError for the first folder that holds images, which would not be used where they lie."""
    for listing in listings:
        if listing.all:
            raise UserError(
                f"{listing.folder} holds images that would not be used, {listing.all[0].name} among them; {advice}"
            )


def refuse_classes(data_root: Path, names: Iterable[str]) -> None:
    """Raise UserError where folders of images are the classes of one category rather than categories."""
    classes = [
        name
        for name in names
        if plain(name) in (*GOOD, *ANOMALOUS) and not any((data_root / name / f).is_dir() for f in ("train", "test"))
    ]
    if classes:
        raise UserError(
            f"{', '.join(classes)} in {data_root} looks like a class of images, not like a category: put good images "
            f"into {data_root / 'train' / 'good'} and others into a folder of {data_root / 'test'}, or train on a "
            f"folder of good images alone with --data-root {data_root / 'FOLDER'}"
        )
