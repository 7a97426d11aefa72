"""From a seed to the files of the category."""

import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path

import numpy as np
from PIL import Image

from dskd_fast.data.synthetic.anomalies import LOGICAL, STRUCTURAL, Kind, Region
from dskd_fast.data.synthetic.rendering import Canvas, coverage, render
from dskd_fast.data.synthetic.scene import CANVAS, Pose, Scene, sample_scene
from dskd_fast.errors import UserError

# Goes into the manifest; raise it with every change that alters a byte of the output.
VERSION = 3

CATEGORY = "screw_bag"
MANIFEST = "synthetic.json"
FOLDERS = ("train/good", "validation/good", "test/good", "test/structural_anomalies", "test/logical_anomalies")
PIXEL_VALUES = {kind.name: 255 - i for i, kind in enumerate(STRUCTURAL + LOGICAL)}
SIZE_LIMITS = (96, 2048)  # below, defects vanish; above, the threads need gigabytes
COUNT_LIMIT = 1000  # NNN.png has three digits


@dataclass(frozen=True)
class Case:
    """One image of the category: where it goes and which defect it gets."""

    folder: str
    index: int
    kind: Kind | None = None

    def files(self) -> list[Path]:
        """The image and, if it gets a defect, the mask."""
        image = Path(self.folder, f"{self.index:03d}.png")
        mask = Path("ground_truth", image.parent.name, image.stem, "000.png")
        return [image] if self.kind is None else [image, mask]


def defects_config(size: tuple[int, int]) -> list[dict[str, object]]:
    """The content of defects_config.json for images of `size` = (width, height) in pixels."""

    def area(part) -> int:
        return round(float(coverage(part, Pose(CANVAS[0] / 2, CANVAS[1] / 2), Canvas(size)).sum()))

    return [
        {
            "defect_name": kind.name,
            "pixel_value": PIXEL_VALUES[kind.name],
            "saturation_threshold": 1.0 if kind.saturates is None else area(kind.saturates),
            "relative_saturation": kind.saturates is None,
        }
        for kind in STRUCTURAL + LOGICAL
    ]


def plan(counts: tuple[int, int, int, int, int]) -> list[Case]:
    """All images for the given numbers of training, validation, good, structural and logical test images."""
    groups = zip(FOLDERS, counts, ([None], [None], [None], STRUCTURAL, LOGICAL), strict=True)
    return [Case(folder, i, kinds[i % len(kinds)]) for folder, count, kinds in groups for i in range(count)]


def compose(case: Case, seed: int) -> tuple[Scene, Scene, Region | None]:
    """Describe an image.

    Returns:
        The good scene, the scene with the defect, and the defect's region: a function of a `Canvas` that returns a
        boolean mask of shape (H, W). For a case without a defect the good scene twice and None.
    """
    rng = np.random.default_rng([seed, FOLDERS.index(case.folder), case.index])
    while True:  # until a bag has room for the defect
        good = sample_scene(rng)
        if case.kind is None:
            return good, good, None
        edit = case.kind.apply(good, rng)
        if edit is not None:
            return good, *edit


def _write_case(folder: Path, size: tuple[int, int], seed: int, case: Case) -> None:
    _, scene, region = compose(case, seed)
    image, *mask = case.files()
    # The noise leaves little to compress, so a higher level would cost time and save nothing.
    Image.fromarray(render(scene, size)).save(folder / image, compress_level=1)
    for path in mask:
        # Without a defect there is no mask.
        assert case.kind is not None
        assert region is not None
        (folder / path).parent.mkdir(parents=True)
        values = np.where(region(Canvas(size)), PIXEL_VALUES[case.kind.name], 0)
        Image.fromarray(values.astype(np.uint8)).save(folder / path)


def _check(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise UserError(f"{name} is {value!r} but must be a whole number from {low} to {high}: give one.")
    return int(value)


def _reuse(target: Path, manifest: dict[str, object], cases: list[Case]) -> Path:
    try:
        existing = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        origin = "was made with other parameters or by another version"
    except (OSError, ValueError, RecursionError):
        existing, origin = None, "was not made by this command"
    if existing != manifest:
        raise UserError(f"{target} exists already and {origin}: delete it or choose another folder.")
    for path in (Path("defects_config.json"), *(path for case in cases for path in case.files())):
        if not (target / path).is_file():
            raise UserError(f"{target} has lost its file {path}: delete the folder to have it made anew.")
    return target


def make_screw_bag(
    root: Path,
    *,
    n_train: int,
    n_validation: int,
    n_test_good: int,
    n_structural: int,
    n_logical: int,
    size: tuple[int, int] = (480, 336),
    seed: int = 0,
) -> Path:
    """Write the synthetic category `screw_bag` in the layout of MVTec LOCO AD.

    The same parameters give the same bytes, however many threads draw (with one version of numpy, scipy and Pillow on
    one kind of processor). The folder appears under its name only when it is complete. A folder that this function
    made with the same parameters is kept as it is.

    Args:
        root: folder that gets the subfolder `screw_bag`; made if it does not exist.
        n_train: number of images in train/good, 1 to 1000.
        n_validation, n_test_good: numbers of images in validation/good and test/good, 0 to 1000.
        n_structural, n_logical: numbers of images in test/structural_anomalies and test/logical_anomalies, 0 to 1000;
            the kinds of anomaly take turns.
        size: (width, height) of the images in pixels, 96 to 2048 each, in any ratio.
        seed: whole number, 0 to 2**63 - 1.

    Returns:
        The category's folder, `root/screw_bag`. A folder for which no images were asked is not made.

    Raises:
        UserError: if an argument is out of range, the folder exists and was not made by this function with the same
            parameters, or the disk cannot be written.
    """
    counts = {"n_train": n_train, "n_validation": n_validation, "n_test_good": n_test_good}
    counts |= {"n_structural": n_structural, "n_logical": n_logical}
    counts = {name: _check(name, count, int(name == "n_train"), COUNT_LIMIT) for name, count in counts.items()}
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise UserError(f"size is {size!r} but must be a pair (width, height) in pixels: give two whole numbers.")
    width, height = (_check(f"size[{axis}]", side, *SIZE_LIMITS) for axis, side in enumerate(size))
    size = width, height
    seed = _check("seed", seed, 0, 2**63 - 1)

    root = Path(root)
    target = root / CATEGORY
    n_test = counts["n_test_good"], counts["n_structural"], counts["n_logical"]
    cases = plan((counts["n_train"], counts["n_validation"], *n_test))
    manifest = {"made_by": "dskd-fast", "version": VERSION, **counts, "size": list(size), "seed": seed}
    if os.path.lexists(target):
        return _reuse(target, manifest, cases)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{CATEGORY}-", dir=root) as scratch:
            # A folder inside, because the temporary one itself is private to the user.
            folder = Path(scratch, CATEGORY)
            for name in sorted({case.folder for case in cases}):
                (folder / name).mkdir(parents=True)
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                list(pool.map(partial(_write_case, folder, size, seed), cases))
            config = json.dumps(defects_config(size), indent=2)
            (folder / "defects_config.json").write_text(config + "\n", encoding="utf-8")
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            folder.rename(target)
    except OSError as error:
        raise UserError(
            f"cannot write {target} ({error.strerror or error}): choose a folder that can be written."
        ) from error
    return target
