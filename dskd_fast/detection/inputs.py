"""Images from a program's memory or from files, one by one, as they are scored."""

import os
from collections.abc import Iterable, Iterator
from numbers import Integral
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dskd_fast.data.decoding import load_image
from dskd_fast.data.images import MIN_SIDE, n_bytes_in_header, read_image

OneImage = str | os.PathLike[str] | NDArray | Tensor | Image.Image
Images = OneImage | Iterable[OneImage]

_SINGLE = (str, os.PathLike, np.ndarray, Tensor, Image.Image)
_PILLOW_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_ACCEPTED = (
    "pass paths, arrays (H, W, 3) or (B, H, W, 3), tensors (3, H, W) or (B, 3, H, W), Pillow images, or an iterable of "
    "single ones"
)


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError for what is no whole number from 1 up."""
    is_whole = isinstance(batch_size, Integral) and not isinstance(batch_size, bool)
    if not is_whole or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} is not possible: use a whole number from 1 up")


def single_images(images: Images) -> Iterator[tuple[str, OneImage]]:
    """Each image, as it is, when it is asked for, with what messages call it.

    Args:
        images: a path, an array (H, W, 3) or (B, H, W, 3), a tensor (3, H, W) or (B, 3, H, W) on any device, a Pillow
            image, or an iterable of such single images, which may differ in kind and size.

    Raises:
        TypeError: something else.
    """
    if isinstance(images, _SINGLE):
        if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
            yield from ((f"images[{i}]", image) for i, image in enumerate(images))
        else:
            yield "images", images
    elif isinstance(images, Iterable) and not isinstance(images, bytes | dict):
        yield from ((f"images[{i}]", image) for i, image in enumerate(images))
    else:
        raise TypeError(f"images is a {type(images).__name__}: {_ACCEPTED}")


def bytes_to_read(image: OneImage) -> float:
    """Bytes of the pixels in an image file; 0 of what is in memory already, which may be changed by its owner."""
    return n_bytes_in_header(Path(image)) if isinstance(image, str | os.PathLike) else 0


def as_rgb(image: OneImage, name: str, *, bits: int | None = None) -> NDArray[np.uint8]:
    """A single image as uint8 RGB (H, W, 3), read or converted.

    Args:
        image: arrays and tensors are RGB, uint8 or floating from 0 to 1; sides have at least 32 pixels.
        name: what messages call it.
        bits: of files of more than 8 bits, see `dskd_fast.data.images.read_image`.

    Raises:
        TypeError: none of the kinds of `single_images`.
        ValueError: a shape, dtype or value other than those.
        ImageError: a file that cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image), bits=bits)
    if isinstance(image, Image.Image):
        pixels = _from_pillow(image, name)
    elif isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"{name} is a tensor of shape {tuple(image.shape)}: pass (3, H, W), or (B, 3, H, W)")
        image = image.detach().cpu()
        pixels = (image.double() if image.is_floating_point() else image).permute(1, 2, 0).numpy()
    elif isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{name} is an array of shape {image.shape}: pass (H, W, 3), or (B, H, W, 3)")
        pixels = image
    else:
        raise TypeError(f"{name} is a {type(image).__name__}: {_ACCEPTED}")
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"{name} has {width} x {height} pixels: pass at least {MIN_SIDE} on each side")
    return np.ascontiguousarray(_to_uint8(pixels, name))


def _from_pillow(image: Image.Image, name: str) -> NDArray[np.uint8]:
    if image.mode not in _PILLOW_MODES:
        raise ValueError(f"{name} is a Pillow image of mode {image.mode}: pass one of {', '.join(_PILLOW_MODES)}")
    load_image(image)
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _to_uint8(pixels: NDArray, name: str) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind != "f":
        raise ValueError(f"{name} has dtype {pixels.dtype}: pass uint8, or floating values from 0 to 1")
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 1):  # NaN fails, too
        raise ValueError(f"{name} has floating values from {low} to {high}: pass values from 0 to 1, or uint8")
    return np.rint(pixels * 255.0).astype(np.uint8)
