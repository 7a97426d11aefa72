"""The commands of a station on a line: watch and serve."""

import argparse
import sys

from dskd_fast.cli.display import messages
from dskd_fast.detection.detector import Detector
from dskd_fast.errors import UserError
from dskd_fast.evaluation.evaluate import threshold_of
from dskd_fast.progress import log
from dskd_fast.runs.folder import load_run
from dskd_fast.station.journal import DECISIONS
from dskd_fast.station.watch import watch as watch_folder
from dskd_fast.training.checkpoints import stopping_signal


def watch(arguments: argparse.Namespace) -> int:
    detector, _, _ = load_run(arguments.run, arguments.device)
    threshold = _threshold(detector, arguments)
    with (
        messages(is_aside=True),
        stopping_signal(True, "stopping after the image in hand (Ctrl-C again: at once)") as is_stopped,
    ):
        log.info("watching %s, decisions in %s; Ctrl-C or SIGTERM ends it", arguments.folder, arguments.out / DECISIONS)
        watch_folder(
            detector,
            arguments.folder,
            arguments.out,
            threshold=threshold,
            emit=lambda line: print(line, flush=True),
            is_stopped=is_stopped,
            overlays=arguments.overlays,
            overlay_format=arguments.overlay_format,
            poll=arguments.poll,
        )
    sys.stdout.flush()
    return 0


def _threshold(detector: Detector, arguments: argparse.Namespace) -> float:
    threshold = threshold_of(detector, arguments.threshold)
    if threshold is None:
        raise UserError(
            f"{arguments.run} has no threshold to decide with, since it had no validation images: pass --threshold"
        )
    return threshold
