"""What a calibrated score is made of, and how much each part counts."""

from dataclasses import dataclass


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
    """

    meaning: str
    weight: float
    weight_by_heart: float
    least_spread: float
    least_if_alike: float | None = None
    weight_in_map: float | None = None

    @property
    def has_map(self) -> bool:
        return self.weight_in_map is not None


PARTS: dict[str, Kind] = {
    "local": Kind("the local student's map, its two finest levels", 1.0, 0.01, 0.1, weight_in_map=1.0),
    "global": Kind("the global student's map", 0.3, 0.01, 0.1, weight_in_map=0.5),
    "sum": Kind("the sum of both students' maps", 0.03, 0.01, 0.1, weight_in_map=0.1),
    "patches": Kind(
        "the teacher's patches, distance of each from the nearest one of the training images'",
        1.0,
        1.0,
        0.2,
        weight_in_map=0.03,
    ),
    "condensed": Kind(
        "the global student's condensed vector, distance from the nearest training image's", 0.1, 0.01, 1.0
    ),
    "global-means": Kind(
        "the global student's mean features, Mahalanobis distance from the training images'", 0.1, 0.01, 1.0
    ),
    "teacher-means": Kind(
        "the teacher's mean features, Mahalanobis distance from the training images'", 0.2, 0.01, 1.0, 0.25
    ),
}
"""Everything a calibrated score is made of; a run has those whose student there is."""

LEVELS = {"local": (0, 1), "global": (0, 1, 2), "sum": (0, 1, 2)}
"""Which levels make a map. The local student's coarsest finds what the global one finds, less well."""
