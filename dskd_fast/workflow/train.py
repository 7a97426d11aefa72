"""Training: read top to bottom, this is all there is to it (paper section 4.1)."""

import contextlib
import dataclasses
import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import torch
from torch.nn.parallel import DistributedDataParallel

from dskd_fast.data.augment import Augmentation
from dskd_fast.data.layout import Category
from dskd_fast.data.store import ImageStore
from dskd_fast.errors import PeerFailed, TrainingStopped, UserError
from dskd_fast.functional import TEMPERATURE_RANGE
from dskd_fast.losses import LOSSES, make_loss
from dskd_fast.models import DSKD, Features
from dskd_fast.models.dskd import STUDENTS
from dskd_fast.workflow.checkpoints import Checkpoints, Epoch, Position, stopping_signal
from dskd_fast.workflow.detector import Detector, Scoring, to_float
from dskd_fast.workflow.device import (
    DEVICES,
    PRECISIONS,
    deterministic_convolutions,
    has_fast_bf16,
    is_out_of_memory,
    keep_freed_memory,
    numerics,
    resolve_device,
)
from dskd_fast.workflow.distributed import ALONE, Group, connected, synchronise_batch_norm

_CHOICES = {
    "stage4_init": ("imagenet", "random"),
    "students": STUDENTS,
    "schedule": ("constant", "cosine"),
    "local_loss": LOSSES,
    "global_loss": LOSSES,
    "precision": PRECISIONS,
    "device": DEVICES,
}


# An epoch whose loss is so many times the first one's has lost more than it had learned.
_EXPLODED = 10


@dataclass(frozen=True)
class TrainingOptions:
    """Everything that decides the result, with the paper's recipe as defaults.

    Attributes:
        teacher, teacher_weights, image_size, gccb, stage4_init: see `dskd_fast.DSKD`.
        epochs, batch_size, lr: of Adam with betas (0.5, 0.999).
        schedule: of the learning rate: "constant" (the paper's) or "cosine", to 0 over the training.
        temperature: T of the contextual affinity.
        students: "both", or "local" or "global" for one branch alone (the paper's ablations).
        local_loss, global_loss: of each student: "cosine" (per position, the paper's for the local one),
            "flattened-cosine" (one per image, as in RD4AD's code) or "contextual-affinity" (the paper's for the global
            one). Its anomaly map is the cosine distance or the contextual affinity, accordingly.
        augmentation: in `Augmentation.parse`'s form.
        sigma: of the image score's Gaussian filter, in pixels of the S x S image; None is 4 at 256, in proportion.
        filter_maps, align_corners: see `Scoring`.
        precision: of training: "fp32", "tf32" or "bf16". Scoring is always in float32.
        compile: whether training runs through torch.compile.
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
    students: str = "both"
    local_loss: str = "cosine"
    global_loss: str = "contextual-affinity"
    augmentation: str = "none"
    sigma: float | None = None
    filter_maps: bool = False
    align_corners: bool = False
    precision: str = "fp32"
    compile: bool = False
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, valid: bool, accepted: str) -> None:
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)!r}: use {accepted}")

        for name, hint in get_type_hints(TrainingOptions).items():
            value = getattr(self, name)
            whole_for_real = type(value) is int and isinstance(1.0, hint)
            is_of_type = isinstance(value, hint) and (type(value) is not bool or hint is bool)
            check(name, is_of_type or whole_for_real, f"a value of type {getattr(hint, '__name__', hint)}")
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

    def networks(self, *, pretrained: bool) -> DSKD:
        """The networks that are trained; not `pretrained`, the teacher is random, too, for a state to be loaded."""
        return DSKD(
            self.teacher,
            image_size=self.image_size,
            gccb=self.gccb,
            stage4_init=self.stage4_init,
            students=self.students,
            pretrained=pretrained,
            teacher_weights=self.teacher_weights if pretrained else None,
        )

    @property
    def scoring(self) -> Scoring:
        sigma = 4 * self.image_size / 256 if self.sigma is None else self.sigma
        return Scoring(
            self.temperature,
            sigma,
            self.filter_maps,
            self.align_corners,
            local_map=self.local_loss.removeprefix("flattened-"),
            global_map=self.global_loss.removeprefix("flattened-"),
        )


# What may change in the middle of a training: the model and what it has seen stay what they are.
CHANGEABLE = ("epochs", "batch_size", "lr", "precision", "compile", "device")


@dataclass(frozen=True)
class Progress:
    """State after a step, for a progress bar."""

    step: int
    steps: int
    epoch: int
    local_loss: float | None
    global_loss: float | None
    images_per_second: float


def train(
    category: Category,
    options: TrainingOptions,
    report: Callable[[Progress], None] = lambda _: None,
    status: Callable[[str], None] = lambda _: None,
    *,
    checkpoint: Path | None = None,
    group: Group = ALONE,
) -> tuple[Detector, list[Epoch]]:
    """Train the students on a category's good images, then calibrate on its validation images.

    Args:
        category: from `dskd_fast.data.layout.open_category`.
        options: the recipe.
        report: called after every step.
        status: called with a sentence when a stage starts.
        checkpoint: file in a run folder that keeps the state of the training, rewritten now and then, and from which
            it goes on if it is there. SIGINT and SIGTERM then end the training after the step it is in.
        group: the processes that train together. Each takes its part of every batch; the result is the one of a single
            process but for rounding. Only the first calibrates.

    Returns:
        The detector, calibrated in the group's first process, and the history.

    Raises:
        ImageError: names every image that cannot be read, before training starts.
        UserError: options that do not fit, weights that cannot be had, a damaged checkpoint, a loss that is no longer
            finite or grows, too little memory or disk.
        TrainingStopped: by a signal.
        PeerFailed: another process of the group failed.
    """
    if not category.train:
        raise UserError(f"{category.root} has no training images: put good images into {category.root}/train/good")
    device = resolve_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    if options.precision == "bf16" and not has_fast_bf16(device):
        status("this processor has no bf16 multiplication: in fp32 the training would be faster")

    def prepare() -> tuple[DSKD, ImageStore, Checkpoints]:
        fixed = {name: value for name, value in dataclasses.asdict(options).items() if name not in CHANGEABLE}
        checkpoints = Checkpoints(checkpoint, f"{category.fingerprint}, {json.dumps(fixed)}")
        status(f"building the networks with the teacher {options.teacher}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = options.networks(pretrained=checkpoints.found is None)
        model = model.to(device, memory_format=torch.channels_last)
        _check_batches(model, len(category.train), options, group)
        checkpoints.check_room(model)
        status(f"reading the images: {len(category.train)} to train on, {len(category.validation)} to validate with")
        return model, ImageStore([*category.train, *category.validation], options.image_size), checkpoints

    model, images, checkpoints = group.agree(prepare)
    train_indices = list(range(len(category.train)))
    validation_indices = list(range(len(category.train), len(images)))
    with stopping_signal(checkpoint is not None) as signal_number, deterministic_convolutions():
        history = _fit(model, images, train_indices, options, report, checkpoints, group, signal_number)

    detector = Detector(model.eval(), options.scoring)
    if group.is_first:
        source = "validation" if validation_indices else "train"
        status(f"calibrating on the {source} images")
        batches = _Batches(images, validation_indices or train_indices, options.batch_size)
        detector.calibrate(batches, source, images.exposures)
        for warning in detector.calibration.warnings:
            status(f"warning: {warning}")
    return detector, history


class Trainer:
    """The students' losses and their optimiser: what one training step is.

    Args:
        model: on its device.
        options: the recipe.
        group: the processes that train together.
    """

    def __init__(self, model: DSKD, options: TrainingOptions, group: Group = ALONE) -> None:
        self.model = model.train()
        self.precision = options.precision
        self.local_loss_fn = make_loss(options.local_loss, options.temperature)
        self.global_loss_fn = make_loss(options.global_loss, options.temperature)
        self._forward: Callable[[torch.Tensor], Features] = model
        if group.size > 1:
            synchronise_batch_norm(model)
            with warnings.catch_warnings():
                # The name that torch before 2.13 has, too; later ones warn of it.
                warnings.simplefilter("ignore", FutureWarning)
                # Buffers are the same everywhere: all of them come from the synchronised statistics.
                self._forward = DistributedDataParallel(model, broadcast_buffers=False)
        if options.compile:
            self._forward = torch.compile(self._forward)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        # On a CPU the fused optimiser copies what does not lie in the order of its dimensions, as channels_last weights
        # do not: a fifth of a step. To Adam all numbers are alike, so it gets views that lie in order.
        self._views = [_in_order(p.detach()) for p in self._parameters]
        self.optimizer = torch.optim.Adam(self._views, lr=options.lr, betas=(0.5, 0.999), fused=True)

    def step(self, batch: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Train on RGB images (B, 3, S, S), float in [0, 1].

        Args:
            batch: the images.
            weight: of the loss; that of a part of a batch is the part's share, times the number of parts, since
                gradients are averaged over the parts.

        Returns:
            The loss of each student there is, float32, in the order of `model.students`.
        """
        # Both hold the last step's gradients; neither is to keep them alive through this one.
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        with numerics(self.precision, batch.device):
            features = self._forward(batch)
            losses = [
                loss_fn(student, features.teacher)
                for loss_fn, student in (
                    (self.local_loss_fn, features.local_student),
                    (self.global_loss_fn, features.global_student),
                )
                if student is not None
            ]
            loss = sum(losses) * weight
        loss.backward()
        for view, parameter in zip(self._views, self._parameters, strict=True):
            view.grad = None if parameter.grad is None else _in_order(parameter.grad)
        self.optimizer.step()
        return torch.stack(losses).detach()

    def state(self) -> dict[str, torch.Tensor]:
        """All that a later training needs to go on: weights, statistics of batch norm, moments of Adam."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": tensor for name, tensor in moments.items()}
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            RuntimeError: it is another model's.
        """
        of_model, moments = {}, {}
        for key, tensor in tensors.items():
            kind, name = key.split(".", 1)
            if kind == "model":
                of_model[name] = tensor
            else:
                index, name = name.split(".")
                moments.setdefault(int(index), {})[name] = tensor
        self.model.load_state_dict(of_model)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


def _in_order(x: torch.Tensor) -> torch.Tensor:
    """A view of x that is contiguous, if x is so in either memory format."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 and not x.is_contiguous() else x


def _fit(
    model: DSKD,
    images: ImageStore,
    indices: list[int],
    options: TrainingOptions,
    report: Callable[[Progress], None],
    checkpoints: Checkpoints,
    group: Group,
    signal_number: Callable[[], int],
) -> list[Epoch]:
    device = model.teacher.mean.device
    augment = Augmentation.parse(options.augmentation)
    random = torch.Generator().manual_seed(options.seed)
    trainer = Trainer(model, options, group)
    steps_per_epoch = math.ceil(len(indices) / options.batch_size)
    at = Position([0.0] * len(model.students))
    if checkpoints.found is not None:
        at = checkpoints.restore(trainer, random)
        begun = len(at.history) + (at.seen > 0)
        if options.epochs < begun:
            raise UserError(f"the training is in epoch {begun} already: go on with --epochs {begun} or more")
        # The rest of an epoch in batches of another size leaves another last one.
        _check_batches(model, len(indices) - at.seen or len(indices), options, group)

    def mean_losses() -> dict[str, float | None]:
        by_name = {name: total / at.seen for name, total in zip(model.students, at.totals, strict=True)}
        return {"local_loss": by_name.get("local"), "global_loss": by_name.get("global")}

    def diverged(what: str) -> UserError:
        step = math.ceil(at.seen / options.batch_size)
        return UserError(
            f"{what} at epoch {len(at.history) + 1}, step {step}{checkpoints.told()}: lower --lr (now {options.lr:g})"
            + (" or use --precision fp32" if options.precision != "fp32" else "")
        )

    while len(at.history) < options.epochs:
        if at.seen == 0:
            at.order = torch.randperm(len(indices), generator=random).tolist()
        started = time.perf_counter() - at.seconds
        while at.seen < len(indices):
            if options.schedule == "cosine":
                done = (len(at.history) + at.seen / len(indices)) / options.epochs
                for parameters in trainer.optimizer.param_groups:
                    parameters["lr"] = options.lr * (1 + math.cos(math.pi * done)) / 2
            chosen = at.order[at.seen : at.seen + options.batch_size]
            with _clear_errors(options, group):
                # Random numbers are drawn for the whole batch, so that an image gets the same ones in any group.
                batch = augment(to_float(images.batch(indices[i] for i in chosen), device), random)
                part = batch[group.share(len(batch))]
                losses = trainer.step(part, group.size * len(part) / len(chosen))
            sums = losses.double().cpu() * len(part)
            *sums, stop = group.add(torch.cat([sums, torch.tensor([float(signal_number() > 0)])])).tolist()
            at.seen += len(chosen)
            if not all(map(math.isfinite, sums)):
                told = ", ".join(f"{name} {x / len(chosen):.3g}" for name, x in zip(model.students, sums, strict=True))
                raise diverged(f"the loss is no longer finite ({told})")
            at.totals = [total + x for total, x in zip(at.totals, sums, strict=True)]
            at.seconds = time.perf_counter() - started
            steps_done = len(at.history) * steps_per_epoch + math.ceil(at.seen / options.batch_size)
            report(
                Progress(
                    steps_done,
                    options.epochs * steps_per_epoch,
                    len(at.history) + 1,
                    **mean_losses(),
                    images_per_second=at.seen / at.seconds,
                )
            )
            if group.is_first and (stop or checkpoints.is_due()):
                if not _is_sound(model, part):
                    raise diverged("the students' features are no longer finite")
                checkpoints.save(trainer, at, random)
            if stop and not group.is_first:
                raise PeerFailed
            if stop:
                raise TrainingStopped(
                    f"stopped after step {steps_done} of {options.epochs * steps_per_epoch}, in epoch "
                    f"{len(at.history) + 1}, and saved: go on with `dskd-fast train --resume {checkpoints.run}`",
                    signal_number() or signal.SIGTERM,
                )
        epoch = Epoch(**mean_losses(), images_per_second=at.seen / at.seconds)
        for name in ("local_loss", "global_loss"):
            first = getattr(at.history[0] if at.history else epoch, name)
            if first is not None and getattr(epoch, name) > _EXPLODED * first:
                raise diverged(
                    f"the {name.replace('_', ' ')} has grown from {first:.3g} in the first epoch to "
                    f"{getattr(epoch, name):.3g}"
                )
        at = Position([0.0] * len(model.students), [*at.history, epoch])
    return at.history


def _is_sound(model: DSKD, images: torch.Tensor) -> bool:
    """Whether the students still give finite features, so that their state is worth keeping.

    The loss of the step just taken does not tell: it was computed before the weights changed.
    """
    model.eval()
    with torch.inference_mode(), numerics("fp32", images.device):
        features = model(images)
    model.train()
    students = (features.local_student, features.global_student)
    return all(bool(torch.isfinite(level).all()) for levels in students for level in levels or ())


def _check_batches(model: DSKD, n: int, options: TrainingOptions, group: Group) -> None:
    """Raise UserError for a number of images that leaves a batch too small to be trained on."""
    last = n % options.batch_size or options.batch_size
    if last < group.size:
        raise UserError(
            f"{n} training images in batches of {options.batch_size} leave a last batch of {last} for {group.size} "
            "processes: use another --batch-size or fewer processes"
        )
    if options.image_size // (2 * model.teacher.levels[2].stride) == 1 and last == 1:
        raise UserError(
            f"{n} training images in batches of {options.batch_size} leave a batch of one, whose embedding at image "
            f"size {options.image_size} is a single value per channel, which batch norm cannot train on: use a larger "
            f"--image-size{' or another --batch-size' if n > 1 else ''}"
        )


@contextlib.contextmanager
def _clear_errors(options: TrainingOptions, group: Group) -> Iterator[None]:
    """Say in the user's words why a training step failed, where PyTorch says it in its own."""
    try:
        with contextlib.nullcontext() if group.size == 1 else connected():
            yield
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if is_out_of_memory(error):
            size = options.batch_size
            smaller = f"--batch-size {size // 2}" if size > 1 else "a smaller --image-size"
            told = f"the memory is too small for a training step with batches of {size}: try {smaller}"
        elif options.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            told = f"torch.compile cannot compile the training here ({reason}): leave --compile out"
        else:
            raise
        raise UserError(told) from None


class _Batches:
    """Batches of uint8 images that can be gone through again."""

    def __init__(self, images: ImageStore, indices: list[int], batch_size: int) -> None:
        self.images = images
        self.indices = indices
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in range(0, len(self.indices), self.batch_size):
            yield self.images.batch(self.indices[i : i + self.batch_size])
