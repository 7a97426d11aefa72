"""What anomalib asks a model for besides its training: pre-processor, network and post-processor.

Images come from anomalib as float32 RGB from 0 to 1, which are 8-bit pixels over 255, and are turned back into these,
so that they are resized and scored to the bit as everywhere else in this package.
"""

import dataclasses
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import Resize

from dskd_fast.data.exposure import measure_exposure
from dskd_fast.data.images import resize_square
from dskd_fast.detection import program
from dskd_fast.detection.calibration import Calibration, is_above
from dskd_fast.detection.detector import calibration_of
from dskd_fast.detection.program import Inspection
from dskd_fast.errors import UserError
from dskd_fast.models import DSKD
from dskd_fast.runs.options import TrainingOptions


def to_pixels(images: Tensor) -> Tensor:
    """Floating images from 0 to 1, of any shape, as the uint8 pixels that they were."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


class PixelResize(Resize):
    """Images to (S, S) as `dskd_fast.data.images.resize_square`, rounded to 8 bits; masks as anomalib does.

    anomalib's data modules have what is a `Resize` work in their own processes, image by image, so this is one.
    """

    def __init__(self, size: int) -> None:
        super().__init__((size, size), antialias=True)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Called by torchvision for each image (3, H, W) or (B, 3, H, W), float from 0 to 1, and for each mask."""
        if not isinstance(inpt, Tensor) or isinstance(inpt, tv_tensors.Mask):
            return super().transform(inpt, params)
        pixels = to_pixels(inpt.as_subclass(Tensor))
        if tuple(pixels.shape[-2:]) != tuple(self.size):
            if pixels.ndim == 3 and pixels.device.type == "cpu":
                # Pillow is the faster of the two, which agree.
                image = resize_square(pixels.permute(1, 2, 0).contiguous().numpy(), self.size[0])
                pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
            else:
                batch = pixels if pixels.ndim == 4 else pixels[None]
                pixels = program.resize_square(batch, self.size[0]).reshape(*pixels.shape[:-2], *self.size)
        return tv_tensors.wrap(pixels.float() / 255, like=inpt)


class DskdPreProcessor(PreProcessor):
    """Resizes alone: the teacher normalises images itself, each by its own mean and standard deviation.

    Args:
        size: S.
    """

    def __init__(self, size: int) -> None:
        super().__init__(PixelResize(size))
        self.size = size

    def forward(self, batch: Tensor) -> Tensor:
        """Images (B, 3, H, W), float from 0 to 1, at (S, S); exported with the model."""
        return program.resize_square(to_pixels(batch), self.size).float() / 255

    def checkpoint_config(self) -> dict[str, Any]:
        """What tells it in a checkpoint; the model's own arguments make it again."""
        return {"size": self.size}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Nothing: see `checkpoint_config`."""


class DskdPostProcessor(PostProcessor):
    """Scores and maps between 0 and 1, with the model's own threshold at 0.5, and masks by it.

    With threshold t and d = (value - t) / (1 + |t|) it is (1 + d / (1 + |d|)) / 2, which `raw` undoes: unlike min-max
    scaling it depends on no image, and keeps every order. anomalib's figures need values from 0 to 1, since they take
    others for logits, one batch at a time, of which large ones become equal. What would come from validation images,
    bad ones among them, does not: nothing is collected from these.
    """

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is collected."""

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is collected."""

    def set_threshold(self, value: float) -> None:
        """Take the threshold of scores and maps, which have one unit."""
        self._image_threshold.fill_(value)
        self._pixel_threshold.fill_(value)

    def scaled(self, values: Tensor) -> Tensor:
        """Values in the model's own unit, of any shape, as anomalib wants them."""
        distance = (values - self._image_threshold) / (1 + self._image_threshold.abs())
        return (1 + distance / (1 + distance.abs())) / 2

    def raw(self, scaled: Tensor) -> Tensor:
        """What was scaled, in the model's own unit: standard deviations above the normal mean."""
        ratio = 2 * scaled - 1
        return self._image_threshold + (1 + self._image_threshold.abs()) * ratio / (1 - ratio.abs())

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Scores (B,), labels (B,), maps and masks (B, 1, S, S) of the network's."""
        located = self.scaled(predictions.anomaly_map)
        return InferenceBatch(
            pred_score=self.scaled(predictions.pred_score),
            pred_label=predictions.pred_label,
            anomaly_map=located,
            pred_mask=located > 0.5,
        )

    def post_process_batch(self, batch: Any) -> None:
        """The same for a batch of anomalib's, in place."""
        batch.anomaly_map = self.scaled(batch.anomaly_map)
        batch.pred_score = self.scaled(batch.pred_score)
        batch.pred_mask = batch.anomaly_map > 0.5


class DskdNetwork(nn.Module):
    """A detector whose state dict holds all of it: networks, what scores are made of, calibration.

    Args:
        networks: on the CPU.
        options: what scores are made by.

    Attributes:
        detector: the same networks with their scores.
        has_weights: whether the weights mean anything, as they do not after `TrainingOptions.networks` without any.
        record: of the run: "config", what config.json of a run folder holds, and "history".
    """

    def __init__(self, networks: DSKD, options: TrainingOptions, *, has_weights: bool) -> None:
        super().__init__()
        self.networks = networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.detector = options.detector(self.networks)
        self.calibrated = self.detector.calibrated
        self.has_weights = has_weights
        self.record: dict[str, Any] = {"config": {}, "history": []}

    @property
    def threshold(self) -> float:
        """Of the scores.

        Raises:
            UserError: there is none yet.
        """
        self.check_calibrated()
        threshold = calibration_of(self.detector).threshold
        assert threshold is not None
        return threshold.value

    def check_calibrated(self) -> None:
        """Raise UserError if there is no threshold yet."""
        calibration = self.detector.calibration
        if calibration is None or calibration.threshold is None:
            raise UserError(
                "the model has no threshold: it was never trained, or its training has not come to its end, so fit it, "
                "or go on with its checkpoint by Engine.fit(model, datamodule=..., ckpt_path=...)"
            )

    def forward(self, images: Tensor) -> InferenceBatch:
        """Images (B, 3, S, S), float from 0 to 1 -> scores (B,) and maps (B, 1, S, S), float32, and labels (B,), bool.

        Scores and maps are in standard deviations above the normal mean. An image that is far too dark, bright or flat
        is anomalous whatever its score.

        Raises:
            UserError: the model is not calibrated yet.
        """
        threshold = self.threshold
        pixels = to_pixels(images.as_subclass(Tensor))
        found = self.detector.find(pixels)
        score = torch.from_numpy(found.scores["combined"])
        reasons = self.detector.suspicions(*measure_exposure(pixels.cpu()))
        label = is_above(score, threshold) | torch.tensor([reason is not None for reason in reasons])
        located = torch.from_numpy(found.maps.combined)[:, None]
        return InferenceBatch(score.float().to(images.device), label.to(images.device), located.to(images.device))

    def get_extra_state(self) -> dict[str, Any]:
        """The calibration and the record: strings, numbers, lists and dictionaries."""
        calibration = self.detector.calibration
        return {"calibration": None if calibration is None else dataclasses.asdict(calibration)} | self.record

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what `get_extra_state` gave."""
        self.record = {"config": state["config"], "history": state["history"]}
        content = state["calibration"]
        students = self.networks.students
        self.detector.calibration = None if content is None else Calibration.from_dict(content, students)
        self.has_weights = True


class ExportedDskd(nn.Module):
    """Pre-processor, network and post-processor in plain operations, from images to what anomalib names.

    Args:
        pre_processor, post_processor: the model's; None leaves it out.
        network: calibrated.
    """

    def __init__(self, pre_processor: nn.Module | None, network: DskdNetwork, post_processor: nn.Module | None) -> None:
        super().__init__()
        self.pre_processor = pre_processor
        self.inspection = Inspection(network.detector, network.threshold)
        self.post_processor = post_processor

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W), float from 0 to 1 -> the fields of `InferenceBatch` that there are."""
        resized = images if self.pre_processor is None else self.pre_processor(images)
        found = self.inspection(to_pixels(resized))
        predictions = InferenceBatch(found["score"], found["anomalous"], found["map"][:, None])
        if self.post_processor is not None:
            predictions = self.post_processor(predictions)
        return {name: value for name, value in predictions._asdict().items() if value is not None}
