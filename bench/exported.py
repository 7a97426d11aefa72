"""A run's exported files against `predict`, on photographs: images per second, and the largest difference.

    python -m bench.exported RUN IMAGES

writes the run in every format, runs each file and `predict` on the images in turn, and prints a table in Markdown.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray

import dskd_fast
from dskd_fast import markdown
from dskd_fast.choices import EXPORT_FORMATS
from dskd_fast.data.images import read_image
from dskd_fast.detection.export import OPENVINO_PRECISION, SUFFIXES, export
from dskd_fast.device import numerics

_ROUNDS = 3
_NAMES = {"torch": "`torch.export.load`", "onnx": "ONNX Runtime", "openvino": "OpenVINO, f32"}

Outputs = dict[str, NDArray]
Run = Callable[[NDArray[np.uint8]], Outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path, help="searched with its folders for .png and .jpg")
    parser.add_argument("--limit", type=int, default=40, help="of images, taken evenly")
    parser.add_argument("--files", type=Path, help="a folder that keeps the files; those in it are not written again")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    chosen = np.linspace(0, len(paths) - 1, min(arguments.limit, len(paths))).round().astype(int)
    images = [read_image(paths[i]).transpose(2, 0, 1)[None].copy() for i in chosen]
    detector = dskd_fast.load(arguments.run, "cpu")

    def predict(image: NDArray[np.uint8]) -> Outputs:
        found = detector.predict(image.transpose(0, 2, 3, 1))[0]
        return {
            "score": np.array([found.score]),
            "map": found.map[None],
            "parts": np.array([list(found.parts.values())]),
        }

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.files or Path(temporary)
        contestants = {"`predict`": predict}
        for file_format in EXPORT_FORMATS:
            path = folder / f"model{SUFFIXES[file_format]}"
            if not path.exists():
                threshold = detector.calibration.threshold
                value = None if threshold is None else threshold.value
                export(detector, path, file_format, category="bench", threshold=value)
            contestants[_NAMES[file_format]] = _load(path)
        print(_table(contestants, images))


def _load(path: Path) -> Run:
    threads = torch.get_num_threads()
    if path.suffix == ".onnx":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda image: dict(zip(names, session.run(names, {"images": image}), strict=True))
    if path.suffix == ".xml":
        precision = OPENVINO_PRECISION | {"INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(path, "CPU", precision)
        return lambda image: {output.any_name: x.copy() for output, x in compiled({"images": image}).items()}
    module = torch.export.load(path).module()

    def run(image: NDArray[np.uint8]) -> Outputs:
        with torch.inference_mode(), numerics("fp32", torch.device("cpu")):
            return {name: x.numpy() for name, x in module(torch.from_numpy(image)).items()}

    return run


def _table(contestants: dict[str, Run], images: list[NDArray[np.uint8]]) -> str:
    reference, *_ = contestants
    # Also warms them up.
    found = {name: [run(image) for image in images] for name, run in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(_ROUNDS):
        for name, run in contestants.items():
            start = time.perf_counter()
            for image in images:
                run(image)
            seconds[name].append(time.perf_counter() - start)
    height, width = images[0].shape[2:]
    heads, rows = ("", "images/s", "score", "map", "parts"), []
    for name in contestants:
        differences = (
            max(
                np.max(np.abs(ours[output] - theirs[output]) / (1 + np.abs(theirs[output])))
                for ours, theirs in zip(found[name], found[reference], strict=True)
            )
            for output in ("score", "map", "parts")
        )
        cells = ["", "", ""] if name == reference else [f"{x:.1e}" for x in differences]
        rate = len(images) / statistics.median(seconds[name])
        rows.append((name, f"{rate:.1f}", *cells))
    what = f"{len(images)} images, the first of {width} x {height}, one at a time, {torch.get_num_threads()} threads:"
    return f"{what}\n\n{markdown.table(heads, rows)}"


if __name__ == "__main__":
    main()
