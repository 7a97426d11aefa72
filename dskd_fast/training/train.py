"""Training: read top to bottom, this is all there is to it (paper section 4.1)."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dskd_fast.data.augment import Augmentation
from dskd_fast.data.category import Category
from dskd_fast.data.store import ImageStore
from dskd_fast.detection.calibrate import calibrate_on
from dskd_fast.detection.detector import Detector, calibration_of, to_float
from dskd_fast.device import deterministic_convolutions, has_fast_bf16, keep_freed_memory, resolve_device
from dskd_fast.errors import PeerFailed, TrainingStopped, UserError
from dskd_fast.models import DSKD
from dskd_fast.progress import log
from dskd_fast.runs.history import Epoch, TrainingState
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training.checkpoints import Checkpoints, Position, owners, stopping_signal
from dskd_fast.training.checks import (
    check_batches,
    check_same_training,
    clear_errors,
    diverged,
    grown_loss,
    is_sound,
    notice_on_bits,
    warning_on_copies,
)
from dskd_fast.training.distributed import ALONE, Group
from dskd_fast.training.recipe import first_networks
from dskd_fast.training.teacher import KeptFeatures
from dskd_fast.training.trainer import Trainer


def train(
    category: Category,
    options: TrainingOptions,
    report: Callable[[TrainingState], None] = lambda _: None,
    *,
    checkpoint: Path | None = None,
    group: Group = ALONE,
) -> tuple[Detector, list[Epoch]]:
    """Train the students on a category's good images, then calibrate on its validation images.

    Args:
        category: from `dskd_fast.data.layout.open_category`.
        options: the recipe.
        report: called after every step. Stages and warnings go to the logger "dskd_fast".
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
        log.warning("this processor has no bf16 multiplication: in fp32 the training would be faster")

    def prepare() -> tuple[DSKD, ImageStore, Checkpoints]:
        checkpoints = Checkpoints(checkpoint, *owners(category, options))
        log.info("building the networks with the teacher %s", options.teacher)
        model = first_networks(options, pretrained=checkpoints.found is None)
        # torch states no types for both at once.
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        check_batches(model, len(category.train), options, group)
        if group.is_first:
            checkpoints.check_room(model)
        n_train, n_validation = len(category.train), len(category.validation)
        log.info("reading the images: %d to train on, %d to validate with", n_train, n_validation)
        images = ImageStore([*category.train, *category.validation], options.image_size, bits=options.bits)
        if (notice := notice_on_bits(images.peaks, options.bits)) is not None:
            log.warning(notice)
        return model, images, checkpoints

    model, images, checkpoints = group.agree(prepare)
    check_same_training(category, options, checkpoints, group)
    train_indices = list(range(len(category.train)))
    with deterministic_convolutions():
        history = _fit(model, images, train_indices, options, report, checkpoints, group)

    detector = options.detector(model)
    if group.is_first:
        log.info("calibrating on the %s images", "validation" if category.validation else "train")
        calibrate_on(detector, images, len(train_indices), options.batch_size)
        calibration = calibration_of(detector)
        if (copied := warning_on_copies(category)) is not None:
            calibration.warnings.append(copied)
        for warning in calibration.warnings:
            log.warning("warning: %s", warning)
    return detector, history


def _fit(
    model: DSKD,
    images: ImageStore,
    indices: list[int],
    options: TrainingOptions,
    report: Callable[[TrainingState], None],
    checkpoints: Checkpoints,
    group: Group,
) -> list[Epoch]:
    device = model.teacher.mean.device
    augment = Augmentation.parse(options.augmentation)
    random = torch.Generator().manual_seed(options.seed)
    trainer = Trainer(model, options, group)
    steps_per_epoch = math.ceil(len(indices) / options.batch_size)
    n_steps = options.epochs * steps_per_epoch
    at = Position([0.0] * len(model.students))
    if checkpoints.found is not None:
        at = checkpoints.restore(trainer, random)
        begun = len(at.history) + (at.seen > 0)
        if options.epochs < begun:
            raise UserError(f"the training is in epoch {begun} already: go on with --epochs {begun} or more")
        # The rest of an epoch in batches of another size leaves another last one.
        check_batches(model, len(indices) - at.seen or len(indices), options, group)
    kept: KeptFeatures | None = None
    # Of a GPU the memory is for the batches, and the teacher takes a smaller part of its time. A signal ends this at
    # once: there is no step to finish.
    if augment == Augmentation() and options.epochs > 1 and device.type == "cpu":
        with clear_errors(options, group):
            kept = trainer.teacher.features_of(images, len(indices), group)

    def step(chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A step with these images: each student's loss, summed over the images of this process, and these."""
        # Random numbers are drawn for the whole batch, so that an image gets the same ones in any group.
        batch = augment(to_float(images.batch(chosen), device), random)
        share = group.share(len(batch))
        of_teacher = None if kept is None else kept.of(chosen[share])
        losses = trainer.step(batch[share], group.size * len(batch[share]) / len(chosen), of_teacher)
        return losses.double().cpu() * len(batch[share]), batch[share]

    with stopping_signal(checkpoints.path is not None) as signal_number:
        while len(at.history) < options.epochs:
            if at.seen == 0:
                at.order = torch.randperm(len(indices), generator=random).tolist()
            started = time.perf_counter() - at.seconds
            while at.seen < len(indices):
                done = (len(at.history) + at.seen / len(indices)) / options.epochs
                trainer.set_progress(done, 1 / n_steps)
                chosen = [indices[i] for i in at.order[at.seen : at.seen + options.batch_size]]
                with clear_errors(options, group):
                    of_part, part = step(chosen)
                *sums, stop = group.add(torch.cat([of_part, torch.tensor([float(signal_number() > 0)])])).tolist()
                at.seen += len(chosen)
                if not all(map(math.isfinite, sums)):
                    means = [f"{name} {x / len(chosen):.3g}" for name, x in zip(model.students, sums, strict=True)]
                    raise diverged(f"the loss is no longer finite ({', '.join(means)})", at, options, checkpoints)
                at.totals = [total + x for total, x in zip(at.totals, sums, strict=True)]
                at.seconds = time.perf_counter() - started
                steps = len(at.history) * steps_per_epoch + math.ceil(at.seen / options.batch_size)
                report(
                    TrainingState(steps, n_steps, len(at.history) + 1, **dataclasses.asdict(at.epoch(model.students)))
                )
                if group.is_first and (stop or checkpoints.is_due()):
                    if not is_sound(model, part):
                        raise diverged("the students' features are no longer finite", at, options, checkpoints)
                    checkpoints.save(trainer, at, random)
                if stop and not group.is_first:
                    raise PeerFailed
                if stop:
                    raise TrainingStopped(
                        f"stopped after step {steps} of {n_steps}, in epoch {len(at.history) + 1}, and saved: go on "
                        f"with `dskd-fast train --resume {checkpoints.run}`",
                        signal_number() or signal.SIGTERM,
                    )
            epoch = at.epoch(model.students)
            if (growth := grown_loss(at.history[0] if at.history else epoch, epoch)) is not None:
                raise diverged(growth, at, options, checkpoints)
            at = Position([0.0] * len(model.students), [*at.history, epoch])
    trainer.finish()
    return at.history
