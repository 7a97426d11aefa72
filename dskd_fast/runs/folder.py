"""The run folder: all of a training run, enough to use it on another machine without the data.

config.json             every option, the category, versions, seed, commit
checkpoint.safetensors  the state of the training, until it has finished
weights.safetensors     teacher and students
calibration.json        normalisation statistics and decision threshold, and which of the next is theirs
scores*.safetensors     what calibrated scores are made of, learned from normal images
history.json            losses and speed per epoch
metrics.json            figures, written by `evaluate`
scores.csv              scores of each test image, written by `evaluate`
"""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import dskd_fast
from dskd_fast.data.category import Category
from dskd_fast.data.layout import open_category
from dskd_fast.detection.calibration import Calibration
from dskd_fast.detection.detector import Detector, calibration_of
from dskd_fast.device import resolve_device
from dskd_fast.errors import UserError
from dskd_fast.files import checksum_of, in_shell, is_half_written, load_tensors, save_tensors, unwritable, write_file
from dskd_fast.models.dskd import branches_of
from dskd_fast.models.folding import round_weights
from dskd_fast.runs.history import Epoch
from dskd_fast.runs.options import ADDED_OPTIONS, TrainingOptions
from dskd_fast.versions import commit, versions

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
CALIBRATION = "calibration.json"
SCORES = "scores.safetensors"
HISTORY = "history.json"
METRICS = "metrics.json"
CHECKPOINT = "checkpoint.safetensors"
_LOCK = ".dskd_fast.lock"

_FORMAT = 1


@contextmanager
def claimed(folder: Path, *, is_new: bool) -> Iterator[None]:
    """Have a run folder for this process alone while it trains.

    Args:
        folder: of the run.
        is_new: make it, or take it if it is there and empty. After an error nothing of it is left, unless it holds the
            state of a training by then.

    Raises:
        UserError: another process trains in it, it is new and has content, or it cannot be written.
    """
    lock = FileLock(folder / _LOCK)
    try:
        existed = folder.is_dir()
        if is_new and os.path.lexists(folder) and not existed:
            raise UserError(f"{folder} already exists: choose another name, or move it away")
        if is_new and not existed:
            folder.mkdir(parents=True, exist_ok=True)
        # Before a lock is put into it: this may be anybody's folder.
        others = [entry for entry in folder.iterdir() if entry.name != _LOCK]
        if is_new and others and not (folder / _LOCK).exists():
            raise UserError(_in_the_way(folder))
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"another process is training in {folder}: wait until it has finished, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise unwritable(folder, error if isinstance(error, OSError) else OSError(str(error))) from error
    is_ours = False
    try:
        half_written = [entry for entry in folder.iterdir() if is_half_written(entry)]
        # Another process may have come, trained and gone in between.
        if is_new and {entry.name for entry in folder.iterdir()} - {_LOCK, *(entry.name for entry in half_written)}:
            raise UserError(_in_the_way(folder))
        for entry in half_written:
            entry.unlink()
        is_ours = True
        yield
    except BaseException:
        if is_new and is_ours and not (folder / CHECKPOINT).exists() and not is_finished(folder):
            with contextlib.suppress(OSError):
                for entry in folder.iterdir():
                    entry.unlink()
                if not existed:
                    folder.rmdir()
        raise
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        lock.release()


def _in_the_way(folder: Path) -> str:
    is_unfinished = (folder / CONFIG).exists() and not is_finished(folder)
    go_on = f", or go on with it by --resume {in_shell(folder)}" if is_unfinished else ""
    return f"{folder} already exists: choose another name, or move it away{go_on}"


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically. NaN and infinity are not JSON: they raise ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    # A path that is not valid Unicode has lone surrogates in Python; JSON can hold them as escapes.
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def begin_run(folder: Path, options: TrainingOptions, category: Category, holdout: float) -> None:
    """Write what is known of a training before it starts, which is enough to start it again."""
    write_json(folder / CONFIG, describe(options, category, holdout))


def save_run(folder: Path, detector: Detector, options: TrainingOptions, history: list[Epoch]) -> None:
    """Complete a run folder with the trained detector, and drop the state of its training."""
    if detector.model.is_folded:
        raise ValueError("folded networks have other weights than a run keeps")
    save_tensors(folder / WEIGHTS, detector.model.state_dict())
    write_json(folder / HISTORY, [dataclasses.asdict(epoch) for epoch in history])
    resolved = {"gccb": detector.model.gccb, "sigma": options.map_options.sigma}
    write_json(folder / CONFIG, read_config(folder) | {"resolved": resolved})
    # What makes it a finished run comes last.
    save_calibration(folder, detector, SCORES)
    (folder / CHECKPOINT).unlink(missing_ok=True)


def save_calibration(folder: Path, detector: Detector, scores: str) -> None:
    """Write a detector's calibration, and before it what calibrated scores are made of, into a file named `scores`.

    The first names the second, so that a process that is killed in between leaves the calibration that was there.
    """
    content = dataclasses.asdict(calibration_of(detector)) | {"weights": checksum_of(folder / WEIGHTS)}
    if detector.calibrated is not None:
        save_tensors(folder / scores, detector.calibrated.state_dict())
        content["scores"] = {"file": scores, "checksum": checksum_of(folder / scores)}
    write_json(folder / CALIBRATION, content)


def replace_calibration(folder: Path, detector: Detector, date: str) -> str:
    """Give a run a new calibration; the one that was there is kept as calibration-DATE.json, whose name is returned."""
    names = itertools.chain([date], (f"{date}-{number}" for number in itertools.count(2)))
    # Of two within a second the later has another name.
    date = next(name for name in names if not (folder / f"{Path(CALIBRATION).stem}-{name}.json").exists())
    kept = f"{Path(CALIBRATION).stem}-{date}.json"
    write_json(folder / kept, read_json(folder / CALIBRATION))
    save_calibration(folder, detector, f"{Path(SCORES).stem}-{date}.safetensors")
    return kept


def describe(options: TrainingOptions, category: Category, holdout: float) -> dict[str, Any]:
    """What a run's config.json holds."""
    return {
        "format": _FORMAT,
        "category": category.name,
        "layout": category.layout,
        "data_root": str(category.root.absolute()),
        "n_images": category.n_images,
        "images": category.fingerprint,
        "validation_source": category.validation_source,
        "holdout": holdout,
        "unused": category.unused_summary,
        "held_out": [path.name for path in category.validation] if category.validation_source == "holdout" else [],
        "options": dataclasses.asdict(options),
        "versions": {
            "dskd_fast": dskd_fast.__version__,
            "python": platform.python_version(),
            **versions("torch", "torchvision", "timm", "numpy"),
        },
        "platform": platform.platform(),
        "device": str(resolve_device(options.device)),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def is_finished(folder: Path) -> bool:
    return (folder / CALIBRATION).is_file()


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
            f"{folder / CONFIG} has format {found!r}, but this version reads format {_FORMAT}: use the version of "
            "dskd-fast that wrote it"
        )
    n_images = config.get("n_images")
    valid = {name: isinstance(config.get(name), str) for name in ("category", "data_root")}
    valid["changes"] = isinstance(config.get("changes", []), list)
    valid["n_images"] = isinstance(n_images, dict) and {"train", "validation"} <= n_images.keys()
    for name, is_valid in valid.items():
        if not is_valid:
            raise UserError(f"{folder / CONFIG} has no valid {name}: train again, or restore the file")
    return config


def read_finished(folder: Path) -> dict[str, Any]:
    """A run's config.json, where the training has finished.

    Raises:
        UserError: it has not, or as `read_config` does.
    """
    config = read_config(folder)
    if not is_finished(folder) and ((folder / CHECKPOINT).is_file() or not (folder / WEIGHTS).is_file()):
        raise UserError(
            f"the training of {folder} has not finished: wait for it, or if it does not run any more, go on with it by "
            f"`dskd-fast train --resume {in_shell(folder)}`"
        )
    return config


def read_options(folder: Path, config: dict[str, Any]) -> tuple[TrainingOptions, float]:
    """The options and the holdout of a run's config.json.

    Raises:
        UserError: they have been edited.
    """
    try:
        # One that is missing is not its default: a later version may have another.
        options = ADDED_OPTIONS | config["options"]
        missing = [field.name for field in dataclasses.fields(TrainingOptions) if field.name not in options]
        if missing:
            raise UserError(f"no {', '.join(missing)} among the options")
        holdout = config["holdout"]
        if not 0 <= holdout < 1:
            raise UserError(f"holdout {holdout}")
        return TrainingOptions(**options), holdout
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{folder / CONFIG} was not written by this program ({error}): train again, or restore the file"
        ) from None


def load(run: str | os.PathLike[str], device: str = "auto") -> Detector:
    """The trained detector of a run folder: networks, statistics and threshold.

    `load("my_run").predict("image.png")[0].score`; see `dskd_fast.detection.detector.Detector.predict`.

    Args:
        run: folder that `dskd-fast train` wrote.
        device: "auto" (the GPU if there is one), "cpu" or "cuda".

    Raises:
        UserError: the folder is not a complete run, or there is no such device.
    """
    return load_run(Path(run), device)[0]


def load_run(
    folder: Path, device: str = "auto", precision: str | None = None
) -> tuple[Detector, TrainingOptions, dict[str, Any]]:
    """Read a run folder: the detector on `device`, its options, and its config.

    Args:
        folder: of the run.
        device: see `load`.
        precision: in which it is to be calibrated anew; None takes that of its calibration.

    Raises:
        UserError: the folder is not a complete run.
    """
    detector, options, config = read_run(folder, device)
    detector.model.fold()
    detector.model.eval()  # what fold made, too
    detector.precision = precision or detector.precision
    if detector.precision == "bf16":
        round_weights(detector.model, torch.bfloat16)
    return detector, options, config


def read_run(folder: Path, device: str = "auto") -> tuple[Detector, TrainingOptions, dict[str, Any]]:
    """As `load_run`, with the networks as they were trained: not folded, in float32, and fit to be saved again."""
    config = read_finished(folder)
    options, _ = read_options(folder, config)
    students = branches_of(options.students)
    try:
        content = read_json(folder / CALIBRATION)
        of_weights = content.pop("weights", None)  # which earlier versions did not record
        of_scores = content.pop("scores", None)
        if isinstance(of_scores, dict):
            # Earlier versions did not record it, and calibrated again by other images alone.
            content.setdefault("by_other_images", of_scores.get("file", SCORES) != SCORES)
        calibration = Calibration.from_dict(content, students)
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(
            f"{folder / CALIBRATION} was not written by this program ({error}): train again, or restore the file"
        ) from None
    try:
        model = options.networks(pretrained=False)
    except UserError as error:
        raise UserError(f"the networks of {folder / CONFIG} cannot be built: {error}") from None
    weights = folder / WEIGHTS
    try:
        model.load_state_dict(load_tensors(weights)[0])
        if of_weights not in (None, checksum_of(weights)):
            raise UserError(f"{folder / CALIBRATION} was made for other weights than {weights}")
    except FileNotFoundError:
        raise UserError(f"the run {folder} has no {WEIGHTS}: train again, or copy the whole folder") from None
    except UserError as error:
        raise UserError(f"{error}: train again, or restore the file") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{weights} belongs to another run ({reason[:200]}): train again, or restore the file"
        ) from None
    # torch states no types for both at once.
    model = model.to(resolve_device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    detector = options.detector(model)
    detector.calibration = calibration
    detector.precision = calibration.precision
    if detector.calibrated is not None:
        _load_scores(folder, of_scores, detector)
    return detector, options, config


def _load_scores(folder: Path, recorded: Any, detector: Detector) -> None:
    try:
        path = folder / Path(recorded["file"]).name
        tensors = load_tensors(path)[0]
        if recorded["checksum"] != checksum_of(path):
            raise ValueError(f"{path} is another calibration's")
        assert detector.calibrated is not None
        detector.calibrated.load(tensors)
        detector.calibrated.to(detector.device)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train again, or copy the whole run folder") from None
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(
            f"the scores of {folder / CALIBRATION} were not written by this program ({error}): train again, or restore "
            "the files"
        ) from None


def find_category(
    folder: Path, config: dict[str, Any], data_root: Path | None, *, holdout: float = 0, seed: int = 0
) -> Category:
    """The images that a run is about.

    Args:
        folder: of the run.
        config: its config.json.
        data_root: where the data is now: the data set's folder, or the category's own under whatever name.
        holdout, seed: as in training, where training images matter.

    Raises:
        UserError: it is not there.
    """
    if data_root is None:
        # The category's own folder, even where a folder in it has the same name.
        data_root, category = Path(config["data_root"]), None
        if not data_root.exists():
            raise UserError(f"the data of {folder} is not at {data_root} any more: say where it is with --data-root")
    else:
        data_root = data_root.expanduser()
        category = config["category"] if (data_root / config["category"]).is_dir() else None
    return open_category(data_root, category, holdout=holdout, seed=seed)


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
