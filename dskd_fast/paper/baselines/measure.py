"""Fitting a method on a category and scoring its maps, each only if it is not there yet.

FOLDER/arrays.safetensors   what the fitted method keeps, and what it was fitted on and by
FOLDER/metrics.json         its figures
FOLDER/scores.csv           the score of each test image
"""

import contextlib
import csv
import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dskd_fast.data.category import Category, GroundTruth
from dskd_fast.data.store import ImageStore
from dskd_fast.detection.detector import to_float
from dskd_fast.detection.findings import map_at_size
from dskd_fast.device import deterministic_convolutions, resolve_device
from dskd_fast.errors import TrainingStopped, UserError
from dskd_fast.evaluation.evaluate import maps_with_truth, remarks
from dskd_fast.files import load_tensors, save_tensors, write_file
from dskd_fast.metrics.maps import score_maps
from dskd_fast.models.teacher import Teacher
from dskd_fast.paper.baselines import make_baseline
from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.protocol import Baseline, Images
from dskd_fast.progress import Progress, log
from dskd_fast.runs import folder as runs
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training.checkpoints import stopping_signal
from dskd_fast.training.distributed import ALONE
from dskd_fast.training.teacher import FrozenTeacher, KeptFeatures

ARRAYS = "arrays.safetensors"
# Of methods whose earlier arrays are of other networks: those are fitted anew.
_VERSIONS = {"gcad": 2}
# What the recipe has that no method of these depends on.
_OF_STUDENTS = ("gccb", "stage4_init", "lr", "schedule", "warmup", "averaging", "temperature", "students")
_OF_SCORING = ("local_loss", "global_loss", "scoring", "sigma", "filter_maps", "align_corners")
_OF_RUNNING = ("augmentation", "precision", "compile", "device")


class Measured:
    """A category's images, and the teacher's features of them, which all methods share.

    Args:
        category: with training and test images.
        recipe: gives teacher, image size, number of steps, batch size, device and seed.

    Attributes:
        of: both, as they were given.

    Raises (at the first use):
        ImageError: names every image that cannot be read.
        UserError: a device, teacher or weights that cannot be had.
    """

    def __init__(self, category: Category, recipe: TrainingOptions) -> None:
        self.of = category, recipe
        self.category = category
        self.recipe = dataclasses.replace(recipe, precision="fp32", compile=False)
        self.device = resolve_device(recipe.device)
        self._paths = [*category.train, *category.validation, *(item.path for item in category.test)]

    @cached_property
    def store(self) -> ImageStore:
        """All images: to train on, to validate with, to test with."""
        return ImageStore(self._paths, self.recipe.image_size, bits=self.recipe.bits)

    @cached_property
    def teacher(self) -> Teacher:
        # What a method draws must not depend on which method asked for the teacher first.
        with torch.random.fork_rng(devices=[]):
            return Teacher(self.recipe.teacher)

    @property
    def splits(self) -> tuple[Images, Images, Images]:
        """Images to train on, to validate with (the former where there are no others), and to test with."""
        a, b = len(self.category.train), len(self.category.train) + len(self.category.validation)
        numbers = range(a), range(a, b) or range(a), range(b, len(self._paths))
        train, validation, test = (Images(self._pixels, self._features, chosen) for chosen in numbers)
        return train, validation, test

    def _pixels(self, numbers: Sequence[int]) -> torch.Tensor:
        return to_float(self.store.batch(numbers), self.device)

    def _features(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        if self._kept is not None:
            return self._kept.of(numbers)
        return self._network(self._pixels(numbers))

    @cached_property
    def _network(self) -> FrozenTeacher:
        with torch.random.fork_rng(devices=[]):
            self.teacher.load_weights(self.recipe.teacher_weights)
        return FrozenTeacher(self.teacher.to(self.device), self.recipe)

    @cached_property
    def _kept(self) -> KeptFeatures | None:
        # Of a GPU the memory is for what is trained.
        return self._network.features_of(self.store, len(self.store), ALONE) if self.device.type == "cpu" else None


def measure(
    name: str, measured: Measured, folder: Path, fingerprint: str, progress: Progress
) -> tuple[dict[str, Any], bool]:
    """The figures of a method, as `dskd_fast.evaluation.evaluate.evaluate` gives them, and whether they are new.

    Args:
        name: see `make_baseline`.
        measured: the images.
        folder: of what is kept.
        fingerprint: of the test images and masks.
        progress: called as progress(stage, done, total).

    Returns:
        "auroc", "spro", "spro_at", "absent", "warnings", "bad_masks" and "unused" as there; "seconds" that fitting and
        maps took.

    Raises:
        UserError: what fails.
        TrainingStopped: by a signal; this method then begins anew.
    """
    identity = _identity(name, measured)
    found = None
    with contextlib.suppress(UserError):  # missing or damaged: they are computed again
        found = runs.read_json(folder / runs.METRICS)
    if isinstance(found, dict) and found.get("evaluated") == fingerprint and found.get("fitted") == identity:
        return found, False
    method, seconds = _fitted(name, measured, folder / ARRAYS, identity, progress)
    started = time.perf_counter()
    figures = _figures(method, measured, folder, progress)
    figures |= {"seconds": {"fit": seconds, "maps": time.perf_counter() - started}}
    figures |= {"fitted": identity, "evaluated": fingerprint}
    runs.write_json(folder / runs.METRICS, figures)
    return figures, True


def _identity(name: str, measured: Measured) -> dict[str, Any]:
    """What decides the arrays of a method: its name, the recipe as far as it counts, and the images."""
    left_out = {*_OF_STUDENTS, *_OF_SCORING, *_OF_RUNNING}
    options = {key: value for key, value in dataclasses.asdict(measured.recipe).items() if key not in left_out}
    version = {"version": _VERSIONS[name]} if name in _VERSIONS else {}
    return {"method": name, "options": options, "images": measured.category.fingerprint} | version


def _fitted(
    name: str, measured: Measured, file: Path, identity: dict[str, Any], progress: Progress
) -> tuple[Baseline, float]:
    """The method, fitted now or before, and the seconds that fitting took."""
    recipe = measured.recipe
    train, validation, _ = measured.splits
    with torch.random.fork_rng(devices=[]), stopping_signal(True) as stopped, deterministic_convolutions():
        torch.manual_seed(recipe.seed)
        method = make_baseline(name, recipe.image_size, measured.teacher, recipe.teacher_weights).to(measured.device)
        if file.is_file():
            try:
                arrays, state = load_tensors(file)
            except UserError as error:
                log.info("%s, so %s is fitted anew", error, name)
            else:
                if state["identity"] == identity:
                    method.restore(arrays)
                    return method, state["seconds"]
        started = time.perf_counter()
        steps = recipe.epochs * math.ceil(len(train) / recipe.batch_size)
        fitting = Fitting(steps, recipe.batch_size, recipe.seed, progress, stopped)
        try:
            method.fit(train, validation, fitting)
        except TrainingStopped as stop:
            raise TrainingStopped(f"{stop}: what is done is saved, {name} begins anew", stop.signal) from None
    seconds = time.perf_counter() - started
    save_tensors(file, method.state_dict(), {"identity": identity, "seconds": seconds})
    return method, seconds


@torch.no_grad()
def _figures(method: Baseline, measured: Measured, folder: Path, progress: Progress) -> dict[str, Any]:
    """The figures of a fitted method; the scores go into a file."""
    category, (_, _, test) = measured.category, measured.splits
    maps = np.empty((len(test), measured.recipe.image_size, measured.recipe.image_size), np.float32)
    scores = np.empty(len(test))
    done = 0
    for batch in test.batches(measured.recipe.batch_size):
        found = method.maps(batch)
        stop = done + len(batch)
        scores[done:stop] = method.score(batch, found).double().cpu().numpy()
        maps[done:stop] = found.float().cpu().numpy()
        done = stop
        progress("computing maps", done, len(test))
    if not (np.isfinite(maps).all() and np.isfinite(scores).all()):
        raise UserError("the maps have NaN or infinite values, so the training diverged: leave the method out")
    truth = GroundTruth(category)
    sizes = measured.store.native_sizes[len(measured.store) - len(test) :]
    with closing(maps_with_truth(truth, [*maps], scores, sizes, map_at_size, progress)) as images:
        figures = score_maps(images)
    write_file(folder / "scores.csv", lambda path: _write_scores(path, category, scores))
    return {"category": category.name, **figures, **remarks(category, truth)}


def _write_scores(path: Path, category: Category, scores: np.ndarray) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "type", "score"])
        for item, score in zip(category.test, scores.tolist(), strict=True):
            writer.writerow([item.path.relative_to(category.root).as_posix(), item.kind, score])
