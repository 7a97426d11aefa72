"""A training and its run folder, from the first file to the last."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dskd_fast.data.category import Category, unused_sentences
from dskd_fast.detection.detector import Detector
from dskd_fast.errors import UserError
from dskd_fast.progress import log
from dskd_fast.runs import folder as runs
from dskd_fast.runs.folder import find_category
from dskd_fast.runs.history import TrainingState
from dskd_fast.runs.options import CHANGEABLE, TrainingOptions
from dskd_fast.training.distributed import ALONE, Group, is_launched
from dskd_fast.training.train import train

Report = Callable[[TrainingState], None]


def start_run(
    folder: Path,
    category: Category,
    options: TrainingOptions,
    *,
    holdout: float,
    report: Report = lambda _: None,
    group: Group = ALONE,
) -> Detector:
    """Train into a new run folder.

    Args:
        folder: must not exist, or be empty.
        category, options, report, group: see `dskd_fast.training.train.train`, whose errors it raises.
        holdout: the share of training images with which `category` was opened.
    """
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            if group.is_first:
                stack.enter_context(runs.claimed(folder, is_new=True))
                runs.begin_run(folder, options, category, holdout)

        group.agree(claim)
        return _train_and_save(folder, category, options, report, group)


def device_of(folder: Path) -> str:
    """The device of a run that is to go on, before the processes that do it have met.

    Raises:
        UserError: there is no run. One process of several leaves that to `resume_run`, which tells all of them.
    """
    if is_launched() and not (folder / runs.CONFIG).is_file():
        return TrainingOptions.device
    return runs.read_options(folder, runs.read_config(folder))[0].device


def resume_run(
    folder: Path,
    changes: dict[str, Any] | None = None,
    *,
    data_root: Path | None = None,
    report: Report = lambda _: None,
    group: Group = ALONE,
) -> Detector:
    """Go on with a training that was killed, stopped or failed, as if nothing had happened.

    Args:
        folder: of the run.
        changes: options to change from here on, of `CHANGEABLE`; config.json lists them.
        data_root: where the data is now.
        report, group: see `dskd_fast.training.train.train`, whose errors it raises.

    Raises:
        UserError: the training has finished, the images are others by name or content, or an option cannot be changed.
    """
    with contextlib.ExitStack() as stack:

        def claim() -> tuple[Category, TrainingOptions]:
            if group.size > 1 and not (folder / runs.CONFIG).is_file():
                raise UserError(
                    f"process {group.rank} of {group.size} finds no run in {folder}: have all machines see the same "
                    "run folder, or copy it to this place on each of them"
                )
            config = runs.read_config(folder)
            if runs.is_finished(folder):
                # Left by a process that was killed between its last two steps.
                with contextlib.suppress(OSError):
                    (folder / runs.CHECKPOINT).unlink(missing_ok=True)
                raise UserError(f"the training of {folder} has finished already: `evaluate` and `predict` take it")
            if group.is_first:
                stack.enter_context(runs.claimed(folder, is_new=False))
            options, holdout = runs.read_options(folder, config)
            category = find_category(folder, config, data_root, holdout=holdout, seed=options.seed)
            if not _has_same_images(folder, config, category):
                raise UserError(
                    f"the training and validation images in {category.root} are not those with which {folder} began "
                    f"({_count(config['n_images'])} then, {_count(category.n_images)} now; names and contents are "
                    "compared): restore them, or train again into another folder"
                )
            changed = {name: value for name, value in (changes or {}).items() if getattr(options, name) != value}
            fixed = [name for name in changed if name not in CHANGEABLE]
            if fixed:
                raise UserError(
                    f"{fixed[0]} of {folder} cannot change from {getattr(options, fixed[0])!r} to "
                    f"{changed[fixed[0]]!r} in the middle of a training: only {', '.join(CHANGEABLE)} can"
                )
            options = dataclasses.replace(options, **changed)
            record: dict[str, Any] = {
                "data_root": str(category.root.absolute()),
                "options": dataclasses.asdict(options),
            }
            # From here on contents are compared, also of a run that an earlier version began.
            record["images"] = category.fingerprint
            if changed:
                record["changes"] = [*config.get("changes", []), changed]
            if group.is_first and config | record != config:
                runs.write_json(folder / runs.CONFIG, config | record)
            return category, options

        category, options = group.agree(claim)
        # A copy of the run folder may not have the changes that the first process has recorded.
        options = group.of_first(options)
        return _train_and_save(folder, category, options, report, group)


def ensure_run(
    folder: Path,
    category: Category,
    options: TrainingOptions,
    *,
    holdout: float,
    report: Report = lambda _: None,
) -> bool:
    """Have a finished run: start it, go on with it, or find that it is there. True unless it was there.

    Raises:
        UserError: the folder holds a run with other options or images, which are compared by name and content.
    """
    if not (folder / runs.CONFIG).exists():
        start_run(folder, category, options, holdout=holdout, report=report)
        return True
    config = runs.read_config(folder)
    there, _ = runs.read_options(folder, config)
    # Where it runs is no part of what it is.
    others = [
        field.name
        for field in dataclasses.fields(options)
        if field.name != "device" and getattr(there, field.name) != getattr(options, field.name)
    ]
    if others:
        raise UserError(
            f"{folder} holds a run with {others[0]} {getattr(there, others[0])!r}, not "
            f"{getattr(options, others[0])!r}: choose another folder, or move it away"
        )
    if not _has_same_images(folder, config, category):
        raise UserError(f"{folder} was trained on other images than {category.root} has: move it away to train again")
    if runs.is_finished(folder):
        return False
    resume_run(folder, data_root=category.root, report=report)
    return True


def _has_same_images(folder: Path, config: dict[str, Any], category: Category) -> bool:
    """Whether a category has the images of a run, as well as the run's config.json can tell."""
    recorded = config.get("images")
    if isinstance(recorded, str) and ":" not in recorded:
        log.warning(
            "%s was begun by an earlier version, which recorded names and sizes of the images alone: other contents "
            "would not be noticed",
            folder,
        )
        return category.names_and_sizes == recorded
    return category.fingerprint == recorded


def _train_and_save(
    folder: Path, category: Category, options: TrainingOptions, report: Report, group: Group
) -> Detector:
    for sentence in unused_sentences(category.unused_summary):
        log.warning(sentence)
    detector, history = train(category, options, report, checkpoint=folder / runs.CHECKPOINT, group=group)
    if group.is_first:
        runs.save_run(folder, detector, options, history)
    return detector


def _count(n_images: dict[str, int]) -> str:
    return json.dumps({name: n_images[name] for name in ("train", "validation")})
