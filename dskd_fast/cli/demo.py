"""The demo: synthetic data and a recipe that fit into a few minutes on two cores."""

from pathlib import Path
from typing import TypedDict

from dskd_fast.data.category import Category
from dskd_fast.data.layout import open_category
from dskd_fast.data.synthetic import CATEGORY, make_screw_bag
from dskd_fast.device import has_fast_bf16, keep_freed_memory, resolve_device
from dskd_fast.models.teacher import LITE
from dskd_fast.runs.options import TrainingOptions, recipe_options


class _Counts(TypedDict):
    n_train: int
    n_validation: int
    n_test_good: int
    n_structural: int
    n_logical: int


_COUNTS: _Counts = {"n_train": 96, "n_validation": 16, "n_test_good": 24, "n_structural": 24, "n_logical": 33}


def make_data(folder: Path, seed: int) -> Category:
    """Draw the data set into `folder`, or take it from there if it is this one already."""
    keep_freed_memory()  # a sixth of the time, for drawing's many large arrays; the training has it, too
    make_screw_bag(folder, **_COUNTS, seed=seed)
    return open_category(folder, CATEGORY)


def options_for_demo(device: str, seed: int) -> TrainingOptions:
    """The recipe "fast" on small images, with the bundled teacher, a narrow condensing block and fewer steps."""
    given = {
        "teacher": LITE,
        "image_size": 128,
        "gccb": 256,
        "epochs": 24,
        "precision": "bf16" if has_fast_bf16(resolve_device(device)) else "fp32",
        "device": device,
        "seed": seed,
    }
    return TrainingOptions(**recipe_options("fast", _COUNTS["n_train"], given))
