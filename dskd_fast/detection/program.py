"""What `Detector.predict` does with images in memory as one module of plain operations, to be exported.

Nothing is float64: some runtimes do not know it, others take float32 in its place without saying so. Where the result
has to be exact, all numbers on the way are whole ones that float32 holds.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from dskd_fast.data.exposure import measure_exposure
from dskd_fast.data.images import MIN_SIDE
from dskd_fast.detection.detector import Detector, calibration_of, to_float
from dskd_fast.detection.scoring.calibrated import filter_matrix

# Pillow rounds the weights of its filter to 22 bits: here two numbers of half as many.
_HALF = 2.0**11


class Inspection(nn.Module):
    """From images to scores, maps and decisions, in operations that depend neither on data nor on sizes."""

    blur_rows: Tensor
    blur_columns: Tensor

    def __init__(self, detector: Detector, threshold: float | None) -> None:
        super().__init__()
        # Both formats hold weights in the usual order; the run's lie channels last.
        model = copy.deepcopy(detector.model).to(memory_format=torch.contiguous_format)
        self.model = model.eval()
        # Parameters would come back requiring grad from the files of some versions of PyTorch.
        for module in self.model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, weight.detach())
        self.calibrated = copy.deepcopy(detector.calibrated)
        self.counts_beyond = self.calibrated is not None and self.calibrated.counts_beyond
        self.scoring = detector.scoring
        calibration = calibration_of(detector)
        self.statistics = calibration.statistics
        self.threshold = threshold
        self.exposure = calibration.exposure
        if self.calibrated is not None:
            return
        blur = filter_matrix(self.model.image_size, self.scoring.sigma).float()
        self.register_buffer("blur_rows", blur.to(detector.device))
        self.register_buffer("blur_columns", blur.mT.contiguous().to(detector.device))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 RGB (B, 3, H, W) -> "score" (B,), "map" (B, H, W) and "parts" (B, parts), float32, and (B,), bool: with
        a threshold "anomalous", and "suspect" where the run knows the brightness and contrast of normal images.

        "parts" are what `Detector.parts` names: calibrated values, or with the paper's scoring each student's score.
        In a runtime that computes in less than float32 all numbers are NaN, and all images anomalous and suspect.
        """
        resized = resize_square(images, self.model.image_size)
        score, located, parts = (self._by_eq_8 if self.calibrated is None else self._calibrated)(
            to_float(resized, images.device)
        )
        # Too small an image has no such pixel, so that reading it is an error, which ONNX has no other way to raise.
        pixel = images.select(2, MIN_SIDE - 1).select(2, MIN_SIDE - 1)[:, 0]
        is_rounded = _is_rounded(pixel.float())
        height, width = images.shape[-2:]
        located = enlarge(located, (height, width), self.scoring.align_corners)
        outputs = {
            name: torch.where(is_rounded.view(-1, *[1] * (x.dim() - 1)), torch.nan, x)
            for name, x in (("score", score), ("map", located), ("parts", parts))
        }
        if self.threshold is not None:
            # For a score in float32 the same as `is_above`, which compares in float64.
            outputs["anomalous"] = (score > _float32_below(self.threshold)) | is_rounded
        if self.exposure is not None:
            beyond = self.exposure.beyond(*measure_exposure(resized, torch.float32))
            suspect = torch.stack([*beyond.values(), is_rounded]).any(0)
            if self.threshold is not None:
                outputs["anomalous"] = outputs["anomalous"] | suspect
            outputs["suspect"] = suspect
        return outputs

    def _calibrated(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, S, S) -> score (B,), map (B, S, S), values of the parts (B, parts)."""
        assert self.calibrated is not None
        measured = self.model.measure(
            images,
            self.scoring.temperature,
            local_map=self.scoring.local_map,
            global_map=self.scoring.global_map,
            counts_beyond=self.counts_beyond,
        )
        scored = self.calibrated(measured)
        return scored.score, self.calibrated.combined(scored), scored.values

    def _by_eq_8(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same by the paper's scoring, the students' scores as the parts."""
        raw_maps = self.model.anomaly_maps(
            images,
            self.scoring.temperature,
            local_map=self.scoring.local_map,
            global_map=self.scoring.global_map,
            align_corners=self.scoring.align_corners,
        )
        normalised = torch.stack(
            [
                # In this order: optimisers of ONNX take a subtraction of less than 1e-8 for one of nothing.
                raw / self.statistics[name].std - self.statistics[name].mean / self.statistics[name].std
                for name, raw in zip(("local", "global"), raw_maps, strict=True)
                if raw is not None
            ]
        )
        maps = torch.cat([normalised.sum(0, keepdim=True), normalised])
        blurred = self.blur_rows @ maps @ self.blur_columns
        scores = blurred.amax((2, 3))
        return scores[0], (blurred if self.scoring.filter_maps else maps)[0], scores[1:].mT


def resize_square(images: Tensor, size: int) -> Tensor:
    """uint8 (B, C, H, W) -> uint8 (B, C, size, size), to the bit as `dskd_fast.data.images.resize_square`.

    Pillow works in fixed point. All numbers here are whole ones below 2^24 for images at most 32 times as large as
    `size`; of larger ones the sums of the lower halves are rounded where they come to more, which would take pixels
    that follow the weights' last bits.
    """
    (upper_rows, lower_rows), (upper_columns, lower_columns) = (
        _pillow_weights(images.shape[axis], size, axis, images.device) for axis in (-2, -1)
    )
    pixels = images.float()
    narrowed = _rounded(pixels @ upper_columns, pixels @ lower_columns)
    return _rounded(upper_rows @ narrowed, lower_rows @ narrowed).clamp(max=255).to(torch.uint8)


def enlarge(maps: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Maps (B, S, S) at (height, width), as `Detector.localisation_map`, smaller ones included."""
    rows, columns = (_enlarging_weights(maps.shape[-1], size, axis, maps.device, align_corners) for axis in (-2, -1))
    return rows @ maps @ columns


def _enlarging_weights(
    source: int, size: tuple[int, int], axis: int, device: torch.device, align_corners: bool
) -> Tensor:
    twice_offset: float | Tensor = 1.0
    if align_corners:
        # Antialiased interpolation in PyTorch keeps the scale of aligned corners, but does not align them.
        smallest = torch.stack([_number(side, device) for side in size]).amin(0)
        twice_offset = (smallest < source).float()
    tents = _tents(source, size[axis], axis, device, align_corners, twice_offset)
    return tents / _total(tents, axis)


def _pillow_weights(source: int, target: int, axis: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The upper and lower halves of Pillow's weights, whole numbers: round(2^22 tent / sum of tents), exactly.

    Quotients are rounded, and then corrected by their remainders, which are exact.
    """
    tents = _tents(source, target, axis, device)
    total = _total(tents, axis)
    upper = (tents * _HALF / total + 0.5).floor()
    rest = _remainder(tents, upper, total)
    lower = (rest * _HALF / total + 0.5).floor()
    twice_rest = 2 * _remainder(rest, lower, total)
    return upper, lower + (twice_rest >= total).float() - (twice_rest < -total).float()


def _remainder(dividend: Tensor, quotient: Tensor, divisor: Tensor) -> Tensor:
    """2^11 dividend - quotient divisor, exactly: in two parts, whose products have no more than 24 bits."""
    upper = (divisor / (2 * _HALF)).floor()
    lower = divisor - 2 * _HALF * upper
    return (_HALF * dividend - 2 * _HALF * (quotient * upper)) - quotient * lower


def _rounded(upper: Tensor, lower: Tensor) -> Tensor:
    """round((2^11 upper + lower) / 2^22), halves up."""
    whole = (upper / _HALF).floor()
    rest = upper - _HALF * whole
    return whole + ((_HALF * rest + lower) / _HALF**2 + 0.5).floor()


def _tents(
    source: int,
    target: int,
    axis: int,
    device: torch.device,
    align_corners: bool = False,
    twice_offset: float | Tensor = 1.0,
) -> Tensor:
    """Bilinear interpolation before its weights are made 1 together, antialiased where `target` is the smaller.

    Whole numbers: distances in units of which twice the larger side (less 1 where corners are aligned) is the width of
    a tent. (target, source) for axis -2, whose images they multiply from the left, (source, target) for -1.
    """
    n_source, n_target = (_number(n, device) - float(align_corners) for n in (source, target))
    at, centre = (
        (2 * torch.arange(n, device=device).float() + twice_offset) * scale
        for n, scale in ((source, n_target), (target, n_source))
    )
    distances = (at - centre[:, None] if axis == -2 else at[:, None] - centre).abs()
    return (2 * torch.maximum(n_source, n_target) - distances).clamp(min=0)


def _total(tents: Tensor, axis: int) -> Tensor:
    """The sum over the source."""
    return tents.sum(-1 if axis == -2 else -2, keepdim=True)


def _is_rounded(numbers: Tensor) -> Tensor:
    """Whether a runtime rounds the operands of products to less than float32, for whole numbers (B,) below 256: (B,).

    OpenVINO does so on processors that multiply bf16, others where they are told to, and no result tells.
    """
    large = 2.0**20 + 1
    rows = torch.stack([numbers + large, torch.ones_like(numbers)], 1)
    return (rows @ rows.new_ones((2, 1))).squeeze(1) != numbers + (large + 1)


def _number(value: int, device: torch.device) -> Tensor:
    """A size, which may be one that is left open in an exported program, as a tensor."""
    return torch.full((), value, dtype=torch.float32, device=device)


def _float32_below(value: float) -> float:
    """The largest number of float32 that is not above a value."""
    nearest = np.float32(value)
    return float(nearest if float(nearest) <= value else np.nextafter(nearest, np.float32(-np.inf)))
