"""One image's result, and how it is shown."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dskd_fast.data.exposure import measure_exposure
from dskd_fast.detection.calibration import decide
from dskd_fast.detection.detector import Detector
from dskd_fast.detection.findings import Findings, Maps, has_place


@dataclass(frozen=True)
class Prediction:
    """One image's result; `error` says why there is none, `reason` why the decision is "suspect".

    With `skipped` it stands for a folder whose image files were left out: how many, and what they are. `decided_by` is
    the part of the score with the largest value (None for the paper's scoring), `parts` has the value of each.
    """

    path: str
    score: float | None = None
    threshold: float | None = None
    decision: str | None = None
    overlay: str | None = None
    map: str | None = None
    reason: str | None = None
    error: str | None = None
    skipped: str | None = None
    decided_by: str | None = None
    parts: dict[str, float] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is anomalous by a part of the score that has no map: the image as a whole, nothing at a place."""
        return self.decision == "anomalous" and not has_place(self.decided_by)


def judge(
    detector: Detector, images: Tensor, paths: Sequence[str], threshold: float | None
) -> tuple[list[Prediction], Findings]:
    """Score images and decide.

    Args:
        detector: calibrated.
        images: uint8 RGB (B, 3, S, S), as `Detector.resized` makes them.
        paths: what each is called.
        threshold: of the decisions; None makes none but "suspect".

    Returns:
        The results, without pictures, and what they were made from.
    """
    found = detector.find(images)
    suspicions = detector.suspicions(*measure_exposure(images))
    judged = []
    for i, (path, suspect) in enumerate(zip(paths, suspicions, strict=True)):
        score = float(found.scores["combined"][i])
        judged.append(
            Prediction(
                path,
                score,
                threshold,
                decide(score, threshold, suspect),
                reason=suspect,
                decided_by=found.decided_by[i],
                parts={name: float(values[i]) for name, values in found.parts.items()},
            )
        )
    return judged, found


def is_drawn(prediction: Prediction, overlays: str) -> bool:
    """Whether an image gets an overlay, by one of `dskd_fast.choices.OVERLAYS`."""
    return overlays == "all" or (overlays == "anomalous" and prediction.decision != "normal")


def map_to_draw(prediction: Prediction, maps: Maps, i: int) -> NDArray[np.float32]:
    """The map (S, S) of image i that its overlay shows: the combined one, or what there is to see of a whole image."""
    if prediction.is_whole and maps.global_ is not None:
        return maps.global_[i]
    return maps.combined[i]


def caption(prediction: Prediction) -> str:
    """The line under an overlay."""
    text = f"score {prediction.score:.2f}"
    if prediction.reason is not None:
        return f"{text}   suspect: {prediction.reason}"
    if prediction.threshold is None:
        return text
    text += f"   threshold {prediction.threshold:.2f}   {prediction.decision}"
    if prediction.decision == "anomalous" and prediction.decided_by is not None:
        where = ": the image as a whole" if prediction.is_whole else ""
        text += f" ({prediction.decided_by}{where})"
    return text
