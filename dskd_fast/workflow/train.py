"""Training: read top to bottom, this is all there is to it (paper section 4.1)."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_type_hints

import torch

from dskd_fast.data.augment import Augmentation
from dskd_fast.data.layout import Category
from dskd_fast.data.store import ImageStore
from dskd_fast.errors import UserError
from dskd_fast.functional import TEMPERATURE_RANGE
from dskd_fast.losses import ContextualAffinityLoss, CosineDistanceLoss
from dskd_fast.models import DSKD
from dskd_fast.workflow.detector import Detector, Scoring, to_float
from dskd_fast.workflow.device import DEVICES, PRECISIONS, keep_freed_memory, numerics, resolve_device

LOCAL_LOSSES = ("cosine", "flattened-cosine")

_CHOICES = {
    "stage4_init": ("imagenet", "random"),
    "schedule": ("constant", "cosine"),
    "local_loss": LOCAL_LOSSES,
    "precision": PRECISIONS,
    "device": DEVICES,
}


@dataclass(frozen=True)
class TrainingOptions:
    """Everything that decides the result, with the paper's recipe as defaults.

    Attributes:
        teacher, teacher_weights, image_size, gccb, stage4_init: see `dskd_fast.DSKD`.
        epochs, batch_size, lr: of Adam with betas (0.5, 0.999).
        schedule: of the learning rate: "constant" (the paper's) or "cosine", to 0 over the training.
        temperature: T of the contextual affinity.
        local_loss: "cosine" (per position, the paper's) or "flattened-cosine" (one per image, as in RD4AD's code).
        augmentation: in `Augmentation.parse`'s form.
        sigma: of the image score's Gaussian filter, in pixels of the S x S image; None is 4 at 256, in proportion.
        filter_maps, align_corners: see `Scoring`.
        precision: of training: "fp32", "tf32" or "bf16". Scoring is always in float32.
        device: "auto", "cpu" or "cuda".
        seed: of the initial weights, the order and the augmentation.

    Raises:
        UserError: a value of the wrong type or out of range. (Whether `image_size` and `gccb` fit the teacher shows
            when the networks are built.)
    """

    teacher: str
    teacher_weights: str | None = None
    image_size: int = 256
    gccb: int | None = None
    stage4_init: str = "imagenet"
    epochs: int = 200
    batch_size: int = 16
    lr: float = 0.005
    schedule: str = "constant"
    temperature: float = 1.0
    local_loss: str = "cosine"
    augmentation: str = "none"
    sigma: float | None = None
    filter_maps: bool = False
    align_corners: bool = False
    precision: str = "fp32"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, valid: bool, accepted: str) -> None:
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)!r}: use {accepted}")

        for name, hint in get_type_hints(TrainingOptions).items():
            value = getattr(self, name)
            whole_for_real = type(value) is int and isinstance(1.0, hint)
            check(name, isinstance(value, hint) or whole_for_real, f"a value of type {getattr(hint, '__name__', hint)}")
        for name, choices in _CHOICES.items():
            check(name, getattr(self, name) in choices, "one of " + ", ".join(choices))
        for name in ("image_size", "epochs", "batch_size"):
            check(name, getattr(self, name) >= 1, "a whole number from 1 up")
        check("seed", 0 <= self.seed < 2**63, "a whole number from 0 up")
        check("lr", 0 < self.lr < math.inf, "a number above 0")
        low, high = TEMPERATURE_RANGE
        check("temperature", low <= self.temperature <= high, f"a number from {low} to {high:g}")
        check("sigma", self.sigma is None or 0 < self.sigma <= self.image_size, "a number above 0, up to image_size")
        Augmentation.parse(self.augmentation)

    @property
    def scoring(self) -> Scoring:
        sigma = 4 * self.image_size / 256 if self.sigma is None else self.sigma
        return Scoring(self.temperature, sigma, self.filter_maps, self.align_corners)


@dataclass(frozen=True)
class Epoch:
    """One epoch's mean losses and speed."""

    local_loss: float
    global_loss: float
    images_per_second: float


@dataclass(frozen=True)
class Progress:
    """State after a step, for a progress bar."""

    step: int
    steps: int
    epoch: int
    local_loss: float
    global_loss: float
    images_per_second: float


def train(
    category: Category,
    options: TrainingOptions,
    report: Callable[[Progress], None] = lambda _: None,
    status: Callable[[str], None] = lambda _: None,
) -> tuple[Detector, list[Epoch]]:
    """Train both students on a category's good images, then calibrate on its validation images.

    Args:
        category: from `dskd_fast.data.layout.open_category`.
        options: the recipe.
        report: called after every step.
        status: called with a sentence when a stage starts.

    Returns:
        The calibrated detector, and the history.

    Raises:
        ImageError: names every image that cannot be read, before training starts.
        UserError: options that do not fit, weights that cannot be had, a loss that is no longer finite.
    """
    if not category.train:
        raise UserError(f"{category.root} has no training images: put good images into {category.root}/train/good")
    device = resolve_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    status(f"building the networks with the teacher {options.teacher}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = DSKD(
            options.teacher,
            image_size=options.image_size,
            gccb=options.gccb,
            stage4_init=options.stage4_init,
            teacher_weights=options.teacher_weights,
        ).to(device, memory_format=torch.channels_last)

    status(f"reading the images: {len(category.train)} to train on, {len(category.validation)} to validate with")
    images = ImageStore([*category.train, *category.validation], options.image_size)
    train_indices = list(range(len(category.train)))
    validation_indices = list(range(len(category.train), len(images)))
    history = _fit(model, images, train_indices, options, device, report)

    detector = Detector(model, options.scoring)
    source = "validation" if validation_indices else "train"
    status(f"calibrating on the {source} images")
    detector.calibrate(_Batches(images, validation_indices or train_indices, options.batch_size), source)
    return detector, history


class Trainer:
    """Both students' losses and their optimiser: what one training step is.

    Args:
        model: on its device.
        options: the recipe.
    """

    def __init__(self, model: DSKD, options: TrainingOptions) -> None:
        self.model = model.train()
        self.precision = options.precision
        self.local_loss_fn = CosineDistanceLoss(flatten=options.local_loss == "flattened-cosine")
        self.global_loss_fn = ContextualAffinityLoss(options.temperature)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        # On a CPU the fused optimiser copies what does not lie in the order of its dimensions, as channels_last weights
        # do not: a fifth of a step. To Adam all numbers are alike, so it gets views that lie in order.
        self._views = [_in_order(p.detach()) for p in self._parameters]
        self.optimizer = torch.optim.Adam(self._views, lr=options.lr, betas=(0.5, 0.999), fused=True)

    def step(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on RGB images (B, 3, S, S), float in [0, 1]; returns the local and the global loss, both scalar."""
        # Both hold the last step's gradients; neither is to keep them alive through this one.
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        with numerics(self.precision, batch.device):
            features = self.model(batch)
            local_loss = self.local_loss_fn(features.local_student, features.teacher)
            global_loss = self.global_loss_fn(features.global_student, features.teacher)
            loss = local_loss + global_loss
        loss.backward()
        for view, parameter in zip(self._views, self._parameters, strict=True):
            view.grad = None if parameter.grad is None else _in_order(parameter.grad)
        self.optimizer.step()
        return local_loss.detach(), global_loss.detach()


def _in_order(x: torch.Tensor) -> torch.Tensor:
    """A view of x that is contiguous, if x is so in either memory format."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 and not x.is_contiguous() else x


def _fit(
    model: DSKD,
    images: ImageStore,
    indices: list[int],
    options: TrainingOptions,
    device: torch.device,
    report: Callable[[Progress], None],
) -> list[Epoch]:
    augment = Augmentation.parse(options.augmentation)
    random = torch.Generator().manual_seed(options.seed)
    trainer = Trainer(model, options)
    steps_per_epoch = math.ceil(len(indices) / options.batch_size)
    embedding_size = options.image_size // (2 * model.teacher.levels[2].stride)
    if embedding_size == 1 and (len(indices) % options.batch_size == 1 or options.batch_size == 1):
        raise UserError(
            f"{len(indices)} training images in batches of {options.batch_size} leave a batch of one, whose embedding "
            f"at image size {options.image_size} is a single value per channel, which batch norm cannot train on: use "
            "a larger --image-size or another --batch-size"
        )
    scheduler = None
    if options.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(trainer.optimizer, options.epochs * steps_per_epoch)
    history = []
    for epoch in range(options.epochs):
        order = torch.randperm(len(indices), generator=random).tolist()
        started = time.perf_counter()
        totals = torch.zeros(2, dtype=torch.float64)
        seen = 0
        for step in range(steps_per_epoch):
            chosen = order[step * options.batch_size : (step + 1) * options.batch_size]
            batch = augment(to_float(images.batch(indices[i] for i in chosen), device), random)
            local_loss, global_loss = trainer.step(batch)
            if scheduler is not None:
                scheduler.step()

            losses = torch.stack([local_loss, global_loss]).double().cpu()
            if not torch.isfinite(losses).all():
                raise UserError(
                    f"the loss is no longer finite at epoch {epoch + 1}, step {step + 1} (local {losses[0]:.3g}, "
                    f"global {losses[1]:.3g}): lower --lr (now {options.lr:g})"
                    + (" or use --precision fp32" if options.precision != "fp32" else "")
                )
            totals += losses * len(chosen)
            seen += len(chosen)
            speed = seen / (time.perf_counter() - started)
            report(
                Progress(
                    epoch * steps_per_epoch + step + 1,
                    options.epochs * steps_per_epoch,
                    epoch + 1,
                    *(totals / seen).tolist(),
                    speed,
                )
            )
        history.append(Epoch(*(totals / seen).tolist(), speed))
    return history


class _Batches:
    """Batches of uint8 images that can be gone through again."""

    def __init__(self, images: ImageStore, indices: list[int], batch_size: int) -> None:
        self.images = images
        self.indices = indices
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in range(0, len(self.indices), self.batch_size):
            yield self.images.batch(self.indices[i : i + self.batch_size])
