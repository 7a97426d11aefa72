"""What a calibrated score is made of, and how much each part counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the soft maximum: two equal values together are ln 2 / 1.5 = 0.46 deviations more than one.
SHARPNESS = 1.5


@dataclass(frozen=True)
class Kind:
    """What a part is, and how much it counts.

    Attributes:
        meaning: for people.
        weight: what is thought of its share in the anomalies there are.
        weight_by_heart: the same where the students know their training images by heart.
        least_spread: what its deviation is at least, as a share of its normal value. Validation images are few and
            alike, and other normal images are farther from the training images by a factor, not by a sum: distances
            of whole images are told from their double.
        least_if_alike: the same where validation images are no farther from the training images than these are from
            each other; None where that tells nothing, as of students, which these have trained.
        weight_in_map: its weight in the map of all parts, where coarse maps would blur finer ones; None if it has no
            place.
        weight_if_farther: its weight in both where other images are farther from the training images than these are
            from each other, as new ones are for which it is recalibrated, or nothing tells; None if it stays.
    """

    meaning: str
    weight: float
    weight_by_heart: float
    least_spread: float
    least_if_alike: float | None = None
    weight_in_map: float | None = None
    weight_if_farther: float | None = None

    @property
    def has_map(self) -> bool:
        return self.weight_in_map is not None


PARTS: dict[str, Kind] = {
    "local": Kind("the local student's map, its two finest levels", 2.0, 0.01, 0.1, weight_in_map=1.0),
    "local-whitened": Kind(
        "the local student's map, in which directions of errors that are usual count less",
        2.0,
        0.001,
        0.1,
        weight_in_map=1.0,
        weight_if_farther=0.001,
    ),
    "global": Kind("the global student's map", 0.3, 0.01, 0.1, weight_in_map=0.5),
    "sum": Kind("the sum of both students' maps", 0.03, 0.01, 0.1, weight_in_map=0.1),
    "patches": Kind(
        "the teacher's patches, distance of each from the nearest one of the training images'",
        1.0,
        1.0,
        0.2,
        weight_in_map=0.03,
    ),
    "arrangement": Kind(
        "the teacher's patches, what is left of them after the mixture of training images nearest to the whole image",
        0.1,
        0.01,
        1.0,
        weight_in_map=0.1,
    ),
    "condensed": Kind(
        "the global student's condensed vector, distance from the nearest training image's", 0.1, 0.01, 1.0
    ),
    "global-means": Kind(
        "the global student's mean features, Mahalanobis distance from the training images'", 0.1, 0.01, 1.0
    ),
    "teacher-means": Kind(
        "the teacher's mean features, Mahalanobis distance from the training images'", 0.4, 0.01, 1.0, 0.25
    ),
}
"""Everything a calibrated score is made of; a run has those whose student there is."""

LEVELS = {"local": (0, 1), "local-whitened": (0, 1), "global": (0, 1, 2), "sum": (0, 1, 2), "arrangement": (0,)}
"""Which levels make a map. The local student's coarsest finds what the global one finds, less well."""


def soft_maximum(values: Tensor) -> Tensor:
    """(B, parts) -> (B,): the maximum, raised a little by what else is high."""
    return torch.logsumexp(SHARPNESS * values, 1) / SHARPNESS


def handicaps(names: Sequence[str], by_heart: float, farther: float) -> tuple[Tensor, Tensor]:
    """What takes the parts' weights into a soft maximum, (parts,): in scores, and in the map of all parts.

    Parts without a place in the map have a number there that is not used.

    Args:
        names: of the parts.
        by_heart: how much the students know their training images by heart, from 0 to 1.
        farther: how much farther validation images are from the training images, from 0 to 1.
    """

    def handicap(kind: Kind, weight: float) -> float:
        far = weight if kind.weight_if_farther is None else kind.weight_if_farther
        not_by_heart = (1 - farther) * math.log(weight) + farther * math.log(far)
        return ((1 - by_heart) * not_by_heart + by_heart * math.log(kind.weight_by_heart)) / SHARPNESS

    kinds = [PARTS[name] for name in names]
    in_maps = [kind.weight if kind.weight_in_map is None else kind.weight_in_map for kind in kinds]
    return (
        torch.tensor([handicap(kind, kind.weight) for kind in kinds]),
        torch.tensor([handicap(kind, weight) for kind, weight in zip(kinds, in_maps, strict=True)]),
    )
