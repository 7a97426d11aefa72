"""anomalib:NAME: a model of anomalib, fitted on the same images, its maps scored by the same code.

What it needs is installed by the extra `baselines`. Its backbone is the teacher of all methods, with that teacher's
weights, and nothing is downloaded: a model that wants others says so. Of the teacher lite that is EfficientNet-Lite0
with the outputs of its blocks, where our own methods see wider activations within them. Where a model is trained, it
sees the images as often as the paper's method does, unaugmented, by anomalib's own settings.
"""

import contextlib
import importlib.util
import inspect
import logging
import math
import random
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from dskd_fast.choices import ANOMALIB, LITE
from dskd_fast.errors import TrainingStopped, UserError
from dskd_fast.models.teacher import Teacher, select_weights
from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.protocol import Baseline, Images

_LITE_BACKBONE = "tf_efficientnet_lite0"
_LITE_LAYERS = ("blocks.1", "blocks.2", "blocks.4")
# Channels that PaDiM draws, which anomalib leaves open for other backbones than these: as many as of ResNet-18.
_PADIM_KNOWS = ("resnet18", "wide_resnet50_2")
_N_FEATURES = 100


class OfAnomalib(Baseline):
    """A model of anomalib.

    Args:
        size: S of images and maps.
        teacher: whose architecture and normalisation the backbone has.
        state: the teacher's weights, as `Teacher.load_weights` gives them.
        name: of the model, as anomalib has it, such as Patchcore.

    Raises:
        UserError: anomalib is not installed, has no such model, or cannot build it of this teacher.
    """

    def __init__(self, size: int, teacher: Teacher, state: Mapping[str, Tensor], name: str) -> None:
        super().__init__(size, [level.channels for level in teacher.levels])
        self.name = name
        self._last: tuple[Images | None, Any] = (None, None)
        check_installed(ANOMALIB + name)
        logging.getLogger("anomalib").setLevel(logging.CRITICAL)
        from anomalib.models import AnomalibModule
        from anomalib.pre_processing import PreProcessor

        kinds = {kind.__name__.lower(): kind for kind in AnomalibModule.__subclasses__()}
        kind = kinds.get(name.replace("_", "").lower())
        if kind is None:
            raise UserError(f"anomalib has no model {name}: use one of {', '.join(sorted(kinds))}")
        normalise = Normalize(teacher.mean.flatten().tolist(), teacher.std.flatten().tolist())
        options: dict[str, Any] = {
            "pre_processor": PreProcessor(Compose([Resize((size, size), antialias=True), normalise])),
            "post_processor": False,
            "evaluator": False,
            "visualizer": False,
        }
        accepted = inspect.signature(kind).parameters
        backbone, layers = _backbone_of(teacher)
        if "backbone" in accepted:
            options["backbone"] = backbone
        if "layers" in accepted:
            options["layers"] = list(layers[-len(accepted["layers"].default) :])
        if "n_features" in accepted and backbone not in _PADIM_KNOWS:
            options["n_features"] = _N_FEATURES
        try:
            with _weights_of(backbone, state), _seeded():
                self.module: nn.Module = kind(**options)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"anomalib's {name} cannot be made with the teacher {teacher.name} ({_said(error)})"
            ) from error

    def fit(self, images: Images, validation: Images, fitting: Fitting) -> None:
        from anomalib.data import ImageBatch
        from lightning.pytorch import Callback, Trainer

        module: Any = self.module

        class Heed(Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                total = trainer.num_training_batches * trainer.max_epochs
                fitting.heed("training", min(trainer.fit_loop.total_batch_idx + 1, total), total)

        def batch_of(numbers: list[int]) -> Any:
            return ImageBatch(image=images.of(numbers).pixels, gt_label=torch.zeros(len(numbers), dtype=torch.bool))

        loader: Any = torch.utils.data.DataLoader(
            range(len(images)),  # type: ignore[arg-type]  # a sequence will do
            fitting.batch_size,
            shuffle=True,
            collate_fn=batch_of,
        )
        logging.getLogger("lightning.pytorch").setLevel(logging.CRITICAL)
        with tempfile.TemporaryDirectory() as folder:
            # Not its Engine, which would keep checkpoints.
            options: dict[str, Any] = {
                "max_epochs": math.ceil(fitting.steps / len(loader)),
                "devices": 1,
                "accelerator": images.of([0]).pixels.device.type,
                **module.trainer_arguments,
            }
            off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
            trainer = Trainer(callbacks=[Heed()], default_root_dir=folder, **options, **dict.fromkeys(off, False))
            try:
                trainer.fit(module, train_dataloaders=loader)
            except (TrainingStopped, KeyboardInterrupt):
                raise
            except Exception as error:
                raise UserError(f"anomalib's {self.name} cannot be fitted here ({_said(error)})") from error
        self.eval()

    def maps(self, images: Images) -> Tensor:
        return self.at_size(self._found(images).anomaly_map.float().flatten(0, -3))

    def score(self, images: Images, maps: Tensor) -> Tensor:
        found = self._found(images).pred_score
        return maps.amax((1, 2)) if found is None else found.float().view(len(images))

    def _found(self, images: Images) -> Any:
        if self._last[0] is not images:  # maps and scores come together
            self._last = images, self.module(images.pixels)
        return self._last[1]


def check_installed(method: str) -> None:
    """Raise UserError for a model of anomalib, "anomalib:NAME", where anomalib is not installed."""
    if method.startswith(ANOMALIB) and importlib.util.find_spec("anomalib") is None:
        raise UserError(f'{method} needs anomalib, which is not installed: pip install "dskd-fast[baselines]"')


def _backbone_of(teacher: Teacher) -> tuple[str, tuple[str, ...]]:
    """timm's name of a teacher's architecture, and of its three levels."""
    if teacher.name == LITE:
        return _LITE_BACKBONE, _LITE_LAYERS
    net: Any = teacher.net
    return teacher.name, tuple(net.feature_info.module_name())


@contextlib.contextmanager
def _weights_of(backbone: str, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Have networks that are made with pretrained weights get these."""
    original = timm.create_model

    def create(name: str, *arguments: Any, pretrained: bool = False, **options: Any) -> nn.Module:
        network = original(name, *arguments, **options)
        if pretrained and name != backbone:
            raise UserError(f"it wants the weights of {name}: give --teacher {name}, and --teacher-weights if need be")
        if pretrained:
            network.load_state_dict(select_weights(state, network.state_dict(), "the teacher's weights", name))
        return network

    timm.create_model = create  # type: ignore[assignment]
    try:
        yield
    finally:
        timm.create_model = original


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Have Python's own random numbers, by which PaDiM draws its channels, follow PyTorch's seed."""
    before = random.getstate()
    random.seed(torch.initial_seed())
    try:
        yield
    finally:
        random.setstate(before)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
