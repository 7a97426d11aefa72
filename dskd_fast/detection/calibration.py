"""What normal images decide: statistics, the threshold and the range of exposures, and the one rule of decisions."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dskd_fast.choices import FALSE_ALARMS, SCORING_PRECISIONS
from dskd_fast.data.exposure import MAX_LUMINANCE
from dskd_fast.errors import UserError

TOLERANCE = 1e-3
"""Most that scores and maps of an exported file may differ from `Detector.predict`'s, as a multiple of 1 + |value|.

They are in standard deviations. Float32 rounding in another order is off by about 1e-6 of a feature; a student's
difference from its teacher, on which the maps depend, is some hundred times smaller than the features.
"""

# Once for an exported file, once for all that changes a score within the run (batches, threads, devices): about 1e-5.
_MARGIN = 2 * TOLERANCE

THRESHOLD_RULE = (
    "smallest score of a normal validation image such that the expected share of false alarms is at most {0} %, "
    "or the largest score where there are too few images to tell that; raised by 0.002 (1 + |score|), and by what "
    "rounding of maps that hardly vary adds, so that rounding cannot lift the image that set it above it"
)

LEFT_OUT_RULE = (
    "; each image was left out of the statistics by which it is scored, as a new one is, and the threshold lies as "
    "much higher as 1.4 times as many images would be expected to raise it, since validation images are alike"
)

# With fewer validation images the threshold is doubtful.
FEW_IMAGES = 16

EXPOSURE_RULE = (
    "half way from the darkest normal image to black, from the brightest to white, from the one with least contrast to "
    "none, and from the one with most to the greatest possible; one in 100 normal images, and at least one, may lie "
    "beyond the limits that the others set, and does not count"
)


@dataclass(frozen=True)
class Scoring:
    """How maps and image scores are made of features: what the paper leaves open, recorded with each run.

    Attributes:
        temperature: T of the contextual affinity.
        sigma: standard deviation, in pixels of the image as the network sees it, of the Gaussian filter before the
            maximum that is the image score.
        filter_maps: whether the localisation map is filtered, too.
        align_corners: of the bilinear upsampling.
        local_map, global_map: see `DSKD.anomaly_maps`: what each student was trained to make small.
    """

    temperature: float
    sigma: float
    filter_maps: bool = False
    align_corners: bool = False
    local_map: str = "cosine"
    global_map: str = "contextual-affinity"


# No map and no score comes near; larger ones would not be finite in float32.
_BEYOND_MAPS = 1e30


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation over all pixels of all normal images (paper eq. 8)."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (abs(self.mean) < _BEYOND_MAPS and 1 / _BEYOND_MAPS < self.std < _BEYOND_MAPS):
            raise UserError(f"mean {self.mean} and standard deviation {self.std} cannot normalise a map")


@dataclass(frozen=True)
class Threshold:
    """The decision threshold: an image is anomalous if its score is above `value` (`is_above`).

    `value` includes the margin above the validation score that set it, if `rule` says so: runs from before that keep
    the value they have.
    """

    value: float
    rule: str
    n_images: int
    expected_false_alarm_rate: float

    def __post_init__(self) -> None:
        if not abs(self.value) < _BEYOND_MAPS:
            raise UserError(f"the threshold {self.value} is not a finite number")


@dataclass(frozen=True)
class Exposure:
    """The brightness and contrast that an image must have for the networks' score to mean anything.

    A frame without features is easy to mimic, so both students find it normal: such an image is suspect instead.

    Attributes:
        brightness: lowest and highest mean of an image's luminance, from 0 to 255.
        contrast: lowest and highest standard deviation of it, from 0 to 127.5.
        rule: how they come from the normal images.
        n_images: the number of those.
    """

    brightness: tuple[float, float]
    contrast: tuple[float, float]
    rule: str
    n_images: int

    def __post_init__(self) -> None:
        for name, most in (("brightness", MAX_LUMINANCE), ("contrast", MAX_LUMINANCE / 2)):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= most:
                raise UserError(f"the limits {low} and {high} of the {name} are not in order from 0 to {most}")
            object.__setattr__(self, name, (low, high))  # JSON has lists

    def beyond(self, brightness: Tensor, contrast: Tensor) -> dict[str, Tensor]:
        """Which images are "too dark", "too bright", of "too little contrast" or "too much contrast", (B,), bool.

        Args:
            brightness, contrast: of images, (B,) each, as `measure_exposure` gives them.
        """
        return {
            "too dark": brightness < self.brightness[0],
            "too bright": brightness > self.brightness[1],
            "too little contrast": contrast < self.contrast[0],
            "too much contrast": contrast > self.contrast[1],
        }

    def reasons(self, brightness: Tensor, contrast: Tensor) -> list[str | None]:
        """Why each of the images, given as to `beyond`, is suspect; None for one that is not."""
        beyond = {name: flags.tolist() for name, flags in self.beyond(brightness, contrast).items()}
        limits = (
            f"normal images allow brightness {self.brightness[0]:.1f} to {self.brightness[1]:.1f}, contrast "
            f"{self.contrast[0]:.1f} to {self.contrast[1]:.1f}"
        )
        reasons = []
        for i, measured in enumerate(zip(brightness.tolist(), contrast.tolist(), strict=True)):
            names = [name for name, flags in beyond.items() if flags[i]]
            figures = "brightness {:.1f}, contrast {:.1f}".format(*measured)
            reasons.append(f"{' and '.join(names)} ({figures}; {limits})" if names else None)
        return reasons


@dataclass(frozen=True)
class Calibration:
    """What is learned from normal images after training.

    Attributes:
        statistics: of the "local" and the "global" branch's maps, where there are both.
        source: which images they come from: "validation", or "train" where there are none.
        n_images: how many.
        threshold: None where there are no validation images: training images score too low to set it.
        warnings: what makes the statistics or the threshold doubtful, a sentence each.
        exposure: None in runs from before there was this check, whose images are then never suspect.
        chosen_parts: those that alone decide, chosen by known bad images; None where nothing was.
        precision: in which the networks ran, and run for every image that is compared with this: one of
            `SCORING_PRECISIONS`.
        by_other_images: whether the images are others than the training was given, as of another lamp.
    """

    statistics: dict[str, Statistics]
    source: Literal["validation", "train"]
    n_images: int
    threshold: Threshold | None = None
    warnings: list[str] = field(default_factory=list)
    exposure: Exposure | None = None
    chosen_parts: list[str] | None = None
    precision: str = "fp32"
    by_other_images: bool = False

    def __post_init__(self) -> None:
        if self.precision not in SCORING_PRECISIONS:
            raise UserError(f"the precision {self.precision!r} is none of {', '.join(SCORING_PRECISIONS)}")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], students: Iterable[str]) -> "Calibration":
        """What `dataclasses.asdict` gave, statistics of these students alone.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, UserError: it is something else.
        """
        threshold, exposure = content["threshold"], content.get("exposure")
        return cls(
            **{
                **content,
                "statistics": {name: Statistics(**content["statistics"][name]) for name in students},
                "threshold": None if threshold is None else Threshold(**threshold),
                "exposure": None if exposure is None else Exposure(**exposure),
            }
        )


def threshold_from(
    scores: Iterable[float], rounding: float = 0.0, *, false_alarms: float = FALSE_ALARMS, are_left_out: bool = False
) -> Threshold:
    """Threshold from the image scores of normal images that were not trained on.

    A new normal image is equally likely to rank anywhere among n others, so the k-th largest of their scores is
    exceeded with probability at most k / (n + 1), whatever the distribution (split conformal prediction); equal scores
    and a margin only lower it. That the maps are normalised on the same images shifts this a little, and more the fewer
    they are.

    The value lies 0.002 (1 + |score|) + `rounding` above that score: the same image in another batch, on another device
    or in an exported file is not above it.

    Args:
        scores: in standard deviations.
        rounding: what rounding of the maps may add to a score where they hardly vary.
        false_alarms: the expected share of them that is allowed; of n images the largest score stands for 1 / (n + 1).
        are_left_out: whether each image was scored by statistics of the others. These are calibrated scores, whose
            threshold lies a little higher (`LEFT_OUT_RULE`).
    """
    ranked = np.sort(np.asarray(list(scores), dtype=np.float64))[::-1]
    n = len(ranked)
    k = max(1, math.floor(false_alarms * (n + 1) * (1 + 1e-12)))
    score = float(ranked[k - 1])
    value = score + margin_above(score, rounding)
    if are_left_out:
        # In an exponential tail the largest of n lies about ln n units above the median: sqrt(2) n images add this.
        value += max(0.0, score - float(np.median(ranked))) * math.log(2) / 2 / math.log(n + 1)
    rule = THRESHOLD_RULE.format(f"{100 * false_alarms:g}") + (LEFT_OUT_RULE if are_left_out else "")
    return Threshold(value, rule, n, k / (n + 1))


def margin_above(score: float, rounding: float) -> float:
    """By how much a threshold lies above the score that sets it: see `threshold_from`."""
    return _MARGIN * (1 + abs(score)) + rounding


def is_above(score: float | NDArray[np.floating] | Tensor, threshold: float) -> Any:
    """Whether scores are above a threshold, which makes images anomalous; a tie is normal.

    Everything that decides calls this: run, figures, report and exported file.

    Args:
        score: a number, array or tensor, compared in float64: float32 would round the threshold.
        threshold: `Threshold.value`, or the user's.

    Returns:
        NumPy's or PyTorch's booleans, of the shape of `score`.
    """
    return (score.double() if isinstance(score, Tensor) else np.asarray(score, np.float64)) > threshold


def decide(score: float, threshold: float | None, suspect: str | None = None) -> str | None:
    """ "suspect" if there is a reason for that, else "anomalous" above the threshold, "normal", or None without one."""
    if suspect is not None:
        return "suspect"
    if threshold is None:
        return None
    return "anomalous" if is_above(score, threshold) else "normal"


def exposure_from(brightness: Tensor, contrast: Tensor) -> Exposure:
    """The limits that normal images set: `EXPOSURE_RULE`.

    Args:
        brightness, contrast: of the images, (B,) each, as `measure_exposure` gives them.
    """
    n = len(brightness)
    # One black frame among the training images must not switch the check off; a minority that is less rare belongs.
    n_outliers = min(max(1, n // 100), (n - 1) // 2)

    def lower_limit(values: Tensor) -> float:
        half_way = values.sort().values[n_outliers] / 2
        return float(values[values >= half_way].min() / 2)

    def limits(values: Tensor, most: float) -> tuple[float, float]:
        values = values.clamp(max=most)  # but for rounding it is there
        return lower_limit(values), most - lower_limit(most - values)

    return Exposure(limits(brightness, MAX_LUMINANCE), limits(contrast, MAX_LUMINANCE / 2), EXPOSURE_RULE, n)
