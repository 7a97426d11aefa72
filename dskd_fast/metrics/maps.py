"""Anomaly maps on disk, and every figure that is computed from the maps of a test set.

Maps lie where MVTec LOCO AD's own evaluation expects them: MAPS/CATEGORY/test/TYPE/NNN.tiff, one 32-bit float
per pixel.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile

from dskd_fast.data.category import Category, GroundTruth
from dskd_fast.data.decoding import Unusable, load_image, open_image
from dskd_fast.data.ground_truth import ANOMALY_KINDS, KINDS, Defect, LabelledImage
from dskd_fast.data.tiff import check_parts
from dskd_fast.errors import UserError
from dskd_fast.files import write_file
from dskd_fast.metrics.auroc import auroc
from dskd_fast.metrics.spro import FPR_LIMITS, SPRO, as_scores, mean_of_kinds

SUFFIXES = (".tiff", ".tif")


class ScoredMap(NamedTuple):
    """A detector's result for one test image, with the ground truth.

    Attributes:
        key: "test/TYPE/NNN", names the image in messages.
        kind: "good", "structural" or "logical".
        anomaly_map: real numbers, shape (H, W) at the image's own resolution, higher meaning more anomalous.
        score: the image score, higher meaning more anomalous.
        defects: the image's defects, masks of shape (H, W); empty for a good image, None where they
            are not marked.
    """

    key: str
    kind: str
    anomaly_map: np.ndarray
    score: float
    defects: Sequence[Defect] | None


def save_map(path: str | os.PathLike, anomaly_map: np.ndarray) -> None:
    """Write an anomaly map as an uncompressed single-channel float32 TIFF, making its folders.

    The file appears under its name only when it is complete; an older one is replaced.

    Args:
        path: ends in .tiff or .tif.
        anomaly_map: finite real numbers, shape (H, W); other types than float32 are rounded to it.

    Raises:
        ValueError: another ending.
        UserError: not a map (see as_scores), scores beyond the range of float32, or the file cannot be
            written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"an anomaly map's file name must end in .tiff or .tif, but this is {path}")
    with np.errstate(over="ignore"):
        scores = as_scores(anomaly_map, f"the map for {path}").astype(np.float32)
    as_scores(scores, f"the map for {path}, as float32,")
    write_file(path, lambda name: _write(name, scores))


def map_file(anomaly_map: np.ndarray) -> bytes:
    """What `save_map` writes, of finite float32 values (H, W)."""
    file = io.BytesIO()
    _write(file, anomaly_map)
    return file.getvalue()


def _write(file: Path | io.BytesIO, scores: np.ndarray) -> None:
    tifffile.imwrite(file, scores, photometric="minisblack", metadata=None)


def read_map(path: str | os.PathLike) -> np.ndarray:
    """Read an anomaly map of any method from a single-channel TIFF.

    Args:
        path: a TIFF of integers or floats of any width; compressed or not.

    Returns:
        Finite scores, shape (H, W): float32 where that holds every value of the file's type exactly, else
        float64.

    Raises:
        UserError: the file is missing, broken, has more than one channel or page, or has NaN or infinite
            scores.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            check_parts(tiff.pages.first)
            scores = tiff.asarray()
    except FileNotFoundError:
        raise UserError(f"there is no anomaly map at {path}") from None
    except Unusable as error:
        raise UserError(f"the anomaly map {path} cannot be used: {error}") from None
    # A broken file can make the reader fail in any way: TiffFileError, ValueError, struct.error, zlib.error.
    except Exception as error:
        # Some compressions, LZW among them, tifffile leaves to a package of codecs; Pillow brings its own.
        try:
            with open_image(Path(path).read_bytes(), ("TIFF",)) as image:
                load_image(image)
                scores = np.asarray(image)
        except Exception:
            raise UserError(f"the anomaly map {path} cannot be read: {error}") from error
    if scores.ndim == 3 and 1 in (scores.shape[0], scores.shape[-1]):
        scores = scores[0] if scores.shape[0] == 1 else scores[..., 0]
    return as_scores(scores, f"the anomaly map {path}")


def read_maps(
    maps_folder: str | os.PathLike,
    category: Category | GroundTruth,
    image_size: Callable[[Path], tuple[int, int]],
) -> Iterator[ScoredMap]:
    """Read the maps of a category's test set one after the other, the image score being the map's maximum.

    The maximum is the image score of MVTec's own evaluation, too.

    Args:
        maps_folder: holds CATEGORY/test/TYPE/NNN.tiff (or .tif) for each test image; for others see
            `maps_without_image`.
        category: whose maps to read.
        image_size: gives an image file's height and width, which its map must have as well.

    Raises:
        UserError: there are no test images, some have no map or two (NNN.tiff and NNN.tif) (all raised before any
            map is read), a map cannot be read (see read_map), or it has another size than its image.
    """
    folder = Path(maps_folder, category.name)
    if not category.test:
        raise UserError(f"category {category.name} has no test images, so there are no maps to score")
    found, missing, doubled = [], [], []
    for image in category.test:
        candidates = [folder / f"{image.key}{suffix}" for suffix in SUFFIXES]
        existing = [path for path in candidates if path.is_file()]
        if not existing:
            missing.append(str(candidates[0]))
        elif len(existing) > 1:
            doubled.append(f"{existing[0]} and {existing[1].name}")
        else:
            found.append((image, existing[0]))
    if missing:
        raise UserError(f"{len(missing)} of {len(category.test)} test images have no anomaly map: {_first(missing)}")
    if doubled:
        raise UserError(
            f"{len(doubled)} of {len(category.test)} test images have two anomaly maps, of which one must be removed: "
            f"{_first(doubled)}"
        )
    return (_read_scored(path, image, category, image_size) for image, path in found)


def maps_without_image(maps_folder: str | os.PathLike, category: Category) -> list[Path]:
    """The TIFFs below CATEGORY/test that are maps of no test image, sorted: their images may have been lost."""
    folder = Path(maps_folder, category.name)
    expected = {folder / f"{image.key}{suffix}" for image in category.test for suffix in SUFFIXES}
    tiffs = (path for path in (folder / "test").rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in tiffs if path not in expected and not path.name.startswith("."))


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")


def _read_scored(
    path: Path,
    image: LabelledImage,
    category: Category | GroundTruth,
    image_size: Callable[[Path], tuple[int, int]],
) -> ScoredMap:
    anomaly_map = read_map(path)
    height, width = size = image_size(image.path)
    if anomaly_map.shape != size:
        raise UserError(
            f"the anomaly map {path} is {anomaly_map.shape[1]} x {anomaly_map.shape[0]} pixels, but its "
            f"image {image.path} is {width} x {height}; write maps at the resolution of the original images"
        )
    return ScoredMap(image.key, image.kind, anomaly_map, float(anomaly_map.max()), category.defects(image, size))


def score_maps(scored_maps: Iterable[ScoredMap], spro: SPRO | None = None) -> dict[str, dict]:
    """Every figure of a test set: AUROC of the image scores and sPRO of the maps, exact.

    Args:
        scored_maps: one for each test image, taken one at a time.
        spro: collects the maps; pass a new one to ask it for its curves afterwards.

    Returns:
        "auroc" and "spro" (up to an FPR of 0.05), each {"structural": figure, "logical": figure, "mean":
        figure}, and "spro_at", the same for each FPR limit: {"0.01": {...}, "0.05": {...}, "0.1": {...},
        "0.3": {...}, "1.0": {...}}. A figure that cannot be computed is None, see auroc and SPRO.compute.

    Raises:
        UserError: scores that are not finite, or a map whose shape is not that of its defects' masks.
    """
    spro = SPRO() if spro is None else spro
    scores: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for scored in scored_maps:
        spro.add(scored.anomaly_map, scored.defects, scored.kind, name=f"the map of {scored.key}")
        scores[scored.kind].append(scored.score)

    areas: dict[str, float | None] = {kind: auroc(scores["good"], scores[kind]) for kind in ANOMALY_KINDS}
    areas["mean"] = mean_of_kinds(**areas)
    curves = spro.compute(FPR_LIMITS)
    spro_at = {str(limit): {kind: curves[kind][limit] for kind in curves} for limit in FPR_LIMITS}
    return {"auroc": areas, "spro": dict(spro_at["0.05"]), "spro_at": spro_at}
