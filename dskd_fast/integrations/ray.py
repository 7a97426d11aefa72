"""Archives of images on many machines: what `predict` finds, as a function for Ray Data.

    import ray
    from dskd_fast.integrations.ray import Predict

    images = ray.data.read_binary_files("/data/archive", include_paths=True)
    workers = ray.data.ActorPoolStrategy(min_size=1, max_size=8)
    found = images.map_batches(Predict, fn_constructor_args=["/data/my_run"], batch_size=32, compute=workers)
    found.write_parquet("/data/scores", mode="overwrite")

Needs `pip install "dskd-fast[ray]"` on every machine.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import torch
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from dskd_fast.choices import OVERLAY_FORMATS, OVERLAYS
from dskd_fast.data.images import ImageError, decode_image, read_image
from dskd_fast.detection.inputs import as_rgb, check_batch_size
from dskd_fast.detection.overlay import colour_range
from dskd_fast.detection.pictures import drawable, overlay_file
from dskd_fast.detection.prediction import Prediction, caption, is_drawn, judge, map_to_draw
from dskd_fast.errors import UserError
from dskd_fast.evaluation.evaluate import threshold_of
from dskd_fast.files import write_file
from dskd_fast.metrics.maps import map_file
from dskd_fast.runs.folder import load

# Of a picture's name, in characters: with what is added to them they have at most 255 bytes.
_STEM = 54
# A batch for the networks ends where its photographs take so many bytes.
_MAX_HELD = 64 * 2**20


class Predict:
    """Scores the images of a `ray.data.Dataset`; for `map_batches`, whose workers each load the run once.

    A batch has the column `path`, text, which names the image and has to be another for each, and at most one of these:

    | column | what it holds |
    |---|---|
    | `bytes` | the image file, as `ray.data.read_binary_files(..., include_paths=True)` reads it |
    | `image` | the pixels, RGB, (H, W, 3) each, uint8 or floating from 0 to 1, all of one size or not |

    Without them `path` is read: a local path that is the same on every machine, or any URL that fsspec knows (`s3://`,
    `gs://`, ...), with the package that it needs for that. `image` takes what was decoded elsewhere, such as by
    `ray.data.read_images`, which knows fewer formats, turns no photograph upright, and fails as a whole where one file
    is damaged.

    Each image gives one row, with a column for each field of `Prediction` but `skipped`, and a column part_NAME for
    each part of the score, as in predictions.csv. An image that cannot be read has its reason in `error` and no score.
    Other columns of the batch are left out. Scores are those of `predict` but for rounding, which depends on the images
    that go through the networks together and on the number of threads: with a small network scores differed by up to
    3e-5 (1 + |score|), where the threshold is raised by 2e-3 of that, and parts by up to 2e-4. A worker has as many
    threads as `num_cpus` of `map_batches` says, or one, since Ray sets OMP_NUM_THREADS to it.

    Args:
        run: a folder that `train` wrote, at this path on every machine.
        out: folder for overlays and maps, a local path or a URL that fsspec knows; only needed for these.
        threshold: of the decisions; None takes the run's, without which there are no decisions.
        overlays: of which images: "all", "anomalous" (suspect ones, too) or "none".
        overlay_format: "jpg" or "png".
        save_maps: also write the combined map of each image, float32 at the image's size.
        batch_size: images per pass of the networks. A batch of `map_batches` is cut into these.
        device: "auto" (the GPU if there is one), "cpu" or "cuda".

    Pictures are called overlays/XX/NAME-X....jpg and maps/XX/NAME-X....tiff, X being the start of the path's SHA-256,
    so that a batch that is done again writes the same files with the same bytes. A local file, and an object in a store
    such as S3, appears under its name only when it is complete; on other file systems (SFTP, HDFS) a worker that is
    killed may leave a part of one, until its batch is done again. A picture that cannot be written is its row's error.

    Raises:
        UserError: `run` is no complete run, a batch has other columns than these, `out` is missing, a package for a URL
            is not installed, overlays of anomalous images are wanted without a threshold, or as `Detector.predict`.
        ValueError: `batch_size` is no whole number from 1 up, or `overlays` or `overlay_format` is something else.
    """

    def __init__(
        self,
        run: str,
        out: str | None = None,
        *,
        threshold: float | None = None,
        overlays: str = "none",
        overlay_format: str = "jpg",
        save_maps: bool = False,
        batch_size: int = 8,
        device: str = "auto",
    ) -> None:
        check_batch_size(batch_size)
        for value, possible in ((overlays, OVERLAYS), (overlay_format, OVERLAY_FORMATS)):
            if value not in possible:
                raise ValueError(f"{value!r} is none of {', '.join(possible)}")
        if out is None and (overlays != "none" or save_maps):
            raise UserError("overlays and maps need a place: pass out, a folder or a URL")
        self._detector = load(run, device)
        self._threshold = threshold_of(self._detector, threshold)
        if overlays == "anomalous" and self._threshold is None:
            raise UserError(f"{run} has no threshold, without which no image is anomalous: pass threshold, or draw all")
        self._overlays, self._overlay_format, self._save_maps = overlays, overlay_format, save_maps
        self._batch_size = batch_size
        self._out = None if out is None else _Folder(out)

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> pa.Table:
        if "path" not in batch or {"bytes", "image"} <= set(batch):
            raise UserError(
                f"the columns are {', '.join(batch)}: have path, and where images are read already one of bytes, as by "
                "read_binary_files(..., include_paths=True), and image"
            )
        if not all(isinstance(path, str) for path in batch["path"]):
            raise UserError("the column path has values that are no text: name each image")
        found: list[Prediction] = []
        for start in range(0, len(batch["path"]), self._batch_size):
            rows = slice(start, start + self._batch_size)
            found += self._predict({name: values[rows] for name, values in batch.items()})
        table = [asdict(one) | {f"part_{name}": value for name, value in (one.parts or {}).items()} for one in found]
        return pa.Table.from_pylist(table, schema=self._schema)  # takes what the schema names

    @cached_property
    def _schema(self) -> pa.Schema:
        # Stated, since blocks of a data set have to have the same types where all values are missing, too.
        numbers = ("score", "threshold")
        names = [field.name for field in fields(Prediction) if field.name not in ("parts", "skipped")]
        columns = [(name, pa.float64() if name in numbers else pa.string()) for name in names]
        return pa.schema([*columns, *((f"part_{part}", pa.float64()) for part in self._detector.parts)])

    def _predict(self, batch: Mapping[str, NDArray[Any]]) -> list[Prediction]:
        """One entry for each row, in order."""
        found: dict[int, Prediction] = {}
        held: dict[int, NDArray[np.uint8]] = {}

        def predict_held() -> None:
            images = torch.stack([self._detector.resized(image) for image in held.values()])
            judged, findings = judge(self._detector, images, [batch["path"][i] for i in held], self._threshold)
            for k, (i, image) in enumerate(held.items()):
                shown, combined = map_to_draw(judged[k], findings.maps, k), findings.maps.combined[k]
                found[i] = self._with_pictures(judged[k], image, shown, combined)
            held.clear()

        for i, path in enumerate(batch["path"]):
            try:
                held[i] = self._read(path, batch, i)
            except ImageError as error:
                found[i] = Prediction(path, error="; ".join(reason for _, reason in error.failures))
            if sum(image.nbytes for image in held.values()) >= _MAX_HELD:
                predict_held()
        if held:
            predict_held()
        return [found[i] for i in range(len(batch["path"]))]

    def _read(self, path: str, batch: Mapping[str, NDArray[Any]], i: int) -> NDArray[np.uint8]:
        """The pixels of row i, (H, W, 3).

        Raises:
            ImageError: there are none that can be used.
        """
        bits = self._detector.bits
        if "image" in batch:
            try:
                return as_rgb(batch["image"][i], "the image", bits=bits)
            except (TypeError, ValueError) as error:
                raise ImageError((Path(path), str(error))) from None
        if "bytes" in batch:
            return decode_image(batch["bytes"][i], Path(path), bits=bits)
        if "://" not in path:
            return read_image(Path(path), bits=bits)
        try:
            file_system, name = fsspec.core.url_to_fs(path)
            data = file_system.cat_file(name)
        except ImportError as error:
            raise _missing(path, error) from None
        except Exception as error:  # each file system has its own
            raise ImageError((Path(path), _unreadable(error))) from None
        return decode_image(data, Path(path), bits=bits)

    def _with_pictures(
        self, one: Prediction, image: NDArray[np.uint8], shown: NDArray[np.float32], combined: NDArray[np.float32]
    ) -> Prediction:
        if self._out is None:
            return one
        name = _name(one.path)
        try:
            if is_drawn(one, self._overlays):
                file = f"overlays/{name}.{self._overlay_format}"
                drawn, limits = drawable(self._detector, shown, image.shape[:2]), colour_range(self._threshold)
                what_to_do = "draw overlays as png (overlay_format)"
                data = overlay_file(image, drawn, caption(one), limits, self._overlay_format, what_to_do)
                self._out.write(file, data)
                one = replace(one, overlay=file)
            if self._save_maps:
                file = f"maps/{name}.tiff"
                self._out.write(file, map_file(self._detector.localisation_map(combined, image.shape[:2])))
                one = replace(one, map=file)
        except UserError as error:
            return replace(one, error=str(error))
        return one


class _Folder:
    """Where files are written, by a path or a URL.

    Raises:
        UserError: a package for the URL is not installed, or there is no such kind of URL.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        try:
            self._file_system, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise _missing(url, error) from None
        except ValueError as error:
            raise UserError(f"{url} cannot be written ({error}): pass a folder or a URL that fsspec knows") from None
        self._made: set[str] = set()

    def write(self, name: str, data: bytes) -> None:
        """Write a file, of which an older one is replaced.

        Raises:
            UserError: it cannot be written.
        """
        if isinstance(self._file_system, LocalFileSystem):
            # fsspec's own would write it in place.
            write_file(Path(self._root, name), lambda temporary: temporary.write_bytes(data))
            return
        path = PurePosixPath(self._root, name)
        try:
            if str(path.parent) not in self._made:
                self._file_system.makedirs(str(path.parent), exist_ok=True)
                self._made.add(str(path.parent))
            self._file_system.pipe_file(str(path), data)
        except Exception as error:  # each file system has its own
            raise UserError(f"cannot write {name} below {self._url} ({_one_line(error)})") from None


def _name(path: str) -> str:
    """Of an image's pictures, without suffix: the same for the same path, and for no other."""
    checksum = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
    # In 256 folders, since millions of files in one are slow to list.
    return f"{checksum[:2]}/{PurePosixPath(path).stem[:_STEM]}-{checksum[:16]}"


def _missing(url: str, error: ImportError) -> UserError:
    return UserError(f"{url} cannot be used, since a package for it is not installed ({_one_line(error)})")


def _unreadable(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"it cannot be opened ({_one_line(error)})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
