"""Scores, decisions and heat maps for images that nobody has labelled."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dskd_fast.data.exposure import measure_exposure
from dskd_fast.data.images import IMAGE_SUFFIXES, ImageError, list_images, read_image
from dskd_fast.errors import UserError
from dskd_fast.files import require_writable, write_file
from dskd_fast.metrics.maps import save_map
from dskd_fast.workflow.detector import Detector, decide
from dskd_fast.workflow.overlay import full_colour, overlay

PREDICTIONS = "predictions.csv"
_PICTURE_FOLDERS = ("overlays", "maps")
# A batch for the networks ends where its photographs, held until they are drawn, take so many bytes. Large ones so go
# through them singly, which costs less than to read them twice.
_MAX_HELD = 64 * 2**20


@dataclass(frozen=True)
class Prediction:
    """One image's result; `error` says why there is none, `reason` why the decision is "suspect"."""

    path: str
    score: float | None = None
    threshold: float | None = None
    decision: str | None = None
    overlay: str | None = None
    map: str | None = None
    reason: str | None = None
    error: str | None = None


def predict(
    detector: Detector,
    inputs: Sequence[Path],
    out: Path,
    *,
    threshold: float | None,
    save_maps: bool = False,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Prediction]:
    """Score images and write predictions.csv, predictions.jsonl and an overlay per image.

    Args:
        detector: calibrated.
        inputs: image files, and folders that are searched with their subfolders.
        out: folder of the results; those of an earlier call are replaced.
        threshold: of the decisions; None makes none.
        save_maps: also write maps/NAME.tiff, float32 at the image's size.
        batch_size: images per pass.
        progress: called as progress(done, total).

    Returns:
        One entry per image, in order. An image that cannot be read, or whose pictures cannot be written, has its
        `error` set and does not stop the rest.

    Raises:
        UserError: an input does not exist or holds no images, or the results cannot be written.
    """
    named = _with_names(inputs, out)
    require_writable(out / PREDICTIONS)
    for folder in (out / name for name in _PICTURE_FOLDERS):
        if folder.exists() and not (out / PREDICTIONS).exists():
            raise UserError(
                f"{folder} is there, and is not from an earlier prediction, of which there would be a {PREDICTIONS} "
                "beside it: choose another --out"
            )
    predictions: list[Prediction] = []
    try:
        for start in range(0, len(named), batch_size):
            batch = named[start : start + batch_size]
            predictions += _predict_batch(detector, batch, out, threshold, save_maps)
            progress(start + len(batch), len(named))
    finally:
        # Also when interrupted: what has been scored should not have to be scored again.
        _write_results(out, predictions)
    return predictions


def _predict_batch(
    detector: Detector, batch: list[tuple[Path, str]], out: Path, threshold: float | None, save_maps: bool
) -> list[Prediction]:
    names = dict(batch)
    predictions: dict[Path, Prediction] = {}
    held: dict[Path, NDArray[np.uint8]] = {}
    high = full_colour(threshold)

    def predict_held() -> None:
        images = torch.stack([detector.resized(image) for image in held.values()])
        maps = detector.maps(images).combined
        scores, suspicions = detector.image_scores(maps).tolist(), detector.suspicions(*measure_exposure(images))
        for path, score, suspect, coarse_map in zip(list(held), scores, suspicions, maps, strict=True):
            decision = decide(score, threshold, suspect)
            caption = f"score {score:.2f}"
            if suspect is not None:
                caption += f"   suspect: {suspect}"
            elif threshold is not None:
                caption += f"   threshold {threshold:.2f}   {decision}"
            # The image and its map are freed before the next map is made.
            written = _write_pictures(detector, held.pop(path), coarse_map, caption, high, out, names[path], save_maps)
            predictions[path] = Prediction(str(path), score, threshold, decision, reason=suspect, **written)

    for path in names:
        try:
            held[path] = read_image(path)
        except ImageError as error:
            predictions[path] = Prediction(str(path), error="; ".join(reason for _, reason in error.failures))
        if sum(image.nbytes for image in held.values()) >= _MAX_HELD:
            predict_held()
    if held:
        predict_held()
    return [predictions[path] for path in names]


def _write_pictures(
    detector: Detector,
    image: NDArray[np.uint8],
    coarse_map: NDArray[np.float32],
    caption: str,
    high: float,
    out: Path,
    name: str,
    save_maps: bool,
) -> dict[str, str]:
    """The fields of `Prediction` that say what was written, or why not."""
    written: dict[str, str] = {}
    anomaly_map = detector.localisation_map(coarse_map, image.shape[:2])
    try:
        overlay_name = f"overlays/{name}.png"
        write_file(out / overlay_name, overlay(image, anomaly_map, caption, low=0.0, high=high).save)
        written["overlay"] = overlay_name
        if save_maps:
            map_name = f"maps/{name}.tiff"
            save_map(out / map_name, anomaly_map)
            written["map"] = map_name
    except UserError as error:
        written["error"] = str(error)
    return written


def _with_names(inputs: Sequence[Path], out: Path) -> list[tuple[Path, str]]:
    """Each image once, with a name for its results: its path below the input folder, without suffix, made unique."""
    found: dict[Path, str] = {}
    for given in inputs:
        if given.is_dir():
            paths = _images_below(given, out)
            if not paths:
                raise UserError(
                    f"{given} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}): pass image files or a folder "
                    "with images"
                )
            for path in paths:
                found.setdefault(path, path.relative_to(given).with_suffix("").as_posix())
        elif given.exists():
            found.setdefault(given, given.stem)
        else:
            raise UserError(f"there is no image or folder {given}: check the path")
    taken: set[str] = set()
    named = []
    for path, name in found.items():
        unique, number = name, 1
        while unique.casefold() in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique.casefold())
        named.append((path, unique))
    return named


def _images_below(folder: Path, out: Path) -> list[Path]:
    """Images in a folder and its subfolders, but for hidden ones and the results of an earlier call."""
    results = {out.resolve(), *(out.resolve() / name for name in _PICTURE_FOLDERS)}
    images = []
    seen: set[Path] = set()

    def unreadable(error: OSError) -> None:
        raise UserError(f"cannot list the folder {error.filename}: {error.strerror}") from error

    for name, subfolders, _ in os.walk(folder, onerror=unreadable, followlinks=True):
        here = Path(name)
        if here.resolve() in seen:
            # A link back to where we have been.
            subfolders.clear()
            continue
        seen.add(here.resolve())
        subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and (here / s).resolve() not in results)
        images += list_images(here)
    return images


def _write_results(out: Path, predictions: Iterable[Prediction]) -> None:
    rows = [asdict(prediction) for prediction in predictions]
    columns = [field.name for field in fields(Prediction)]

    def write_csv(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)

    def write_jsonl(temporary: Path) -> None:
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")

    write_file(out / PREDICTIONS, write_csv)
    write_file(out / "predictions.jsonl", write_jsonl)
