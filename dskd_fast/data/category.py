"""The images of one category, and what is marked in its test images."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dskd_fast.data.contents import content_digests
from dskd_fast.data.ground_truth import KINDS, Defect, DefectType, Kind, LabelledImage, MaskError, read_defects
from dskd_fast.data.images import ImageError, image_size
from dskd_fast.errors import UserError

# How many of many files a sentence names.
_N_NAMED = 3


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
        """A hash of the names and contents of the training and validation images, to notice when they have changed.

        "sha256:" and 64 digits. Each file is read at the first call, and again only when it has changed on the disk.
        """
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for path, content in zip(split, content_digests(split), strict=True):
                # A file that cannot be read is reported when images are decoded, with all others.
                digest.update(os.fsencode(path.name) + b"\0" + (content or bytes(32)))
            digest.update(b"\0")
        return f"sha256:{digest.hexdigest()}"

    @property
    def names_and_sizes(self) -> str:
        """A hash of file names and sizes, 64 digits, which versions without `fingerprint` stored in its place."""
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

        def below(path: Path) -> str:
            return path.relative_to(self.root).as_posix()

        return [
            {"files": what, "n_files": len(paths), "first": [below(path) for path in paths[:_N_NAMED]]}
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
                defects += read_defects(path, item, size, self.defect_types)
            except ImageError as error:
                reasons.append(f"the mask {path} is unusable: " + "; ".join(reason for _, reason in error.failures))
            except UserError as error:
                reasons.append(str(error))
        if reasons:
            raise MaskError(reasons)
        return defects


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
        return self.noted(item, self.read(item, size))

    def read(self, item: LabelledImage, size: tuple[int, int] | None = None) -> list[Defect] | MaskError | None:
        """As `Category.defects`, but gives a `MaskError` back; for `noted`. Threads may read at the same time."""
        try:
            return self._category.defects(item, size)
        except MaskError as error:
            return error

    def noted(self, item: LabelledImage, found: list[Defect] | MaskError | None) -> list[Defect] | None:
        """What `defects` gives, where `found` is what `read` gave."""
        if isinstance(found, MaskError):
            self._bad_masks[item.kind] |= dict.fromkeys(found.reasons)
        return None if self._bad_masks[item.kind] or isinstance(found, MaskError) else found

    def bad_masks(self, kind: str | None = None) -> list[str]:
        """A sentence for each mask that cannot be used, of one kind of anomaly or of all, among those read so far."""
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
