"""Calibration on image files: a category's own, or new ones for a run that is there."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dskd_fast.choices import FALSE_ALARMS
from dskd_fast.data.store import Batches, ImageStore, Pixels
from dskd_fast.detection.detector import Detector, calibration_of


def calibrate_on(
    detector: Detector, images: Pixels, n_training: int, batch_size: int, *, false_alarms: float = FALSE_ALARMS
) -> None:
    """Calibrate on the images that a training has used.

    Args:
        detector: with trained networks.
        images: the training images, then the validation images. Where there are none of these, the training images
            stand in for them.
        n_training: how many are training images.
        batch_size: images per pass.
        false_alarms: the share of normal images that may be called anomalous.
    """
    training = Batches(images, list(range(n_training)), batch_size)
    if len(images) == n_training:
        detector.calibrate(training, "train", images.exposures)
        return
    validation = Batches(images, list(range(n_training, len(images))), batch_size)
    detector.calibrate(validation, "validation", images.exposures, training=training, false_alarms=false_alarms)


def recalibrate(
    detector: Detector, paths: Sequence[Path], *, false_alarms: float = FALSE_ALARMS, batch_size: int = 8
) -> None:
    """Calibrate a detector on new normal images, as of another lamp or camera, without training.

    Statistics, threshold and the limits of brightness and contrast are then of these images alone. Distances are
    measured from them and from all images before (`NearestNeighbour`), or from their mean in the training images'
    covariance (`Mahalanobis`); those of patches and arrangement from the training images' alone.

    Args:
        detector: of a finished run; its calibration is replaced.
        paths: of the images.
        false_alarms: the share of normal images that may be called anomalous.
        batch_size: images per pass.

    Raises:
        ImageError: names every image that cannot be read.
    """
    images = ImageStore(paths, detector.model.image_size, bits=detector.bits)
    batches = Batches(images, list(range(len(images))), batch_size)
    if detector.calibrated is not None:
        detector.calibrated.use(detector.calibrated.names)  # what was chosen by bad images was chosen for other scores
    detector.calibrate(batches, "validation", images.exposures, false_alarms=false_alarms, are_new=True)
    calibration_of(detector).warnings.extend(_what_is_not_promised(len(images), false_alarms))


class Caught(NamedTuple):
    """What a detector makes of images that are known to be bad.

    Attributes:
        paths: the images.
        parts: the values of each part, (n,), and the score as "score".
        decided_by: the part with the largest value; None for the paper's scoring.
    """

    paths: Sequence[Path]
    parts: dict[str, NDArray[np.float64]]
    decided_by: list[str | None]


def score_bad(detector: Detector, paths: Sequence[Path], *, batch_size: int = 8) -> Caught:
    """Score known bad images, which tells what a detector is good for. Nothing is learned from them.

    Raises:
        ImageError: names every image that cannot be read.
    """
    images = ImageStore(paths, detector.model.image_size, bits=detector.bits)
    found = [detector.find(batch) for batch in Batches(images, list(range(len(images))), batch_size)]
    parts = {name: np.concatenate([one.parts[name] for one in found]) for name in detector.parts}
    parts["score"] = np.concatenate([one.scores["combined"] for one in found])
    return Caught(paths, parts, [part for one in found for part in one.decided_by])


def _what_is_not_promised(n_images: int, false_alarms: float) -> list[str]:
    promised = 1 / (n_images + 1)
    if promised <= false_alarms:
        return []
    needed = math.ceil(1 / false_alarms) - 1
    return [
        f"{n_images} normal images can promise {promised:.2g} false alarms at best, not {false_alarms:.2g}, for which "
        f"{needed} are needed: the threshold is above the highest score of them"
    ]
