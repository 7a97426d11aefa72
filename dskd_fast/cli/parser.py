"""The arguments of every command, and their help."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

import dskd_fast
from dskd_fast.choices import (
    BITS_RANGE,
    EXPERIMENTS,
    EXPORT_FORMATS,
    HOLDOUT,
    LITE,
    METHODS,
    RECIPES,
    TEMPERATURE_RANGE,
)
from dskd_fast.cli import arguments, station_arguments, values
from dskd_fast.files import printable
from dskd_fast.runs.options import FAST_STEPS, RECIPE_OPTIONS

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


class _Parser(argparse.ArgumentParser):
    """A file's name that a shell has put in place of `*` may be taken for an option, and is then printed."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dskd-fast", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"dskd-fast {dskd_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, details: str = "", **settings: Any) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary + details,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )

    _add_train(
        command(
            "train",
            "Train on a category's good images and write a run folder.",
            "\n\nWith the teacher lite the recipe is fast, else the paper's. A data set has CATEGORY/train/good,\n"
            "optionally validation/good, test/TYPE and ground_truth/TYPE (MVTec LOCO AD's layout, or MVTec AD's).\n"
            "A plain folder of good images will do: without validation images a tenth of them is held out to set\n"
            "the threshold.\n\nOn several GPUs, or on the cores of several sockets:\n"
            "  torchrun --nproc-per-node K $(which dskd-fast) train ...",
            # What is not given is absent: a resumed run has values of its own.
            argument_default=argparse.SUPPRESS,
        )
    )

    evaluate = command(
        "evaluate",
        "Score a run on its category's test images: AUROC, sPRO, decisions.",
        "\n\nExits with 1 if masks cannot be used, which leaves their kind of anomaly without sPRO.",
    )
    arguments.add_run(evaluate)
    arguments.add_moved_data(evaluate)
    evaluate.add_argument(
        "--save-maps",
        type=values.path,
        metavar="DIR",
        help="write float32 TIFFs at native size as DIR/CATEGORY/test/TYPE/NNN.tiff, the layout of MVTec's evaluator",
    )
    arguments.add_threshold(evaluate)
    arguments.add_max_pixels(evaluate)
    arguments.add_device(evaluate)

    maps = command(
        "evaluate-maps",
        "Score saved anomaly maps of any method, or predictions of any model of anomalib: exact AUROC and sPRO.",
        "\n\nOf a folder the image score is the maximum of the map, as in MVTec's evaluator. (`evaluate` filters the "
        "map\nfirst, so its AUROC differs; sPRO is the same.)\n\n"
        "anomalib writes pictures alone, whose colours are no scores. Save its predictions of the whole test set:\n"
        "  torch.save(engine.predict(model, datamodule=datamodule), 'predictions.pt')\n"
        "and give that file, or one of dictionaries with image_path, anomaly_map and pred_score (texts, tensors).\n"
        "The image score is then pred_score, and maps are enlarged to the images' size. Nothing in the file is\n"
        "executed, and anomalib need not be installed.",
    )
    maps.add_argument(
        "maps",
        type=values.path,
        metavar="MAPS",
        help="folder with CATEGORY/test/TYPE/NNN.tiff, or file of anomalib's predictions",
    )
    arguments.add_data_root(maps)
    maps.add_argument("--category", required=True, metavar="C", help="the category to score")
    maps.add_argument("--out", type=values.path, metavar="F.json", help="also write the figures there")
    arguments.add_max_pixels(maps)

    predict = command(
        "predict",
        "Score images, decide, and draw heat maps.",
        "\n\nAn image is normal, anomalous, or suspect: much darker, brighter or flatter than the training images.\n"
        "Writes DIR/predictions.csv, DIR/predictions.jsonl and DIR/overlays. The column decided_by names the part of "
        "the\nscore that decided, part_NAME its value and those of the others (in the .jsonl: parts). condensed,\n"
        "global-means and teacher-means compare the image as a whole: they have no place in a map, and the overlay of "
        "an\nimage that they call anomalous shows the global student's.\n\n"
        "Exits with 1 if an image file could not be read (the others are still done). All image files of a folder "
        "are\nscored, but for overlays and maps of an earlier prediction, those in DIR included, and for ground_truth "
        "beside\ntest, which are listed as skipped.",
    )
    arguments.add_run(predict)
    predict.add_argument(
        "images", type=values.path, nargs="+", metavar="IMAGE_OR_FOLDER", help="image files or folders"
    )
    predict.add_argument(
        "--out",
        type=values.path,
        metavar="DIR",
        default=Path("predictions"),
        help="results folder (default: %(default)s)",
    )
    predict.add_argument("--save-maps", action="store_true", help="also write each map as DIR/maps/NAME.tiff, float32")
    arguments.add_overlays(predict)
    arguments.add_threshold(predict)
    arguments.add_max_pixels(predict)
    arguments.add_device(predict)

    station_arguments.add_watch(command)
    station_arguments.add_serve(command)

    recalibrate = command(
        "recalibrate",
        "Set a run's statistics and threshold by new good images, as of another lamp or camera, without training.",
        "\n\nWithout --good by the run's own images, for another --precision. The calibration that was there is kept as"
        "\ncalibration-DATE.json. Known bad images are only reported on, unless --choose-parts is given.",
    )
    arguments.add_run(recalibrate)
    recalibrate.add_argument(
        "--good", type=values.path, metavar="FOLDER", help="folder of good images; 99 can promise 1 %%"
    )
    recalibrate.add_argument(
        "--bad",
        type=values.path,
        metavar="FOLDER",
        help="folder of known bad images: which part finds which of them, and what share is found",
    )
    recalibrate.add_argument(
        "--false-alarms",
        type=values.rate,
        metavar="X",
        help="share of good images that may be called anomalous, such as 0.5%% (default: 1%%)",
    )
    recalibrate.add_argument(
        "--choose-parts",
        action="store_true",
        help="let only those parts decide with which most of the bad images are found; the run then says so, and "
        "figures on images like these say little",
    )
    arguments.add_scoring_precision(recalibrate)
    arguments.add_max_pixels(recalibrate)
    arguments.add_device(recalibrate)

    export = command(
        "export",
        "Write a run as one file that other programs run without dskd-fast.",
        "\n\nThe file takes uint8 RGB images (batch, 3, height, width) from 32 x 32 up and gives score, map and "
        "decision as\npredict does: resizing, normalisation and threshold are inside. It is checked against the run "
        'before it is kept.\nFormats other than torch need pip install "dskd-fast[onnx]", or "dskd-fast[openvino]".',
    )
    arguments.add_run(export)
    export.add_argument(
        "--format",
        choices=EXPORT_FORMATS,
        required=True,
        help="torch: a .pt2 for torch.export.load; onnx: an .onnx for ONNX Runtime and others; openvino: an .xml and "
        "a .bin beside it",
    )
    export.add_argument(
        "--out",
        type=values.path,
        metavar="FILE",
        help="the file, replaced if it exists (default: RUN/model.pt2, .onnx or .xml)",
    )
    arguments.add_threshold(export)

    report = command(
        "report",
        "Score runs on their test images and write the figures, curves and heat maps as one HTML page.",
        "\n\nWrites DIR/index.html, which needs no network and no other file.",
    )
    report.add_argument(
        "runs", type=values.path, nargs="+", metavar="RUN", help="run folders that train wrote, side by side"
    )
    report.add_argument(
        "--out",
        type=values.path,
        metavar="DIR",
        required=True,
        help="folder of the page, index.html, replaced if it exists",
    )
    arguments.add_moved_data(report)
    arguments.add_threshold(report)
    arguments.add_max_pixels(report)
    arguments.add_device(report)

    info = command("info", "Show what a run folder holds.")
    arguments.add_run(info)

    _add_reproduce(
        command(
            "reproduce",
            "Train what a table of the paper needs and print it with our figures beside the paper's.",
            "\n\nThe defaults are the paper's recipe. What is trained and evaluated is kept, so the same command goes "
            "on\nafter an interruption, and tables share what they have in common. Writes DIR/table-TABLE.txt, .md, "
            ".csv\nand .json, and heat maps (loco, mvtec-ad) or a plot (ablation-temperature). Exits with 2 if "
            "something\nfailed; the rest is still done. Calls for different categories may run side by side; one for "
            "all of them\nthen prints the table.",
            argument_default=argparse.SUPPRESS,
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
        "--out", type=values.path, metavar="DIR", default=Path("dskd-fast-demo"), help="folder (default: %(default)s)"
    )
    arguments.add_option(demo, "seed", "of the images and the training", values.natural, "K")
    arguments.add_device(demo)
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
    arguments.add_data_root(data)
    data.add_argument(
        "--holdout",
        type=values.share,
        metavar="X",
        help="share of the training images held out for validation where there is no validation folder "
        f"(default: {HOLDOUT})",
    )
    data.add_argument(
        "--augment",
        metavar="SPEC",
        help="auto: the category's setting, conservative for unknown ones; none; or such as "
        "hflip,vflip,rotate=3,brightness=0.1,contrast=0.1,saturation=0.1. A flip may turn a good image into a wrong "
        "one (default: auto)",
    )
    arguments.add_option(
        data,
        "bits",
        "how many bits the camera gives, {} to {}, where its files could hold more: 2^B - 1 is white, and an image "
        "with a larger value is refused, then and later; 8-bit images stay as they are (default: the full range of the "
        "file's type)".format(*BITS_RANGE),
        values.bits,
        "B",
    )
    arguments.add_max_pixels(data)

    model = parser.add_argument_group("model")
    arguments.add_teacher(model)
    arguments.add_option(
        model,
        "gccb",
        "channels to which the global branch condenses the image; 0: no condensing block "
        "(default: half of the embedding's, the paper's 1024)",
        values.natural,
        "G",
    )
    arguments.add_option(
        model,
        "stage4_init",
        "start of the global branch's embedding, on which the paper is silent; only a ResNet's has ImageNet weights",
    )
    arguments.add_option(model, "students", "one student alone is for comparison: it sees one kind of anomaly")

    recipe = parser.add_argument_group("recipe (each of its options can be given besides)")
    recipe.add_argument(
        "--recipe",
        choices=RECIPES,
        help=f"fast: {FAST_STEPS} steps, {_described(RECIPE_OPTIONS['fast'])}, and --augment auto augments no unknown "
        f"category; paper: the defaults below (default: fast for {LITE}, else paper)",
    )
    arguments.add_recipe(recipe)
    low, high = TEMPERATURE_RANGE
    arguments.add_option(recipe, "temperature", f"of the affinities, {low:g} to {high:g}", values.temperature, "T")
    arguments.add_option(
        recipe,
        "local_loss",
        "of the local student. cosine: per position, the paper's; flattened-cosine: one per image, as in RD4AD's code; "
        "contextual-affinity",
    )
    arguments.add_option(recipe, "global_loss", "of the global student, likewise")
    arguments.add_option(recipe, "seed", "of initial weights, order and augmentation", values.natural, "K")

    scoring = parser.add_argument_group("scoring (the paper is silent on all but the first)")
    arguments.add_scoring(scoring)

    running = parser.add_argument_group("running")
    arguments.add_device(running)
    arguments.add_precision(running)
    arguments.add_option(
        running,
        "compile",
        "train through torch.compile, which needs a C++ compiler and takes a minute or more before the first step",
        action=argparse.BooleanOptionalAction,
    )
    where = running.add_mutually_exclusive_group()
    where.add_argument(
        "--out",
        type=values.path,
        metavar="RUN",
        help="run folder, must not exist yet (default: runs/CATEGORY-DATE-TIME, with --all-categories runs/DATA-ROOT)",
    )
    where.add_argument(
        "--resume",
        type=values.path,
        metavar="RUN",
        help="go on with a training that was killed, stopped or failed. --data-root, --epochs, --batch-size, --lr, "
        "--precision, --compile and --device may be others than before",
    )


def _described(options: dict[str, Any]) -> str:
    return ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", choices=EXPERIMENTS, help="the table: of a data set, or an ablation")
    arguments.add_data_root(parser)
    parser.add_argument(
        "--categories", nargs="+", metavar="C", help="folders in the data root (default: all that it holds)"
    )
    parser.add_argument(
        "--out",
        type=values.path,
        metavar="DIR",
        default=Path("reproduction"),
        help="folder of runs, tables and figures, for all tables of one recipe (default: %(default)s)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        type=values.method,
        metavar="M",
        default=list(METHODS[:1]),
        help="rows of loco or mvtec-ad that are measured here: "
        f"{', '.join(METHODS)}, or anomalib:NAME, any model of anomalib (default: {METHODS[0]})",
    )
    arguments.add_max_pixels(parser)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--seeds",
        type=values.positive,
        metavar="N",
        default=3,
        help="trainings of each kind, with the seeds 0 to N-1 (default: %(default)s)",
    )
    arguments.add_teacher(recipe)
    arguments.add_recipe(recipe)
    arguments.add_precision(recipe)
    arguments.add_device(recipe)
