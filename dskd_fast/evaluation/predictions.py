"""Maps and predictions that other programs have saved -> figures: folders of TIFFs, and what anomalib predicts.

anomalib is not imported: of its objects only attributes are read. It keeps predictions in memory, and all that it
writes of them are pictures, whose colours are no scores; so they come as objects, or in a file of `torch.save`.
"""

import math
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dskd_fast.data.category import Category, GroundTruth
from dskd_fast.data.images import image_size
from dskd_fast.data.listing import IMAGE_SUFFIXES
from dskd_fast.detection.findings import map_at_size
from dskd_fast.errors import UserError
from dskd_fast.evaluation.evaluate import count_kinds, maps_with_truth, remarks
from dskd_fast.metrics.maps import SUFFIXES, ScoredMap, maps_without_image, read_maps, score_maps
from dskd_fast.progress import Progress, silent

_MAXIMUM = "maximum of the map"
_SAVE = "save predictions with torch.save(engine.predict(...), 'predictions.pt')"
_PLAIN = "dictionaries of tensors, numbers and texts"
_N_NAMED = 3
_FIELDS = ("image_path", "anomaly_map", "pred_score")
# Masks that are compared, and how far from their place, relative to the image's middle, they may lie.
_N_COMPARED, _SHIFT = 20, 0.03
_Value = TypeVar("_Value")


def evaluate_saved(maps: Path, category: Category, *, progress: Progress = silent) -> dict[str, Any]:
    """Figures of a folder CATEGORY/test/TYPE/NNN.tiff, or of a file of anomalib's predictions.

    Returns:
        As `evaluate_predictions`.

    Raises:
        UserError: maps are missing, cannot be read or do not fit the images; or the folder has pictures alone.
    """
    if not maps.exists():
        raise UserError(f"there is no folder and no file {maps}: name a folder of maps or a file of predictions")
    if maps.is_file():
        return evaluate_predictions(load_predictions(maps), category, progress=progress)
    _refuse_pictures(maps)
    truth = GroundTruth(category)
    figures = score_maps(_counted(read_maps(maps, truth, image_size), len(category.test), progress))
    left = [path.relative_to(maps).as_posix() for path in maps_without_image(maps, category)]
    return _result(category, truth, figures, _MAXIMUM, left)


def evaluate_predictions(predictions: Any, category: Category, *, progress: Progress = silent) -> dict[str, Any]:
    """Figures of what `Engine.predict` of anomalib has returned, of any of its models.

    Args:
        predictions: what has the attributes or keys `image_path`, `anomaly_map` and `pred_score`, such as anomalib's
            `ImageBatch`; or any nesting of lists of such. Of a batch of B: a list of B paths, a tensor or array
            (B, h, w) or (B, 1, h, w) of any floating type, and one of (B,) or (B, 1); of a single image without B.
            Higher means more anomalous. Without `pred_score` the maximum of the map is the image's score, without
            `anomaly_map` there is no sPRO. A map is of the whole image, and is enlarged bilinearly to the image's size;
            `gt_mask`, where it is there, like the map, tells whether that is so.
        category: with the test images, each of which has one prediction: `dskd_fast.data.layout.open_category`. Images
            are the same if their paths are, or end alike in CATEGORY/test/TYPE/NAME, wherever the folder is now.
        progress: called as progress(stage, done, total).

    Returns:
        "category"; "auroc", "spro", "spro_at" as `dskd_fast.metrics.maps.score_maps` gives them; "image_score": what
        that is; "n_images" per kind; "absent", "warnings", "bad_masks" and "unused" as `dskd_fast.evaluation.evaluate`
        gives them.

    Raises:
        UserError: test images have no prediction or two; a prediction lacks a path, or both map and score; shapes do
            not fit, maps are of cropped images, or a value is NaN or infinite.

    Example:
        predictions = engine.predict(model, datamodule=datamodule)
        figures = evaluate_predictions(predictions, open_category("/data/mvtec_loco", "screw_bag"))
    """
    if not category.test:
        raise UserError(f"category {category.name} has no test images, so there are no predictions to score")
    try:
        found, left = _of_test_images(_images(predictions), category)
    except RecursionError:  # a list may hold itself
        raise UserError(f"the predictions are nested too deeply: pass one list of objects with {_FIELDS[0]}") from None
    truth = GroundTruth(category)
    maps = _of_all("anomaly_map", [image.anomaly_map for image in found])
    scores = _of_all("pred_score", [image.score for image in found])
    for image, score in zip(found, scores, strict=False):
        if not math.isfinite(score):
            raise UserError(f"pred_score of {image.path} is {score}, which has no rank: check the model that gave it")
    if maps:
        _refuse_crops(found, truth)
        each = np.array(scores or [m.max() for m in maps], np.float64)
        sizes = [image_size(item.path) for item in category.test]
        with closing(maps_with_truth(truth, maps, each, sizes, map_at_size, progress)) as images:
            figures = score_maps(images)
    elif scores:
        # A pixel and no defects: all that needs maps is then absent.
        pixel = np.zeros((1, 1), np.float32)
        figures = score_maps(
            ScoredMap(item.key, item.kind, pixel, score, None)
            for item, score in zip(category.test, scores, strict=True)
        )
    else:
        raise UserError(
            "the predictions have neither anomaly_map nor pred_score: there is nothing to score; rename what holds "
            "them (anomaly_maps and pred_scores in anomalib 1)"
        )
    result = _result(category, truth, figures, "pred_score of the predictions" if scores else _MAXIMUM, left)
    if not maps:
        result["absent"].append("no sPRO: the predictions have no anomaly_map")
    result["warnings"] += _cut_off(scores, maps)
    return result


# They hold what was saved of objects of anomalib, and do nothing.
_INERT = [(type(name, (), {}), f"anomalib.data.dataclasses.torch.image.{name}") for name in ("ImageBatch", "ImageItem")]
# What these are beside a tensor, image or mask, is of no use here.
_TENSORS = [(torch.Tensor, f"torchvision.tv_tensors._{name.lower()}.{name}") for name in ("Image", "Mask")]


def load_predictions(path: Path) -> Any:
    """What `torch.save` wrote of anomalib's predictions, or of dictionaries and lists of tensors and texts.

    Read with `weights_only=True`, which calls nothing that the file names; objects of anomalib become ones that only
    have their attributes.

    Raises:
        UserError: it cannot be read, or holds objects of other classes.
    """
    try:
        with torch.serialization.safe_globals([*_INERT, *_TENSORS]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other kinds of files, which are refused below
            # Mapped, since most of such a file are the images, which nothing reads.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = next((line for line in str(error).splitlines() if "GLOBAL" in line), "").split("GLOBAL ")[-1].split()
        other = f"objects of other classes than predictions have, such as {found[0]}" if found else "no predictions"
        raise UserError(f"{path} holds {other}, and is not read: {_SAVE}, or {_PLAIN}") from None
    # A broken file can make the reader fail in any way: OSError, EOFError, RuntimeError, KeyError.
    except Exception as error:
        words = str(error).strip()
        said = (words if " " in words else type(error).__name__).splitlines()[0].split(". ")[0][:120]
        raise UserError(f"{path} cannot be read as a file of torch.save ({said}): {_SAVE}") from None


class _Predicted(NamedTuple):
    """One image's prediction."""

    path: str
    anomaly_map: NDArray[np.float32] | None
    score: float | None
    mask: NDArray[np.float32] | None


def _images(predictions: Any) -> Iterator[_Predicted]:
    """Every image of batches, single ones and nested lists of these."""
    if any(_field(predictions, name) is not None for name in _FIELDS):
        yield from _images_of_batch(predictions)
    elif isinstance(predictions, Iterable) and not isinstance(predictions, (str, Mapping, torch.Tensor, np.ndarray)):
        for part in predictions:
            yield from _images(part)
    else:
        raise UserError(
            f"predictions hold {'None' if predictions is None else f'a {type(predictions).__name__}'}: give what "
            "Engine.predict returns (with return_predictions=True), or objects or dictionaries with "
            f"{', '.join(_FIELDS)}"
        )


def _field(batch: Any, name: str) -> Any:
    return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)


def _images_of_batch(batch: Any) -> Iterator[_Predicted]:
    paths = _field(batch, "image_path")
    paths = [paths] if paths is None or isinstance(paths, (str, Path)) else list(paths)
    if not paths or None in paths:
        raise UserError(
            "a prediction has no image_path, so it is not known of which image it is: predict with Engine.predict, or "
            "set it"
        )

    def per_image(name: str) -> NDArray[np.float32] | None:
        values = _array(name, _field(batch, name), paths)
        if values is None:
            return None
        if values.ndim < 2 or values.size == 0 or values.size != len(paths) * math.prod(values.shape[-2:]):
            raise _unfit(name, values, paths, "a map (h, w)")
        with np.errstate(over="ignore"):  # infinite ones are refused where they are scored
            return values.astype(np.float32).reshape(len(paths), *values.shape[-2:])

    maps, masks = per_image("anomaly_map"), per_image("gt_mask")
    scores = _array("pred_score", _field(batch, "pred_score"), paths)
    if scores is not None and scores.size != len(paths):
        raise _unfit("pred_score", scores, paths, "a score")
    for i, path in enumerate(paths):
        yield _Predicted(
            str(path),
            None if maps is None else maps[i],
            None if scores is None else float(scores.flat[i]),
            None if masks is None else masks[i],
        )


def _unfit(name: str, values: Any, paths: Sequence[Any], wanted: str) -> UserError:
    return UserError(
        f"{name} has shape {values.shape} and image_path {len(paths)} images, {paths[0]} first: pass {wanted} for each"
    )


def _array(name: str, values: Any, paths: Sequence[Any]) -> np.ndarray | None:
    if values is None:
        return None
    try:
        array = values
        if isinstance(values, torch.Tensor):
            array = values.detach().cpu()
            array = (array.double() if array.is_floating_point() else array).numpy()  # NumPy has no bf16
        array = np.asarray(array)
        if array.dtype.kind in "biuf":
            return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):  # sparse, quantised, without memory; of several shapes
        pass
    raise UserError(
        f"{name} of {paths[0]} is a {type(values).__name__} that is no array of real numbers: pass a dense tensor"
    )


def _of_test_images(images: Iterable[_Predicted], category: Category) -> tuple[list[_Predicted], list[str]]:
    """The prediction of each test image, and the paths of those of other images."""
    root = category.root.resolve()
    places: dict[Any, int] = {}
    for i, item in enumerate(category.test):
        places[root / item.path.relative_to(category.root)] = i
        places[(root.name, *item.path.relative_to(category.root).parts)] = i
    found: dict[int, _Predicted] = {}
    left = []
    for image in images:
        # Which takes both separators, of a prediction that was made elsewhere.
        place = places.get(PureWindowsPath(image.path).parts[-4:])
        place = places.get(Path(image.path).resolve()) if place is None else place
        if place is None:
            left.append(image.path)
        elif place in found:
            raise UserError(f"there are two predictions of {image.path}: pass those of one model, each image once")
        else:
            found[place] = image
    missing = [str(item.path) for i, item in enumerate(category.test) if i not in found]
    if not found:
        first = f", the first {left[0]}" if left else ""
        raise UserError(
            f"none of the {len(left)} predictions is of a test image in {category.root / 'test'}{first}: name the "
            f"data and the category that they were made of; an image_path ends in {root.name}/test/TYPE/NAME"
        )
    if missing:
        named = ", ".join(missing[:_N_NAMED]) + (", ..." if len(missing) > _N_NAMED else "")
        raise UserError(
            f"{len(missing)} of {len(category.test)} test images have no prediction: {named}; predict the whole test "
            f"set, of which datamodules may have taken a part for validation: engine.predict(model, "
            f"data_path={str(category.root / 'test')!r})"
        )
    return [found[i] for i in range(len(category.test))], left


def _of_all(name: str, values: Sequence[_Value | None]) -> list[_Value]:
    """The values, if all predictions have them; empty if none has; an error if only some have."""
    existing = [value for value in values if value is not None]
    if existing and len(existing) < len(values):
        raise UserError(
            f"{len(values) - len(existing)} of {len(values)} predictions have no {name}: pass those of one model"
        )
    return existing


def _refuse_crops(found: Sequence[_Predicted], truth: GroundTruth) -> None:
    """An error where masks that came with the maps do not lie where the data's lie: no map could be scored."""
    pairs: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for image, item in zip(found, truth.test, strict=True):
        if image.mask is not None and image.mask.any() and item.masks and len(pairs) < _N_COMPARED:
            defects = truth.defects(item)
            if defects:
                pairs.append((_middle(image.mask), _middle(np.any([d.mask for d in defects], axis=0))))
    if not pairs:
        return
    theirs, ours = (np.array(middles) for middles in zip(*pairs, strict=True))
    square = (ours**2).sum(0)
    # Per axis: how much farther from the image's middle their masks lie than ours. Where all lie in it, nothing tells.
    scale = np.where(square > 0.01 * len(pairs), (theirs * ours).sum(0) / np.maximum(square, 1e-9), 1)
    if (abs(scale - 1) > _SHIFT).any():
        raise UserError(
            f"the maps are of cropped images, since gt_mask in the predictions lies {scale[1]:.2f} (across) and "
            f"{scale[0]:.2f} (down) times as far from the middle as the masks of the data: predict whole images, of "
            "PatchCore without its center_crop_size"
        )


def _middle(mask: NDArray[Any]) -> NDArray[np.float64]:
    """The mean position (y, x) of what is marked, from -1 to 1."""
    places = (np.argwhere(mask) + 0.5) / mask.shape
    return 2 * places.mean(0) - 1


def _cut_off(scores: Sequence[float], maps: Sequence[NDArray[np.float32]]) -> list[str]:
    """A sentence where values are equal because they were cut off at 0 and 1."""
    n_zeros, n_ones = (sum(score == end for score in scores) if max(scores, default=2) <= 1 else 0 for end in (0, 1))
    is_normalised = max((m.max() for m in maps), default=2) <= 1
    n_pixels, total = sum(int((m == 1).sum()) for m in maps) if is_normalised else 0, sum(m.size for m in maps)
    if max(n_zeros, n_ones, n_pixels) < 2:
        return []
    return [
        f"{n_zeros} image scores are 0 and {n_ones} are 1, and {100 * n_pixels / max(total, 1):.2g} % of all pixels "
        "are 1: anomalib's normalisation cuts off there, and what is equal has no order; to be exact, set "
        "model.post_processor.enable_normalization = False before you predict"
    ]


def _refuse_pictures(folder: Path) -> None:
    """An error where there is no map, but pictures are."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    pictures = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if pictures and not any(path.suffix.lower() in SUFFIXES for path in files):
        raise UserError(
            f"{folder} has {len(pictures)} pictures and no map, {pictures[0].name} first: the colours of pictures, "
            f"anomalib's visualizations among them, are no scores; {_SAVE} and give that file"
        )


def _result(
    category: Category, truth: GroundTruth, figures: dict[str, dict], image_score: str, left: list[str]
) -> dict[str, Any]:
    result: dict[str, Any] = {"category": category.name, **figures, "image_score": image_score}
    result |= {"n_images": count_kinds(category), **remarks(category, truth)}
    if left:
        result["unused"].append(
            {"files": "maps or predictions of no test image", "n_files": len(left), "first": left[:_N_NAMED]}
        )
    return result


def _counted(images: Iterable[ScoredMap], total: int, progress: Progress) -> Iterator[ScoredMap]:
    for done, image in enumerate(images, start=1):
        yield image
        progress("scoring maps", done, total)
