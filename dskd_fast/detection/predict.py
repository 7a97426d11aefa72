"""Scores, decisions and heat maps for images that nobody has labelled."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dskd_fast.choices import OVERLAY_FORMATS, OVERLAYS
from dskd_fast.data.images import ImageError, n_bytes_in_header, read_image
from dskd_fast.data.listing import IMAGE_SUFFIXES, PICTURE_FOLDERS, PREDICTIONS, is_prediction_output, walk
from dskd_fast.detection.detector import Detector
from dskd_fast.detection.inputs import check_batch_size
from dskd_fast.detection.overlay import colour_range
from dskd_fast.detection.pictures import Pictures
from dskd_fast.detection.prediction import Prediction, caption, is_drawn, judge, map_to_draw
from dskd_fast.errors import UserError
from dskd_fast.files import require_writable, write_file
from dskd_fast.progress import Progress, silent
from dskd_fast.workers import Workers

# A batch for the networks ends where its photographs, held until they are drawn, take so many bytes. Large ones so go
# through them singly, which costs less than to read them twice.
_MAX_HELD = 64 * 2**20
# Of what was scored when the prediction was interrupted.
_NOT_DRAWN = "its pictures were not written, since the prediction ended before"

# A photograph, and as the networks see it.
_Read = tuple[NDArray[np.uint8], torch.Tensor]


def predict(
    detector: Detector,
    inputs: Sequence[Path],
    out: Path,
    *,
    threshold: float | None,
    save_maps: bool = False,
    overlays: str = "all",
    overlay_format: str = "jpg",
    batch_size: int = 8,
    progress: Progress = silent,
) -> list[Prediction]:
    """Score images and write predictions.csv, predictions.jsonl and an overlay per image.

    Threads read images ahead of the networks and draw behind them; what waits there takes a bounded amount of memory.

    The files have a column, or a key, for each field of `Prediction`; the values of the parts are a column part_NAME
    each in the first, one object in the second. An overlay shows the combined map; where a part without a map has
    decided that the image is anomalous, it says so and shows the global student's, if there is one.

    Args:
        detector: calibrated.
        inputs: image files, which are read whatever their suffix, and folders that are searched with their subfolders.
            Hidden files and folders are left out.
        out: folder of the results; those of an earlier call are replaced. Of its overlays, those of images that are
            scored now are removed where none is drawn; of other images, and maps, they stay.
        threshold: of the decisions; None makes none.
        save_maps: also write maps/NAME.tiff, always the combined map, float32 at the image's size.
        overlays: of which images: "all", "anomalous" (suspect ones, too) or "none".
        overlay_format: "jpg" (quality 90) or "png", which loses nothing and takes longer and more room.
        batch_size: images per pass.
        progress: called as progress(stage, done, total).

    Returns:
        One entry per image, in order. An image that cannot be read, or whose pictures cannot be written, has its
        `error` set and does not stop the rest. After these come the image files whose suffix names a format that is
        not read, with an `error`, and the folders that hold no photographs to inspect, with `skipped`: overlays and
        maps of this or another prediction, known by the predictions.csv beside them, and ground_truth beside test.
        Likewise the folders of `out` in which pictures of an earlier call are left.

    Raises:
        UserError: an input does not exist or holds no image files, the results cannot be written, or overlays of
            anomalous images are wanted without a threshold.
        ValueError: `batch_size` is no whole number from 1 up, or `overlays` or `overlay_format` is something else.
    """
    check_batch_size(batch_size)
    for value, possible in ((overlays, OVERLAYS), (overlay_format, OVERLAY_FORMATS)):
        if value not in possible:
            raise ValueError(f"{value!r} is none of {', '.join(possible)}")
    if overlays == "anomalous" and threshold is None:
        raise UserError("without a threshold no image is anomalous: pass one, or draw overlays of all images or none")
    named, others = _with_names(inputs, out)
    require_writable(out / PREDICTIONS)
    for folder in (out / name for name in PICTURE_FOLDERS):
        if folder.exists() and not (out / PREDICTIONS).exists():
            raise UserError(
                f"{folder} is there, and is not from an earlier prediction, of which there would be a {PREDICTIONS} "
                "beside it: choose another --out"
            )
    earlier = _pictures(out)
    pictures = Pictures(detector, out, colour_range(threshold), overlay_format, save_maps, earlier)
    scored: list[_Scored] = []
    with Workers() as workers:
        read = workers.ahead(
            named, lambda entry: _read(detector, entry[0]), weigh=lambda entry: n_bytes_in_header(entry[0])
        )
        try:
            try:
                for start in range(0, len(named), batch_size):
                    batch = named[start : start + batch_size]
                    _predict_batch(detector, batch, read, threshold, overlays, pictures, workers, scored)
                    progress("predicting", start + len(batch), len(named))
            finally:
                read.close()
                wait([one.written for one in scored if one.written is not None])
        finally:
            # Also when interrupted, be it in this wait: what has been scored should not have to be scored again.
            predictions = [one.finished() for one in scored]
            others += _left_over(earlier, out, predictions, others)
            _write_results(out, predictions + others, detector.parts)
        for one in scored:
            one.result()  # raises what a thread has raised
    return predictions + others


def _read(detector: Detector, path: Path) -> _Read | ImageError:
    """An image, or why it cannot be read."""
    try:
        image = read_image(path, bits=detector.bits)
    except ImageError as error:
        return error
    return image, detector.resized(image)


class _Scored(NamedTuple):
    """A prediction without its pictures, and the fields that say what a thread has written."""

    prediction: Prediction
    written: "Future[dict[str, Any]] | None" = None

    def result(self) -> Prediction:
        return self.prediction if self.written is None else replace(self.prediction, **self.written.result())

    def finished(self) -> Prediction:
        """The result without a wait: with an `error` where the thread has failed, or is not done."""
        if self.written is None:
            return self.prediction
        if self.written.cancel() or not self.written.done():
            return replace(self.prediction, error=_NOT_DRAWN)
        failure = self.written.exception()
        if failure is not None:
            error = f"its pictures could not be written: {type(failure).__name__}: {failure}"
            return replace(self.prediction, error=error)
        return self.result()


def _predict_batch(
    detector: Detector,
    batch: list[tuple[Path, str]],
    read: Iterator[_Read | ImageError],
    threshold: float | None,
    overlays: str,
    pictures: Pictures,
    workers: Workers,
    scored: list[_Scored],
) -> None:
    """Append what is found in a batch to `scored`, and have its pictures drawn."""
    names = dict(batch)
    predictions: dict[Path, _Scored] = {}
    held: dict[Path, _Read] = {}

    def predict_held() -> None:
        images = torch.stack([resized for _, resized in held.values()])
        judged, found = judge(detector, images, [str(path) for path in held], threshold)
        for path, prediction in zip(list(held), judged, strict=True):
            # Until its pictures are begun, for which it may have to wait.
            predictions[path] = _Scored(replace(prediction, error=_NOT_DRAWN))
        for i, path in enumerate(list(held)):
            prediction = judged[i]
            text = caption(prediction) if is_drawn(prediction, overlays) else None
            # The image is freed when it is drawn.
            image, _ = held.pop(path)
            drawn = map_to_draw(prediction, found.maps, i)
            written = pictures.begin(workers, names[path], image, text, drawn, found.maps.combined[i])
            del image
            predictions[path] = _Scored(prediction, written)

    try:
        for path in names:
            result = next(read)
            if isinstance(result, ImageError):
                error = "; ".join(reason for _, reason in result.failures)
                predictions[path] = _Scored(Prediction(str(path), error=error))
            else:
                held[path] = result
            del result
            if sum(image.nbytes for image, _ in held.values()) >= _MAX_HELD:
                predict_held()
        if held:
            predict_held()
    finally:
        scored += [predictions[path] for path in names if path in predictions]


def _pictures(out: Path) -> dict[Path, set[Path]]:
    """The overlays and maps of an earlier call, by their folders."""
    folders = [folder for folder in (out / name for name in PICTURE_FOLDERS) if folder.is_dir()]
    return {folder: {path for listing in walk(folder) for path in listing.all} for folder in folders}


def _left_over(
    earlier: dict[Path, set[Path]], out: Path, predictions: list[Prediction], others: list[Prediction]
) -> list[Prediction]:
    """Entries for folders with pictures that this call has not replaced, unless there are such entries already."""
    written = {out / name for prediction in predictions for name in (prediction.overlay, prediction.map) if name}
    listed = {Path(other.path).resolve() for other in others}
    entries = []
    for folder, paths in earlier.items():
        n_files = sum(path.exists() for path in paths - written)
        if n_files and folder.resolve() not in listed:
            what = f"{n_files} image file{'s' * (n_files > 1)} (of an earlier prediction, not drawn by this one)"
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
