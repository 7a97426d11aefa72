"""Students of one training or of two, scored together."""

import dataclasses
from typing import Any

from dskd_fast.data.category import Category
from dskd_fast.data.store import ImageStore
from dskd_fast.detection.calibrate import calibrate_on
from dskd_fast.detection.calibration import Calibration
from dskd_fast.detection.detector import Detector, calibration_of
from dskd_fast.evaluation.evaluate import evaluate
from dskd_fast.progress import Progress
from dskd_fast.runs.options import TrainingOptions


def calibrated_figures(
    detector: Detector, category: Category, recipe: TrainingOptions, progress: Progress
) -> dict[str, Any]:
    """AUROC and sPRO of the same networks by calibrated scores, as `score_maps` gives them."""
    ours = dataclasses.replace(recipe, scoring="calibrated").detector(detector.model)
    images = ImageStore([*category.train, *category.validation], recipe.image_size, bits=recipe.bits)
    calibrate_on(ours, images, len(category.train), recipe.batch_size)
    found = evaluate(ours, category, threshold=None, batch_size=recipe.batch_size, progress=progress)
    return {name: found[name] for name in ("auroc", "spro", "spro_at")}


def join(local: Detector, global_: Detector) -> Detector:
    """A detector with the local student of one training and the global student of another, with the same teacher.

    It takes over the networks of both. It has no threshold.
    """
    model = local.model
    model.global_bottleneck = global_.model.global_bottleneck
    model.global_student = global_.model.global_student
    model.students = ("local", "global")
    # At most the global student's temperature differs from the recipe's.
    scoring = dataclasses.replace(global_.scoring, local_map=local.scoring.local_map)
    statistics = {
        name: calibration_of(detector).statistics[name] for name, detector in (("local", local), ("global", global_))
    }
    of_local = calibration_of(local)
    calibration = Calibration(statistics, of_local.source, of_local.n_images, exposure=of_local.exposure)
    return Detector(model, scoring, calibration, local.bits)
