"""The run folder: all of a training run, enough to use it on another machine without the data.

config.json          every option, the category, versions, seed, commit
weights.safetensors  teacher and both students
calibration.json     normalisation statistics and decision threshold
history.json         losses and speed per epoch
metrics.json         figures, written by `evaluate`
scores.csv           scores of each test image, written by `evaluate`
"""

import dataclasses
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import timm
import torch
import torchvision

import dskd_fast
from dskd_fast.data.layout import Category
from dskd_fast.errors import UserError
from dskd_fast.files import unwritable, write_file
from dskd_fast.models import DSKD
from dskd_fast.workflow.detector import BRANCHES, Calibration, Detector, Statistics, Threshold
from dskd_fast.workflow.device import resolve_device
from dskd_fast.workflow.train import Epoch, TrainingOptions

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
CALIBRATION = "calibration.json"
HISTORY = "history.json"
METRICS = "metrics.json"

_FORMAT = 1


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that holds its files only when they are complete.

    Yields a temporary folder beside `target` (inside it, if it is there already and empty), made at once so that an
    unwritable place is known of before any work. On an error it is removed.

    Raises:
        UserError: `target` exists and is not an empty folder, or cannot be written.
    """
    try:
        if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{target} already exists: choose another name, or move it away")
        # Through a link to an empty folder, the run goes where the link leads.
        target = target.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        existed = target.is_dir()
        temporary = tempfile.TemporaryDirectory(
            prefix=f".{target.name[:200]}.",
            suffix=".partial",
            dir=target if existed else target.parent,
            ignore_cleanup_errors=True,
        )
    except OSError as error:
        raise unwritable(target, error) from error
    with temporary as name:
        content = Path(name, "content")
        content.mkdir()
        yield content
        try:
            if existed:
                # It may be a mount point or somebody's working directory: filled, not replaced. What makes it a run
                # comes last.
                for entry in sorted(content.iterdir(), key=lambda path: path.name == CONFIG):
                    entry.rename(target / entry.name)
            else:
                content.rename(target)
        except OSError as error:
            raise unwritable(target, error) from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically. NaN and infinity are not JSON: they raise ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    # A path that is not valid Unicode has lone surrogates in Python; JSON can hold them as escapes.
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def save_run(
    folder: Path, detector: Detector, options: TrainingOptions, category: Category, history: list[Epoch]
) -> None:
    """Write a trained detector into `folder`."""
    write_json(folder / CONFIG, describe(detector.model, options, category))
    state = {name: tensor.contiguous().cpu() for name, tensor in detector.model.state_dict().items()}
    write_file(folder / WEIGHTS, lambda temporary: safetensors.torch.save_file(state, temporary))
    write_json(folder / CALIBRATION, dataclasses.asdict(detector.calibration))
    write_json(folder / HISTORY, [dataclasses.asdict(epoch) for epoch in history])


def describe(model: DSKD, options: TrainingOptions, category: Category) -> dict[str, Any]:
    """What a run's config.json holds."""
    return {
        "format": _FORMAT,
        "category": category.name,
        "layout": category.layout,
        "data_root": str(category.root.absolute()),
        "n_images": category.n_images,
        "validation_source": category.validation_source,
        "held_out": [path.name for path in category.validation] if category.validation_source == "holdout" else [],
        "options": dataclasses.asdict(options),
        "resolved": {"gccb": model.gccb, "sigma": options.scoring.sigma},
        "versions": {
            "dskd_fast": dskd_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "numpy": numpy.__version__,
        },
        "platform": platform.platform(),
        "device": str(resolve_device(options.device)),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        UserError: not a run folder, or one of another version.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a run folder (it has no {CONFIG}): pass the folder that `train --out` wrote")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise UserError(
            f"{folder / CONFIG} has format {found}, but this version reads format {_FORMAT}: use the version of "
            "dskd-fast that wrote it"
        )
    for name in ("category", "data_root"):
        if not isinstance(config.get(name), str):
            raise UserError(f"{folder / CONFIG} has no {name}: train again, or restore the file")
    return config


def load_run(folder: Path, device: str = "auto") -> tuple[Detector, TrainingOptions, dict[str, Any]]:
    """Read a run folder: the detector on `device`, its options, and its config.

    Raises:
        UserError: the folder is not a complete run.
    """
    config = read_config(folder)
    try:
        options = TrainingOptions(**config["options"])
        content = read_json(folder / CALIBRATION)
        threshold = content.pop("threshold")
        calibration = Calibration(
            **content | {"statistics": {name: Statistics(**content["statistics"][name]) for name in BRANCHES}},
            threshold=None if threshold is None else Threshold(**threshold),
        )
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"the run {folder} has a {CONFIG} or {CALIBRATION} that was not written by this program ({error}): train "
            "again, or restore the files"
        ) from None
    model = DSKD(
        options.teacher,
        image_size=options.image_size,
        gccb=options.gccb,
        stage4_init=options.stage4_init,
        pretrained=False,
    )
    weights = folder / WEIGHTS
    try:
        model.load_state_dict(safetensors.torch.load_file(weights))
    except FileNotFoundError:
        raise UserError(f"the run {folder} has no {WEIGHTS}: train again, or copy the whole folder") from None
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{weights} is damaged or belongs to another run ({reason[:200]}): train again, or restore the file"
        ) from None
    model = model.to(resolve_device(device), memory_format=torch.channels_last)
    return Detector(model, options.scoring, calibration), options, config


def read_json(path: Path) -> Any:
    """Parse a JSON file of a run.

    Raises:
        UserError: missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train again, or copy the whole run folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): train again, or restore the file") from None


def _commit() -> str | None:
    """The commit of the program's own source, with "+changes" if it differs; None outside a checkout."""
    here = Path(dskd_fast.__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository.
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
