"""Parts -> calibration -> one score and one map."""

import keyword
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from dskd_fast.detection.scoring.distances import Mahalanobis, NearestNeighbour
from dskd_fast.detection.scoring.maps import MapPart
from dskd_fast.models import DSKD, Measurements


@dataclass(frozen=True)
class _Kind:
    """What a part is, and how much it counts: `weight` is what is thought of its share in the anomalies there are."""

    weight: float
    meaning: str
    has_map: bool = False


PARTS: dict[str, _Kind] = {
    "local": _Kind(1.0, "the local student's map, its two finest levels", has_map=True),
    "global": _Kind(0.3, "the global student's map", has_map=True),
    "condensed": _Kind(0.1, "the global student's condensed vector, distance from the nearest training image's"),
    "global-means": _Kind(0.1, "the global student's mean features, Mahalanobis distance from the training images'"),
    "teacher-means": _Kind(0.1, "the teacher's mean features, Mahalanobis distance from the training images'"),
}
"""Everything a calibrated score is made of; a run has those whose student there is."""

_LEVELS = {"local": (0, 1), "global": (0, 1, 2)}

# Of the soft maximum: two equal values together are ln 2 / 1.5 = 0.46 deviations more than one.
_SHARPNESS = 1.5

# Of the filter for maps that are looked at, as a multiple of the score's.
_MAP_SIGMA = 2.0

# Deviations by which the value of a part that is not used is lowered.
_FAR_BELOW = 1e6

# What a part's deviation is at least, as a share of its normal value. Validation images are few and alike, and other
# normal images are further from the training images by a factor, not by a sum: distances are told from their double.
_MIN_SPREAD_OF_MAPS, _MIN_SPREAD_OF_DISTANCES = 0.1, 1.0


class Scored(NamedTuple):
    """A batch's calibrated scores.

    Attributes:
        score: (B,).
        values: (B, parts), the calibrated values of the parts there are, in the order of `CalibratedScore.names`.
        maps: of the parts that have one, (B, S, S), in the unit of their values, filtered to be looked at.
    """

    score: Tensor
    values: Tensor
    maps: dict[str, Tensor]


class CalibratedScore(nn.Module):
    """Everything between a detector's measurements and its scores, learned from normal images only.

    Each part gives an image one number. On the validation images it has a mean and a deviation; what it gives a new
    image counts in these deviations, less a handicap for parts that seldom decide (`PARTS`). The score is the soft
    maximum of them.

    Args:
        model: tells which parts there are.
        sigma: of the Gaussian filter before the maximum that is a map's value, in pixels.

    Attributes:
        names: of the parts there are.
        left_out: after `calibrate`, the values (n, parts) of the images that it was called with, each left out of what
            it is compared with.
    """

    left_out: NDArray[np.float64]

    centre: Tensor
    spread: Tensor
    is_used: Tensor
    handicap: Tensor
    filter: Tensor
    map_filter: Tensor

    def __init__(self, model: DSKD, sigma: float) -> None:
        super().__init__()
        self.size = model.image_size
        has = {
            "local": "local" in model.students,
            "global": "global" in model.students,
            "condensed": "global" in model.students and model.gccb > 0,
            "global-means": "global" in model.students,
            "teacher-means": True,
        }
        self.names = tuple(name for name in PARTS if has[name])
        self.parts = nn.ModuleDict({_module_name(name): _make_part(name) for name in self.names})
        weights = torch.tensor([PARTS[name].weight for name in self.names], dtype=torch.float64)
        self.register_buffer("handicap", (weights.log() / _SHARPNESS).float(), persistent=False)
        self.register_buffer("centre", torch.zeros(len(self.names)))
        self.register_buffer("spread", torch.ones(len(self.names)))
        self.register_buffer("is_used", torch.ones(len(self.names)))
        for name, deviation in (("filter", sigma), ("map_filter", _MAP_SIGMA * sigma)):
            # It is linear: its matrix is what it makes of the unit vectors.
            matrix = torch.from_numpy(ndimage.gaussian_filter1d(np.eye(self.size), deviation, axis=0)).float()
            self.register_buffer(name, matrix, persistent=False)

    def forward(self, measured: Measurements) -> Scored:
        maps: dict[str, Tensor] = {}
        values = []
        for i, name in enumerate(self.names):
            if PARTS[name].has_map:
                found = self._part(name)(measured, self.size)
                found = (found - self.centre[i]) / self.spread[i] + self.handicap[i]
                values.append(_filtered(found, self.filter).amax((1, 2)))
                maps[name] = _filtered(found, self.map_filter)
            else:
                distance = self._part(name)(_vectors(name, measured))
                values.append((distance - self.centre[i]) / self.spread[i] + self.handicap[i])
        stacked = torch.stack(values, 1)
        return Scored(soft_maximum(stacked - self._unused()), stacked, maps)

    def combined(self, maps: Mapping[str, Tensor]) -> Tensor:
        """The largest of `Scored.maps` at each place, (B, S, S): of parts that decide, if any of these has a map."""
        of_unused = self._unused()
        lowered = torch.stack([of_unused[i] for i, name in enumerate(self.names) if name in maps])
        lowered = lowered - lowered.amin(0)
        return (torch.stack(list(maps.values())) - lowered[:, None, None, None]).amax(0)

    def fit(self, training: Measurements) -> None:
        """Learn what training images are like."""
        for name in self.names:
            if not PARTS[name].has_map:
                self._part(name).fit(_vectors(name, training))

    def calibrate(
        self, normal: Measurements, kind: Literal["validation", "train", "new"] = "validation"
    ) -> NDArray[np.float64]:
        """Take statistics, centre and spread from normal images.

        Args:
            normal: of n images.
            kind: "train" for those of `fit`, since there are no others; they then stand in for new ones, a fold at a
                time. "new": they look different from the training images, and so do all from now on: distances are
                measured from them, too.

        Returns:
            The scores (n,) that these images have where each is left out of what it is compared with: as new images.
        """
        columns = []
        for name in self.names:
            part = self._part(name)
            if PARTS[name].has_map:
                maps = part.calibrate(normal, self.size)
                columns.append(_filtered(maps, self.filter.cpu()).amax((1, 2)))
            else:
                vectors = _vectors(name, normal)
                distances = {"validation": part, "train": part.of_training, "new": part.add}[kind]
                columns.append(distances(vectors))
        raw = torch.stack([column.double().cpu() for column in columns], 1).numpy()
        least = [_MIN_SPREAD_OF_MAPS if PARTS[n].has_map else _MIN_SPREAD_OF_DISTANCES for n in self.names]
        rounding = [self._part(n).rounding() if PARTS[n].has_map else 0.0 for n in self.names]
        floors = np.array(least), np.array(rounding)
        centre, spread = _centre_and_spread(raw, *floors)
        self.centre.copy_(torch.from_numpy(centre))
        self.spread.copy_(torch.from_numpy(spread))
        if len(raw) > 1:
            pairs = [_centre_and_spread(np.delete(raw, i, 0), *floors) for i in range(len(raw))]
            centre, spread = (np.stack(values) for values in zip(*pairs, strict=True))
        values = (raw - centre) / spread + self.handicap.double().cpu().numpy()
        self.left_out = values
        return self.scores_of(values)

    def scores_of(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores (n,) of calibrated values (n, parts)."""
        return soft_maximum(torch.from_numpy(values) - self._unused().double().cpu()).numpy()

    def rounding(self) -> float:
        """By how much rounding of maps may change a score."""
        return sum(
            self._part(name).rounding() / float(self.spread[i])
            for i, name in enumerate(self.names)
            if PARTS[name].has_map
        )

    def deciding(self, values: NDArray[np.floating]) -> list[str]:
        """The part that decided each score: the largest of its values (B, parts)."""
        return [self.names[i] for i in (values - self._unused().cpu().numpy()).argmax(1)]

    def use(self, names: Collection[str]) -> None:
        """Let these parts alone decide from now on; the values of the others are still given."""
        self.is_used.copy_(torch.tensor([float(name in names) for name in self.names]))

    @property
    def used(self) -> tuple[str, ...]:
        """The parts that decide."""
        return tuple(name for name, is_used in zip(self.names, self.is_used.tolist(), strict=True) if is_used)

    def _unused(self) -> Tensor:
        """(parts,): what takes the others out of a maximum."""
        return (1 - self.is_used) * _FAR_BELOW

    def _part(self, name: str) -> Any:
        return self.parts[_module_name(name)]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, whatever the number of training images.

        Raises:
            ValueError: it is another run's.
        """
        own = self.state_dict()
        if own.keys() != tensors.keys():
            raise ValueError("it holds other parts than this run has")
        for key, tensor in tensors.items():
            path, _, name = key.rpartition(".")
            setattr(self.get_submodule(path), name, tensor)


def _filtered(maps: Tensor, matrix: Tensor) -> Tensor:
    return matrix @ maps @ matrix.mT


def soft_maximum(values: Tensor) -> Tensor:
    """(B, parts) -> (B,): the maximum, raised a little by what else is high."""
    return torch.logsumexp(_SHARPNESS * values, 1) / _SHARPNESS


def collected(measured: Iterable[Measurements]) -> Measurements:
    """The measurements of several batches as those of one, on the CPU."""

    def join(values: tuple) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], list):
            return [torch.cat(levels).cpu() for levels in zip(*values, strict=True)]
        return torch.cat(values).cpu()

    return Measurements(*(join(values) for values in zip(*measured, strict=True)))


def _make_part(name: str) -> nn.Module:
    if name in _LEVELS:
        return MapPart("local" if name == "local" else "global", _LEVELS[name])
    return NearestNeighbour() if name == "condensed" else Mahalanobis()


def _vectors(name: str, measured: Measurements) -> Tensor:
    vectors = {
        "condensed": measured.condensed,
        "global-means": measured.global_means,
        "teacher-means": measured.teacher_means,
    }[name]
    assert vectors is not None  # a part whose student is not there is not made
    return vectors


def _module_name(name: str) -> str:
    """Of a part: exported programs are Python, in which "global" is a word of the language."""
    return name.replace("-", "_") + ("_" if keyword.iskeyword(name) else "")


def _centre_and_spread(
    raw: NDArray[np.float64], least: NDArray[np.float64], rounding: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation (parts,) of raw values (n, parts): as a new image's would lie around them.

    The deviation is at least the share `least` of the mean, and what `rounding` makes of the values.
    """
    n = len(raw)
    centre = raw.mean(0)
    deviation = raw.std(0, ddof=1) if n > 1 else np.zeros_like(centre)
    spread = np.maximum(np.maximum(deviation, least * np.abs(centre)) * math.sqrt(1 + 1 / n), rounding)
    return centre, np.where(spread > 0, spread, 1.0)
