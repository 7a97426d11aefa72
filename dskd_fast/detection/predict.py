"""Scores, decisions and heat maps for images that nobody has labelled."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dskd_fast.data.exposure import measure_exposure
from dskd_fast.data.images import ImageError, read_image
from dskd_fast.data.listing import IMAGE_SUFFIXES, PICTURE_FOLDERS, PREDICTIONS, is_prediction_output, walk
from dskd_fast.detection.calibration import decide
from dskd_fast.detection.detector import Detector
from dskd_fast.detection.findings import has_place
from dskd_fast.detection.inputs import check_batch_size
from dskd_fast.detection.overlay import full_colour, overlay
from dskd_fast.errors import UserError
from dskd_fast.files import require_writable, write_file
from dskd_fast.metrics.maps import save_map
from dskd_fast.progress import Progress, silent

# A batch for the networks ends where its photographs, held until they are drawn, take so many bytes. Large ones so go
# through them singly, which costs less than to read them twice.
_MAX_HELD = 64 * 2**20


@dataclass(frozen=True)
class Prediction:
    """One image's result; `error` says why there is none, `reason` why the decision is "suspect".

    With `skipped` it stands for a folder whose image files were left out: how many, and what they are. `decided_by` is
    the part of the score with the largest value (None for the paper's scoring), `parts` has the value of each.
    """

    path: str
    score: float | None = None
    threshold: float | None = None
    decision: str | None = None
    overlay: str | None = None
    map: str | None = None
    reason: str | None = None
    error: str | None = None
    skipped: str | None = None
    decided_by: str | None = None
    parts: dict[str, float] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is anomalous by a part of the score that has no map: the image as a whole, nothing at a place."""
        return self.decision == "anomalous" and not has_place(self.decided_by)


def predict(
    detector: Detector,
    inputs: Sequence[Path],
    out: Path,
    *,
    threshold: float | None,
    save_maps: bool = False,
    batch_size: int = 8,
    progress: Progress = silent,
) -> list[Prediction]:
    """Score images and write predictions.csv, predictions.jsonl and an overlay per image.

    The files have a column, or a key, for each field of `Prediction`; the values of the parts are a column part_NAME
    each in the first, one object in the second. An overlay shows the combined map; where a part without a map has
    decided that the image is anomalous, it says so and shows the global student's, if there is one.

    Args:
        detector: calibrated.
        inputs: image files, which are read whatever their suffix, and folders that are searched with their subfolders.
            Hidden files and folders are left out.
        out: folder of the results; those of an earlier call are replaced, but for its pictures of other images.
        threshold: of the decisions; None makes none.
        save_maps: also write maps/NAME.tiff, always the combined map, float32 at the image's size.
        batch_size: images per pass.
        progress: called as progress(stage, done, total).

    Returns:
        One entry per image, in order. An image that cannot be read, or whose pictures cannot be written, has its
        `error` set and does not stop the rest. After these come the image files whose suffix names a format that is
        not read, with an `error`, and the folders that hold no photographs to inspect, with `skipped`: overlays and
        maps of this or another prediction, known by the predictions.csv beside them, and ground_truth beside test.
        Likewise the folders of `out` in which an earlier call has left pictures of other images.

    Raises:
        UserError: an input does not exist or holds no image files, or the results cannot be written.
        ValueError: `batch_size` is no whole number from 1 up.
    """
    check_batch_size(batch_size)
    named, others = _with_names(inputs, out)
    require_writable(out / PREDICTIONS)
    for folder in (out / name for name in PICTURE_FOLDERS):
        if folder.exists() and not (out / PREDICTIONS).exists():
            raise UserError(
                f"{folder} is there, and is not from an earlier prediction, of which there would be a {PREDICTIONS} "
                "beside it: choose another --out"
            )
    earlier = _pictures(out)
    predictions: list[Prediction] = []
    try:
        for start in range(0, len(named), batch_size):
            batch = named[start : start + batch_size]
            predictions += _predict_batch(detector, batch, out, threshold, save_maps)
            progress("predicting", start + len(batch), len(named))
    finally:
        # Also when interrupted: what has been scored should not have to be scored again.
        others += _left_over(earlier, out, predictions, others)
        _write_results(out, predictions + others, detector.parts)
    return predictions + others


def _predict_batch(
    detector: Detector, batch: list[tuple[Path, str]], out: Path, threshold: float | None, save_maps: bool
) -> list[Prediction]:
    names = dict(batch)
    predictions: dict[Path, Prediction] = {}
    held: dict[Path, NDArray[np.uint8]] = {}
    high = full_colour(threshold)

    def predict_held() -> None:
        images = torch.stack([detector.resized(image) for image in held.values()])
        found = detector.find(images)
        suspicions = detector.suspicions(*measure_exposure(images))
        for i, (path, suspect) in enumerate(zip(list(held), suspicions, strict=True)):
            score = float(found.scores["combined"][i])
            prediction = Prediction(
                str(path),
                score,
                threshold,
                decide(score, threshold, suspect),
                reason=suspect,
                decided_by=found.decided_by[i],
                parts={name: float(values[i]) for name, values in found.parts.items()},
            )
            combined = drawn = found.maps.combined[i]
            if prediction.is_whole and found.maps.global_ is not None:
                drawn = found.maps.global_[i]
            saved = combined if save_maps else None
            caption = _caption(prediction)
            # The image and its map are freed before the next map is made.
            written = _write_pictures(detector, held.pop(path), drawn, saved, caption, high, out, names[path])
            predictions[path] = replace(prediction, **written)

    for path in names:
        try:
            held[path] = read_image(path, bits=detector.bits)
        except ImageError as error:
            predictions[path] = Prediction(str(path), error="; ".join(reason for _, reason in error.failures))
        if sum(image.nbytes for image in held.values()) >= _MAX_HELD:
            predict_held()
    if held:
        predict_held()
    return [predictions[path] for path in names]


def _caption(prediction: Prediction) -> str:
    """The line under an overlay."""
    caption = f"score {prediction.score:.2f}"
    if prediction.reason is not None:
        return f"{caption}   suspect: {prediction.reason}"
    if prediction.threshold is None:
        return caption
    caption += f"   threshold {prediction.threshold:.2f}   {prediction.decision}"
    if prediction.decision == "anomalous" and prediction.decided_by is not None:
        where = ": the image as a whole" if prediction.is_whole else ""
        caption += f" ({prediction.decided_by}{where})"
    return caption


def _write_pictures(
    detector: Detector,
    image: NDArray[np.uint8],
    drawn: NDArray[np.float32],
    saved: NDArray[np.float32] | None,
    caption: str,
    high: float,
    out: Path,
    name: str,
) -> dict[str, Any]:
    """Draw one map (S, S) and save one, which may be the same.

    Returns:
        The fields of `Prediction` that say what was written, or why not.
    """
    written: dict[str, Any] = {}
    anomaly_map = detector.localisation_map(drawn, image.shape[:2])
    try:
        overlay_name = f"overlays/{name}.png"
        write_file(out / overlay_name, overlay(image, anomaly_map, caption, low=0.0, high=high).save)
        written["overlay"] = overlay_name
        if saved is not None:
            if saved is not drawn:
                del anomaly_map  # one map at a time
                anomaly_map = detector.localisation_map(saved, image.shape[:2])
            map_name = f"maps/{name}.tiff"
            save_map(out / map_name, anomaly_map)
            written["map"] = map_name
    except UserError as error:
        written["error"] = str(error)
    return written


def _pictures(out: Path) -> dict[Path, list[Path]]:
    """The overlays and maps of an earlier call, by their folders."""
    folders = [folder for folder in (out / name for name in PICTURE_FOLDERS) if folder.is_dir()]
    return {folder: [path for listing in walk(folder) for path in listing.all] for folder in folders}


def _left_over(
    earlier: dict[Path, list[Path]], out: Path, predictions: list[Prediction], others: list[Prediction]
) -> list[Prediction]:
    """Entries for folders with pictures that this call has not replaced, unless there are such entries already."""
    written = {out / name for prediction in predictions for name in (prediction.overlay, prediction.map) if name}
    listed = {Path(other.path).resolve() for other in others}
    entries = []
    for folder, paths in earlier.items():
        n_files = len({*paths} - written)
        if n_files and folder.resolve() not in listed:
            what = f"{n_files} image file{'s' * (n_files > 1)} (of an earlier prediction, not drawn from these images)"
            entries.append(Prediction(str(folder), skipped=what))
    return entries


def _with_names(inputs: Sequence[Path], out: Path) -> tuple[list[tuple[Path, str]], list[Prediction]]:
    """The images to score, and entries for what is not scored.

    Each image comes once, with a name for its results: its path below the input folder, without suffix, made unique.
    """
    found: dict[Path, str] = {}
    others: dict[Path, Prediction] = {}
    for given in inputs:
        if given.is_dir():
            images, of_folder = _image_files_below(given, out)
            if not images and not of_folder:
                raise UserError(
                    f"{given} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}): pass image files or a folder "
                    "with images"
                )
            others |= of_folder
            for path in images:
                found.setdefault(path, path.relative_to(given).with_suffix("").as_posix())
        elif given.exists():
            found.setdefault(given, given.stem)
        else:
            raise UserError(f"there is no image or folder {given}: check the path")
    if others and not found and all(other.error is None for other in others.values()):
        skipped = next(iter(others.values()))
        raise UserError(f"there is nothing to score: {skipped.path} has {skipped.skipped}: pass photographs")
    taken: set[str] = set()
    named = []
    for path, name in found.items():
        unique, number = name, 1
        while unique.casefold() in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique.casefold())
        named.append((path, unique))
    # One that is also named as a file is read, whatever its suffix.
    return named, [other for path, other in others.items() if path not in found]


def _image_files_below(folder: Path, out: Path) -> tuple[list[Path], dict[Path, Prediction]]:
    """The images to score in a folder and its subfolders, and entries for what is not scored, by path."""
    others: dict[Path, Prediction] = {}
    pictures = {(out / name).resolve() for name in PICTURE_FOLDERS}

    def is_left_out(path: Path) -> bool:
        named = path.absolute()  # "." has no name
        if is_prediction_output(named) or path.resolve() in pictures:
            what = "drawn by an earlier prediction"
        elif named.name == "ground_truth" and (named.parent / "test").is_dir():
            what = "masks of the test images beside them"
        else:
            return False
        n_files = sum(len(listing.all) for listing in walk(path))
        if n_files:
            others[path] = Prediction(str(path), skipped=f"{n_files} image file{'s' * (n_files > 1)} ({what})")
        return True

    images = []
    for listing in [] if is_left_out(folder) else walk(folder, is_left_out):
        images += listing.images
        for path in listing.others:
            reason = f"{path.suffix.lower()} files are not read: convert it to png, jpg, bmp, tif or webp"
            others[path] = Prediction(str(path), error=reason)
    return images, others


def _write_results(out: Path, predictions: Iterable[Prediction], parts: Sequence[str]) -> None:
    rows = [asdict(prediction) for prediction in predictions]
    names = [field.name for field in fields(Prediction) if field.name != "parts"]
    columns = [*names, *(f"part_{part}" for part in parts)]

    def write_csv(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, fieldnames=columns)
            writer.writeheader()
            for row in rows:
                values = {f"part_{part}": value for part, value in (row["parts"] or {}).items()}
                writer.writerow({name: row[name] for name in names} | values)

    def write_jsonl(temporary: Path) -> None:
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")

    write_file(out / PREDICTIONS, write_csv)
    write_file(out / "predictions.jsonl", write_jsonl)
