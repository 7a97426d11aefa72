"""What is marked in a test image: defects, and the masks and the ``defects_config.json`` that they are read from."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import ndimage

from dskd_fast.data.images import read_mask
from dskd_fast.data.naming import plain
from dskd_fast.errors import UserError

Kind = Literal["good", "structural", "logical"]
ANOMALY_KINDS: tuple[Kind, ...] = ("structural", "logical")
KINDS: tuple[Kind, ...] = ("good", *ANOMALY_KINDS)

# A lossy format cannot hold a mask: its values smear over the edges.
_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")

# Each region becomes a mask of its own: noise taken for a mask would fill the memory.
_MAX_COMPONENTS = 1000


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
        saturation: the saturation threshold s > 0 of sPRO in pixels: the defect counts as found in full once this
            many of its pixels are. Of defects read from masks it is a whole number, at most the mask's area.
        name: the defect's name in ``defects_config.json``, else its test folder.
    """

    mask: np.ndarray
    saturation: float
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


def read_defects_config(path: Path) -> dict[int, DefectType] | None:
    if not path.is_file():
        for other in sorted(path.parent.iterdir()):
            if plain(other.name) in ("defectsconfigjson", "defectconfigjson") and other.is_file():
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
        is_positive = type(threshold) in (int, float) and 0 < threshold < math.inf
        rules = {
            f"defect_name must be text, not {name!r}": isinstance(name, str),
            f"pixel_value must be an integer from 1 to 255, not {value!r}": type(value) is int and 1 <= value <= 255,
            f"relative_saturation must be true or false, not {relative!r}": type(relative) is bool,
            f"saturation_threshold must be a positive number, not {threshold!r}": is_positive,
            f"a relative saturation_threshold must not exceed 1, but is {threshold!r}": (
                not is_positive or not relative or threshold <= 1
            ),
            f"an absolute saturation_threshold counts pixels, but is {threshold!r}": (
                not is_positive or relative or threshold == int(threshold)
            ),
        }
        for sentence, is_kept in rules.items():
            if not is_kept:
                raise UserError(f"{sentence} in {where}")
        defect_type = DefectType(name, threshold, relative)
        other = defect_types.setdefault(value, defect_type)
        if (other.saturation_threshold, other.relative_saturation) != (threshold, relative):
            raise UserError(
                f"{where} gives the pixel value {value} another saturation threshold than an entry before it"
            )
    return defect_types


def read_defects(
    path: Path, item: LabelledImage, size: tuple[int, int], defect_types: dict[int, DefectType] | None
) -> list[Defect]:
    """The defects that one mask of a test image marks, see `dskd_fast.data.category.Category.defects`.

    Args:
        path: one of ``item.masks``.
        item: the test image.
        size: its height and width.
        defect_types: those of its category.

    Raises:
        ImageError: the mask cannot be read.
        UserError: it cannot be used.
    """
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
        area = int(mask.sum())
        if defect_types is None:
            return [Defect(mask, area, item.folder)]
        defect_type = _type_of(path, values[mask], defect_types)
        return [Defect(mask, defect_type.saturation(area), defect_type.name)]
    labels, n_components = ndimage.label(mask, structure=np.ones((3, 3)))
    if n_components > _MAX_COMPONENTS:
        raise UserError(
            f"the mask {path} has {n_components} separate regions, more than {_MAX_COMPONENTS}; "
            "it looks like noise or a photograph, so check that it is a mask"
        )
    components = (labels == label for label in range(1, n_components + 1))
    return [Defect(component, int(component.sum()), item.folder) for component in components]


def _type_of(path: Path, values: np.ndarray, defect_types: dict[int, DefectType]) -> DefectType:
    value, *others = np.unique(values).tolist()
    if others:
        raise UserError(
            f"the mask {path} holds {1 + len(others)} values ({value} and {others[0]} among them), where "
            "one defect has one value; write one file per defect"
        )
    if value not in defect_types:
        raise UserError(
            f"the mask {path} holds the pixel value {value}, which the category's defects_config.json does not list; "
            "add an entry for it or correct the mask"
        )
    return defect_types[value]
