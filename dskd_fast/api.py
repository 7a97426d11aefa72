"""The networks under the name by which the package offers them, with the way from a run folder to predictions."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from dskd_fast import models

if TYPE_CHECKING:
    from dskd_fast.detection.detector import Detector


class DSKD(models.DSKD):
    __doc__ = models.DSKD.__doc__

    @staticmethod
    def load(run: str | PathLike[str], device: str = "auto") -> "Detector":
        """The trained detector of a run folder: networks, statistics and threshold.

        `DSKD.load("my_run").predict("image.png")[0].score`; see `dskd_fast.detection.detector.Detector.predict`.

        Args:
            run: folder that `dskd-fast train` wrote.
            device: "auto" (the GPU if there is one), "cpu" or "cuda".

        Raises:
            UserError: the folder is not a complete run, or there is no such device.
        """
        # Imported late: whoever builds networks alone needs neither scipy nor a run folder.
        from dskd_fast.runs.folder import load_run

        return load_run(Path(run), device)[0]
