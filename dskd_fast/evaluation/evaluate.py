"""Evaluation on a category's test images: AUROC, sPRO, the decisions at the run's threshold, and what made them."""

import csv
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dskd_fast.data.category import Category, GroundTruth
from dskd_fast.data.contents import copies
from dskd_fast.data.ground_truth import ANOMALY_KINDS, KINDS
from dskd_fast.data.store import ImageStore
from dskd_fast.detection.calibration import decide
from dskd_fast.detection.detector import Detector, calibration_of
from dskd_fast.detection.findings import VARIANTS, Findings, Maps, Variant
from dskd_fast.detection.inputs import check_batch_size
from dskd_fast.errors import UserError
from dskd_fast.files import write_file
from dskd_fast.metrics.auroc import auroc
from dskd_fast.metrics.maps import ScoredMap, save_map, score_maps
from dskd_fast.metrics.spro import mean_of_kinds
from dskd_fast.progress import Progress, silent
from dskd_fast.workers import Workers


class ScoredImages(NamedTuple):
    """A category's test images as a detector sees them.

    Attributes:
        images: the test images, in the category's order.
        maps: their maps, (n, S, S) each.
        scores: their image scores, (n,), by each variant of the maps that there is.
        suspicions: why they are suspect, see `Detection`; None for those that are not.
        parts: what the scores are made of, (n,) each, in the order of `Detector.parts`.
        decided_by: the part with the largest value for each image; None with the paper's scoring.
    """

    images: ImageStore
    maps: Maps
    scores: dict[Variant, NDArray[np.float64]]
    suspicions: list[str | None]
    parts: dict[str, NDArray[np.float64]]
    decided_by: list[str | None]

    def decisions(self, threshold: float | None) -> list[str | None]:
        """What is decided of each image: see `dskd_fast.detection.calibration.decide`."""
        pairs = zip(self.scores["combined"], self.suspicions, strict=True)
        return [decide(score, threshold, suspect) for score, suspect in pairs]


def evaluate(
    detector: Detector,
    category: Category,
    *,
    threshold: float | None,
    batch_size: int = 16,
    save_maps: Path | None = None,
    scores_file: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score every test image, and the maps where there are masks.

    Args:
        detector: calibrated.
        category: with test images.
        threshold: of the decisions; None makes none.
        batch_size: images per pass.
        save_maps: folder for the combined maps at native size, as CATEGORY/test/TYPE/NNN.tiff.
        scores_file: CSV of every image's scores.
        progress: called as progress(stage, done, total).

    Returns:
        "category"; "auroc", "spro", "spro_at" as `dskd_fast.metrics.maps.score_maps` gives them, for the combined maps
        and again under "local" and "global" for each student alone (None for a missing one); "n_images" per
        kind; "decisions" per kind: how many images were called anomalous at "threshold"; "suspects" per kind: how many
        were called suspect instead, whose scores count in the figures like all others; "scoring": "calibrated" or
        "paper"; "parts": the AUROC of each part of the score by itself; "decided_by" per kind: by which part how many
        images were called anomalous (None without a threshold, and with the paper's scoring, where a sum decides);
        "absent": why a figure is None;
        "warnings": what makes the figures doubtful; "bad_masks": a sentence for each mask that cannot be used, which
        leaves its kind without sPRO; "unused": `Category.unused_summary`.

    Raises:
        UserError: no test images, images that cannot be read, files that cannot be written, or maps that would lie in
            the data set.
        ValueError: `batch_size` is no whole number from 1 up.
    """
    if save_maps is not None and (save_maps / category.name).resolve().is_relative_to(category.root.resolve()):
        raise UserError(
            f"maps in {save_maps / category.name} would lie among the data set's own images: choose another folder "
            "for --save-maps"
        )
    test = score_images(detector, category, batch_size, progress)
    truth = GroundTruth(category)

    def saved(images: Iterable[ScoredMap], variant: Variant, writers: Workers) -> Iterator[ScoredMap]:
        for image in images:
            if variant == "combined" and save_maps is not None:
                path = save_maps / category.name / f"{image.key}.tiff"
                saving.append(writers.behind(save_map, path, image.anomaly_map, weight=image.anomaly_map.nbytes))
            yield image

    saving: list[Future[None]] = []
    figures: dict[Variant, dict[str, Any]] = {}
    with Workers() as writers:
        for variant in detector.variants:
            with closing(scored_maps(detector, truth, test, variant, progress)) as images:
                figures[variant] = score_maps(saved(images, variant, writers))
    for future in saving:
        future.result()  # raises what could not be written
    decisions = test.decisions(threshold)
    result = {
        "category": category.name,
        **figures["combined"],
        "local": figures.get("local"),
        "global": figures.get("global"),
        "n_images": count_kinds(category),
        "threshold": threshold,
        "decisions": None if threshold is None else count_decisions(category, decisions, "anomalous"),
        "suspects": count_decisions(category, decisions, "suspect"),
        "scoring": "paper" if detector.calibrated is None else "calibrated",
        "parts": {name: part_auroc(category, values) for name, values in test.parts.items()},
        "decided_by": None if threshold is None else count_parts(category, test, decisions),
        **remarks(category, truth, detector),
    }
    if scores_file is not None:
        _write_scores(scores_file, category, test, decisions, threshold)
    return result


def score_images(
    detector: Detector,
    category: Category,
    batch_size: int,
    progress: Progress,
    besides: Callable[[int, NDArray[np.uint8]], None] | None = None,
) -> ScoredImages:
    """Maps and scores of every test image, from which all figures are made.

    Args:
        detector: calibrated.
        category: with test images.
        batch_size: images per pass.
        progress: called as progress(stage, done, total).
        besides: see `ImageStore`.

    Raises:
        UserError: no test images, or files that cannot be read.
        ValueError: `batch_size` is no whole number from 1 up.
    """
    check_batch_size(batch_size)
    if not category.test:
        raise UserError(f"{category.root} has no test images: figures need a folder test, `predict` does not")
    images = ImageStore(
        [item.path for item in category.test],
        detector.model.image_size,
        bits=detector.bits,
        progress=progress,
        besides=besides,
    )
    found = _find_all(detector, images, batch_size, progress)
    return ScoredImages(
        images, found.maps, found.scores, detector.suspicions(*images.exposures), found.parts, found.decided_by
    )


def scored_maps(
    detector: Detector,
    truth: GroundTruth,
    test: ScoredImages,
    variant: Variant,
    progress: Progress,
) -> Generator[ScoredMap, None, None]:
    """The maps of one variant at native size, one at a time, as `score_maps` takes them.

    Close it where not all are taken: threads read ahead of it.
    """
    maps, scores = [*test.maps.existing[variant]], test.scores[variant]
    yield from maps_with_truth(
        truth, maps, scores, test.images.native_sizes, detector.localisation_map, progress, f"scoring {variant} maps"
    )


def maps_with_truth(
    truth: GroundTruth,
    maps: Sequence[NDArray[np.float32]],
    scores: NDArray[np.float64],
    sizes: Sequence[tuple[int, int]],
    at_size: Callable[[NDArray[np.float32], tuple[int, int]], NDArray[np.float32]],
    progress: Progress,
    stage: str = "scoring maps",
) -> Generator[ScoredMap, None, None]:
    """Maps of any method at native size beside what is marked, one at a time, as `score_maps` takes them.

    Close it where not all are taken: threads read ahead of it.

    Args:
        truth: of the test images.
        maps: of the test images, (S, S) each.
        scores: of the images, (n,).
        sizes: native height and width of each.
        at_size: gives a map at such a size.
        progress: called as progress(stage, done, total).
        stage: its name.
    """
    with Workers() as workers:
        # A mask takes one byte a pixel, and is read from as many.
        masks = workers.ahead(
            range(len(sizes)),
            lambda i: truth.read(truth.test[i], sizes[i]),
            weigh=lambda i: 2 * math.prod(sizes[i]) * max(1, len(truth.test[i].masks)),
        )
        for i, (item, found) in enumerate(zip(truth.test, masks, strict=True)):
            anomaly_map = at_size(maps[i], sizes[i])
            defects = truth.noted(item, found)
            yield ScoredMap(item.key, item.kind, anomaly_map, float(scores[i]), defects)
            progress(stage, i + 1, len(truth.test))


def count_kinds(category: Category) -> dict[str, int]:
    """Number of test images of each kind."""
    return {kind: category.n_images[f"test/{kind}"] for kind in KINDS}


def count_decisions(category: Category, decisions: Sequence[str | None], decision: str) -> dict[str, int]:
    """How many test images of each kind have this decision."""
    decided = [item.kind for item, found in zip(category.test, decisions, strict=True) if found == decision]
    return {kind: decided.count(kind) for kind in KINDS}


def count_parts(
    category: Category, test: ScoredImages, decisions: Sequence[str | None]
) -> dict[str, dict[str, int]] | None:
    """By which part of the score how many test images of each kind are called anomalous; None if by no part."""
    if None in test.decided_by:
        return None
    counts: dict[str, dict[str, int]] = {kind: dict.fromkeys(test.parts, 0) for kind in KINDS}
    for item, decision, part in zip(category.test, decisions, test.decided_by, strict=True):
        if decision == "anomalous" and part is not None:
            counts[item.kind][part] += 1
    return counts


def part_auroc(category: Category, values: NDArray[np.float64]) -> dict[str, float | None]:
    """AUROC of one part's values for the test images (n,), as `score_maps` gives it for scores."""
    kinds = np.array([item.kind for item in category.test])
    good = values[kinds == "good"]
    areas: dict[str, float | None] = {kind: auroc(good, values[kinds == kind]) for kind in ANOMALY_KINDS}
    return areas | {"mean": mean_of_kinds(**areas)}


def absences(category: Category, truth: GroundTruth) -> list[str]:
    """Why figures are absent, a sentence each; empty if all can be computed. All masks must have been read."""
    counts = count_kinds(category)
    reasons = [f"no {kind} test images, so no figures that need them" for kind in KINDS if not counts[kind]]
    for kind in KINDS[1:]:
        obstacle = category.localisation_obstacle(kind)
        n_bad = len(truth.bad_masks(kind))
        if n_bad:
            obstacle = f"masks of category {category.name} cannot be used ({n_bad} such: see bad masks)"
        if obstacle is not None and counts[kind]:
            reasons.append(f"no sPRO of {kind} anomalies: {obstacle}")
    return reasons


def remarks(category: Category, truth: GroundTruth, detector: Detector | None = None) -> dict[str, Any]:
    """What to say beside the figures: "absent", "warnings", "bad_masks" and "unused", see `evaluate`."""
    chosen = None if detector is None else calibration_of(detector).chosen_parts
    return {
        "absent": absences(category, truth),
        "warnings": _warnings(category)
        + (
            []
            if chosen is None
            else [
                f"only {', '.join(chosen)} decide, chosen by known bad images: figures on images like these say little"
            ]
        ),
        "bad_masks": truth.bad_masks(),
        "unused": category.unused_summary,
    }


def _warnings(category: Category) -> list[str]:
    """What makes figures doubtful, a sentence each."""
    found = copies((item.path for item in category.test), [*category.train, *category.validation])
    if not found:
        return []
    first = found[0].relative_to(category.root).as_posix()
    return [
        f"copies of training or validation images among the {len(category.test)} test images: {len(found)}, such as "
        f"{first}; they say little about new images, so take them out"
    ]


def _find_all(detector: Detector, images: ImageStore, batch_size: int, progress: Progress) -> Findings:
    """What the detector finds in all images; the maps of only one batch are held twice."""
    shape = len(images), detector.model.image_size, detector.model.image_size
    maps = {variant: np.empty(shape, np.float32) for variant in detector.variants}
    scores: dict[Variant, list[NDArray[np.float64]]] = {variant: [] for variant in detector.variants}
    parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in detector.parts}
    decided_by: list[str | None] = []
    for start in range(0, len(images), batch_size):
        stop = min(start + batch_size, len(images))
        found = detector.find(images.batch(range(start, stop)))
        for variant, of_batch in found.maps.existing.items():
            maps[variant][start:stop] = of_batch
            scores[variant].append(found.scores[variant])
        for name, values in found.parts.items():
            parts[name].append(values)
        decided_by += found.decided_by
        progress("computing maps", stop, len(images))
    return Findings(
        Maps(maps["combined"], maps.get("local"), maps.get("global")),
        {variant: np.concatenate(values) for variant, values in scores.items()},
        {name: np.concatenate(values) for name, values in parts.items()},
        decided_by,
    )


def _write_scores(
    path: Path, category: Category, test: ScoredImages, decisions: Sequence[str | None], threshold: float | None
) -> None:
    scores = test.scores

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            columns = ["image", "type", "score", "local_score", "global_score", "threshold", "decision", "reason"]
            writer.writerow([*columns, "decided_by", *(f"part_{name}" for name in test.parts)])
            for i, item in enumerate(category.test):
                writer.writerow(
                    [
                        item.path.relative_to(category.root).as_posix(),
                        item.kind,
                        *(float(scores[variant][i]) if variant in scores else None for variant in VARIANTS),
                        threshold,
                        decisions[i],
                        test.suspicions[i],
                        test.decided_by[i],
                        *(float(values[i]) for values in test.parts.values()),
                    ]
                )

    write_file(path, write)


def threshold_of(detector: Detector, given: float | None) -> float | None:
    """The threshold to decide with: the one that was given, else the run's, which it may not have."""
    if given is not None:
        return given
    threshold = calibration_of(detector).threshold
    return None if threshold is None else threshold.value
