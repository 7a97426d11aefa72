"""The test images of a category, and the masks below ``ground_truth`` that belong to them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from dskd_fast.data.ground_truth import ANOMALY_KINDS, Kind, LabelledImage
from dskd_fast.data.listing import all_images, has_images, list_folder, list_subfolders, walk
from dskd_fast.data.naming import FOLDERS, GOOD, LOGICAL, meant_folder, refuse_images, refuse_other_names
from dskd_fast.errors import UserError

# The paper's modified MVTec AD (section 4.1): these test images are logical anomalies; None stands for a
# whole folder.
_MVTEC_AD_LOGICAL: dict[tuple[str, str], tuple[str, ...] | None] = {
    ("cable", "cable_swap"): None,
    ("cable", "combined"): ("005", "007", "009"),
    ("capsule", "faulty_imprint"): ("004", "005"),
    ("transistor", "cut_lead"): None,
    ("transistor", "misplaced"): None,
}


def find_test_images(
    root: Path, category: str, layout: str, masks: "MaskFiles", unused: dict[str, list[Path]]
) -> Iterator[LabelledImage]:
    test = root / "test"
    if not test.is_dir():
        return
    refuse_images([list_folder(test)], f"move them to {test / 'good'} or to a folder named by defect")
    refuse_other_names(test, {"good": GOOD, "logical_anomalies": LOGICAL})
    for folder in list_subfolders(test):
        here, *deeper = walk(folder)
        if meant_folder(folder.name, FOLDERS) == "ground_truth" and has_images(folder):
            raise UserError(f"{folder} looks like the masks; move it to {root / 'ground_truth'}")
        refuse_images(deeper, f"move them to {folder}, or to a folder of their own in {test}")
        _require_distinct_stems(here.images)
        unused["formats that are not read"] += here.others
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


class MaskFiles:
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
        return [path for path in all_images(walk(self.root)) if path not in self._taken]

    def _files(self, folder: str) -> dict[str, list[Path]]:
        """The files directly in a folder of masks by their stems."""
        if folder not in self._by_stem:
            by_stem = self._by_stem[folder] = defaultdict(list)
            if (self.root / folder).is_dir():
                for path in list_folder(self.root / folder).all:
                    by_stem[path.stem].append(path)
        return self._by_stem[folder]


def find_stray_masks(
    root: Path,
    category: str,
    layout: str,
    test: Iterable[LabelledImage],
    masks: MaskFiles,
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
            unused["masks of good images"] += [path]
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
        kinds = ANOMALY_KINDS if path.parent == masks.root else (_kind(layout, category, folder, stem),)
        for kind in kinds:
            sentences[kind][sentence] = None
    return {kind: tuple(of_kind) for kind, of_kind in sentences.items()}
