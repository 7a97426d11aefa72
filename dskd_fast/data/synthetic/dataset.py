"""From a seed to the files of the category."""

import json
import operator
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dskd_fast.data.synthetic.anomalies import LOGICAL, PIXEL_VALUES, STRUCTURAL, Kind, Region, _area
from dskd_fast.data.synthetic.rendering import Canvas, render
from dskd_fast.data.synthetic.scene import ATTEMPTS, CANVAS, Scene, sample_scene
from dskd_fast.errors import UserError

# Goes into the manifest; raise it with every change that alters a byte of the output.
VERSION = 2

CATEGORY = "screw_bag"
MANIFEST = "synthetic.json"

SIZE_LIMITS = (96, 2048)  # below, defects vanish; above, the threads need gigabytes
COUNT_LIMIT = 1000  # NNN.png has three digits


def defects_config(size: tuple[int, int]) -> list[dict[str, object]]:
    """The content of defects_config.json for images of `size` = (width, height) in pixels."""
    scale = Canvas(size).scale
    return [
        {
            "defect_name": kind.name,
            "pixel_value": PIXEL_VALUES[kind.name],
            "saturation_threshold": 1.0 if kind.saturates is None else round(_area(kind.saturates) * scale**2),
            "relative_saturation": kind.saturates is None,
        }
        for kind in STRUCTURAL + LOGICAL
    ]


@dataclass(frozen=True)
class Case:
    """One image of the category: where it goes and which defects it gets."""

    folder: str
    index: int
    kinds: tuple[Kind, ...] = ()

    @property
    def image(self) -> Path:
        return Path(self.folder, f"{self.index:03d}.png")

    def masks(self) -> list[Path]:
        defect_type = Path(self.folder).name
        return [Path("ground_truth", defect_type, f"{self.index:03d}", f"{k:03d}.png") for k in range(len(self.kinds))]


_COARSE = Canvas((int(CANVAS[0]), int(CANVAS[1])))

FOLDERS = (
    "train/good",
    "validation/good",
    "test/good",
    "test/structural_anomalies",
    "test/logical_anomalies",
)


def plan(counts: tuple[int, int, int, int, int]) -> list[Case]:
    """All images for the given numbers of training, validation, good, structural and logical test images."""
    cases = [Case(folder, i) for folder, count in zip(FOLDERS[:3], counts[:3], strict=True) for i in range(count)]
    for i in range(counts[3]):
        kinds = (STRUCTURAL[i % len(STRUCTURAL)],)
        if i % 6 == 5:
            # Some images carry a second, independent defect, as some of LOCO's do.
            kinds += (STRUCTURAL[0],) if kinds[0] is not STRUCTURAL[0] else (STRUCTURAL[2],)
        cases.append(Case(FOLDERS[3], i, kinds))
    cases += [Case(FOLDERS[4], i, (LOGICAL[i % len(LOGICAL)],)) for i in range(counts[4])]
    return cases


def compose(case: Case, seed: int) -> tuple[Scene, Scene, list[Region]]:
    """Describe an image.

    Returns:
        The good scene, the scene with the case's defects (the same if there are none), one region per defect.

    A region is a function of a `Canvas` that returns a boolean mask of shape (H, W).
    """
    rng = np.random.default_rng([seed, FOLDERS.index(case.folder), case.index])
    for _ in range(ATTEMPTS):
        good = scene = sample_scene(rng)
        regions = []
        for kind in case.kinds:
            edit = kind.apply(scene, rng)
            if edit is None:
                break
            scene, region = edit
            regions.append(region)
        else:
            if len(regions) < 2 or not np.logical_and(*(region(_COARSE) for region in regions)).any():
                return good, scene, regions
    raise RuntimeError(f"no scene found with room for {[kind.name for kind in case.kinds]}")


def _write_case(folder: Path, size: tuple[int, int], seed: int, case: Case) -> None:
    _, scene, regions = compose(case, seed)
    # The noise leaves little to compress, so a higher level would cost time and save nothing.
    Image.fromarray(render(scene, size)).save(folder / case.image, compress_level=1)
    canvas = Canvas(size)
    for path, kind, region in zip(case.masks(), case.kinds, regions, strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        mask = region(canvas).astype(np.uint8) * PIXEL_VALUES[kind.name]
        Image.fromarray(mask.astype(np.uint8)).save(folder / path)


def _whole_number(name: str, value: object, low: int, high: int | None) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        limits = f"from {low} up" if high is None else f"from {low} to {high}"
        raise UserError(f"{name} is {value!r} but must be a whole number {limits}: give one.")
    return number


def _reuse(target: Path, manifest: dict[str, object], cases: list[Case]) -> Path:
    try:
        found = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if found != manifest:
        whose = (
            "was not made by this command" if found is None else "was made with other parameters or by another version"
        )
        raise UserError(f"{target} exists already and {whose}: delete it or choose another folder.")
    expected = [case.image for case in cases] + [mask for case in cases for mask in case.masks()]
    for path in (*expected, Path("defects_config.json")):
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

    The same parameters give the same bytes, however many threads draw (with one version of numpy, scipy and
    Pillow on one kind of processor). The folder appears under its name only when it is complete. A folder
    that this function made with the same parameters is kept as it is.

    Args:
        root: folder that gets the subfolder `screw_bag`; made if it does not exist.
        n_train: number of images in train/good, 1 to 1000.
        n_validation: number of images in validation/good, 0 to 1000.
        n_test_good: number of images in test/good, 0 to 1000.
        n_structural: number of images in test/structural_anomalies, 0 to 1000; the kinds take turns.
        n_logical: number of images in test/logical_anomalies, 0 to 1000; the kinds take turns.
        size: (width, height) of the images in pixels, 96 to 2048 each, in any ratio.
        seed: whole number from 0 up.

    Returns:
        The category's folder, `root/screw_bag`. A folder for which no images were asked is not made.

    Raises:
        UserError: if an argument is out of range, the folder exists and was not made by this function with
            the same parameters, or the disk cannot be written.
    """
    counts = {
        "n_train": _whole_number("n_train", n_train, 1, COUNT_LIMIT),
        "n_validation": _whole_number("n_validation", n_validation, 0, COUNT_LIMIT),
        "n_test_good": _whole_number("n_test_good", n_test_good, 0, COUNT_LIMIT),
        "n_structural": _whole_number("n_structural", n_structural, 0, COUNT_LIMIT),
        "n_logical": _whole_number("n_logical", n_logical, 0, COUNT_LIMIT),
    }
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise UserError(f"size is {size!r} but must be a pair (width, height) in pixels: give two whole numbers.")
    width, height = (_whole_number(f"size[{axis}]", side, *SIZE_LIMITS) for axis, side in enumerate(size))
    seed = _whole_number("seed", seed, 0, None)

    root = Path(root)
    target = root / CATEGORY
    cases = plan(tuple(counts.values()))
    manifest = {"made_by": "dskd-fast", "version": VERSION, **counts, "size": [width, height], "seed": seed}
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
                list(pool.map(partial(_write_case, folder, (width, height), seed), cases))
            config = json.dumps(defects_config((width, height)), indent=2)
            (folder / "defects_config.json").write_text(config + "\n", encoding="utf-8")
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            try:
                folder.rename(target)
            except OSError:
                if not os.path.lexists(target):
                    raise
                # Someone else was faster.
                return _reuse(target, manifest, cases)
    except OSError as error:
        raise UserError(
            f"cannot write {target} ({error.strerror or error}): choose a folder that can be written."
        ) from error
    return target
