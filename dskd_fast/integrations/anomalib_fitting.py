"""What a training inside anomalib has besides its networks: the recipe's parts, and the images that calibrate."""

import copy
import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import data as torch_data

from dskd_fast.data.augment import Augmentation
from dskd_fast.data.exposure import measure_exposure
from dskd_fast.errors import UserError
from dskd_fast.integrations.anomalib_parts import DskdNetwork, to_pixels
from dskd_fast.runs.history import Epoch
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training.checkpoints import Position
from dskd_fast.training.checks import grown_loss
from dskd_fast.training.recipe import StudentLosses, WeightAverages
from dskd_fast.training.teacher import FrozenTeacher


@dataclasses.dataclass(frozen=True)
class Subset:
    """Positions of images in a dataset of anomalib's, and their files."""

    dataset: Any
    positions: list[int]
    paths: tuple[Path, ...]


class Fitting:
    """What there is while a model is trained."""

    def __init__(
        self, model: DskdNetwork, options: TrainingOptions, n_images: int, images: tuple[Subset, Subset]
    ) -> None:
        self.options = options
        self.n_images = n_images
        self.images = images
        self.losses = StudentLosses(options)
        self.augment = Augmentation.parse(options.augmentation)
        self.random = torch.Generator().manual_seed(options.seed)
        self.teacher = FrozenTeacher(model.networks.teacher, options)
        self.averages = WeightAverages(model.networks, options.averaging)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self._totals: list[Tensor] = []
        self._seen = 0
        self._started = time.perf_counter()

    def count(self, losses: Sequence[Tensor], n: int) -> None:
        self._totals.append(torch.stack([loss.detach() for loss in losses]).double() * n)
        self._seen += n

    def end_epoch(self, model: DskdNetwork) -> None:
        """Record the epoch, unless its losses show that the training has failed, which is an error."""
        totals = torch.stack(self._totals).sum(0).tolist()
        at = Position(totals, seen=self._seen, seconds=time.perf_counter() - self._started)
        epoch = at.epoch([*model.networks.students])
        history = model.record["history"]
        growth = grown_loss(Epoch(**history[0]), epoch) if history else None
        if not all(map(math.isfinite, totals)):
            growth = f"the loss is no longer finite ({[total / self._seen for total in totals]})"
        if growth is not None:
            raise UserError(f"{growth} in epoch {len(history) + 1}: lower lr of the options (now {self.options.lr:g})")
        history.append(dataclasses.asdict(epoch))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides weights and optimiser, all of it tensors."""
        return {"random": self.random.get_state(), **self.averages.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.random.set_state(state["random"].cpu())
        self.averages.load_state({name: tensor for name, tensor in state.items() if name != "random"})


def train_and_validation(data: Any) -> tuple[Subset, Subset]:
    """The training images, and the validation images that are normal and no test images."""
    if not hasattr(getattr(data, "train_data", None), "samples"):
        raise UserError(
            "Dskd goes through its images once more at the end: pass a data module of anomalib, not dataloaders"
        )
    tested = set(data.test_data.samples.image_path) if hasattr(data, "test_data") else set()
    train = _normal(data.train_data, set())
    validation = _normal(data.val_data, tested) if hasattr(data, "val_data") else None
    if validation is None or not validation.positions:
        raise UserError(
            "no validation image is normal and no test image, so that nothing can set the threshold: give the data "
            'module val_split_mode="from_train" and val_split_ratio=0.1'
        )
    return train, validation


def check_callbacks(trainer: Any) -> None:
    """Refuse those that wait for a figure of validation, which there is none of: Lightning tells it an epoch later."""
    for callback in (*trainer.early_stopping_callbacks, *trainer.checkpoint_callbacks):
        monitor = callback.monitor or ""
        if monitor.startswith(("image_", "pixel_", "val_")):
            name = type(callback).__name__
            way = (
                "use ModelCheckpoint() without monitor" if callback in trainer.checkpoint_callbacks else "leave it out"
            )
            raise UserError(f"{name} monitors {monitor}, but Dskd validates nothing while it trains: {way}")


def _normal(dataset: Any, excluded: set[str]) -> Subset:
    samples = dataset.samples
    paths, labels = samples.image_path.tolist(), samples.label_index.tolist()
    labelled = enumerate(zip(paths, labels, strict=True))
    positions = [i for i, (path, label) in labelled if not label and path not in excluded]
    return Subset(dataset, positions, tuple(Path(paths[i]) for i in positions))


class NormalImages:
    """Normal images of anomalib's datasets, as the network sees them, in place of an `ImageStore`.

    They are read once and kept: 0.2 MB each at 256 x 256.

    Args:
        datasets: each with the positions of its normal images.
        transform: in place of the datasets' own, which may augment.
        n_workers: processes that read.

    Attributes:
        exposures: brightness and contrast, (n,) each.
    """

    def __init__(self, datasets: Iterable[tuple[Any, list[int]]], transform: Any, n_workers: int) -> None:
        batches = []
        for dataset, positions in datasets:
            own = copy.copy(dataset)
            own.augmentations = transform
            loader = torch_data.DataLoader(
                torch_data.Subset(own, positions), 8, num_workers=n_workers, collate_fn=dataset.collate_fn
            )
            batches += [to_pixels(batch.image.as_subclass(Tensor)) for batch in loader]
        self._images = torch.cat(batches)
        brightness, contrast = zip(*(measure_exposure(batch) for batch in batches), strict=True)
        self.exposures = (torch.cat(brightness), torch.cat(contrast))

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Iterable[int]) -> Tensor:
        """Those at `indices`, uint8 (B, 3, S, S)."""
        return self._images[torch.tensor([*indices], dtype=torch.long)]
