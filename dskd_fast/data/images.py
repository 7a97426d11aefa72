"""Reading image files of all usual formats as 8-bit RGB."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from dskd_fast.data.decoding import MAX_PIXELS, Picture, Unusable, decode_pillow, open_image, pixel_limit
from dskd_fast.data.tiff import decode_tiff, is_tiff
from dskd_fast.errors import UserError

__all__ = [
    "MAX_PIXELS",
    "MIN_SIDE",
    "ImageError",
    "decode_image",
    "image_size",
    "n_bytes_in_header",
    "pixel_limit",
    "read_image",
    "read_image_and_peak",
    "read_mask",
    "resize_square",
]

MIN_SIDE = 32
_BLOCK = 256  # rows
# First bytes of formats that are not read, but that are found under suffixes of those that are.
_OTHER_FORMATS = {
    b"GIF8": "a GIF",
    b"\0\0\0\x0cjP  ": "a JPEG 2000",
    b"\xff\x4f\xff\x51": "a JPEG 2000",
    b"\0\0\0\x0cJXL ": "a JPEG XL",
    b"\xff\x0a": "a JPEG XL",
    b"8BPS": "a Photoshop file",
}


class ImageError(UserError):
    """One or more image files cannot be used.

    ``failures`` holds a (path, reason) pair for each of them.
    """

    def __init__(self, *failures: tuple[Path, str]):
        super().__init__(*failures)
        self.failures = failures

    def __str__(self) -> str:
        what = "image is" if len(self.failures) == 1 else "images are"
        listed = "; ".join(f"{path}: {reason}" for path, reason in self.failures)
        return f"{len(self.failures)} {what} unusable and must be replaced or removed: {listed}"


def read_image(path: Path, *, bits: int | None = None) -> np.ndarray:
    """Read an image file as uint8 RGB of shape (H, W, 3), rotated as its EXIF orientation asks.

    PNG, JPEG, BMP, TIFF and WebP are recognised by their content. Grey, palette, 1-bit and CMYK images are
    converted to RGB. Alpha is ignored: the stored colours are returned as they are, blended with nothing.
    Values of more than 8 bits are scaled by their full range and rounded (65535 becomes 255), or by that of ``bits``.
    Floating-point TIFF must lie in [0, 1].

    A file holds one picture. Of a TIFF its reduced copies and transparency masks do not count, and three channels of
    8 or 16 bits that ImageJ keeps as pages are RGB, unless their colours are set to others. Of the several pictures in
    a phone's JPEG (MPO) the first is the photograph.

    Args:
        path: the file.
        bits: of integers of more than 8 bits: 2^bits - 1 is white, and larger values are refused.

    Raises:
        ImageError: the file is missing, empty, truncated or damaged, is of another kind, has several pages or frames,
            is smaller than 32 pixels on a side, holds a value above those of ``bits``, or has more pixels than the
            limit (`MAX_PIXELS`, `pixel_limit`). (Damage inside a file is found in a PNG by its checksums, and in a JPEG
            within the limits of `dskd_fast.data.jpeg.is_damaged`; other formats have no checksums.)
    """
    return read_image_and_peak(path, bits=bits)[0]


def read_image_and_peak(path: Path, *, bits: int | None = None) -> tuple[np.ndarray, int | None]:
    """What `read_image` gives, and the largest value that is stored, without alpha; None if not of 16 bits."""
    try:
        picture = _decode(_read_bytes(path))
        colours, maximum = _colours(picture, bits)
        peak = None
        if picture.maximum == 65535:
            # Of a picture whose white is 0 the stored values are the differences from white.
            peak = maximum - int(colours.min()) if picture.is_white_zero else int(colours.max())
        return _to_rgb(colours, maximum), peak
    except Unusable as error:
        raise ImageError((Path(path), str(error))) from error


def decode_image(data: bytes, path: Path, *, bits: int | None = None) -> np.ndarray:
    """What `read_image` returns of a file that holds `data`; `path` is what errors call it.

    Raises:
        ImageError: as `read_image`.
    """
    try:
        return _to_rgb(*_colours(_decode(data), bits))
    except Unusable as error:
        raise ImageError((Path(path), str(error))) from error


def read_mask(path: Path) -> np.ndarray:
    """Read a mask as unsigned integers of shape (H, W): the stored values, neither scaled nor rounded.

    Where a mask has colours (or a palette), the largest channel counts; alpha does not. In a 1-bit mask white
    is 255.

    Raises:
        ImageError: as `read_image`, and for a floating-point mask, or one in a lossy format (WebP altogether).
    """
    try:
        picture = _decode(_read_bytes(path))
        if picture.pixels.dtype.kind != "u":
            raise Unusable("it holds floating-point values, where a mask needs integers")
        if picture.is_lossy:
            raise Unusable("it is a JPEG or WebP, whose compression changes a mask's values: save masks as PNG")
        return _colours(picture)[0].max(axis=2)
    except Unusable as error:
        raise ImageError((Path(path), str(error))) from error


def image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels of what `read_image` returns.

    The file is decoded as there, so that both agree on every file.

    Raises:
        ImageError: as `read_image`.
    """
    try:
        return _decode(_read_bytes(path)).pixels.shape[:2]
    except Unusable as error:
        raise ImageError((Path(path), str(error))) from error


def n_bytes_in_header(path: Path) -> float:
    """Bytes of what `read_image` returns, by the file's header; infinite where that does not say it."""
    try:
        if not Path(path).is_file():  # to open a pipe would wait for a writer
            return math.inf
        with open_image(Path(path)) as image:
            return 3 * image.width * image.height
    except Exception:  # of as many kinds as in `_decode`
        return math.inf


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize a uint8 image of shape (H, W, 3) to (size, size, 3); the aspect ratio is not kept.

    Bilinear with antialiasing, as Pillow does it: columns first, rounded, then rows. The paper resizes in the same
    plain way, to 256 x 256.

    Raises:
        ValueError: ``image`` is not uint8 of shape (H, W, 3), or ``size`` is below 1.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 of shape (H, W, 3), not {image.dtype} of shape {image.shape}")
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, not {size}")
    # One side at a time: given both, versions of Pillow differ in which they take first, and so in what they round.
    narrowed = Image.fromarray(image).resize((size, image.shape[0]), Image.Resampling.BILINEAR)
    return np.array(narrowed.resize((size, size), Image.Resampling.BILINEAR))


def _read_bytes(path: Path) -> bytes:
    path = Path(path)
    try:
        if path.is_dir():
            raise Unusable("it is a folder")
        if path.exists() and not path.is_file():
            raise Unusable("it is not a regular file")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise Unusable("there is no such file") from error
    except OSError as error:
        raise Unusable(f"it cannot be opened ({error.strerror})") from error
    return data


def _colours(picture: Picture, bits: int | None = None) -> tuple[np.ndarray, int]:
    """Values (H, W, C) from black to white without alpha, C 1 or 3, and the value of white."""
    pixels, maximum = picture.pixels, picture.maximum
    pixels = pixels[:, :, :1] if pixels.shape[2] <= 2 else pixels[:, :, :3]
    if bits is not None and pixels.dtype == np.uint16:
        maximum = 2**bits - 1
        if pixels.max() > maximum:
            raise Unusable(
                f"it holds the value {pixels.max()}, above {maximum}, the largest of {bits} bits, as which images are "
                "read here (--bits)"
            )
    return maximum - pixels if picture.is_white_zero else pixels, maximum


def _to_rgb(colours: np.ndarray, maximum: int) -> np.ndarray:
    if colours.dtype == np.uint16:
        colours = np.rint(np.arange(maximum + 1) * (255 / maximum)).astype(np.uint8)[colours]
    elif colours.dtype != np.uint8:
        scaled = np.empty(colours.shape, np.uint8)
        # In blocks, since float64 copies of a large image would take several times its memory.
        for rows in range(0, len(colours), _BLOCK):
            scaled[rows : rows + _BLOCK] = np.rint(colours[rows : rows + _BLOCK].astype(np.float64) * (255 / maximum))
        colours = scaled
    return np.array(np.broadcast_to(colours, (*colours.shape[:2], 3)), order="C")


def _decode(data: bytes) -> Picture:
    if not data:
        raise Unusable("the file is empty")
    try:
        picture = decode_tiff(data) if is_tiff(data) else decode_pillow(data)
    except Unusable:
        raise
    except Exception as error:
        # On damaged files decoders raise many kinds of errors: KeyError, struct.error, EOFError, ...
        raise Unusable(_reason(error, data)) from error
    height, width = picture.pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise Unusable(f"it has {width} x {height} pixels, and each side needs at least {MIN_SIDE}")
    return picture


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        name = next((name for start, name in _OTHER_FORMATS.items() if data.startswith(start)), None)
        if data[4:8] == b"ftyp":
            name = "a HEIF, AVIF or other file of MPEG's kind"
        if name is not None:
            return f"it is {name}, and no PNG, JPEG, BMP, TIFF or WebP image: save it as PNG or JPEG"
        return "it is no PNG, JPEG, BMP, TIFF or WebP image, or its header is damaged"
    if isinstance(error, Image.DecompressionBombError):  # of plugins that have a limit of their own
        return "it has more pixels than Pillow reads of this format: save it as PNG or TIFF"
    if isinstance(error, MemoryError):
        return "it does not fit in memory"
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"it is damaged or truncated ({detail})"
