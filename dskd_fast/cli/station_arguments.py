"""The commands of a station on a line, and their arguments."""

import argparse
from collections.abc import Callable

from dskd_fast.choices import HOST, PORT, SERVED_BYTES, SERVED_PIXELS
from dskd_fast.cli import arguments, values

# Called with name, summary and details; gives the command's parser.
Command = Callable[[str, str, str], argparse.ArgumentParser]


def add_watch(command: Command) -> None:
    parser = command(
        "watch",
        "Judge the images of a folder as they appear: whole ones only, each once, until it is stopped.",
        "\n\nOne JSON line each on the standard output and in DIR/decisions.jsonl, by which a later call knows what "
        "was judged;\nmessages go to the standard error. Network folders will do. SIGTERM and Ctrl-C end it after the "
        "image in hand, with 0.\nWhat counts as one image, and what happens when something fails: dskd_fast/README.md.",
    )
    arguments.add_run(parser)
    parser.add_argument(
        "folder", type=values.path, metavar="FOLDER", help="into which images are written, with its subfolders"
    )
    parser.add_argument(
        "--out", type=values.path, metavar="DIR", required=True, help="folder of decisions.jsonl and overlays"
    )
    parser.add_argument(
        "--poll",
        type=values.positive_number,
        metavar="SECONDS",
        default=0.5,
        help="between two looks at the folder; a file has to be the same for so long before it is read (default: "
        "%(default)s)",
    )
    arguments.add_overlays(parser, "anomalous")
    arguments.add_threshold(parser)
    arguments.add_max_pixels(parser)
    arguments.add_device(parser)


def add_serve(command: Command) -> None:
    parser = command(
        "serve",
        "Judge photographs that are sent over HTTP, or dropped on a page.",
        "\n\nPOST /predict with the image file as the body gives JSON; ?overlay=true and ?map=true add pictures; GET / "
        "is the\npage, /openapi.json describes it all. There is no password: whoever reaches the address can use "
        'it. Needs\npip install "dskd-fast[serve]".',
    )
    arguments.add_run(parser)
    parser.add_argument(
        "--port", type=values.port, metavar="N", default=PORT, help="0: one that is free (default: %(default)s)"
    )
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        default=HOST,
        help="to be reached at; 0.0.0.0: from everywhere (default: %(default)s, from this machine alone)",
    )
    parser.add_argument(
        "--max-bytes",
        type=values.positive,
        metavar="N",
        default=SERVED_BYTES,
        help=f"refuse larger files (default: {SERVED_BYTES // 2**20} MiB)",
    )
    arguments.add_threshold(parser)
    arguments.add_max_pixels(parser, SERVED_PIXELS)
    arguments.add_device(parser)
