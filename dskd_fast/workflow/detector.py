"""A trained detector: the networks, the statistics that make their maps comparable, and the decision threshold."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as nnf

from dskd_fast.data.exposure import MAX_LUMINANCE, measure_exposure
from dskd_fast.data.images import resize_square
from dskd_fast.errors import UserError
from dskd_fast.models import DSKD
from dskd_fast.workflow.device import numerics
from dskd_fast.workflow.inputs import Images, rgb_images

Variant = Literal["combined", "local", "global"]
VARIANTS: tuple[Variant, ...] = ("combined", "local", "global")

TOLERANCE = 1e-3
"""Most that scores and maps of an exported file may differ from `Detector.predict`'s, as a multiple of 1 + |value|.

They are in standard deviations. Float32 rounding in another order is off by about 1e-6 of a feature; a student's
difference from its teacher, on which the maps depend, is some hundred times smaller than the features.
"""

# Once for an exported file, once for all that changes a score within the run (batches, threads, devices): about 1e-5.
_MARGIN = 2 * TOLERANCE
# Most that a value of a map before normalisation changes by rounding, as a share of the map's mean: measured, 2e-6.
_MAP_ROUNDING = 1e-5
# Standard deviations by which rounding may move a score before a warning says that it decides.
_MAX_ROUNDING = 0.1

THRESHOLD_RULE = (
    "smallest score of a normal validation image such that the expected share of false alarms is at most 1 %, "
    "or the largest score where there are too few images to tell 1 %; raised by 0.002 (1 + |score|), and by what "
    "rounding of maps that hardly vary adds, so that rounding cannot lift the image that set it above it"
)
_PERCENT_OF_FALSE_ALARMS = 1

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
    """

    statistics: dict[str, Statistics]
    source: Literal["validation", "train"]
    n_images: int
    threshold: Threshold | None = None
    warnings: list[str] = field(default_factory=list)
    exposure: Exposure | None = None


class Maps(NamedTuple):
    """Anomaly maps of a batch, each (B, S, S), float32, in standard deviations above the normal mean.

    The map of a student that there is not is None; `combined` is then the other's.
    """

    combined: NDArray[np.float32]
    local: NDArray[np.float32] | None
    global_: NDArray[np.float32] | None

    def of(self, variant: Variant) -> NDArray[np.float32] | None:
        return self.global_ if variant == "global" else getattr(self, variant)


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
    """

    score: float
    anomalous: bool | None
    map: NDArray[np.float32]
    local_map: NDArray[np.float32] | None
    global_map: NDArray[np.float32] | None
    suspect: str | None = None


@dataclass
class Detector:
    """DSKD with everything that turns its features into maps, scores and decisions."""

    model: DSKD
    scoring: Scoring
    calibration: Calibration | None = None

    @property
    def device(self) -> torch.device:
        return self.model.teacher.mean.device

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What there are maps of: "combined", and "local" and "global" or the one there is."""
        return ("combined", *self.model.students)

    def predict(self, images: Images, *, batch_size: int = 8) -> list[Detection]:
        """Score images, locate what is wrong with them, and decide.

        Threads may share a detector: the networks run for one of them at a time, reading, resizing and enlarging maps
        for all at once. The batch in which an image is computed changes no more of its score than float32 rounding.

        Args:
            images: a path, an array (H, W, 3) or (B, H, W, 3), a tensor (3, H, W) or (B, 3, H, W) on any device, a
                Pillow image, or an iterable of single ones, which may differ in kind and size. Arrays and tensors are
                RGB, uint8 or floating from 0 to 1 (then rounded to 8 bits). Each side has at least 32 pixels.
            batch_size: images per pass of the networks.

        Returns:
            One entry per image, in order; a list for a single image, too.

        Raises:
            TypeError, ValueError: `images` is none of the above, or `batch_size` is below 1.
            ImageError: a file cannot be read, or has more pixels than `dskd_fast.data.images.pixel_limit` allows.
            UserError: the networks give values that are not finite.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not possible: use a whole number from 1 up")
        detections: list[Detection] = []
        remaining = rgb_images(images)
        # Of the images themselves only one at a time is held.
        while batch := [(self.resized(x), x.shape[:2]) for x in itertools.islice(remaining, batch_size)]:
            detections += self._predict_batch(*zip(*batch, strict=True))
        return detections

    def _predict_batch(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Detection]:
        batch = torch.stack(images)
        maps = self.maps(batch)
        scores = self.image_scores(maps.combined).tolist()
        threshold = self.calibration.threshold
        detections = []
        suspicions = self.suspicions(*measure_exposure(batch))
        for i, (size, score, suspect) in enumerate(zip(sizes, scores, suspicions, strict=True)):
            located = (
                None if maps.of(variant) is None else self.localisation_map(maps.of(variant)[i], size)
                for variant in VARIANTS
            )
            decision = decide(score, None if threshold is None else threshold.value, suspect)
            anomalous = None if decision is None else decision != "normal"
            detections.append(Detection(score, anomalous, *located, suspect))
        return detections

    def suspicions(self, brightness: Tensor, contrast: Tensor) -> list[str | None]:
        """Why images are suspect (see `Detection`), each None if it is not.

        Args:
            brightness, contrast: of the images, (B,) each, as `measure_exposure` gives them for (B, 3, S, S).
        """
        exposure = self.calibration.exposure
        return [None] * len(brightness) if exposure is None else exposure.reasons(brightness, contrast)

    def resized(self, image: NDArray[np.uint8]) -> Tensor:
        """A uint8 RGB image (H, W, 3) as the networks see it, (3, S, S)."""
        return torch.from_numpy(resize_square(image, self.model.image_size)).permute(2, 0, 1)

    def raw_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Each student's map before normalisation, in the order of `model.students`, for uint8 images (B, 3, S, S).

        Raises:
            UserError: they are not finite.
        """
        batch = to_float(images, self.device)
        # Always float32, however the students were trained: a score should not depend on what the machine can round.
        with torch.inference_mode(), numerics("fp32", self.device):
            maps = self.model.anomaly_maps(
                batch,
                self.scoring.temperature,
                local_map=self.scoring.local_map,
                global_map=self.scoring.global_map,
                align_corners=self.scoring.align_corners,
            )
            maps = tuple(m for m in maps if m is not None)
            if not torch.isfinite(torch.stack(maps)).all():
                raise UserError(
                    "the networks give anomaly maps with NaN or infinite values: the weights are damaged, or the "
                    "training diverged, so train again, with a lower --lr if it was raised"
                )
            return maps

    def maps(self, images: Tensor) -> Maps:
        """Normalised maps for uint8 RGB images (B, 3, S, S): each branch's, and their sum (paper eq. 8)."""
        if self.calibration is None:
            raise ValueError("the detector has no calibration yet: call calibrate first")
        normalised = {
            name: (raw.double() - self.calibration.statistics[name].mean) / self.calibration.statistics[name].std
            for name, raw in zip(self.model.students, self.raw_maps(images), strict=True)
        }
        maps = {"combined": sum(normalised.values())} | normalised
        return Maps(*(maps[name].float().cpu().numpy() if name in maps else None for name in VARIANTS))

    def image_scores(self, maps: NDArray[np.float32]) -> NDArray[np.float64]:
        """Image scores (B,) of maps (B, S, S): the maximum after a Gaussian filter."""
        return self._filtered(maps).max(axis=(1, 2)).astype(np.float64)

    def localisation_map(self, anomaly_map: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
        """A map (S, S) at the image's own resolution (height, width), bilinear; filtered if the run says so."""
        if self.scoring.filter_maps:
            anomaly_map = self._filtered(anomaly_map[None])[0]
        source = torch.from_numpy(anomaly_map)[None, None]
        resized = nnf.interpolate(
            source,
            size,
            mode="bilinear",
            align_corners=self.scoring.align_corners,
            # Smaller than the map on a side: average, do not skip.
            antialias=min(size) < min(anomaly_map.shape),
        )
        return resized[0, 0].numpy()

    def calibrate(
        self,
        batches: Iterable[Tensor],
        source: Literal["validation", "train"],
        measured: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Set the statistics, the limits of brightness and contrast and, from validation images, the threshold.

        Args:
            batches: uint8 RGB images of normal objects, (B, 3, S, S) each; visited once for the statistics and, for
                validation images, once more for the scores.
            source: what they are.
            measured: brightness and contrast of all normal images, `measure_exposure`, where there are more than those.

        What makes the result doubtful is in the calibration's `warnings`: maps or scores that do not vary.
        """
        students = self.model.students
        count, total, squares = 0, np.zeros(len(students)), np.zeros(len(students))
        n_images = 0
        of_batches = []
        for images in batches:
            of_batches.append(measure_exposure(images))
            raw = torch.stack(self.raw_maps(images)).double().flatten(1)
            # Sums of deviations from the first batch's mean: squares of the values themselves would cancel.
            if n_images == 0:
                origin = raw.mean(1, keepdim=True)
            deviation = raw - origin
            count += raw.shape[1]
            total += deviation.sum(1).cpu().numpy()
            squares += deviation.square().sum(1).cpu().numpy()
            n_images += len(images)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        mean += origin[:, 0].cpu().numpy()
        # Values that differ by no more than float32 rounding are constant: their noise must not be blown up.
        constant = std <= np.finfo(np.float32).eps * np.abs(mean)
        statistics = {
            name: Statistics(float(mean[i]), 1.0 if constant[i] else float(std[i])) for i, name in enumerate(students)
        }
        rounding = {name: _MAP_ROUNDING * abs(x.mean) / x.std for name, x in statistics.items()}
        warnings = [
            f"the maps of the {name} student are constant over the normal images (mean {mean[i]:.3g}, standard "
            f"deviation {std[i]:.1e}), so that its part of a score is rounding: look at the images, and train longer"
            for i, name in enumerate(students)
            if constant[i] or rounding[name] > _MAX_ROUNDING
        ]
        brightness, contrast = measured or (torch.cat(values) for values in zip(*of_batches, strict=True))
        exposure = exposure_from(brightness, contrast)
        n_suspect = int(torch.stack(list(exposure.beyond(brightness, contrast).values())).any(0).sum())
        if n_suspect:
            warnings.append(
                f"{n_suspect} of {exposure.n_images} normal images {'is' if n_suspect == 1 else 'are'} suspect, since "
                "brightness or contrast is very different from the others': `predict` on their folder says which; take "
                "out what does not belong there, and train again"
            )
        self.calibration = Calibration(statistics, source, n_images, warnings=warnings, exposure=exposure)
        if source == "validation":
            scores = np.concatenate([self.image_scores(self.maps(images).combined) for images in batches])
            total_rounding = sum(rounding.values())
            if np.ptp(scores) <= _margin(scores.max(), total_rounding):
                warnings.append(
                    f"the threshold rests on one score, {scores.max():.4g}, which all validation images have "
                    f"({n_images} in number), so that other good images may well be above it: put more good images, "
                    "and different ones, into validation/good"
                )
            self.calibration = replace(self.calibration, threshold=threshold_from(scores, total_rounding))

    def _filtered(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        return ndimage.gaussian_filter(maps, sigma=(0, self.scoring.sigma, self.scoring.sigma))


def threshold_from(scores: Iterable[float], rounding: float = 0.0) -> Threshold:
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
    """
    ranked = np.sort(np.asarray(list(scores), dtype=np.float64))[::-1]
    n = len(ranked)
    k = max(1, _PERCENT_OF_FALSE_ALARMS * (n + 1) // 100)
    score = float(ranked[k - 1])
    return Threshold(score + _margin(score, rounding), THRESHOLD_RULE, n, k / (n + 1))


def _margin(score: float, rounding: float) -> float:
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


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images to float32 in [0, 1] on `device`, in the memory format that convolutions like."""
    moved = images.to(device, non_blocking=True)
    return moved.float().div_(255).contiguous(memory_format=torch.channels_last)
