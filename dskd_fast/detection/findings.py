"""What a detector finds: maps, scores, and what they are made of."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as nnf

from dskd_fast.detection.scoring.parts import PARTS

Variant = Literal["combined", "local", "global"]
VARIANTS: tuple[Variant, ...] = ("combined", "local", "global")


class Maps(NamedTuple):
    """Anomaly maps of a batch, each (B, S, S), float32.

    With the paper's scoring they are in standard deviations above the mean of all pixels of normal images. Calibrated
    ones are in the unit of the score: the highest place of a normal image is about 0, and where a map is above the
    threshold, so is the score. The map of a student that there is not is None. `combined` is the sum of both, or the
    one there is; of calibrated ones the largest at each place, parts without a map of their own here included.
    """

    combined: NDArray[np.float32]
    local: NDArray[np.float32] | None
    global_: NDArray[np.float32] | None

    @property
    def existing(self) -> dict[Variant, NDArray[np.float32]]:
        """Those that are not None."""
        return {variant: found for variant in VARIANTS if (found := self.of(variant)) is not None}

    def of(self, variant: Variant) -> NDArray[np.float32] | None:
        return self.global_ if variant == "global" else getattr(self, variant)


class Findings(NamedTuple):
    """What a detector finds in a batch.

    Attributes:
        maps: where.
        scores: image scores (B,) by each variant of the maps; "combined" is the one that decides.
        parts: what the scores are made of, (B,) each, in the order of `Detector.parts`.
        decided_by: the part with the largest value for each image; None where the score is of a sum (paper eq. 8).
    """

    maps: Maps
    scores: dict[Variant, NDArray[np.float64]]
    parts: dict[str, NDArray[np.float64]]
    decided_by: list[str | None]


@dataclass(frozen=True, eq=False)
class Detection:
    """What a detector finds in one image.

    Attributes:
        score: in standard deviations above the normal mean.
        anomalous: whether the score is above the run's threshold; None without one. True for a suspect image, whatever
            its score: a program that asks for nothing else must not let it pass.
        map: anomaly map (H, W) at the image's own size, float32, in the same unit.
        local_map, global_map: of each student alone; None without that student.
        suspect: why the score means nothing, since brightness or contrast is beyond what normal images allow
            (`Exposure`), as with a camera that is off; None where it is not.
        parts: the value of everything that the score is made of (`dskd_fast.detection.scoring.parts.PARTS`), in
            the same unit.
        decided_by: the part with the largest value; None where the score is of the maps' sum (paper eq. 8).

    `has_place` says whether that part has a map. If not, the image as a whole is unusual, and `map` shows the maps of
    the others, which may be dark.
    """

    score: float
    anomalous: bool | None
    map: NDArray[np.float32]
    local_map: NDArray[np.float32] | None
    global_map: NDArray[np.float32] | None
    suspect: str | None = None
    parts: dict[str, float] = field(default_factory=dict)
    decided_by: str | None = None

    @property
    def has_place(self) -> bool:
        return has_place(self.decided_by)


def has_place(part: str | None) -> bool:
    """Whether a part of the score has a map; a sum of maps (None) has."""
    return part is None or PARTS[part].has_map


def map_at_size(
    anomaly_map: NDArray[np.float32], size: tuple[int, int], align_corners: bool = False
) -> NDArray[np.float32]:
    """A map (S, S) at an image's own resolution (height, width), bilinear."""
    resized = nnf.interpolate(
        torch.from_numpy(anomaly_map)[None, None],
        size,
        mode="bilinear",
        align_corners=align_corners,
        # Smaller than the map on a side: average, do not skip.
        antialias=min(size) < min(anomaly_map.shape),
    )
    return resized[0, 0].numpy()
