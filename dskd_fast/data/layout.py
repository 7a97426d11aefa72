"""Finding the images, masks and splits of one category on disk.

Three layouts are understood:

- ``loco`` (MVTec LOCO AD): ``train/good``, ``validation/good``,
  ``test/{good,logical_anomalies,structural_anomalies}``, ``ground_truth/TYPE/NNN/KKK.png`` with one mask per
  defect, and ``defects_config.json``.
- ``mvtec_ad`` (MVTec AD): ``train/good``, ``test/DEFECT``, ``ground_truth/DEFECT/NNN_mask.png``.
- ``folder``: good images, in a folder of their own or under ``train`` or ``train/good``; everything else is
  optional.

No image file vanishes without a word. In the folders that are read, one that lies where it would not be used is
refused, and so is a folder whose name is nearly one of those above (``val``, ``Train``, ``test/ok``); the error says
where it belongs. All other image files of the category that nothing reads are listed in `Category.unused`. Hidden
files, and files that are no images by their suffix, are left alone.
"""

import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import ndimage

from dskd_fast.data.contents import content_digests
from dskd_fast.data.images import ImageError, image_size, natural_key, read_mask
from dskd_fast.data.listing import Listing, is_prediction_output, list_folder, walk
from dskd_fast.errors import UserError

Kind = Literal["good", "structural", "logical"]
KINDS: tuple[Kind, ...] = ("good", "structural", "logical")

DATA_ROOT_VARIABLE = "DSKD_FAST_DATA"

MVTEC_AD_CATEGORIES = (
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "hazelnut",
    "leather",
    "metal_nut",
    "pill",
    "screw",
    "tile",
    "toothbrush",
    "transistor",
    "wood",
    "zipper",
)

# The paper's modified MVTec AD (section 4.1): these test images are logical anomalies; None stands for a
# whole folder.
_MVTEC_AD_LOGICAL: dict[tuple[str, str], tuple[str, ...] | None] = {
    ("cable", "cable_swap"): None,
    ("cable", "combined"): ("005", "007", "009"),
    ("capsule", "faulty_imprint"): ("004", "005"),
    ("transistor", "cut_lead"): None,
    ("transistor", "misplaced"): None,
}

# A lossy format cannot hold a mask: its values smear over the edges.
_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")

# What people call these folders, as `_plain` writes it: the name itself comes first.
_FOLDERS = {
    "train": ("train", "training", "trainset", "trainingset", "traindata", "trainingdata", "trainimages"),
    "validation": ("validation", "val", "valid", "validate", "valset", "validset", "validationset", "validationdata"),
    "test": ("test", "tests", "testing", "testset", "testdata", "testimages"),
    "ground_truth": ("groundtruth", "groundtruths", "gt", "mask", "masks"),
}
_GOOD = ("good", "ok", "okay", "normal", "nominal", "pass", "passed", "defectfree", "anomalyfree")
_LOGICAL = ("logicalanomalies", "logicalanomaly", "logical")
_ANOMALOUS = (
    *("bad", "ng", "nok", "notok", "notgood", "fail", "failed", "faulty", "reject", "rejected", "rejects", "abnormal"),
    *("defect", "defects", "defective", "anomaly", "anomalies", "anomalous", "broken", "damaged"),
)

# How many of many files a sentence names.
_N_NAMED = 3

_FORMATS = "png, jpg, bmp, tif or webp"

# The share of training images held out for validation where there is no validation folder.
HOLDOUT = 0.1

MIN_IMAGES_TO_HOLD_OUT = 10

# Each region becomes a mask of its own: noise taken for a mask would fill the memory.
_MAX_COMPONENTS = 1000


class DataNotFound(UserError):
    """There is no data set where it was looked for."""


class MaskError(UserError):
    """Masks of a test image cannot be used; `reasons` has a sentence for each of them."""

    def __init__(self, reasons: Iterable[str]):
        self.reasons = tuple(reasons)
        super().__init__("; ".join(self.reasons))


@dataclass(frozen=True, eq=False)
class Defect:
    """One defect of a test image.

    Attributes:
        mask: bool, shape (H, W) of the native image; True where the defect is.
        saturation: the saturation threshold s of sPRO in pixels, 1 <= s <= the mask's area: the defect counts
            as found in full once this many of its pixels are.
        name: the defect's name in ``defects_config.json``, else its test folder.
    """

    mask: np.ndarray
    saturation: int
    name: str


@dataclass(frozen=True)
class DefectType:
    """An entry of ``defects_config.json``: how much of such a defect has to be found."""

    name: str
    saturation_threshold: float
    relative_saturation: bool

    def saturation(self, area: int) -> int:
        """The saturation threshold in pixels of a defect of ``area`` pixels, as MVTec's evaluator defines it.

        That evaluator divides by zero where a relative threshold rounds down to no pixel; here one pixel is
        asked for.
        """
        if self.relative_saturation:
            return max(1, int(self.saturation_threshold * area))
        return min(int(self.saturation_threshold), area)


@dataclass(frozen=True)
class LabelledImage:
    """A test image.

    Attributes:
        path: the image file.
        folder: its folder under ``test``, which names the defect.
        kind: "good", "structural" or "logical".
        key: ``test/FOLDER/STEM``; with ``.tiff`` appended, the name of its anomaly map. A stem may hold dots.
        masks: its ground truth files, whether they can be used or not; empty if there are none.
        one_mask_per_defect: each file of ``masks`` is one defect (LOCO), rather than one file holding all of
            them.
    """

    path: Path
    folder: str
    kind: Kind
    key: str
    masks: tuple[Path, ...] = ()
    one_mask_per_defect: bool = False


@dataclass(frozen=True)
class Category:
    """The images of one category.

    Attributes:
        name: the category's name.
        root: its folder.
        layout: "loco", "mvtec_ad" or "folder".
        train: good images to train on, without those held out.
        validation: good images to normalise and to set thresholds with.
        validation_source: where these are from: a "folder", a "holdout" of the training images, or "none".
        test: the test images, good ones included.
        defect_types: pixel value to entry of ``defects_config.json``, or None where there is no such file.
        unused: image files of the category that nothing reads, by what they are ("formats that are not read").
        stray_masks: by the kind of anomaly, a sentence for each mask that belongs to no test image, or to one that
            has another mask already.
    """

    name: str
    root: Path
    layout: Literal["loco", "mvtec_ad", "folder"]
    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    validation_source: Literal["folder", "holdout", "none"]
    test: tuple[LabelledImage, ...]
    defect_types: dict[int, DefectType] | None
    unused: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    stray_masks: Mapping[Kind, tuple[str, ...]] = field(default_factory=dict)

    @property
    def n_images(self) -> dict[str, int]:
        """Number of images per split and type: train, validation, test/good, test/structural,
        test/logical."""
        counts = {"train": len(self.train), "validation": len(self.validation)}
        return counts | {f"test/{kind}": sum(item.kind == kind for item in self.test) for kind in KINDS}

    @property
    def fingerprint(self) -> str:
        """A hash of the names and contents of the images that a training sees, to notice when they are others.

        "sha256:" and 64 digits. Each file is read at the first call, and again only when it has changed on the disk.
        """
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for path, content in zip(split, content_digests(split), strict=True):
                # What cannot be read, as a dead link, is named with all else that cannot be when images are decoded.
                digest.update(os.fsencode(path.name) + b"\0" + (content or bytes(32)))
            digest.update(b"\0")
        return f"sha256:{digest.hexdigest()}"

    @property
    def names_and_sizes(self) -> str:
        """What versions before `fingerprint` knew images by: 64 digits, a hash of names and numbers of bytes alone."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for path in split:
                n_bytes = path.stat().st_size if path.exists() else -1
                digest.update(os.fsencode(path.name) + b"\0%d\0" % n_bytes)
            digest.update(b"\0")
        return digest.hexdigest()

    @property
    def unused_summary(self) -> list[dict[str, Any]]:
        """`unused` as JSON: "files" (what they are), "n_files", and "first", their first paths below `root`."""
        return [
            {"files": what, "n_files": len(paths), "first": [_below(self.root, path) for path in paths[:_N_NAMED]]}
            for what, paths in self.unused.items()
        ]

    def localisation_obstacle(self, kind: Kind) -> str | None:
        """Why the localisation of "structural" or "logical" anomalies cannot be scored; None if it can.

        It can if there are such test images and each has its ground truth.
        """
        anomalous = [item for item in self.test if item.kind == kind]
        without = [item for item in anomalous if not item.masks]
        if not anomalous:
            return f"category {self.name} has no {kind} test images"
        if without:
            return (
                f"{len(without)} of the {len(anomalous)} {kind} test images of category {self.name} have "
                f"no ground truth mask, among them {without[0].path}"
            )
        return None

    def defects(self, item: LabelledImage, size: tuple[int, int] | None = None) -> list[Defect] | None:
        """The defects of a test image: an empty list for a good image, None where there is no ground truth.

        With one mask per defect, every pixel that is not 0 belongs to it, and its value is looked up in
        ``defects_config.json``; without that file the saturation threshold is the defect's area. With one
        mask per image, each 8-connected component of the pixels that are not 0 is a defect and its area the
        saturation threshold, which makes sPRO the PRO of MVTec AD.

        Args:
            item: one of ``test``.
            size: height and width of the image; None reads it for them.

        Raises:
            MaskError: names every mask of the image that is unreadable, empty, lossy (JPEG, WebP), has more than 1000
                regions, differs from its image in size, or holds a value that the configuration lacks or more than
                one value.
            ImageError: the image cannot be read.
        """
        if item.kind == "good":
            return []
        if not item.masks:
            return None
        size = image_size(item.path) if size is None else size
        defects: list[Defect] = []
        reasons = []
        for path in item.masks:
            try:
                defects += self._defects_in(path, item, size)
            except ImageError as error:
                reasons.append(f"the mask {path} is unusable: " + "; ".join(reason for _, reason in error.failures))
            except UserError as error:
                reasons.append(str(error))
        if reasons:
            raise MaskError(reasons)
        return defects

    def _defects_in(self, path: Path, item: LabelledImage, size: tuple[int, int]) -> list[Defect]:
        if path.suffix.lower() not in _MASK_SUFFIXES:
            raise UserError(
                f"the mask {path} is in a format that may smear its edges or is not read; draw it again and save it "
                "as png, bmp or tif"
            )
        values = read_mask(path)
        if values.shape != size:
            raise UserError(
                f"the mask {path} has {values.shape[1]} x {values.shape[0]} pixels, but its image "
                f"{item.path} has {size[1]} x {size[0]}; a mask must have the size of its image"
            )
        mask = values > 0
        if not mask.any():
            raise UserError(f"the mask {path} is empty: no pixel differs from 0; remove it or mark the defect")
        if item.one_mask_per_defect:
            return [self._single_defect(path, values, mask, item.folder)]
        labels, n_components = ndimage.label(mask, structure=np.ones((3, 3)))
        if n_components > _MAX_COMPONENTS:
            raise UserError(
                f"the mask {path} has {n_components} separate regions, more than {_MAX_COMPONENTS}; "
                "it looks like noise or a photograph, so check that it is a mask"
            )
        components = (labels == label for label in range(1, n_components + 1))
        return [Defect(component, int(component.sum()), item.folder) for component in components]

    def _single_defect(self, path: Path, values: np.ndarray, mask: np.ndarray, folder: str) -> Defect:
        area = int(mask.sum())
        if self.defect_types is None:
            return Defect(mask, area, folder)
        found = np.unique(values[mask]).tolist()
        if len(found) > 1:
            raise UserError(
                f"the mask {path} holds {len(found)} values ({found[0]} and {found[1]} among them), where "
                "one defect has one value; write one file per defect"
            )
        if found[0] not in self.defect_types:
            raise UserError(
                f"the mask {path} holds the pixel value {found[0]}, which "
                f"{self.root / 'defects_config.json'} does not list; add an entry for it or correct the mask"
            )
        defect_type = self.defect_types[found[0]]
        return Defect(mask, defect_type.saturation(area), defect_type.name)


class GroundTruth:
    """What is marked in a category's test images, where one bad mask hides neither the others nor the image scores.

    Args:
        category: whose masks to read.

    Attributes:
        name, test: the category's.
    """

    def __init__(self, category: Category) -> None:
        self.name = category.name
        self.test = category.test
        self._category = category
        # Dictionaries, because each mask is read once for every variant of the maps.
        self._bad_masks: dict[str, dict[str, None]] = {
            kind: dict.fromkeys(category.stray_masks.get(kind, ())) for kind in KINDS
        }

    def defects(self, item: LabelledImage, size: tuple[int, int] | None = None) -> list[Defect] | None:
        """As `Category.defects`, but None where a mask of the image or of its kind so far cannot be used.

        Raises:
            ImageError: the image cannot be read.
        """
        try:
            found = self._category.defects(item, size)
        except MaskError as error:
            self._bad_masks[item.kind] |= dict.fromkeys(error.reasons)
        return None if self._bad_masks[item.kind] else found

    def bad_masks(self, kind: str | None = None) -> list[str]:
        """A sentence for each mask that cannot be used, of one kind of anomaly or of all, as far as they were read."""
        kinds = KINDS if kind is None else (kind,)
        return list(dict.fromkeys(sentence for kind in kinds for sentence in self._bad_masks[kind]))


def unused_sentences(summary: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each entry of a `Category.unused_summary`."""
    return [
        f"not used: {entry['n_files']} image file{'s' * (entry['n_files'] != 1)} ({entry['files']}): "
        + ", ".join(entry["first"])
        + (", ..." if entry["n_files"] > len(entry["first"]) else "")
        for entry in summary
    ]


def default_data_root() -> Path:
    """The folder that $DSKD_FAST_DATA names, else ``./mvtec_loco_anomaly_detection``."""
    return Path(os.environ.get(DATA_ROOT_VARIABLE) or "mvtec_loco_anomaly_detection")


def open_category(
    data_root: str | os.PathLike, category: str | None, *, holdout: float = HOLDOUT, seed: int = 0
) -> Category:
    """Find the images of a category.

    ``data_root/category`` is looked at first, then ``data_root`` itself, if it is a category's folder and
    ``category`` is None or that folder's name. A category's folder has a folder ``train`` (with the images in
    it or in ``train/good``) or holds images directly; these are good images, then.

    Without a validation folder, a share of the training images is held out: round(holdout * n), at least 2,
    where there are 10 training images or more, and none where there are fewer. Which ones depends on ``seed``
    and the file names alone.

    Args:
        data_root: the data set's folder; a leading ``~`` is the home directory.
        category: the category's name, a plain folder name.
        holdout: share of the training images, 0 <= holdout < 1; 0 holds out none.
        seed: selects the images to hold out.

    Raises:
        DataNotFound: ``data_root`` does not exist or has no category in it.
        UserError: the category is missing, has no training images, has two test images of the same stem in
            one folder, or has an invalid ``defects_config.json``; an image file lies where it would not be used (loose
            beside a folder ``good``, or in a subfolder), or a folder's name is nearly one of those that are read; the
            folder's name says that its images are not good; or ``holdout`` is out of range.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"holdout must be at least 0 and below 1, not {holdout}")
    root = _find_root(Path(data_root).expanduser(), category)
    name = _folder_name(root)
    _refuse_other_names(root, _FOLDERS)
    unused: dict[str, list[Path]] = defaultdict(list)
    train = _training_images(root, unused)
    validation = _images_of_split(root / "validation", unused)
    source: Literal["folder", "holdout", "none"] = "folder"
    if not validation:
        train, validation = _hold_out(train, holdout, seed)
        source = "holdout" if validation else "none"
    layout = _layout(root, name)
    masks = _MaskFiles(root / "ground_truth")
    test = tuple(_test_images(root, name, layout, masks, unused))
    stray_masks = _stray_masks(root, name, layout, test, masks, unused)
    return Category(
        name=name,
        root=root,
        layout=layout,
        train=tuple(train),
        validation=tuple(validation),
        validation_source=source,
        test=test,
        defect_types=_read_defects_config(root / "defects_config.json"),
        unused={what: tuple(paths) for what, paths in unused.items()},
        stray_masks=stray_masks,
    )


def list_categories(data_root: Path) -> list[str]:
    """The names of the categories in a data set's folder, sorted.

    Raises:
        DataNotFound: there are none.
        UserError: the folder is itself a category, or no folder, or its subfolders are the classes of one category
            (``good``, ``bad``): a model of the bad images would take defects for normal.
    """
    data_root = data_root.expanduser()
    if data_root.is_dir() and not _is_category(data_root):
        found = [folder.name for folder in _subfolders(data_root) if _is_category(folder)]
        if found:
            _refuse_classes(data_root, found)
            return found
    _find_root(data_root, None)  # says what is wrong
    loose = list_folder(data_root).images
    why = f", since it holds images directly, as {loose[0].name}" if loose else ""
    raise UserError(f"{data_root} is itself a category{why}: name the folder above it, or move what belongs elsewhere")


def _folder_name(folder: Path) -> str:
    # Not resolve(): a link is known by its own name.
    return Path(os.path.abspath(folder)).name


def _subfolders(folder: Path) -> list[Path]:
    try:
        folders = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error
    return sorted(folders, key=lambda path: natural_key(path.name))


def _is_category(folder: Path) -> bool:
    """Whether a folder is meant as a category, though its folders may have to be renamed."""
    here = list_folder(folder)
    if (folder / "train").is_dir() or (folder / "test").is_dir() or here.images:
        return True
    subfolders = _subfolders(folder)
    if any(_meant(sub.name, _FOLDERS) in ("train", "test") and _has_images(sub) for sub in subfolders):
        return True
    # A logo.svg beside categories makes no category of their folder.
    return bool(here.others) and not any(_is_category(sub) for sub in subfolders)


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.casefold())


def _meant(name: str, names: Mapping[str, Iterable[str]]) -> str | None:
    """Which folder somebody means by this name; None where it is none of them."""
    return next((folder for folder, variants in names.items() if _plain(name) in variants), None)


def _has_images(folder: Path) -> bool:
    return next(_all(walk(folder)), None) is not None


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _refuse_other_names(parent: Path, names: Mapping[str, Iterable[str]]) -> None:
    """Raise UserError for a folder of images whose name is nearly one of those that are read."""
    for folder in _subfolders(parent):
        meant = _meant(folder.name, names)
        # Another spelling may be the same folder: by a link, or where the file system takes no account of case.
        if meant in (None, folder.name) or ((parent / meant).is_dir() and folder.samefile(parent / meant)):
            continue
        if _has_images(folder):
            raise UserError(
                f"{folder} is not read under this name, though it looks like the folder {meant}; rename it to "
                f"{parent / meant}, or move its images there"
            )


def _refuse_classes(data_root: Path, names: Iterable[str]) -> None:
    """Raise UserError where folders of images are the classes of one category rather than categories."""
    classes = [
        name
        for name in names
        if _plain(name) in (*_GOOD, *_ANOMALOUS) and not any((data_root / name / f).is_dir() for f in ("train", "test"))
    ]
    if classes:
        raise UserError(
            f"{', '.join(classes)} in {data_root} looks like a class of images, not like a category: put good images "
            f"into {data_root / 'train' / 'good'} and others into a folder of {data_root / 'test'}, or train on a "
            f"folder of good images alone with --data-root {data_root / 'FOLDER'}"
        )


def _find_root(data_root: Path, category: str | None) -> Path:
    if category is not None and (not category or category in (".", "..") or {"/", "\\"} & set(category)):
        raise UserError(f"a category must be the name of a folder in the data root, not {category!r}")
    if not data_root.exists():
        raise DataNotFound(
            f"the data root {data_root} does not exist; download MVTec LOCO AD (licence CC BY-NC-SA 4.0) "
            "from https://www.mvtec.com/company/research/datasets/mvtec-loco, or take a folder of your own, "
            f"and point --data-root or ${DATA_ROOT_VARIABLE} to it, or run 'dskd-fast demo', which needs no "
            "data"
        )
    if not data_root.is_dir():
        raise UserError(f"the data root {data_root} is a file; name the folder that holds the categories")
    if category is not None and (data_root / category).is_dir():
        if not _is_category(data_root / category):
            raise UserError(
                f"{data_root / category} has no folder train or test and no images of its own; put good images into "
                f"{data_root / category / 'train' / 'good'}"
            )
        return data_root / category
    if _is_category(data_root):
        if category not in (None, _folder_name(data_root)):
            raise UserError(
                f"the data root {data_root} is itself the category {_folder_name(data_root)} "
                f"and holds no category {category}; leave the category out or name the folder above it"
            )
        return data_root
    found = [folder.name for folder in _subfolders(data_root) if _is_category(folder)]
    if not found:
        raise DataNotFound(
            f"the data root {data_root} holds neither categories (folders with train/good) nor images; point "
            f"--data-root or ${DATA_ROOT_VARIABLE} to MVTec LOCO AD "
            "(https://www.mvtec.com/company/research/datasets/mvtec-loco, licence CC BY-NC-SA 4.0) or to a "
            "folder of good images, or run 'dskd-fast demo', which needs no data"
        )
    _refuse_classes(data_root, found)
    listed = ", ".join(found[:30]) + (", ..." if found[30:] else "")
    if category is None:
        raise UserError(f"the data root {data_root} is not itself a category; choose one of: {listed}")
    raise UserError(f"there is no category {category} in {data_root}; choose one of: {listed}")


def _images_of_split(folder: Path, unused: dict[str, list[Path]]) -> list[Path]:
    """Images of ``folder/good``, or of ``folder`` itself where there are none."""
    if not folder.is_dir():
        return []
    _refuse_other_names(folder, {"good": _GOOD})
    good = folder / "good"
    loose = list_folder(folder)
    of_good = list_folder(good) if good.is_dir() else Listing(good, [], [])
    if loose.all and of_good.all:
        raise UserError(
            f"{folder} holds images that would not be used, {loose.all[0].name} among them, because {good} has some; "
            f"move good ones to {good} itself, others elsewhere"
        )
    chosen = of_good if of_good.all else loose
    _refuse_deeper(chosen.folder, (listing for listing in walk(folder) if listing.folder not in (folder, good)))
    return _readable(chosen, unused)


def _refuse_deeper(folder: Path, deeper: Iterable[Listing]) -> None:
    for listing in deeper:
        if listing.all:
            raise UserError(
                f"{listing.folder} holds images that would not be used; move good ones to {folder} itself, others "
                "elsewhere"
            )


def _readable(listing: Listing, unused: dict[str, list[Path]]) -> list[Path]:
    if listing.others and not listing.images:
        raise UserError(
            f"none of the {len(listing.others)} image files in {listing.folder} is of a format that is read, "
            f"{listing.others[0].name} among them; convert them to {_FORMATS}"
        )
    _add(unused, "formats that are not read", listing.others)
    return listing.images


def _add(unused: dict[str, list[Path]], what: str, paths: Iterable[Path]) -> None:
    for path in paths:  # which may be none: then there is no entry
        unused[what].append(path)


def _all(listings: Iterable[Listing]) -> Iterator[Path]:
    return (path for listing in listings for path in listing.all)


def _training_images(root: Path, unused: dict[str, list[Path]]) -> list[Path]:
    loose = list_folder(root)
    has_train, has_test = (root / "train").is_dir(), (root / "test").is_dir()
    # A test set alone can be scored, if not trained on.
    is_flat = not has_train and bool(loose.images or (loose.others and not has_test))
    for folder in _subfolders(root):
        # One that is meant but spelled otherwise is empty, or the same folder, or has been refused.
        if _meant(folder.name, _FOLDERS) is not None:
            continue
        try:
            listings = [] if is_prediction_output(folder) else list(walk(folder, is_prediction_output))
            drawn = {*_all(walk(folder))} - {*_all(listings)}
        except UserError:
            if is_flat:
                raise
            continue  # not ours to read, as lost+found
        if is_flat:
            _refuse_deeper(root, listings)
        _add(unused, "in folders that have no meaning here", _all(listings))
        _add(unused, "drawn by an earlier prediction", sorted(drawn))
    if is_flat:
        if _plain(_folder_name(root)) in _ANOMALOUS:
            raise UserError(
                f"{root} looks by its name like a folder of anomalous images, and training takes good ones; rename it "
                "if they are good, or point --data-root to the good ones"
            )
        return _readable(loose, unused)
    _add(unused, "directly in the folder of the category", loose.all)
    if not has_train:
        return []
    images = _images_of_split(root / "train", unused)
    if not images:
        raise UserError(
            f"there are no training images in {root / 'train' / 'good'}; put good images there ({_FORMATS})"
        )
    return images


def _hold_out(train: list[Path], share: float, seed: int) -> tuple[list[Path], list[Path]]:
    if share == 0 or len(train) < MIN_IMAGES_TO_HOLD_OUT:
        return train, []
    n_held_out = min(max(2, round(share * len(train))), len(train) - 1)

    # A hash of the name, unlike a shuffle, keeps nearly the same images when one is added, on every numpy
    # version.
    def rank(path: Path) -> bytes:
        return hashlib.sha256(f"{seed}/".encode() + os.fsencode(path.name)).digest()

    held_out = set(sorted(train, key=rank)[:n_held_out])
    return [path for path in train if path not in held_out], [path for path in train if path in held_out]


def _layout(root: Path, name: str) -> Literal["loco", "mvtec_ad", "folder"]:
    test = root / "test"
    types = ("logical_anomalies", "structural_anomalies")
    if (root / "defects_config.json").is_file() or any((test / folder).is_dir() for folder in types):
        return "loco"
    known = name in MVTEC_AD_CATEGORIES and test.is_dir()
    if known or ((root / "train" / "good").is_dir() and any(root.glob("ground_truth/*/*_mask.png"))):
        return "mvtec_ad"
    return "folder"


def _test_images(
    root: Path, category: str, layout: str, masks: "_MaskFiles", unused: dict[str, list[Path]]
) -> Iterator[LabelledImage]:
    test = root / "test"
    if not test.is_dir():
        return
    if list_folder(test).all:
        raise UserError(f"{test} holds images directly; move them to {test / 'good'} or to a folder named by defect")
    _refuse_other_names(test, {"good": _GOOD, "logical_anomalies": _LOGICAL})
    for folder in _subfolders(test):
        here, *deeper = walk(folder)
        if _meant(folder.name, _FOLDERS) == "ground_truth" and _has_images(folder):
            raise UserError(f"{folder} looks like the masks; move it to {root / 'ground_truth'}")
        for listing in deeper:
            if listing.all:
                own = test / "_".join(listing.folder.relative_to(test).parts)
                raise UserError(
                    f"{listing.folder} holds images that would not be used; move them to {folder} itself, or to a "
                    f"folder directly in {test}, such as {own}"
                )
        _require_distinct_stems(here.images)
        _add(unused, "formats that are not read", here.others)
        for path in here.images:
            kind = _kind(layout, category, folder.name, path.stem)
            files, one_mask_per_defect = ((), False) if kind == "good" else masks.of(folder.name, path)
            key = f"test/{folder.name}/{path.stem}"
            yield LabelledImage(path, folder.name, kind, key, files, one_mask_per_defect)


def _require_distinct_stems(images: list[Path]) -> None:
    by_stem: dict[str, Path] = {}
    for path in images:
        other = by_stem.setdefault(path.stem, path)
        if other is not path:
            raise UserError(
                f"{other} and {path.name} differ only in their suffix, so that their anomaly maps would get "
                "the same name; rename one of them"
            )
    for path in images:
        if path.stem.endswith("_mask") and path.stem.removesuffix("_mask") in by_stem:
            raise UserError(
                f"{path} looks like the mask of the image beside it; move it to ground_truth/{path.parent.name}"
            )


def _kind(layout: str, category: str, folder: str, stem: str) -> Kind:
    if folder == "good":
        return "good"
    if layout == "mvtec_ad" and (category, folder) in _MVTEC_AD_LOGICAL:
        stems = _MVTEC_AD_LOGICAL[category, folder]
        return "logical" if stems is None or stem in stems else "structural"
    return "logical" if folder == "logical_anomalies" else "structural"


class _MaskFiles:
    """The files below ``ground_truth``, and which of them belong to a test image.

    Attributes:
        seconds: masks that are left over because their image has another one, with that one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seconds: dict[Path, Path] = {}
        self._taken: set[Path] = set()
        self._by_stem: dict[str, dict[str, list[Path]]] = {}

    def of(self, folder: str, image: Path) -> tuple[tuple[Path, ...], bool]:
        """The mask files of a test image, and whether each of them is one defect."""
        own = self.root / folder / image.stem
        one_for_each = tuple(list_folder(own).all) if own.is_dir() else ()
        by_stem = self._files(folder)
        singles = [path for stem in (f"{image.stem}_mask", image.stem) for path in by_stem.get(stem, ())]
        chosen = one_for_each or tuple(singles[:1])
        self._taken |= {*chosen}
        self.seconds |= {path: chosen[0] for path in singles if path not in chosen}
        return chosen, bool(one_for_each)

    def left(self) -> list[Path]:
        """All files that belong to no test image."""
        if not self.root.is_dir():
            return []
        return [path for path in _all(walk(self.root)) if path not in self._taken]

    def _files(self, folder: str) -> dict[str, list[Path]]:
        """The files directly in a folder of masks by their stems."""
        if folder not in self._by_stem:
            by_stem = self._by_stem[folder] = defaultdict(list)
            if (self.root / folder).is_dir():
                for path in list_folder(self.root / folder).all:
                    by_stem[path.stem].append(path)
        return self._by_stem[folder]


def _stray_masks(
    root: Path,
    category: str,
    layout: str,
    test: Iterable[LabelledImage],
    masks: _MaskFiles,
    unused: dict[str, list[Path]],
) -> dict[Kind, tuple[str, ...]]:
    """By the kind of anomaly, a sentence for each mask, or for each folder of masks, that belongs to no image."""
    folders = {item.folder for item in test}
    sentences: dict[Kind, dict[str, None]] = defaultdict(dict)
    for path in masks.left():
        folder = path.relative_to(masks.root).parts[0]
        if path in masks.seconds:
            sentence = f"the mask {path} is a second one beside {masks.seconds[path]}, of one image; remove one of them"
        elif path.parent == masks.root:
            sentence = f"the mask {path} lies directly in {masks.root}; move it to a folder named as its folder of test"
        elif folder == "good":
            _add(unused, "masks of good images", [path])
            continue
        elif folder not in folders:
            sentence = (
                f"{masks.root / folder} holds masks, but {root / 'test' / folder} no images; restore these, or remove "
                "the masks"
            )
        else:
            sentence = (
                f"the mask {path} belongs to no image of {root / 'test' / folder} (those of NNN.png are NNN_mask.png, "
                "NNN.png or NNN/*.png); restore its image, or rename or remove it"
            )
        stem = path.stem.removesuffix("_mask") if path.parent == masks.root / folder else path.parent.name
        kinds = KINDS[1:] if path.parent == masks.root else (_kind(layout, category, folder, stem),)
        for kind in kinds:
            sentences[kind][sentence] = None
    return {kind: tuple(of_kind) for kind, of_kind in sentences.items()}


def _read_defects_config(path: Path) -> dict[int, DefectType] | None:
    if not path.is_file():
        for other in sorted(path.parent.iterdir()):
            if _plain(other.name) in ("defectsconfigjson", "defectconfigjson") and other.is_file():
                raise UserError(f"{other} is not read under this name; rename it to {path.name}")
        return None
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise UserError(f"{path} must hold a list of defect types, not {type(entries).__name__}")
    defect_types: dict[int, DefectType] = {}
    for position, entry in enumerate(entries, start=1):
        where = f"entry {position} of {path}"
        keys = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise UserError(f"{where} lacks {', '.join(missing)}")
        name, value, threshold, relative = (entry[key] for key in keys)
        if not isinstance(name, str):
            raise UserError(f"defect_name must be text, not {name!r}, in {where}")
        if type(value) is not int or not 1 <= value <= 255:
            raise UserError(f"pixel_value must be an integer from 1 to 255, not {value!r}, in {where}")
        if type(relative) is not bool:
            raise UserError(f"relative_saturation must be true or false, not {relative!r}, in {where}")
        if type(threshold) not in (int, float) or not math.isfinite(threshold) or threshold <= 0:
            raise UserError(f"saturation_threshold must be a positive number, not {threshold!r}, in {where}")
        if relative and threshold > 1:
            raise UserError(f"a relative saturation_threshold must not exceed 1, but is {threshold!r} in {where}")
        if not relative and threshold != int(threshold):
            raise UserError(f"an absolute saturation_threshold counts pixels, but is {threshold!r} in {where}")
        defect_type = DefectType(name, threshold, relative)
        other = defect_types.setdefault(value, defect_type)
        if (other.saturation_threshold, other.relative_saturation) != (threshold, relative):
            raise UserError(
                f"{where} gives the pixel value {value} another saturation threshold than an entry before it"
            )
    return defect_types
