"""Runs on their test images as one HTML page: figures, curves, and a gallery of photographs and heat maps.

The page needs neither a network nor another file. What it shows is data in it, as JSON that the browser does not take
for markup, and its script makes text of all names.

Its size: at most 32 kB for a photograph and 23 kB for a map, usually 20 and 6. 250 images of a run take 10 MB and never
more than 26; each further run of the same images adds its maps.
"""

import base64
import io
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import dskd_fast
from dskd_fast.data.category import Category, GroundTruth, unused_sentences
from dskd_fast.data.ground_truth import ANOMALY_KINDS, KINDS
from dskd_fast.detection.calibration import decide
from dskd_fast.detection.detector import Detector
from dskd_fast.detection.findings import Variant, has_place
from dskd_fast.detection.overlay import colour_range, colours
from dskd_fast.detection.scoring.parts import PARTS
from dskd_fast.errors import UserError
from dskd_fast.evaluation.evaluate import (
    ScoredImages,
    count_decisions,
    count_kinds,
    part_auroc,
    remarks,
    score_images,
    scored_maps,
    threshold_of,
)
from dskd_fast.evaluation.html import filled, resource
from dskd_fast.files import require_writable, write_file
from dskd_fast.metrics.auroc import roc_curve
from dskd_fast.metrics.maps import score_maps
from dskd_fast.metrics.spro import SPRO
from dskd_fast.progress import Progress, silent
from dskd_fast.runs.folder import find_category, load_run, read_finished
from dskd_fast.runs.options import TrainingOptions

PAGE = "index.html"
SPRO_LIMIT = 0.05

# Longest side of a photograph in the page, in pixels, the bytes it may take, and the JPEG qualities that are tried.
_PHOTO_SIDE, _PHOTO_BYTES, _PHOTO_QUALITIES = 360, 24_000, (80, 60, 40, 20, 10)
# Side of a map in the page. The finest features of an image of S pixels have S / 4 positions a side.
_MAP_SIDE = 128
_N_BINS = 32
# Scores that spread over more than this ratio get a logarithmic axis.
_LOGARITHMIC_FROM = 20
# A drawn curve is off by at most this share of either axis.
_CURVE_TOLERANCE = 1 / 400
# The colours of the heat maps are linear between these strengths.
_COLOUR_STOPS = np.linspace(0, 1, 21)


class _Source(NamedTuple):
    """A run that was asked for: what the page calls it, its folder, and its category."""

    name: str
    folder: Path
    category: Category


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    threshold: float | None = None,
    data_root: Path | None = None,
    device: str = "auto",
    progress: Progress = silent,
    remark: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Path:
    """Score the test images of runs and write the page.

    Args:
        folders: run folders, one or more; a folder that is named twice counts once.
        out: folder of the page; the page of an earlier call is replaced.
        threshold: of the decisions of all runs; None takes each run's own, if it has one.
        data_root: where the data is now, if not where it was in training.
        device: "auto", "cpu" or "cuda".
        progress: called as progress(stage, done, total).
        remark: called for each run with what `dskd_fast.evaluation.evaluate.remarks` says of its data; the page says
            it, too.

    Returns:
        The page, `out`/index.html.

    Raises:
        UserError: a folder is no run, data is missing or has no test images, files cannot be read or written. All but
            damaged files is known before any scoring.
    """
    sources = _open(folders, data_root)
    require_writable(out / PAGE)
    runs: list[dict[str, Any]] = []
    images: dict[Any, dict[str, Any]] = {}
    many_categories = len({source.category.name for source in sources}) > 1
    for number, source in enumerate(sources):
        title = f"{source.name}: " if len(sources) > 1 else ""

        def titled(stage: str, done: int, total: int, title: str = title) -> None:
            progress(title + stage, done, total)

        detector, options, config = load_run(source.folder, device)
        decided = threshold_of(detector, threshold)
        category = source.category
        # Runs with the same images share their photographs.
        keys = [(item.path.resolve(), item.kind) for item in category.test]
        photographs: dict[int, dict[str, Any]] = {}

        def photograph(
            i: int, image: NDArray[np.uint8], keys: list = keys, into: dict[int, dict[str, Any]] = photographs
        ) -> None:
            if keys[i] not in images:
                into[i] = _photograph(image)

        test = score_images(detector, category, options.batch_size, titled, photograph)
        truth = GroundTruth(category)
        runs.append(_describe_run(source, truth, detector, options, config, test, decided, titled))
        remark(remarks(category, truth, detector))
        for i, item in enumerate(category.test):
            key = keys[i]
            if key not in images:
                name = item.path.relative_to(category.root / "test").as_posix()
                images[key] = {
                    "name": f"{category.name}/{name}" if many_categories else name,
                    "kind": item.kind,
                    **photographs[i],
                    "runs": [None] * len(sources),
                }
            images[key]["runs"][number] = _describe_result(detector, test, i, decided)
            titled("drawing", i + 1, len(category.test))
    page = render(
        {
            "version": dskd_fast.__version__,
            "created": datetime.now().astimezone().isoformat(timespec="minutes"),
            "spro_limit": SPRO_LIMIT,
            "colours": _colour_tables(),
            "meanings": {name: kind.meaning for name, kind in PARTS.items()},
            "runs": runs,
            "images": list(images.values()),
        }
    )
    write_file(out / PAGE, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return out / PAGE


def render(data: dict[str, Any]) -> str:
    """The page for what it shows; `data` may hold any strings, lone surrogates included.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    page, style, *script = (
        resource(__package__, f"report_page/{name}")
        for name in ("page.html", "style.css", "figures.js", "gallery.js", "controls.js")
    )
    return filled(page, style, "\n".join(script), data)


def _open(folders: Sequence[Path], data_root: Path | None) -> list[_Source]:
    unique = list({folder.resolve(): Path(os.path.abspath(folder)) for folder in reversed(folders)}.values())[::-1]
    sources = []
    for name, folder in zip(_names(unique), unique, strict=True):
        category = find_category(folder, read_finished(folder), data_root)
        if not category.test:
            raise UserError(
                f"{category.root}, the data of the run {folder}, has no test images: a report needs a folder test"
            )
        sources.append(_Source(name, folder, category))
    return sources


def _names(folders: Sequence[Path]) -> list[str]:
    """The end of each path, as much of it as tells it from the others."""
    names = []
    for folder in folders:
        length = 1
        while sum(other.parts[-length:] == folder.parts[-length:] for other in folders) > 1:
            length += 1
        names.append("/".join(folder.parts[-length:]).replace("//", "/"))
    return names


def _describe_run(
    source: _Source,
    truth: GroundTruth,
    detector: Detector,
    options: TrainingOptions,
    config: dict[str, Any],
    test: ScoredImages,
    threshold: float | None,
    progress: Progress,
) -> dict[str, Any]:
    kinds = np.array([item.kind for item in source.category.test])
    decisions = test.decisions(threshold)
    size = detector.model.image_size
    low, high = colour_range(threshold)
    alone = "" if options.students == "both" else f", the {options.students} student alone"
    # First of all, since it reads the masks.
    variants: dict[str, dict[str, Any]] = {
        variant: _describe_variant(truth, detector, test, variant, kinds, threshold, progress)
        for variant in test.scores
    }
    for name in _without_own_map(test):
        variants[name] = _describe_part(source.category, test, name, kinds)
    said = remarks(source.category, truth, detector)
    return {
        "name": source.name,
        "path": str(source.folder),
        "category": source.category.name,
        "recipe": f"{options.teacher}, {size} x {size}, epochs: {options.epochs}{alone}",
        "trained": config.get("created"),
        "threshold": threshold,
        "no_colour": low,
        "full_colour": high,
        "n_images": count_kinds(source.category),
        "decisions": None if threshold is None else count_decisions(source.category, decisions, "anomalous"),
        "suspects": count_decisions(source.category, decisions, "suspect"),
        "absent": [*said["absent"], *said["warnings"], *said["bad_masks"], *unused_sentences(said["unused"])],
        "variants": variants,
        # Where a sum of maps decides, there is nothing to list beside the variants.
        "parts": [] if detector.calibrated is None else list(detector.parts),
    }


def _describe_variant(
    truth: GroundTruth,
    detector: Detector,
    test: ScoredImages,
    variant: Variant,
    kinds: NDArray[np.str_],
    threshold: float | None,
    progress: Progress,
) -> dict[str, Any]:
    spro = SPRO()
    with closing(scored_maps(detector, truth, test, variant, progress)) as images:
        figures = score_maps(images, spro)
    scores: dict[str, NDArray[np.float64]] = {kind: test.scores[variant][kinds == kind] for kind in KINDS}
    return {
        "map": variant,
        "has_place": True,
        "auroc": figures["auroc"],
        "spro": figures["spro"],
        "roc": _roc(scores),
        "spro_curve": {kind: _points(spro.curve(kind, SPRO_LIMIT), SPRO_LIMIT) for kind in ANOMALY_KINDS},
        # It is a threshold for the combined score alone.
        "histogram": _histogram(scores, threshold if variant == "combined" else None),
    }


def _without_own_map(test: ScoredImages) -> list[str]:
    """The parts of the score that measure an image as a whole, or whose map is a part of the combined one alone."""
    return [name for name in test.parts if name not in test.scores]


def _describe_part(category: Category, test: ScoredImages, name: str, kinds: NDArray[np.str_]) -> dict[str, Any]:
    """As `_describe_variant`, for a part of the score without a map of its own; beside it another map is shown."""
    scores: dict[str, NDArray[np.float64]] = {kind: test.parts[name][kinds == kind] for kind in KINDS}
    return {
        "map": "combined" if has_place(name) or test.maps.global_ is None else "global",
        "has_place": has_place(name),
        "auroc": part_auroc(category, test.parts[name]),
        "spro": dict.fromkeys((*ANOMALY_KINDS, "mean")),
        "roc": _roc(scores),
        "spro_curve": dict.fromkeys(ANOMALY_KINDS),
        "histogram": _histogram(scores, None),
    }


def _roc(scores: dict[str, NDArray[np.float64]]) -> dict[str, list[list[float]] | None]:
    return {kind: _points(roc_curve(scores["good"], scores[kind]), 1.0) for kind in ANOMALY_KINDS}


def _describe_result(detector: Detector, test: ScoredImages, index: int, threshold: float | None) -> dict[str, Any]:
    """What a run says of one image."""
    limits = colour_range(threshold)
    return {
        "decision": decide(test.scores["combined"][index], threshold, test.suspicions[index]),
        "reason": test.suspicions[index],
        "decided_by": test.decided_by[index],
        "scores": {variant: float(test.scores[variant][index]) for variant in test.scores}
        | {name: float(test.parts[name][index]) for name in _without_own_map(test)},
        "maps": {variant: _map_png(detector, maps[index], limits) for variant, maps in test.maps.existing.items()},
    }


def _histogram(scores: dict[str, NDArray[np.float64]], threshold: float | None) -> dict[str, Any]:
    """Counts per bin and kind; the bins, all of one width on their axis, hold all scores and the threshold."""
    values = np.concatenate([*scores.values(), [] if threshold is None else [threshold]])
    low, high = values.min(), values.max()
    if low == high:
        low, high = low - 0.5, high + 0.5
    logarithmic = bool(low > 0 and high / low > _LOGARITHMIC_FROM)
    edges = np.geomspace(low, high, _N_BINS + 1) if logarithmic else np.linspace(low, high, _N_BINS + 1)
    # What rounding did to the outer edges must not lose a score.
    edges[0], edges[-1] = low, high
    counts = {kind: np.histogram(of_kind, edges)[0].tolist() for kind, of_kind in scores.items()}
    return {"edges": edges.tolist(), "counts": counts, "logarithmic": logarithmic}


def _points(curve: tuple[NDArray, NDArray] | None, width: float) -> list[list[float]] | None:
    """Corners of a rising curve, [[x, ...], [y, ...]], without those that would not be seen.

    The plot is divided into cells of the tolerance's size; of the corners in a cell the first and the last stay, so
    what is left out lies between two that are in the same cell.
    """
    if curve is None:
        return None
    x, y = curve
    cells = np.floor(np.stack([x / width, y]) / _CURVE_TOLERANCE)
    is_new = (np.diff(cells, axis=1) != 0).any(axis=0)
    kept = np.append(True, is_new) | np.append(is_new, True)
    return [[float(f"{value:.5g}") for value in values[kept]] for values in (x, y)]


def _photograph(pixels: NDArray[np.uint8]) -> dict[str, Any]:
    image = Image.fromarray(pixels)
    image.thumbnail((_PHOTO_SIDE, _PHOTO_SIDE))
    for quality in _PHOTO_QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        if file.tell() <= _PHOTO_BYTES:
            break
    return {"width": image.width, "height": image.height, "photo": _base64(file.getvalue())}


def _map_png(detector: Detector, anomaly_map: NDArray[np.float32], limits: tuple[float, float]) -> str:
    """The map as it localises, in 8-bit grey: 0 what is drawn as nothing, 255 full colour."""
    low, high = limits
    side = min(_MAP_SIDE, *anomaly_map.shape)
    strength = np.clip((detector.localisation_map(anomaly_map, (side, side)) - low) / (high - low), 0, 1)
    file = io.BytesIO()
    Image.fromarray((255 * strength).round().astype(np.uint8)).save(file, "PNG", optimize=True)
    return _base64(file.getvalue())


def _colour_tables() -> dict[str, list[float]]:
    """Red, green, blue and opacity from 0 to 1 at evenly spaced strengths."""
    rgb, opacity = colours(_COLOUR_STOPS)
    columns = {"red": rgb[:, 0] / 255, "green": rgb[:, 1] / 255, "blue": rgb[:, 2] / 255, "opacity": opacity}
    return {name: values.round(4).tolist() for name, values in columns.items()}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
