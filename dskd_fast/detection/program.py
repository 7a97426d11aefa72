"""What `Detector.predict` does with images in memory as one module of plain operations, to be exported."""

import copy

import torch
from torch import Tensor, nn

from dskd_fast.data.exposure import measure_exposure
from dskd_fast.data.images import MIN_SIDE
from dskd_fast.detection.calibration import is_above
from dskd_fast.detection.detector import Detector, calibration_of, to_float
from dskd_fast.detection.scoring.calibrated import filter_matrix

# Pillow rounds the weights of its filter to multiples of this.
_WEIGHT_UNIT = 2.0**-22


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
        self.scoring = detector.scoring
        calibration = calibration_of(detector)
        self.statistics = calibration.statistics
        self.threshold = threshold
        self.exposure = calibration.exposure
        if self.calibrated is not None:
            return
        blur = filter_matrix(self.model.image_size, self.scoring.sigma)
        self.register_buffer("blur_rows", blur.to(detector.device))
        self.register_buffer("blur_columns", blur.mT.contiguous().to(detector.device))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 RGB (B, 3, H, W) -> "score" (B,), "map" (B, H, W) and "parts" (B, parts), float32, and (B,), bool: with
        a threshold "anomalous", and "suspect" where the run knows the brightness and contrast of normal images.

        "parts" are what `Detector.parts` names: calibrated values, or with the paper's scoring each student's score.
        """
        resized = resize_square(images, self.model.image_size)
        score, located, parts = (self._by_eq_8 if self.calibrated is None else self._calibrated)(
            to_float(resized, images.device)
        )
        # Too small an image has no such pixel, so that reading it is an error, which ONNX has no other way to raise.
        pixel = images.select(2, MIN_SIDE - 1).select(2, MIN_SIDE - 1)[:, 0]
        score = score + 0 * pixel.float()
        height, width = images.shape[-2:]
        located = enlarge(located, (height, width), self.scoring.align_corners)
        outputs = {"score": score, "map": located, "parts": parts}
        if self.threshold is not None:
            outputs["anomalous"] = is_above(score, self.threshold)
        if self.exposure is not None:
            suspect = torch.stack(list(self.exposure.beyond(*measure_exposure(resized)).values())).any(0)
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
        )
        scored = self.calibrated(measured)
        return scored.score, self.calibrated.combined(scored.maps), scored.values

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
                (raw.double() - self.statistics[name].mean) / self.statistics[name].std
                for name, raw in zip(("local", "global"), raw_maps, strict=True)
                if raw is not None
            ]
        )
        maps = torch.cat([normalised.sum(0, keepdim=True), normalised]).float()
        # Rounded between the axes, as scipy does it.
        blurred = ((self.blur_rows @ maps.double()).float().double() @ self.blur_columns).float()
        scores = blurred.amax((2, 3))
        return scores[0], (blurred if self.scoring.filter_maps else maps)[0], scores[1:].mT


def resize_square(images: Tensor, size: int) -> Tensor:
    """uint8 (B, C, H, W) -> uint8 (B, C, size, size), to the bit as `dskd_fast.data.images.resize_square`.

    Pillow works in fixed point, of which float64 holds every number exactly.
    """
    rows, columns = (
        (_interpolation(images.shape[axis], size, axis, images.device) / _WEIGHT_UNIT + 0.5).floor() * _WEIGHT_UNIT
        for axis in (-2, -1)
    )
    narrowed = (images.double() @ columns + 0.5).floor()
    return (rows @ narrowed + 0.5).floor().clamp(max=255).to(torch.uint8)


def enlarge(maps: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Maps (B, S, S) at (height, width), as `Detector.localisation_map`, smaller ones included."""
    offset: float | Tensor = 0.5
    if align_corners:
        # Antialiased interpolation in PyTorch keeps the scale of aligned corners, but does not align them.
        smaller = torch.stack([_number(side, maps.device) for side in size]).amin(0) < maps.shape[-1]
        offset = 0.5 * smaller.double()
    rows, columns = (
        _interpolation(maps.shape[-1], side, axis, maps.device, align_corners, offset)
        for side, axis in zip(size, (-2, -1), strict=True)
    )
    return (rows @ maps.double() @ columns).float()


def _interpolation(
    source: int, target: int, axis: int, device: torch.device, align_corners: bool = False, offset: float | Tensor = 0.5
) -> Tensor:
    """Weights of bilinear interpolation, antialiased where `target` is the smaller, float64.

    (target, source) for axis -2, whose images they multiply from the left, (source, target) for -1. They are made as
    they are used: ONNX Runtime before 1.26 fuses a transposition with a product of float64, for which it has no kernel.
    """
    n_source, n_target = _number(source, device), _number(target, device)
    scale = (n_source - 1) / (n_target - 1) if align_corners else n_source / n_target
    at = torch.arange(source, device=device).double() + offset
    centre = (torch.arange(target, device=device).double() + offset) * scale
    distances = (at - centre[:, None] if axis == -2 else at[:, None] - centre).abs()
    weights = (1 - distances / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(-1 if axis == -2 else -2, keepdim=True)


def _number(value: int, device: torch.device) -> Tensor:
    """A size, which may be one that is left open in an exported program, as a float64 tensor."""
    return torch.full((), value, dtype=torch.float64, device=device)
