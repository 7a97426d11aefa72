"""What an image file holds, by its content: PNG, JPEG, BMP and WebP by Pillow, TIFF by `dskd_fast.data.tiff`."""

import contextlib
import io
import math
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from dskd_fast.choices import MAX_PIXELS
from dskd_fast.data import jpeg

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_ORIENTATION_TAG = 0x0112
_max_pixels = MAX_PIXELS
_PILLOW_LIMIT_LOCK = threading.Lock()
# Where the header of a PNG has these bytes.
_PNG_BIT_DEPTH, _PNG_COLOUR_TYPE, _PNG_INTERLACING = 24, 25, 28
# The type and checksum of the empty chunk that ends every PNG.
_PNG_END = b"IEND\xaeB`\x82"


class Unusable(Exception):
    """Carries the reason out of a decoder that does not know the path."""


class Picture(NamedTuple):
    """What a file holds: upright pixels (H, W, C), uint8, uint16 or float, as they are stored, alpha included.

    `maximum` is the largest value of their type, and means black instead of white where `is_white_zero`.
    """

    pixels: np.ndarray
    maximum: int
    is_white_zero: bool = False
    is_lossy: bool = False


@contextlib.contextmanager
def pixel_limit(n: int) -> Iterator[None]:
    """Read images of up to `n` pixels, in all threads, within the context."""
    global _max_pixels
    before, _max_pixels = _max_pixels, n
    try:
        yield
    finally:
        _max_pixels = before


@contextlib.contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Pillow's own limit of pixels is the whole process's, and warns: ours takes its place while a file is opened."""
    with _PILLOW_LIMIT_LOCK:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def open_image(data: bytes | Path, formats: Sequence[str] = _FORMATS) -> Image.Image:
    """`Image.open` with `pixel_limit` in place of Pillow's own limit, raising what it raises; for `load_image`."""
    with _without_pillows_limit():
        image = Image.open(data if isinstance(data, Path) else io.BytesIO(data), formats=tuple(formats))
    check_pixels(*image.size)
    return image


def load_image(image: Image.Image) -> None:
    """`Image.load` without Pillow's limit, which its TIFF reader looks at again."""
    is_beyond = image.format == "TIFF" and image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf)
    # Threads load one after the other only where they have to.
    with _without_pillows_limit() if is_beyond else contextlib.nullcontext():
        image.load()


def check_pixels(width: int, height: int) -> None:
    if width * height > _max_pixels:
        raise Unusable(
            f"it has {width} x {height} pixels, more than the limit of {_max_pixels:,} against decompression bombs: "
            f"raise it with --max-pixels {width * height} (in Python, dskd_fast.data.images.pixel_limit)"
        )


def decode_pillow(data: bytes, page: int = 0) -> Picture:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise Unusable(
            "this program has set PIL.ImageFile.LOAD_TRUNCATED_IMAGES, with which half a file passes for an image: set "
            "it to False"
        )
    with open_image(data) as image:
        if image.format == "PNG":
            # Pillow's load stops at the last pixel and skips checksums; verify reads every chunk up to the
            # end mark.
            with open_image(data, ("PNG",)) as copy:
                copy.verify()
            if _PNG_END not in data:
                raise Unusable("it is damaged or truncated (the end mark is missing)")
        if image.format in ("PNG", "WEBP") and (n_frames := getattr(image, "n_frames", 1)) > 1:
            raise Unusable(f"it is an animation of {n_frames} frames: save the one that counts as PNG")
        image.seek(page)
        load_image(image)
        is_jpeg = image.format in ("JPEG", "MPO")
        if is_jpeg and jpeg.is_damaged(data):
            raise Unusable("it is damaged or truncated (some of its coded data is missing)")
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        is_white_zero = False
        if image.format == "PNG" and data[_PNG_BIT_DEPTH] == 16:
            pixels = _decode_png16(data, image.size)
        elif image.mode in ("L", "LA", "RGB", "RGBA"):
            pixels = np.asarray(image)
        elif image.mode.startswith("I;16"):
            pixels = np.asarray(image).astype(np.uint16)
            # Of 8-bit values Pillow has made differences from white itself.
            is_white_zero = (
                isinstance(image, TiffImageFile) and image.tag_v2.get(262) == tifffile.PHOTOMETRIC.MINISWHITE
            )
        elif image.mode in ("1", "P", "PA", "CMYK", "YCbCr"):
            # Pillow warns about, and otherwise has no use here for, transparency given per palette entry.
            image.info.pop("transparency", None)
            pixels = np.asarray(image.convert("RGB"))
        else:
            raise Unusable(f"its pixel format ({image.mode} in Pillow's terms) is not supported")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    maximum = int(np.iinfo(pixels.dtype).max)
    return Picture(upright(pixels, orientation), maximum, is_white_zero, is_jpeg or image.format == "WEBP")


def _decode_png16(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """A 16-bit PNG as uint16 of shape (H, W, C).

    Pillow's PNG reader drops the low byte of each channel where there are several, but its zlib decoder,
    which undoes filters and interlacing, can be asked for either byte.
    """
    # torchvision.io.decode_png would do the same to the bit, but is deprecated since torchvision 0.29.
    colour_type, interlaced = data[_PNG_COLOUR_TYPE], data[_PNG_INTERLACING]
    compressed = b"".join(_png_chunks(data, b"IDAT"))

    def decode(mode: str, raw_mode: str) -> np.ndarray:
        return np.asarray(Image.frombytes(mode, size, compressed, "zip", raw_mode, interlaced)).astype(np.uint16)

    if colour_type == 0:
        return decode("I;16", "I;16B")[:, :, None]
    if colour_type == 4:
        # Grey and alpha have four bytes a pixel, just as 8-bit RGBA.
        four = decode("RGBA", "RGBA")
        return four[:, :, 0::2] * 256 + four[:, :, 1::2]
    mode = {2: "RGB", 6: "RGBA"}[colour_type]
    return decode(mode, f"{mode};16B") * 256 + decode(mode, f"{mode};16L")


def _png_chunks(data: bytes, wanted: bytes) -> Iterator[bytes]:
    position = 8
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == wanted:
            yield data[position + 8 : position + 8 + length]
        elif kind == b"IEND":
            return
        position += 12 + length


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8; anything else counts as 1)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
