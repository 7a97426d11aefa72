"""The overlays and map files of a prediction, which threads draw and write."""

import io
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dskd_fast.choices import OVERLAY_FORMATS
from dskd_fast.detection.detector import Detector
from dskd_fast.detection.overlay import overlay
from dskd_fast.errors import UserError
from dskd_fast.files import write_file
from dskd_fast.metrics.maps import save_map
from dskd_fast.workers import Workers

# Bytes beside each of a photograph's while its overlay is drawn: two pictures of 4 bytes a pixel, and itself.
_OVERLAY_BYTES = 4
_JPEG_MAX_SIDE = 65500
# PNG's level takes a quarter of the time of the usual one, for a fifth more bytes.
_ENCODING: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": 90},
    "png": {"format": "PNG", "compress_level": 1},
}


class Pictures(NamedTuple):
    """Where and how the pictures of a prediction are written.

    Attributes:
        detector: whose maps they show.
        out: the folder of the results.
        limits: the map values that are drawn as nothing and in full colour.
        overlay_format: one of `OVERLAY_FORMATS`.
        save_maps: whether there are map files.
        earlier: the pictures of an earlier call, by their folders.
    """

    detector: Detector
    out: Path
    limits: tuple[float, float]
    overlay_format: str
    save_maps: bool
    earlier: dict[Path, set[Path]]

    def begin(
        self,
        workers: Workers,
        name: str,
        image: NDArray[np.uint8],
        caption: str | None,
        drawn: NDArray[np.float32],
        saved: NDArray[np.float32],
    ) -> "Future[dict[str, Any]] | None":
        """Have a thread draw one map (S, S) and save one, which may be the same.

        An earlier call's overlay of the name is removed where there is none now: it would be taken for this one's.

        Args:
            workers: the threads.
            name: of the files, without folder and suffix.
            image: (H, W, 3), uint8.
            caption: the line under the overlay; None for no overlay.
            drawn, saved: the maps.

        Returns:
            The fields of `Prediction` that say what was written, or why not; None if there is nothing to write.
        """
        jobs: list[Callable[[], dict[str, Any]]] = []
        weight = 0
        if caption is not None:
            jobs.append(partial(self._draw, name, image, drawable(self.detector, drawn, image.shape[:2]), caption))
            weight += _OVERLAY_BYTES * image.nbytes
        if self.save_maps:
            anomaly_map = self.detector.localisation_map(saved, image.shape[:2])
            jobs.append(partial(self._save, name, anomaly_map))
            weight += anomaly_map.nbytes
        if caption is None and self._earlier_overlays(name, OVERLAY_FORMATS):
            jobs.append(partial(self._remove, name, OVERLAY_FORMATS))
        return workers.behind(_all_of, jobs, weight=weight) if jobs else None

    def _draw(self, name: str, image: NDArray[np.uint8], anomaly_map: NDArray, caption: str) -> dict[str, Any]:
        file = f"overlays/{name}.{self.overlay_format}"
        write_overlay(self.out / file, image, anomaly_map, caption, self.limits)
        # An earlier call's overlay of this name is replaced, whatever its format.
        self._remove(name, [other for other in OVERLAY_FORMATS if other != self.overlay_format])
        return {"overlay": file}

    def _earlier_overlays(self, name: str, formats: Iterable[str]) -> list[Path]:
        paths = [self.out / f"overlays/{name}.{suffix}" for suffix in formats]
        return [path for path in paths if path in self.earlier.get(self.out / "overlays", ())]

    def _remove(self, name: str, formats: Iterable[str]) -> dict[str, Any]:
        for path in self._earlier_overlays(name, formats):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"cannot remove the earlier overlay {path}: {error.strerror or error}") from error
        return {}

    def _save(self, name: str, anomaly_map: NDArray[np.float32]) -> dict[str, Any]:
        file = f"maps/{name}.tiff"
        save_map(self.out / file, anomaly_map)
        return {"map": file}


def drawable(detector: Detector, anomaly_map: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """A map (S, S) as it localises in an image of that size, or a small one that `overlay` enlarges to that."""
    if detector.scoring.align_corners or detector.scoring.filter_maps:
        return detector.localisation_map(anomaly_map, size)
    return anomaly_map


def write_overlay(
    path: Path, image: NDArray[np.uint8], anomaly_map: NDArray[np.float32], caption: str, limits: tuple[float, float]
) -> None:
    """Draw and write an overlay as its suffix says; see `overlay`, and `drawable` for the map.

    Raises:
        UserError: a JPEG cannot be so large, or the file cannot be written; the latter is caused by an OSError.
    """
    what_to_do = "draw overlays as png (--overlay-format)"
    content = overlay_file(image, anomaly_map, caption, limits, path.suffix[1:], what_to_do)
    write_file(path, lambda temporary: temporary.write_bytes(content))


def overlay_file(
    image: NDArray[np.uint8],
    anomaly_map: NDArray[np.float32],
    caption: str,
    limits: tuple[float, float],
    overlay_format: str,
    what_to_do: str,
) -> bytes:
    """What `write_overlay` writes, in one of `OVERLAY_FORMATS`; the same arguments give the same bytes.

    Raises:
        UserError: a JPEG cannot be so large; it ends with `what_to_do`.
    """
    drawn = overlay(image, anomaly_map, caption, *limits)
    if overlay_format == "jpg" and max(drawn.size) > _JPEG_MAX_SIDE:
        raise UserError(
            f"its overlay has {drawn.width} x {drawn.height} pixels, and a JPEG at most {_JPEG_MAX_SIDE} on a "
            f"side: {what_to_do}"
        )
    file = io.BytesIO()
    drawn.save(file, **_ENCODING[overlay_format])
    return file.getvalue()


def _all_of(jobs: list[Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """What jobs return, one after the other; the first that cannot write its file ends them."""
    written: dict[str, Any] = {}
    try:
        while jobs:
            written |= jobs.pop(0)()
    except UserError as error:
        written["error"] = str(error)
    return written
