"""Scores, decisions and heat maps for images that nobody has labelled."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dskd_fast.data.images import IMAGE_SUFFIXES, ImageError, list_images, read_image
from dskd_fast.errors import UserError
from dskd_fast.files import require_writable, write_file
from dskd_fast.metrics.maps import save_map
from dskd_fast.workflow.detector import Detector, decide
from dskd_fast.workflow.overlay import full_colour, overlay

PREDICTIONS = "predictions.csv"
_PICTURE_FOLDERS = ("overlays", "maps")


@dataclass(frozen=True)
class Prediction:
    """One image's result; `error` says why there is none."""

    path: str
    score: float | None = None
    threshold: float | None = None
    decision: str | None = None
    overlay: str | None = None
    map: str | None = None
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
    images, errors = {}, {}
    for path, _ in batch:
        try:
            images[path] = read_image(path)
        except ImageError as error:
            errors[path] = "; ".join(reason for _, reason in error.failures)
    if images:
        found = detector.predict(images.values(), batch_size=len(images))
        detections = dict(zip(images, found, strict=True))

    predictions = []
    for path, name in batch:
        if path in errors:
            predictions.append(Prediction(str(path), error=errors[path]))
            continue
        image, score, anomaly_map = images[path], detections[path].score, detections[path].map
        decision = decide(score, threshold)
        caption = f"score {score:.2f}"
        if threshold is not None:
            caption += f"   threshold {threshold:.2f}   {decision}"
        picture = overlay(image, anomaly_map, caption, low=0.0, high=full_colour(threshold))
        written: dict[str, str] = {}
        try:
            overlay_name = f"overlays/{name}.png"
            write_file(out / overlay_name, lambda temporary, picture=picture: picture.save(temporary))
            written["overlay"] = overlay_name
            if save_maps:
                map_name = f"maps/{name}.tiff"
                save_map(out / map_name, anomaly_map)
                written["map"] = map_name
        except UserError as error:
            written["error"] = str(error)
        predictions.append(Prediction(str(path), score, threshold, decision, **written))
    return predictions


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
