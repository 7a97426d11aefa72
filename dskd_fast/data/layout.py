"""Finding the images, masks and splits of one category on disk.

Three layouts are understood:

- ``loco`` (MVTec LOCO AD): ``train/good``, ``validation/good``,
  ``test/{good,logical_anomalies,structural_anomalies}``, ``ground_truth/TYPE/NNN/KKK.png`` with one mask per
  defect, and ``defects_config.json``.
- ``mvtec_ad`` (MVTec AD): ``train/good``, ``test/DEFECT``, ``ground_truth/DEFECT/NNN_mask.png``.
- ``folder``: good images, in a folder of their own or under ``train`` or ``train/good``; everything else is
  optional.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import ndimage

from dskd_fast.data.images import image_size, list_images, natural_key, read_mask
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

# The share of training images held out for validation where there is no validation folder.
HOLDOUT = 0.1

MIN_IMAGES_TO_HOLD_OUT = 10

# Each region becomes a mask of its own: noise taken for a mask would fill the memory.
_MAX_COMPONENTS = 1000


class DataNotFound(UserError):
    """There is no data set where it was looked for."""


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
        masks: its ground truth files; empty if there are none.
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
    """

    name: str
    root: Path
    layout: Literal["loco", "mvtec_ad", "folder"]
    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    validation_source: Literal["folder", "holdout", "none"]
    test: tuple[LabelledImage, ...]
    defect_types: dict[int, DefectType] | None

    @property
    def n_images(self) -> dict[str, int]:
        """Number of images per split and type: train, validation, test/good, test/structural,
        test/logical."""
        counts = {"train": len(self.train), "validation": len(self.validation)}
        return counts | {f"test/{kind}": sum(item.kind == kind for item in self.test) for kind in KINDS}

    @property
    def fingerprint(self) -> str:
        """A hash of the names and sizes of the images that a training sees, to notice when they are others."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for path in split:
                # What is not there, as at the end of a dead link, is named with all else that cannot be read.
                n_bytes = path.stat().st_size if path.exists() else -1
                digest.update(os.fsencode(path.name) + b"\0%d\0" % n_bytes)
            digest.update(b"\0")
        return digest.hexdigest()

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
            UserError: a mask is empty, has more than 1000 regions, differs from its image in size, or holds a
                value that the configuration lacks or more than one value.
            ImageError: the image or a mask cannot be read.
        """
        if item.kind == "good":
            return []
        if not item.masks:
            return None
        size = image_size(item.path) if size is None else size
        defects = []
        for path in item.masks:
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
                defects.append(self._single_defect(path, values, mask, item.folder))
            else:
                labels, n_components = ndimage.label(mask, structure=np.ones((3, 3)))
                if n_components > _MAX_COMPONENTS:
                    raise UserError(
                        f"the mask {path} has {n_components} separate regions, more than {_MAX_COMPONENTS}; "
                        "it looks like noise or a photograph, so check that it is a mask"
                    )
                for label in range(1, n_components + 1):
                    component = labels == label
                    defects.append(Defect(component, int(component.sum()), item.folder))
        return defects

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
            one folder, or has an invalid ``defects_config.json``; or ``holdout`` is out of range.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"holdout must be at least 0 and below 1, not {holdout}")
    root = _find_root(Path(data_root).expanduser(), category)
    name = _folder_name(root)
    train = _training_images(root)
    validation = _images_of_split(root / "validation")
    source: Literal["folder", "holdout", "none"] = "folder"
    if not validation:
        train, validation = _hold_out(train, holdout, seed)
        source = "holdout" if validation else "none"
    layout = _layout(root, name)
    return Category(
        name=name,
        root=root,
        layout=layout,
        train=tuple(train),
        validation=tuple(validation),
        validation_source=source,
        test=tuple(_test_images(root, name, layout)),
        defect_types=_read_defects_config(root / "defects_config.json"),
    )


def list_categories(data_root: Path) -> list[str]:
    """The names of the categories in a data set's folder, sorted.

    Raises:
        DataNotFound: there are none.
        UserError: the folder is itself a category, or no folder.
    """
    data_root = data_root.expanduser()
    if data_root.is_dir() and not _is_category(data_root):
        found = [folder.name for folder in _subfolders(data_root) if _is_category(folder)]
        if found:
            return found
    _find_root(data_root, None)  # says what is wrong
    raise UserError(f"{data_root} is itself a category: name the folder above it")


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
    return (folder / "train").is_dir() or (folder / "test").is_dir() or bool(list_images(folder))


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
    listed = ", ".join(found[:30]) + (", ..." if found[30:] else "")
    if category is None:
        raise UserError(f"the data root {data_root} is not itself a category; choose one of: {listed}")
    raise UserError(f"there is no category {category} in {data_root}; choose one of: {listed}")


def _images_of_split(folder: Path) -> list[Path]:
    """Images of ``folder/good``, or of ``folder`` itself where there are none."""
    for candidate in (folder / "good", folder):
        if candidate.is_dir() and (images := list_images(candidate)):
            unused = [f for f in _subfolders(candidate) if f != folder / "good" and list_images(f)]
            if unused:
                raise UserError(
                    f"{unused[0]} holds images that would not be used; move good ones to {candidate} itself, "
                    "others elsewhere"
                )
            return images
    return []


def _training_images(root: Path) -> list[Path]:
    if not (root / "train").is_dir():
        # A test set alone can be scored, if not trained on.
        return list_images(root)
    images = _images_of_split(root / "train")
    if not images:
        raise UserError(
            f"there are no training images in {root / 'train' / 'good'}; put good images there (png, jpg, bmp or tif)"
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


def _test_images(root: Path, category: str, layout: str) -> Iterable[LabelledImage]:
    test = root / "test"
    if not test.is_dir():
        return
    if list_images(test):
        raise UserError(f"{test} holds images directly; move them to {test / 'good'} or to a folder named by defect")
    for folder in _subfolders(test):
        images = list_images(folder)
        _require_distinct_stems(images)
        ground_truth = root / "ground_truth" / folder.name
        for path in images:
            kind = _kind(layout, category, folder.name, path.stem)
            masks, one_mask_per_defect = ((), False) if kind == "good" else _masks(ground_truth, path.stem)
            key = f"test/{folder.name}/{path.stem}"
            yield LabelledImage(path, folder.name, kind, key, masks, one_mask_per_defect)


def _require_distinct_stems(images: list[Path]) -> None:
    by_stem: dict[str, Path] = {}
    for path in images:
        other = by_stem.setdefault(path.stem, path)
        if other is not path:
            raise UserError(
                f"{other} and {path.name} differ only in their suffix, so that their anomaly maps would get "
                "the same name; rename one of them"
            )


def _kind(layout: str, category: str, folder: str, stem: str) -> Kind:
    if folder == "good":
        return "good"
    if layout == "mvtec_ad" and (category, folder) in _MVTEC_AD_LOGICAL:
        stems = _MVTEC_AD_LOGICAL[category, folder]
        return "logical" if stems is None or stem in stems else "structural"
    return "logical" if folder == "logical_anomalies" else "structural"


def _masks(folder: Path, stem: str) -> tuple[tuple[Path, ...], bool]:
    """The mask files of a test image, and whether each of them is one defect."""
    if (folder / stem).is_dir():
        masks = [path for path in list_images(folder / stem) if path.suffix.lower() in _MASK_SUFFIXES]
        if masks:
            return tuple(masks), True
    for name in (f"{stem}_mask", stem):
        for suffix in _MASK_SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return (folder / f"{name}{suffix}",), False
    return (), False


def _read_defects_config(path: Path) -> dict[int, DefectType] | None:
    if not path.is_file():
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
