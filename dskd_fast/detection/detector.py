"""A trained detector: the networks, the statistics that make their maps comparable, and the decision threshold."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from dskd_fast.choices import FALSE_ALARMS
from dskd_fast.data.exposure import measure_exposure
from dskd_fast.data.images import resize_square
from dskd_fast.detection.calibration import (
    FEW_IMAGES,
    Calibration,
    Scoring,
    Statistics,
    decide,
    exposure_from,
    margin_above,
    threshold_from,
)
from dskd_fast.detection.findings import Detection, Findings, Maps, Variant, map_at_size
from dskd_fast.detection.inputs import Images, OneImage, as_rgb, bytes_to_read, check_batch_size, single_images
from dskd_fast.detection.scoring.calibrated import CalibratedScore, collected
from dskd_fast.detection.scoring.maps import MAP_ROUNDING
from dskd_fast.device import numerics
from dskd_fast.errors import UserError
from dskd_fast.models import DSKD, Measurements
from dskd_fast.models.dskd import added
from dskd_fast.workers import Workers

# Standard deviations by which rounding may move a score before a warning says that it decides.
_MAX_ROUNDING = 0.1
# By how much the batch of an image changes its score in bf16, as a share of 1 + |score|: at most 0.01 was measured.
_BF16_ROUNDING = 0.02


@dataclass
class Detector:
    """DSKD with everything that turns its features into maps, scores and decisions.

    Attributes:
        model: the networks. Those of a run that scores in bf16 have weights in bf16, and outside of this class run only
            under `dskd_fast.device.numerics("bf16", detector.device)`.
        scoring: how maps and scores are made of their features.
        calibration: statistics and threshold; None before `calibrate`.
        bits: of values of more than 8 bits in image files, see `dskd_fast.data.images.read_image`.
        calibrated: what makes scores of the students' measurements; None for the paper's scoring.
        precision: in which the networks run, whatever they were trained in: a calibration holds for the one in which it
            was made.

    Example:
        >>> from dskd_fast.detection.calibration import Scoring
        >>> networks = DSKD("lite", image_size=64, pretrained=False)
        >>> detector = Detector(networks, Scoring(temperature=1.0, sigma=1.0))
        >>> detector.calibrate([torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)], "validation")
        >>> black = np.zeros((480, 640, 3), np.uint8)
        >>> (found,) = detector.predict(black)
        >>> found.map.shape, found.suspect.split(" (")[0]
        ((480, 640), 'too dark and too little contrast')
    """

    model: DSKD
    scoring: Scoring
    calibration: Calibration | None = None
    bits: int | None = None
    calibrated: CalibratedScore | None = None
    precision: str = "fp32"

    @property
    def device(self) -> torch.device:
        return self.model.teacher.mean.device

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What there are maps of: "combined", and "local" and "global" or the one there is."""
        return ("combined", *self.model.students)

    @property
    def parts(self) -> tuple[str, ...]:
        """What scores are made of."""
        return self.model.students if self.calibrated is None else self.calibrated.names

    def predict(self, images: Images, *, batch_size: int = 8) -> list[Detection]:
        """Score images, locate what is wrong with them, and decide.

        Threads may share a detector: the networks run for one of them at a time, reading, resizing and enlarging maps
        for all at once. The batch in which an image is computed changes no more of its score than rounding.

        Args:
            images: a path, an array (H, W, 3) or (B, H, W, 3), a tensor (3, H, W) or (B, 3, H, W) on any device, a
                Pillow image, or an iterable of single ones, which may differ in kind and size. Arrays and tensors are
                RGB, uint8 or floating from 0 to 1 (then rounded to 8 bits). Each side has at least 32 pixels.
            batch_size: images per pass of the networks.

        Returns:
            One entry per image, in order; a list for a single image, too.

        Raises:
            TypeError, ValueError: `images` is none of the above, or `batch_size` is no whole number from 1 up.
            ImageError: a file cannot be read, or has more pixels than `dskd_fast.data.images.pixel_limit` allows.
            UserError: the networks give values that are not finite.
        """
        check_batch_size(batch_size)
        detections: list[Detection] = []

        def prepare(named: tuple[str, OneImage]) -> tuple[Tensor, tuple[int, int]]:
            pixels = as_rgb(named[1], named[0], bits=self.bits)
            return self.resized(pixels), pixels.shape[:2]

        with Workers() as workers:
            # Files are read ahead, and of their pixels no more than a bound is held.
            prepared = workers.ahead(single_images(images), prepare, lambda named: bytes_to_read(named[1]))
            while batch := list(itertools.islice(prepared, batch_size)):
                detections += self._predict_batch(*zip(*batch, strict=True))
        return detections

    def _predict_batch(self, images: tuple[Tensor, ...], sizes: Sequence[tuple[int, int]]) -> list[Detection]:
        batch = torch.stack(images)
        found = self.find(batch)
        threshold = calibration_of(self).threshold
        detections = []
        suspicions = self.suspicions(*measure_exposure(batch))
        for i, (size, suspect) in enumerate(zip(sizes, suspicions, strict=True)):
            located = {variant: self.localisation_map(maps[i], size) for variant, maps in found.maps.existing.items()}
            score = float(found.scores["combined"][i])
            decision = decide(score, None if threshold is None else threshold.value, suspect)
            detections.append(
                Detection(
                    score,
                    None if decision is None else decision != "normal",
                    located["combined"],
                    located.get("local"),
                    located.get("global"),
                    suspect,
                    {name: float(values[i]) for name, values in found.parts.items()},
                    found.decided_by[i],
                )
            )
        return detections

    def find(self, images: Tensor) -> Findings:
        """Maps, scores and what they are made of, for uint8 RGB images (B, 3, S, S)."""
        if self.calibrated is None:
            maps = self.maps(images)
            scores = {variant: self.image_scores(found) for variant, found in maps.existing.items()}
            return Findings(maps, scores, {name: scores[name] for name in self.model.students}, [None] * len(images))
        calibration_of(self)
        with torch.inference_mode(), numerics("fp32", self.device):
            scored = self.calibrated(self.measured(images))
            combined = self.calibrated.combined(scored)
            arrays = {name: self.calibrated.shown(scored.maps[name]).cpu().numpy() for name in self.model.students}
        values = scored.values.double().cpu().numpy()
        parts: dict[str, NDArray[np.float64]] = dict(zip(self.parts, values.T, strict=True))
        of_students: dict[Variant, NDArray[np.float64]] = {name: parts[name] for name in self.model.students}
        of_all: dict[Variant, NDArray[np.float64]] = {"combined": scored.score.double().cpu().numpy()}
        return Findings(
            Maps(combined.cpu().numpy(), arrays.get("local"), arrays.get("global")),
            of_all | of_students,
            parts,
            list(self.calibrated.deciding(values)),
        )

    def measured(self, images: Tensor) -> Measurements:
        """What uint8 images (B, 3, S, S) are scored by.

        Raises:
            UserError: it is not finite.
        """
        with torch.inference_mode(), numerics(self.precision, self.device):
            measured = self.model.measure(
                to_float(images, self.device),
                self.scoring.temperature,
                local_map=self.scoring.local_map,
                global_map=self.scoring.global_map,
                counts_beyond=self.calibrated is not None and self.calibrated.counts_beyond,
            )
            maps = [x for levels in (measured.local_levels, measured.global_levels) for x in levels or ()]
            if not all(torch.isfinite(x).all() for x in maps):
                raise _not_finite()
        return measured

    def suspicions(self, brightness: Tensor, contrast: Tensor) -> list[str | None]:
        """Why images are suspect (see `Detection`), each None if it is not.

        Args:
            brightness, contrast: of the images, (B,) each, as `measure_exposure` gives them for (B, 3, S, S).
        """
        exposure = calibration_of(self).exposure
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
        with torch.inference_mode(), numerics(self.precision, self.device):
            of_branches = self.model.anomaly_maps(
                batch,
                self.scoring.temperature,
                local_map=self.scoring.local_map,
                global_map=self.scoring.global_map,
                align_corners=self.scoring.align_corners,
            )
            maps = tuple(m for m in of_branches if m is not None)
            if not torch.isfinite(torch.stack(maps)).all():
                raise _not_finite()
            return maps

    def maps(self, images: Tensor) -> Maps:
        """The paper's maps for uint8 RGB images (B, 3, S, S): each branch's, and their sum (eq. 8)."""
        statistics = calibration_of(self).statistics
        normalised = {
            name: (raw.double() - statistics[name].mean) / statistics[name].std
            for name, raw in zip(self.model.students, self.raw_maps(images), strict=True)
        }
        combined = sum(normalised.values(), torch.zeros((), dtype=torch.float64))
        found = {name: x.float().cpu().numpy() for name, x in normalised.items()}
        return Maps(combined.float().cpu().numpy(), found.get("local"), found.get("global"))

    def image_scores(self, maps: NDArray[np.float32]) -> NDArray[np.float64]:
        """The paper's image scores (B,) of maps (B, S, S): the maximum after a Gaussian filter."""
        return self._filtered(maps).max(axis=(1, 2)).astype(np.float64)

    def localisation_map(self, anomaly_map: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
        """A map (S, S) at the image's own resolution (height, width), bilinear; filtered if the run says so.

        Calibrated maps have been filtered already.
        """
        if self.scoring.filter_maps and self.calibrated is None:
            anomaly_map = self._filtered(anomaly_map[None])[0]
        return map_at_size(anomaly_map, size, self.scoring.align_corners)

    def calibrate(
        self,
        batches: Iterable[Tensor],
        source: Literal["validation", "train"],
        exposures: tuple[Tensor, Tensor] | None = None,
        *,
        training: Iterable[Tensor] = (),
        are_new: bool = False,
        false_alarms: float = FALSE_ALARMS,
    ) -> None:
        """Set the statistics, the limits of brightness and contrast and, from validation images, the threshold.

        Args:
            batches: uint8 RGB images of normal objects, (B, 3, S, S) each; visited once for the statistics, and once
                more with the paper's scoring of validation images and with calibrated scores of training images.
            source: what they are.
            exposures: brightness and contrast of all normal images, `measure_exposure`, where there are more than
                those.
            training: the training images likewise, from which distances are measured; only calibrated scores need
                them. Empty where `batches` are training images.
            are_new: whether the images look different from the training images, which are known from before.
            false_alarms: see `threshold_from`.

        What makes the result doubtful is in the calibration's `warnings`: maps or scores that do not vary.
        """
        students = self.model.students
        count, total, squares = 0, np.zeros(len(students)), np.zeros(len(students))
        n_images = 0
        of_batches = []
        measured: list[Measurements] = []
        if self.calibrated is not None and not are_new:
            self.calibrated.fit(self.measured(images) for images in (batches if source == "train" else training))
            self.calibrated.to(self.device)
        for images in batches:
            if exposures is None:
                of_batches.append(measure_exposure(images))
            if self.calibrated is None:
                raw_maps = self.raw_maps(images)
            else:
                of_batch = self.measured(images)
                size, align_corners = images.shape[-2:], self.scoring.align_corners
                of_students = (added(x, size, align_corners) for x in (of_batch.local_levels, of_batch.global_levels))
                raw_maps = tuple(x for x in of_students if x is not None)
                with torch.inference_mode(), numerics("fp32", self.device):  # as `find` does
                    measured.append(self.calibrated.reduced(of_batch, n_images if source == "train" else None))
            raw = torch.stack(raw_maps).double().flatten(1)
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
        statistics: dict[str, Statistics] = {
            name: Statistics(float(mean[i]), 1.0 if constant[i] else float(std[i])) for i, name in enumerate(students)
        }
        rounding = {name: MAP_ROUNDING * abs(x.mean) / x.std for name, x in statistics.items()}
        warnings = [
            f"the maps of the {name} student are constant over the normal images (mean {mean[i]:.3g}, standard "
            f"deviation {std[i]:.1e}), so that its part of a score is rounding: look at the images, and train longer"
            for i, name in enumerate(students)
            if constant[i] or rounding[name] > _MAX_ROUNDING
        ]
        brightness, contrast = exposures or (torch.cat(values) for values in zip(*of_batches, strict=True))
        exposure = exposure_from(brightness, contrast)
        n_suspect = int(torch.stack(list(exposure.beyond(brightness, contrast).values())).any(0).sum())
        if n_suspect:
            warnings.append(
                f"{n_suspect} of {exposure.n_images} normal images {'is' if n_suspect == 1 else 'are'} suspect, since "
                "brightness or contrast is very different from the others': `predict` on their folder says which; take "
                f"out what does not belong there, and {'recalibrate' if are_new else 'train again'}"
            )
        self.calibration = Calibration(
            statistics,
            source,
            n_images,
            warnings=warnings,
            exposure=exposure,
            precision=self.precision,
            by_other_images=are_new,
        )
        if self.calibrated is not None:
            self.calibrated.cpu()
            scores = self.calibrated.calibrate(collected(measured), "new" if are_new else source)
            self.calibrated.to(self.device)
            total_rounding = self.calibrated.rounding()
        elif source == "validation":
            scores = np.concatenate([self.image_scores(self.maps(images).combined) for images in batches])
            total_rounding = sum(rounding.values())
        if source == "validation":
            if self.precision == "bf16":
                total_rounding += _BF16_ROUNDING * (1 + float(np.abs(scores).max()))
            if np.ptp(scores) <= margin_above(scores.max(), total_rounding):
                more = "put more good images, and different ones, into validation/good"
                if are_new:
                    more = "recalibrate with more good images, and different ones"
                warnings.append(
                    f"the threshold rests on one score, {scores.max():.4g}, which all validation images have "
                    f"({n_images} in number), so that other good images may well be above it: {more}"
                )
            threshold = threshold_from(
                scores, total_rounding, false_alarms=false_alarms, are_left_out=self.calibrated is not None
            )
            if self.calibrated is not None and n_images < FEW_IMAGES:
                rate = threshold.expected_false_alarm_rate
                warnings.append(
                    f"only {n_images} validation images set the threshold: expect {rate:.0%} "
                    "of good images to be called anomalous, and more where they differ more from each other than these"
                )
            self.calibration = replace(self.calibration, threshold=threshold)

    def _filtered(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        return ndimage.gaussian_filter(maps, sigma=(0, self.scoring.sigma, self.scoring.sigma))


def _not_finite() -> UserError:
    return UserError(
        "the networks give anomaly maps with NaN or infinite values: the weights are damaged, or the training "
        "diverged, so train again, with a lower --lr if it was raised"
    )


def calibration_of(detector: Detector) -> Calibration:
    """The calibration of a detector that must have one.

    Raises:
        ValueError: it has none.
    """
    if detector.calibration is None:
        raise ValueError("the detector has no calibration yet: call calibrate first")
    return detector.calibration


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images to float32 in [0, 1] on `device`, in the memory format that convolutions like."""
    moved = images.to(device, non_blocking=True)
    return moved.float().div_(255).contiguous(memory_format=torch.channels_last)
