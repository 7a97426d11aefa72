"""The overlays and map files of a prediction, which threads draw and write."""

from collections.abc import Callable
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
_JPEG_QUALITY, _JPEG_MAX_SIDE = 90, 65500
# A quarter of the time of the usual level, for a fifth more bytes.
_PNG_LEVEL = 1


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
            jobs.append(partial(self._draw, name, image, self._drawable(drawn, image.shape[:2]), caption))
            weight += _OVERLAY_BYTES * image.nbytes
        if self.save_maps:
            anomaly_map = self.detector.localisation_map(saved, image.shape[:2])
            jobs.append(partial(self._save, name, anomaly_map))
            weight += anomaly_map.nbytes
        return workers.behind(_all_of, jobs, weight=weight) if jobs else None

    def _drawable(self, anomaly_map: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
        """The map as it localises, or a small one that `overlay` enlarges to that."""
        scoring = self.detector.scoring
        if scoring.align_corners or scoring.filter_maps:
            return self.detector.localisation_map(anomaly_map, size)
        return anomaly_map

    def _draw(self, name: str, image: NDArray[np.uint8], anomaly_map: NDArray, caption: str) -> dict[str, Any]:
        drawn = overlay(image, anomaly_map, caption, *self.limits)
        is_jpeg = self.overlay_format == "jpg"
        if is_jpeg and max(drawn.size) > _JPEG_MAX_SIDE:
            raise UserError(
                f"its overlay has {drawn.width} x {drawn.height} pixels, and a JPEG at most {_JPEG_MAX_SIDE} on a "
                "side: draw overlays as png (--overlay-format)"
            )
        options: dict[str, Any] = {"quality": _JPEG_QUALITY} if is_jpeg else {"compress_level": _PNG_LEVEL}
        file = f"overlays/{name}.{self.overlay_format}"
        write_file(self.out / file, lambda temporary: drawn.save(temporary, **options))
        for other in {*OVERLAY_FORMATS} - {self.overlay_format}:
            # An earlier call's overlay of this name is replaced, whatever its format.
            replaced = self.out / f"overlays/{name}.{other}"
            if replaced in self.earlier.get(self.out / "overlays", ()):
                replaced.unlink(missing_ok=True)
        return {"overlay": file}

    def _save(self, name: str, anomaly_map: NDArray[np.float32]) -> dict[str, Any]:
        file = f"maps/{name}.tiff"
        save_map(self.out / file, anomaly_map)
        return {"map": file}


def _all_of(jobs: list[Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """What jobs return, one after the other; the first that cannot write its file ends them."""
    written: dict[str, Any] = {}
    try:
        while jobs:
            written |= jobs.pop(0)()
    except UserError as error:
        written["error"] = str(error)
    return written
