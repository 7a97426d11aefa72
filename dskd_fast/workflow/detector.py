"""A trained detector: the networks, the statistics that make their maps comparable, and the decision threshold."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as nnf

from dskd_fast.data.images import resize_square
from dskd_fast.errors import UserError
from dskd_fast.models import DSKD
from dskd_fast.workflow.device import numerics
from dskd_fast.workflow.inputs import Images, check_batch_size, rgb_images

Variant = Literal["combined", "local", "global"]
VARIANTS: tuple[Variant, ...] = ("combined", "local", "global")

THRESHOLD_RULE = (
    "smallest score of a normal validation image such that the expected share of false alarms is at most 1 %, "
    "or the largest score where there are too few images to tell 1 %"
)
_FALSE_ALARM_RATE = 0.01


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
    """The decision threshold: an image is anomalous if its score is above `value`."""

    value: float
    rule: str
    n_images: int
    expected_false_alarm_rate: float

    def __post_init__(self) -> None:
        if not abs(self.value) < _BEYOND_MAPS:
            raise UserError(f"the threshold {self.value} is not a finite number")


@dataclass(frozen=True)
class Calibration:
    """What is learned from normal images after training.

    Attributes:
        statistics: of the "local" and the "global" branch's maps, where there are both.
        source: which images they come from: "validation", or "train" where there are none.
        n_images: how many.
        threshold: None where there are no validation images: training images score too low to set it.
    """

    statistics: dict[str, Statistics]
    source: Literal["validation", "train"]
    n_images: int
    threshold: Threshold | None = None


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
        anomalous: whether the score is above the run's threshold; None without one.
        map: anomaly map (H, W) at the image's own size, float32, in the same unit.
        local_map, global_map: of each student alone; None without that student.
    """

    score: float
    anomalous: bool | None
    map: NDArray[np.float32]
    local_map: NDArray[np.float32] | None
    global_map: NDArray[np.float32] | None


@dataclass
class Detector:
    """DSKD with everything that turns its features into maps, scores and decisions.

    Attributes:
        model: the networks.
        scoring: how maps and scores are made of their features.
        calibration: statistics and threshold; None before `calibrate`.
        bits: of values of more than 8 bits in image files, see `dskd_fast.data.images.read_image`.
    """

    model: DSKD
    scoring: Scoring
    calibration: Calibration | None = None
    bits: int | None = None

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
            TypeError, ValueError: `images` is none of the above, or `batch_size` is no whole number from 1 up.
            ImageError: a file cannot be read.
            UserError: the networks give values that are not finite.
        """
        check_batch_size(batch_size)
        detections: list[Detection] = []
        remaining = rgb_images(images, bits=self.bits)
        while batch := list(itertools.islice(remaining, batch_size)):
            detections += self._predict_batch(batch)
        return detections

    def _predict_batch(self, images: list[NDArray[np.uint8]]) -> list[Detection]:
        size = self.model.image_size
        maps = self.maps(torch.stack([torch.from_numpy(resize_square(x, size)).permute(2, 0, 1) for x in images]))
        threshold = self.calibration.threshold
        detections = []
        for i, (image, score) in enumerate(zip(images, self.image_scores(maps.combined).tolist(), strict=True)):
            located = (
                None if maps.of(variant) is None else self.localisation_map(maps.of(variant)[i], image.shape[:2])
                for variant in VARIANTS
            )
            detections.append(Detection(score, None if threshold is None else score > threshold.value, *located))
        return detections

    def raw_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Each student's map before normalisation, in the order of `model.students`, for uint8 images (B, 3, S, S).

        Raises:
            UserError: they are not finite.
        """
        self.model.eval()
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

    def calibrate(self, batches: Iterable[Tensor], source: Literal["validation", "train"]) -> None:
        """Set the statistics and, from validation images, the threshold.

        Args:
            batches: uint8 RGB images of normal objects, (B, 3, S, S) each; visited once for the statistics and, for
                validation images, once more for the scores.
            source: what they are.
        """
        students = self.model.students
        count, total, squares = 0, np.zeros(len(students)), np.zeros(len(students))
        n_images = 0
        for images in batches:
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
        self.calibration = Calibration(statistics, source, n_images)
        if source == "validation":
            scores = np.concatenate([self.image_scores(self.maps(images).combined) for images in batches])
            self.calibration = Calibration(statistics, source, n_images, threshold_from(scores))

    def _filtered(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        return ndimage.gaussian_filter(maps, sigma=(0, self.scoring.sigma, self.scoring.sigma))


def threshold_from(scores: Iterable[float]) -> Threshold:
    """Threshold from the image scores of normal images that were not trained on.

    A new normal image is equally likely to rank anywhere among n others, so the k-th largest of their scores is
    exceeded with probability k / (n + 1), whatever the distribution (split conformal prediction). That the maps are
    normalised on the same images shifts this a little, and more the fewer they are.
    """
    ranked = np.sort(np.asarray(list(scores), dtype=np.float64))[::-1]
    n = len(ranked)
    k = max(1, math.floor(_FALSE_ALARM_RATE * (n + 1)))
    return Threshold(float(ranked[k - 1]), THRESHOLD_RULE, n, k / (n + 1))


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images to float32 in [0, 1] on `device`, in the memory format that convolutions like."""
    moved = images.to(device, non_blocking=True)
    return moved.float().div_(255).contiguous(memory_format=torch.channels_last)
