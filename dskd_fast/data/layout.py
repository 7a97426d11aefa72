"""Finding the images, masks and splits of one category on disk.

Three layouts are understood:

- ``loco`` (MVTec LOCO AD): ``train/good``, ``validation/good``,
  ``test/{good,logical_anomalies,structural_anomalies}``, ``ground_truth/TYPE/NNN/KKK.png`` with one mask per
  defect, and ``defects_config.json``.
- ``mvtec_ad`` (MVTec AD): ``train/good``, ``test/DEFECT``, ``ground_truth/DEFECT/NNN_mask.png``.
- ``folder``: good images, in a folder of their own or under ``train`` or ``train/good``; everything else is
  optional.

No image file is skipped without a message. In the folders that are read, an image file that would not be used is an
error, and so is a folder with nearly one of the names above (``val``, ``Train``, ``test/ok``); the error says where the
files belong. All other unused image files of the category are listed in `Category.unused`. Hidden files, and
files without the suffix of an image format, are ignored.
"""

import hashlib
import os
from collections import defaultdict
from pathlib import Path
from typing import Literal

from dskd_fast.choices import DATA_ROOT, DATA_ROOT_VARIABLE, HOLDOUT
from dskd_fast.data.category import Category
from dskd_fast.data.ground_truth import read_defects_config
from dskd_fast.data.labels import MaskFiles, find_stray_masks, find_test_images
from dskd_fast.data.listing import (
    Listing,
    all_images,
    has_images,
    is_prediction_output,
    list_folder,
    list_subfolders,
    walk,
)
from dskd_fast.data.naming import (
    ANOMALOUS,
    FOLDERS,
    GOOD,
    meant_folder,
    plain,
    refuse_classes,
    refuse_images,
    refuse_other_names,
)
from dskd_fast.errors import UserError

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

_WHERE_DATA_ARE = (
    "download MVTec LOCO AD (licence CC BY-NC-SA 4.0) from https://www.mvtec.com/company/research/datasets/mvtec-loco, "
    f"or take a folder of good images, and point --data-root or ${DATA_ROOT_VARIABLE} to it, or run 'dskd-fast demo', "
    "which needs no data"
)

_FORMATS = "png, jpg, bmp, tif or webp"

MIN_IMAGES_TO_HOLD_OUT = 10


class DataNotFound(UserError):
    """There is no data set at the given place."""


def default_data_root() -> Path:
    """The folder that $DSKD_FAST_DATA names, else ``./mvtec_loco_anomaly_detection``."""
    return Path(os.environ.get(DATA_ROOT_VARIABLE) or DATA_ROOT)


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
    refuse_other_names(root, FOLDERS)
    unused: dict[str, list[Path]] = defaultdict(list)
    train = _training_images(root, unused)
    validation = _images_of_split(root / "validation", unused)
    source: Literal["folder", "holdout", "none"] = "folder"
    if not validation:
        train, validation = _hold_out(train, holdout, seed)
        source = "holdout" if validation else "none"
    layout = _layout(root, name)
    masks = MaskFiles(root / "ground_truth")
    test = tuple(find_test_images(root, name, layout, masks, unused))
    stray_masks = find_stray_masks(root, name, layout, test, masks, unused)
    return Category(
        name=name,
        root=root,
        layout=layout,
        train=tuple(train),
        validation=tuple(validation),
        validation_source=source,
        test=test,
        defect_types=read_defects_config(root / "defects_config.json"),
        unused={what: tuple(paths) for what, paths in unused.items() if paths},
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
        found = _categories_in(data_root)
        if found:
            return found
    _find_root(data_root, None)  # says what is wrong
    loose = list_folder(data_root).images
    why = f", since it holds images directly, as {loose[0].name}" if loose else ""
    raise UserError(f"{data_root} is itself a category{why}: name the folder above it, or move what belongs elsewhere")


def _folder_name(folder: Path) -> str:
    # Not resolve(): a link is known by its own name.
    return Path(os.path.abspath(folder)).name


def _is_category(folder: Path) -> bool:
    """Whether a folder is meant as a category, though its folders may have to be renamed."""
    here = list_folder(folder)
    if (folder / "train").is_dir() or (folder / "test").is_dir() or here.images:
        return True
    subfolders = list_subfolders(folder)
    if any(meant_folder(sub.name, FOLDERS) in ("train", "test") and has_images(sub) for sub in subfolders):
        return True
    # A logo.svg beside categories makes no category of their folder.
    return bool(here.others) and not any(_is_category(sub) for sub in subfolders)


def _categories_in(data_root: Path) -> list[str]:
    found = [folder.name for folder in list_subfolders(data_root) if _is_category(folder)]
    refuse_classes(data_root, found)
    return found


def _find_root(data_root: Path, category: str | None) -> Path:
    if category is not None and (not category or category in (".", "..") or {"/", "\\"} & set(category)):
        raise UserError(f"a category must be the name of a folder in the data root, not {category!r}")
    if not data_root.exists():
        raise DataNotFound(f"the data root {data_root} does not exist; {_WHERE_DATA_ARE}")
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
    found = _categories_in(data_root)
    if not found:
        raise DataNotFound(f"the data root {data_root} holds neither categories nor images; {_WHERE_DATA_ARE}")
    listed = ", ".join(found[:30]) + (", ..." if found[30:] else "")
    if category is None:
        raise UserError(f"the data root {data_root} is not itself a category; choose one of: {listed}")
    raise UserError(f"there is no category {category} in {data_root}; choose one of: {listed}")


def _images_of_split(folder: Path, unused: dict[str, list[Path]]) -> list[Path]:
    """Images of ``folder/good``, or of ``folder`` itself where there are none."""
    if not folder.is_dir():
        return []
    refuse_other_names(folder, {"good": GOOD})
    good = folder / "good"
    loose = list_folder(folder)
    of_good = list_folder(good) if good.is_dir() else Listing(good, [], [])
    chosen, other = (of_good, loose) if of_good.all else (loose, of_good)
    deeper = [listing for listing in walk(folder) if listing.folder not in (folder, good)]
    refuse_images([other, *deeper], f"move good ones to {chosen.folder}, others elsewhere")
    return _readable(chosen, unused)


def _readable(listing: Listing, unused: dict[str, list[Path]]) -> list[Path]:
    if listing.others and not listing.images:
        raise UserError(
            f"none of the {len(listing.others)} image files in {listing.folder} is of a format that is read, "
            f"{listing.others[0].name} among them; convert them to {_FORMATS}"
        )
    unused["formats that are not read"] += listing.others
    return listing.images


def _training_images(root: Path, unused: dict[str, list[Path]]) -> list[Path]:
    loose = list_folder(root)
    has_train, has_test = (root / "train").is_dir(), (root / "test").is_dir()
    # A test set alone can be scored, if not trained on.
    is_flat = not has_train and bool(loose.images or (loose.others and not has_test))
    for folder in list_subfolders(root):
        # The usual folders are read elsewhere; under another spelling they are empty, links, or already refused.
        if meant_folder(folder.name, FOLDERS) is not None:
            continue
        try:
            listings = [] if is_prediction_output(folder) else list(walk(folder, is_prediction_output))
            drawn = {*all_images(walk(folder))} - {*all_images(listings)}
        except UserError:
            if is_flat:
                raise
            continue  # such as lost+found, which only root may read
        if is_flat:
            refuse_images(listings, f"move good ones to {root}, others elsewhere")
        unused["in folders that have no meaning here"] += all_images(listings)
        unused["drawn by an earlier prediction"] += sorted(drawn)
    if is_flat:
        if plain(_folder_name(root)) in ANOMALOUS:
            raise UserError(
                f"{root} looks by its name like a folder of anomalous images, and training takes good ones; rename it "
                "if they are good, or point --data-root to the good ones"
            )
        return _readable(loose, unused)
    unused["directly in the folder of the category"] += loose.all
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
