"""Parts -> calibration -> one score and one map."""

import keyword
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from dskd_fast.detection.scoring.arrangement import ArrangementPart, ImageSample
from dskd_fast.detection.scoring.distances import Mahalanobis, NearestNeighbour
from dskd_fast.detection.scoring.maps import MapPart, SumPart
from dskd_fast.detection.scoring.parts import LEVELS, PARTS, SHARPNESS, Kind, handicaps, soft_maximum
from dskd_fast.detection.scoring.patches import PatchPart, PatchSample
from dskd_fast.detection.scoring.whitening import ErrorCovariances, WhitenedPart
from dskd_fast.models import DSKD, Measurements

# Of the filter for maps that are looked at, as a multiple of the score's.
_MAP_SIGMA = 3.0

# Deviations by which the value of a part that is not used is lowered.
_FAR_BELOW = 1e6

# Where the local student's error at its coarsest level is so many times as large on validation images as on those that
# it was trained on, it begins to know, and knows, these by heart: with 200 training images it is 1.3, with 30 2.4.
_BEGINS_BY_HEART, _BY_HEART = 1.5, 2.5

# Where validation images are farther from the training images than these are from each other, other images are farther
# still: all that depends on it has changed where the teacher's mean features are farther by this share.
_FARTHER = 0.1

# With fewer training images a fifth of them changes too much of what the distances are measured from.
_ENOUGH_TO_TELL = 20


class Scored(NamedTuple):
    """A batch's calibrated scores.

    Attributes:
        score: (B,).
        values: (B, parts), the calibrated values of the parts there are, in the order of `CalibratedScore.names`.
        maps: of the parts that have one, (B, S, S), in the unit of their values, not filtered.
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
        handicap, map_handicap: (parts,), the logarithms of the weights in a score, which values and maps contain, and
            of those by which `combined` weighs the maps.
    """

    left_out: NDArray[np.float64]

    training_error: Tensor
    centre: Tensor
    spread: Tensor
    is_used: Tensor
    handicap: Tensor
    map_handicap: Tensor
    filter: Tensor
    map_filter: Tensor

    def __init__(self, model: DSKD, sigma: float) -> None:
        super().__init__()
        self.size = model.image_size
        has = {
            "local": "local" in model.students,
            "local-whitened": "local" in model.students,
            "global": "global" in model.students,
            "condensed": "global" in model.students and model.gccb > 0,
            "global-means": "global" in model.students,
            "sum": "local" in model.students and "global" in model.students,
            "patches": True,
            "arrangement": True,
            "teacher-means": True,
        }
        self._all_names = tuple(name for name in PARTS if has[name])
        self._begin()
        self.register_buffer("training_error", torch.zeros(()))
        for name, deviation in (("filter", sigma), ("map_filter", _MAP_SIGMA * sigma)):
            self.register_buffer(name, filter_matrix(self.size, deviation).float(), persistent=False)

    def _begin(self) -> None:
        """Have all parts, none of which knows anything."""
        self.names = self._all_names
        self._among_training = 0.0  # mean distance of training images' teacher-means from each other's
        self.parts = nn.ModuleDict({_module_name(name): _make_part(name) for name in self.names})
        for name, handicap in zip(("handicap", "map_handicap"), handicaps(self.names, 0.0, 0.0), strict=True):
            self.register_buffer(name, handicap)
        self.register_buffer("centre", torch.zeros(len(self.names)))
        self.register_buffer("spread", torch.ones(len(self.names)))
        self.register_buffer("is_used", torch.ones(len(self.names)))

    def forward(self, measured: Measurements) -> Scored:
        measured = self.reduced(measured)
        maps: dict[str, Tensor] = {}
        values = []
        for i, name in enumerate(self.names):
            if PARTS[name].has_map:
                found = self._part(name)(_maps(name, measured), self.size)
                found = (found - self.centre[i]) / self.spread[i] + self.handicap[i]
                values.append(_filtered(found, self.filter).amax((1, 2)))
                maps[name] = found
            else:
                distance = self._part(name)(_vectors(name, measured))
                values.append((distance - self.centre[i]) / self.spread[i] + self.handicap[i])
        stacked = torch.stack(values, 1)
        return Scored(soft_maximum(stacked - self._unused()), stacked, maps)

    @property
    def counts_beyond(self) -> bool:
        """How patches are to be measured for this, see `DSKD.measure`."""
        return bool(self._part("patches").counts_beyond)

    def reduced(self, measured: Measurements, training_image: int | None = None) -> Measurements:
        """The same with distances (B, h, w) in place of vectors, which are many; see `PatchPart.distances`."""

        def distances(name: str, *found: Any) -> Any:
            return self._part(name).distances(*found) if name in self.names else None

        return measured._replace(
            patches=distances("patches", measured.patches, training_image),
            arrangement=distances("arrangement", measured.patches, training_image),
            local_errors=distances("local-whitened", measured.local_errors),
        )

    def combined(self, scored: Scored) -> Tensor:
        """The maps of parts that decide, if any of these has one, by what their values weigh in a map: (B, S, S)."""
        places = [self.names.index(name) for name in scored.maps]
        lowered = self._unused()[places]
        raised = (self.map_handicap - self.handicap)[places]
        shares = torch.softmax(SHARPNESS * (scored.values[:, places] + raised - (lowered - lowered.amin(0))), 1)
        return self.shown((torch.stack(list(scored.maps.values()), 1) * shares[:, :, None, None]).sum(1))

    def shown(self, maps: Tensor) -> Tensor:
        """Maps (B, S, S) filtered to be looked at."""
        return _filtered(maps, self.map_filter)

    def fit(self, training: Iterable[Measurements]) -> None:
        """Learn what training images are like; of the batches each is taken once."""
        # Before the first batch is measured: what is learned anew is as in new runs, whatever version the run is of.
        self._begin()
        samples: dict[str, Any] = {"patches": PatchSample(), "arrangement": ImageSample()}
        if "local-whitened" in self.names:
            samples["local-whitened"] = ErrorCovariances()
        batches = []
        for measured in training:
            for name, sample in samples.items():
                sample.add(measured.local_errors if name == "local-whitened" else measured.patches)
            batches.append(measured._replace(patches=torch.empty(0), local_errors=None))
        of_all = collected(batches)
        for name in self.names:
            if name in samples:
                self._part(name).fit(samples[name])
            elif not PARTS[name].has_map:
                self._part(name).fit(_vectors(name, of_all))
        if len(of_all.teacher_means) >= _ENOUGH_TO_TELL:
            self._among_training = float(self._part("teacher-means").of_training(of_all.teacher_means).mean())
        if of_all.local_levels is not None:
            self.training_error.copy_(of_all.local_levels[-1].mean())

    def calibrate(
        self, normal: Measurements, kind: Literal["validation", "train", "new"] = "validation"
    ) -> NDArray[np.float64]:
        """Take statistics, centre and spread from normal images.

        Args:
            normal: of n images, `reduced`.
            kind: "train" for those of `fit`, since there are no others; they then stand in for new ones, a fold at a
                time. "new": they look different from the training images, and so do all from now on: distances are
                measured from them, too. With both, nothing tells how far other images will be, and all least deviations
                are the large ones.

        Returns:
            The scores (n,) that these images have where each is left out of what it is compared with: as new images.
        """
        columns = []
        for name in self.names:
            part = self._part(name)
            if PARTS[name].has_map:
                calibrated = part if name == "patches" else part.calibrate
                maps = calibrated(_maps(name, normal), self.size)
                columns.append(_filtered(maps, self.filter.cpu()).amax((1, 2)))
            else:
                vectors = _vectors(name, normal)
                distances = {"validation": part, "train": part.of_training, "new": part.add}[kind]
                columns.append(distances(vectors))
        raw = torch.stack([column.double().cpu() for column in columns], 1).numpy()
        farther = self._farther(raw, kind)
        if kind != "new":
            by_heart = 1.0 if kind == "train" else self._share_by_heart(normal)  # so few images that none were held out
            weights = handicaps(self.names, by_heart, farther)
            for own, handicap in zip((self.handicap, self.map_handicap), weights, strict=True):
                own.copy_(handicap)
        else:
            may_fall = torch.tensor([PARTS[name].weight_if_farther is not None for name in self.names])
            for own, handicap in zip((self.handicap, self.map_handicap), handicaps(self.names, 0, 1), strict=True):
                own.copy_(torch.where(may_fall, torch.minimum(own, handicap), own))
        least = [_least_spread(PARTS[name], farther) for name in self.names]
        rounding = [self._part(name).rounding() if PARTS[name].has_map else 0.0 for name in self.names]
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
            self._part(name).rounding() / float(self.spread[i]) for i, name in enumerate(self.names) if name in LEVELS
        )

    def _farther(self, raw: NDArray[np.float64], kind: str) -> float:
        """How much farther validation images are from training images than these from each other, from 0 to 1.

        The teacher has not learned these, so that its mean features tell; 1 if nothing tells.

        Args:
            raw: the parts' values (n, parts) of validation images.
            kind: as of `calibrate`.
        """
        if kind != "validation" or not self._among_training > 0:
            return 1.0
        ratio = raw[:, self.names.index("teacher-means")].mean() / self._among_training
        return min(1.0, max(0.0, (ratio - 1) / _FARTHER)) if math.isfinite(ratio) else 1.0

    def _share_by_heart(self, normal: Measurements) -> float:
        """How much the students know the training images by heart, from 0 to 1."""
        if normal.local_levels is None or not self.training_error > 0:
            return 0.0
        ratio = float(normal.local_levels[-1].mean() / self.training_error)
        return min(1.0, max(0.0, (ratio - _BEGINS_BY_HEART) / (_BY_HEART - _BEGINS_BY_HEART)))

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
        """Take over what `state_dict` gave, in this version or an earlier one, whatever the number of training images.

        Raises:
            ValueError: it is another run's.
        """
        try:
            self.load_state_dict(tensors)
        except RuntimeError:  # names are missing, or too many; sizes follow the state
            raise ValueError("it holds other parts than this run has") from None

    def _match(self, state: dict[str, Any], prefix: str) -> None:
        """Have the parts that a state has, and complete it where it is of an earlier version.

        Then weights of maps were those of scores, errors were not whitened, and there was no arrangement.
        """
        if (handicap := state.get(prefix + "handicap")) is not None:
            state.setdefault(prefix + "map_handicap", handicap.clone())
        PatchPart.complete(state, f"{prefix}parts.{_module_name('patches')}.")
        self._begin()
        for name in ("local-whitened", "arrangement"):
            if name in self.names and f"{prefix}parts.{_module_name(name)}.mean0" not in state:
                del self.parts[_module_name(name)]
                self.names = tuple(x for x in self.names if x != name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._match(state_dict, prefix)
        # Sizes follow the number of training images, and tensors of inference mode cannot be written to.
        for name in self.state_dict():
            if (found := state_dict.get(prefix + name)) is not None:
                path, _, own = name.rpartition(".")
                setattr(self.get_submodule(path), own, torch.empty_like(found, device=self.filter.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def filter_matrix(size: int, sigma: float) -> Tensor:
    """The Gaussian filter along one side of maps, (size, size), float64: as it is linear, what unit vectors become."""
    return torch.from_numpy(ndimage.gaussian_filter1d(np.eye(size), sigma, axis=0))


def _filtered(maps: Tensor, matrix: Tensor) -> Tensor:
    return matrix @ maps @ matrix.mT


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
    if name == "sum":
        return SumPart(LEVELS[name])
    if name == "local-whitened":
        return WhitenedPart(LEVELS[name])
    if name == "arrangement":
        return ArrangementPart()
    if name in LEVELS:
        return MapPart(LEVELS[name])
    if name == "patches":
        return PatchPart()
    return NearestNeighbour() if name == "condensed" else Mahalanobis()


def _maps(name: str, measured: Measurements) -> Any:
    """What the map of a part is made of."""
    return {
        "local": measured.local_levels,
        "local-whitened": measured.local_errors,
        "global": measured.global_levels,
        "sum": (measured.local_levels, measured.global_levels),
        "patches": measured.patches,
        "arrangement": measured.arrangement,
    }[name]


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


def _least_spread(kind: Kind, farther: float) -> float:
    """As a share of a part's normal value."""
    if kind.least_if_alike is None:
        return kind.least_spread
    return (1 - farther) * kind.least_if_alike + farther * kind.least_spread


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
