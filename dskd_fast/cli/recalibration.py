"""`dskd-fast recalibrate`."""

import argparse
import itertools
import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dskd_fast.choices import FALSE_ALARMS
from dskd_fast.cli.display import print_line
from dskd_fast.data.category import Category
from dskd_fast.data.contents import copies
from dskd_fast.data.listing import walk
from dskd_fast.data.store import ImageStore
from dskd_fast.detection.calibrate import Caught, calibrate_on, recalibrate, score_bad
from dskd_fast.detection.calibration import Threshold, is_above, threshold_from
from dskd_fast.detection.detector import Detector, calibration_of
from dskd_fast.detection.export import SUFFIXES
from dskd_fast.detection.findings import has_place
from dskd_fast.detection.scoring.parts import PARTS
from dskd_fast.device import has_fast_bf16
from dskd_fast.errors import UserError
from dskd_fast.runs import folder as runs

# Shares of good images called anomalous at which the share of bad ones that is found is told.
_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)


def run(arguments: argparse.Namespace) -> int:
    if arguments.choose_parts and arguments.bad is None:
        raise UserError("--choose-parts needs known bad images to choose by: give their folder with --bad")
    if arguments.good is None and arguments.precision is None:
        raise UserError("nothing to calibrate by: pass a folder of good images with --good, or another --precision")
    good = [] if arguments.good is None else _images(arguments.good, "--good")
    bad = [] if arguments.bad is None else _images(arguments.bad, "--bad")
    both = copies(bad, good)
    if both:
        raise UserError(
            f"{min(both)} is among the good and the bad images, as the same file or a copy: take it out of one of the "
            "folders"
        )
    known: list[Path] = []
    detector, options, config = runs.load_run(arguments.run, arguments.device, arguments.precision)
    if not good and calibration_of(detector).by_other_images:
        raise UserError(f"{arguments.run} is calibrated by other images: pass their folder with --good, too")
    if detector.precision == "bf16" and not has_fast_bf16(detector.device):
        print_line("warning: this processor has no bf16 multiplication: in fp32 it would be faster", style="yellow")
    own: Category | None = None
    try:
        own = runs.find_category(arguments.run, config, None, holdout=config["holdout"], seed=options.seed)
        known = copies(good, own.train)
    except UserError:
        if not good:
            raise
        print_line("not looked for: copies of training images among the good ones, since those are not where they were")
    if known:
        raise UserError(
            f"{len(known)} of the good images are copies of training images, such as {known[0]}: the students know "
            "them, so take others"
        )
    if arguments.choose_parts and detector.calibrated is None:
        raise UserError(f"{arguments.run} has the paper's scores, which have no parts: leave --choose-parts out")
    before = calibration_of(detector).threshold
    false_alarms = FALSE_ALARMS if arguments.false_alarms is None else arguments.false_alarms
    if good:
        recalibrate(detector, good, false_alarms=false_alarms)
    elif own is not None:
        if bad and not own.validation:
            raise UserError(f"{arguments.run} has no validation images to judge bad ones by: pass --good FOLDER, too")
        if arguments.false_alarms is not None and not own.validation:
            raise UserError(
                f"{arguments.run} has no validation images to set a threshold by: leave --false-alarms out, or pass "
                "--good FOLDER, too"
            )
        _calibrate_on_own(detector, own, config, options.batch_size, false_alarms)
    if bad:
        caught = score_bad(detector, bad)
        if arguments.choose_parts:
            _choose_parts(detector, caught, false_alarms)
        _print_caught(detector, caught)
    kept = runs.replace_calibration(arguments.run, detector, f"{datetime.now():%Y%m%d-%H%M%S}")
    calibration = calibration_of(detector)
    for warning in calibration.warnings:
        print_line(f"warning: {warning}", style="yellow")
    threshold = calibration.threshold
    was = "none" if before is None else f"{before.value:.4g}"
    if threshold is None:
        print_line(f"no threshold (it was {was}), since the run has no validation images")
    else:
        print_line(
            f"threshold {threshold.value:.4g} (it was {was}) from {threshold.n_images} good images, expected false "
            f"alarms {threshold.expected_false_alarm_rate:.2%}"
        )
    print_line(f"scores are in {calibration.precision} from now on")
    print_line(f"the calibration that was there is kept as {kept}")
    names = [runs.METRICS, *(f"model{suffix}" for suffix in SUFFIXES.values())]
    outdated = [name for name in names if (arguments.run / name).exists()]
    if outdated:
        print_line(
            f"of the calibration before, in {arguments.run}: {', '.join(outdated)}; evaluate or export again",
            style="yellow",
        )
    return 0


def _calibrate_on_own(
    detector: Detector, own: Category, config: dict[str, Any], batch_size: int, false_alarms: float
) -> None:
    if config.get("images") not in (own.fingerprint, own.names_and_sizes):
        raise UserError(
            f"the training and validation images in {own.root} are not those of the run: restore them, or pass a "
            "folder of good images with --good"
        )
    if detector.calibrated is not None:
        detector.calibrated.use(detector.calibrated.names)  # what was chosen by bad images was chosen for other scores
    images = ImageStore([*own.train, *own.validation], detector.model.image_size, bits=detector.bits)
    calibrate_on(detector, images, len(own.train), batch_size, false_alarms=false_alarms)


def _images(folder: Path, option: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: pass a folder of images with {option}")
    listings = list(walk(folder))
    images = [path for listing in listings for path in listing.images]
    others = [path for listing in listings for path in listing.others]
    if not images:
        raise UserError(f"{folder} holds no images: pass a folder of images with {option}")
    if others:
        print_line(
            f"not used: {len(others)} image files of formats that are not read, such as {others[0]}", style="yellow"
        )
    return images


class _Choice(NamedTuple):
    """Parts, and what they would find; the better choice is the larger one."""

    n_found: int
    n_parts: int
    weight: float
    parts: tuple[str, ...]
    threshold: Threshold


def _choose_parts(detector: Detector, caught: Caught, false_alarms: float) -> None:
    """Let the parts decide with which most bad images are above the threshold.

    Of equal choices the one with most parts, then the one whose parts are thought to find more (`PARTS`).
    """
    calibrated = detector.calibrated
    assert calibrated is not None
    choices = []
    for n in range(1, len(calibrated.names) + 1):
        for parts in itertools.combinations(calibrated.names, n):
            calibrated.use(parts)
            threshold = threshold_from(
                calibrated.scores_of(calibrated.left_out),
                calibrated.rounding(),
                false_alarms=false_alarms,
                are_left_out=True,
            )
            scores = _scores(detector, caught)
            n_found = int(is_above(scores, threshold.value).sum())
            weight = math.fsum(PARTS[name].weight for name in parts)
            choices.append(_Choice(n_found, n, weight, parts, threshold))
    chosen = max(choices, key=lambda choice: choice[:3])
    calibrated.use(chosen.parts)
    caught.parts["score"] = _scores(detector, caught)
    caught.decided_by[:] = calibrated.deciding(_values(detector, caught))
    if chosen.parts == calibrated.names:
        print_line("all parts decide: no choice of them finds more of the bad images")
        return
    calibration = calibration_of(detector)
    warning = (
        f"only {', '.join(chosen.parts)} decide: chosen by {len(caught.paths)} known bad images, so that figures on "
        "images like these say little"
    )
    detector.calibration = replace(
        calibration,
        threshold=chosen.threshold,
        chosen_parts=list(chosen.parts),
        warnings=[*calibration.warnings, warning],
    )


def _values(detector: Detector, caught: Caught) -> NDArray[np.float64]:
    return np.stack([caught.parts[name] for name in detector.parts], 1)


def _scores(detector: Detector, caught: Caught) -> NDArray[np.float64]:
    assert detector.calibrated is not None
    return detector.calibrated.scores_of(_values(detector, caught))


def _print_caught(detector: Detector, caught: Caught) -> None:
    threshold = calibration_of(detector).threshold
    assert threshold is not None
    scores = caught.parts["score"]
    found = is_above(scores, threshold.value)
    for i in np.argsort(scores):
        by = caught.decided_by[i]
        where = "" if by is None else f" by {by}" + ("" if has_place(by) else ", which has no place")
        print_line(f"{'found' if found[i] else 'MISSED':7}{where}  score {scores[i]:.4g}  {caught.paths[i]}")
    print_line(f"bad images found at the threshold: {found.sum()} of {len(found)}")
    if detector.calibrated is None:
        return
    print_line("what each part alone would find:")
    for i, name in enumerate(detector.parts):
        good = detector.calibrated.left_out[:, i]
        print_line(f"  {name:14} {_shares(good, caught.parts[name])}")
    good = detector.calibrated.scores_of(detector.calibrated.left_out)
    print_line(f"  {'all together':14} {_shares(good, scores)}")


def _shares(good: NDArray[np.float64], bad: NDArray[np.float64]) -> str:
    """The share of bad images above as many good ones as each rate allows; rates that they cannot tell are left out."""
    told = [rate for rate in _RATES if rate * (len(good) + 1) >= 1] or [1 / (len(good) + 1)]
    shares = [
        f"{np.mean(bad > np.sort(good)[::-1][int(rate * (len(good) + 1) + 1e-9) - 1]):.0%} at {rate:.3g} false alarms"
        for rate in told
    ]
    return ", ".join(shares)
