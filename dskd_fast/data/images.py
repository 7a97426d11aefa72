"""Reading image files as 8-bit RGB, whatever the file holds."""

import contextlib
import io
import logging
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from dskd_fast.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
MIN_SIDE = 32
MAX_PIXELS = 250_000_000
"""Images with more pixels are not read, unless `pixel_limit` says otherwise: a small file may unpack to any size."""

# For a damaged file tifffile logs several lines, and the caller gets an error that says the same.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_ORIENTATION_TAG = 0x0112
_max_pixels = MAX_PIXELS
_PILLOW_LIMIT_LOCK = threading.Lock()
# The type and checksum of the empty chunk that ends every PNG.
_PNG_END = b"IEND\xaeB`\x82"
_TIFF_GREY_OR_RGB = (
    tifffile.PHOTOMETRIC.MINISWHITE,
    tifffile.PHOTOMETRIC.MINISBLACK,
    tifffile.PHOTOMETRIC.RGB,
)


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


class _Unusable(Exception):
    """Carries the reason out of a decoder that does not know the path."""


def list_images(folder: Path) -> list[Path]:
    """The image files directly in ``folder``, in natural order (``2.png`` before ``10.png``).

    A file is an image by its suffix (`IMAGE_SUFFIXES`, any case). Hidden files and folders are left out. A
    link that leads nowhere is listed, so that reading it fails rather than the image going missing in
    silence.

    Raises:
        UserError: ``folder`` is not a folder or cannot be read.
    """
    try:
        entries = list(Path(folder).iterdir())
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error
    images = [
        entry
        for entry in entries
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".") and not entry.is_dir()
    ]
    return sorted(images, key=lambda path: natural_key(path.name))


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """A sort key that compares runs of digits by their value, and the whole name where that leaves a tie."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)], name


def read_image(path: Path) -> np.ndarray:
    """Read an image file as uint8 RGB of shape (H, W, 3), rotated as its EXIF orientation asks.

    PNG, JPEG, BMP and TIFF are recognised by their content. Grey, palette, 1-bit and CMYK images are
    converted to RGB. Alpha is ignored: the stored colours are returned as they are, blended with nothing.
    Values of more than 8 bits are scaled by their full range and rounded (65535 becomes 255), so 12-bit
    values kept in a 16-bit file come out dark. Floating-point TIFF must lie in [0, 1]. A TIFF with several
    pages gives its first.

    Raises:
        ImageError: the file is missing, empty, truncated or damaged, is of another kind, is smaller than 32
            pixels on a side, or has more pixels than the limit (`MAX_PIXELS`, `pixel_limit`).
    """
    try:
        pixels, maximum = _decode(_read_bytes(path))
        return _to_rgb(pixels, maximum)
    except _Unusable as error:
        raise ImageError((Path(path), str(error))) from error


def read_mask(path: Path) -> np.ndarray:
    """Read a mask as unsigned integers of shape (H, W): the stored values, neither scaled nor rounded.

    Where a mask has colours (or a palette), the largest channel counts; alpha does not. In a 1-bit mask white
    is 255.

    Raises:
        ImageError: as `read_image`, and for a floating-point mask.
    """
    try:
        pixels, _ = _decode(_read_bytes(path))
        if pixels.dtype.kind != "u":
            raise _Unusable("it holds floating-point values, where a mask needs integers")
    except _Unusable as error:
        raise ImageError((Path(path), str(error))) from error
    return _without_alpha(pixels).max(axis=2)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels of what `read_image` returns, from the file's header where that is enough.

    Raises:
        ImageError: as `read_image`, as far as the header shows it.
    """
    try:
        data = _read_bytes(path)
        try:
            with open_image(data) as image:
                if image.format != "TIFF":
                    turned = image.getexif().get(_ORIENTATION_TAG) in (5, 6, 7, 8)
                    return image.size if turned else image.size[::-1]
        except _Unusable:
            raise
        except Exception as error:
            raise _Unusable(_reason(error)) from error
        # A TIFF states its orientation in a tag that Pillow has or has not applied to the size by now.
        return _decode(data)[0].shape[:2]
    except _Unusable as error:
        raise ImageError((Path(path), str(error))) from error


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


@contextlib.contextmanager
def pixel_limit(n: int) -> Iterator[None]:
    """Read images of up to `n` pixels, in all threads, within the context."""
    global _max_pixels
    before, _max_pixels = _max_pixels, n
    try:
        yield
    finally:
        _max_pixels = before


def open_image(data: bytes, formats: Sequence[str] = _FORMATS) -> Image.Image:
    """`Image.open` with `pixel_limit` in place of Pillow's own limit, which is the whole process's, and warns.

    `load_image` loads it. Raises what Pillow raises.
    """
    Image.preinit()
    for name in formats:
        if name not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(data[:16]) is not True:
            continue
        try:
            image = factory(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # as Image.open takes it: another format, or a damaged header
        _check_pixels(*image.size)
        return image
    raise Image.UnidentifiedImageError("cannot identify the image")


def load_image(image: Image.Image) -> None:
    """`Image.load` without Pillow's limit, which its TIFF reader looks at again."""
    if image.format != "TIFF" or image.width * image.height <= (Image.MAX_IMAGE_PIXELS or np.inf):
        image.load()
        return
    with _PILLOW_LIMIT_LOCK:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image.load()
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_pixels(width: int, height: int) -> None:
    if width * height > _max_pixels:
        raise _Unusable(
            f"it has {width} x {height} pixels, more than the limit of {_max_pixels:,} against decompression bombs: "
            f"raise it with --max-pixels {width * height} (in Python, dskd_fast.data.images.pixel_limit)"
        )


def _read_bytes(path: Path) -> bytes:
    path = Path(path)
    try:
        if path.is_dir():
            raise _Unusable("it is a folder")
        if path.exists() and not path.is_file():
            raise _Unusable("it is not a regular file")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise _Unusable("there is no such file") from error
    except OSError as error:
        raise _Unusable(f"it cannot be opened ({error.strerror})") from error
    if not data:
        raise _Unusable("the file is empty")
    return data


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no PNG, JPEG, BMP or TIFF image, or its header is damaged"
    if isinstance(error, Image.DecompressionBombError):  # of plugins that have a limit of their own
        return "it has more pixels than Pillow reads of this format: save it as PNG or TIFF"
    if isinstance(error, MemoryError):
        return "it does not fit in memory"
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"it is damaged or truncated ({detail})"


def _decode(data: bytes) -> tuple[np.ndarray, int]:
    """Pixels of shape (H, W, C), upright, as uint8, uint16 or float, and the value that means white."""
    try:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            pixels, maximum = _decode_tiff(data)
        else:
            pixels = _decode_pillow(data)
            maximum = np.iinfo(pixels.dtype).max
    except _Unusable:
        raise
    except Exception as error:
        # The decoders raise whatever a damaged file makes them stumble over: KeyError, struct.error,
        # EOFError, ...
        raise _Unusable(_reason(error)) from error
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise _Unusable(f"it has {width} x {height} pixels, and each side needs at least {MIN_SIDE}")
    return pixels, maximum


def _decode_pillow(data: bytes) -> np.ndarray:
    with open_image(data) as image:
        if image.format == "PNG":
            # Pillow's load stops at the last pixel and skips checksums; verify reads every chunk up to the
            # end mark.
            with open_image(data, ("PNG",)) as copy:
                copy.verify()
            if _PNG_END not in data:
                raise _Unusable("it is damaged or truncated (the end mark is missing)")
        load_image(image)
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        if image.format == "PNG" and _png_bit_depth(data) == 16:
            pixels = _decode_png16(data, image.size)
        elif image.mode in ("L", "LA", "RGB", "RGBA"):
            pixels = np.asarray(image)
        elif image.mode.startswith("I;16"):
            pixels = np.asarray(image).astype(np.uint16)
            if image.format == "TIFF" and image.tag_v2.get(262) == tifffile.PHOTOMETRIC.MINISWHITE:
                pixels = 65535 - pixels
        elif image.mode in ("1", "P", "PA", "CMYK", "YCbCr"):
            # Pillow warns about, and otherwise has no use here for, transparency given per palette entry.
            image.info.pop("transparency", None)
            pixels = np.asarray(image.convert("RGB"))
        else:
            raise _Unusable(f"its pixel format ({image.mode} in Pillow's terms) is not supported")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    return _upright(pixels, orientation)


def _png_bit_depth(data: bytes) -> int:
    return data[24]


def _decode_png16(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """A 16-bit PNG as uint16 of shape (H, W, C).

    Pillow's PNG reader drops the low byte of each channel where there are several, but its zlib decoder,
    which undoes filters and interlacing, can be asked for either byte.
    """
    colour_type, interlaced = data[25], data[28]
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


def _decode_tiff(data: bytes) -> tuple[np.ndarray, int]:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages[0]
        _check_pixels(page.imagewidth, page.imagelength)
        # Pillow knows more colour spaces and codecs, but drops the low byte of channels of 16 bits.
        bits = page.bitspersample
        signed = page.dtype is not None and page.dtype.kind == "i"
        if bits <= 8 and not signed:
            return _decode_pillow(data), 255
        if page.photometric not in _TIFF_GREY_OR_RGB or page.samplesperpixel > 4:
            raise _Unusable(
                f"it is a TIFF of {page.samplesperpixel} channels of {bits} bits, photometric interpretation "
                f"{int(page.photometric)}, where grey or RGB is needed"
            )
        if page.dtype is None or not (page.dtype.kind == "f" or page.dtype == np.uint16):
            raise _Unusable(
                f"it is a TIFF of {bits}-bit {page.dtype or 'values'}, where unsigned 8- or 16-bit integers "
                "or floating-point values from 0 to 1 are needed"
            )
        try:
            pixels = page.asarray()
        except ValueError as error:
            if "imagecodecs" in str(error):
                if bits == 16 and page.samplesperpixel == 1:
                    return _decode_pillow(data), 65535
                raise _Unusable(
                    f"its compression ({page.compression.name} with {bits} bits) needs imagecodecs"
                ) from error
            raise
        if page.axes == "SYX":
            pixels = pixels.transpose(1, 2, 0)
        elif page.axes == "YX":
            pixels = pixels[:, :, None]
        elif page.axes != "YXS":
            raise _Unusable(f"it is a TIFF with axes {page.axes}, where one plane of pixels is needed")
        if pixels.dtype.kind == "f":
            maximum = 1
            # Written so that NaN fails, too.
            if not (pixels.min() >= 0 and pixels.max() <= 1):
                raise _Unusable("its floating-point values leave the range from 0 to 1")
        else:
            maximum = 2**bits - 1
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            pixels = maximum - pixels
        orientation = page.tags[274].value if 274 in page.tags else 1
        return _upright(pixels, orientation), maximum


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8; anything else counts as 1)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _without_alpha(pixels: np.ndarray) -> np.ndarray:
    return pixels[:, :, :1] if pixels.shape[2] <= 2 else pixels[:, :, :3]


def _to_rgb(pixels: np.ndarray, maximum: int) -> np.ndarray:
    pixels = _without_alpha(pixels)
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels.astype(np.float64) * (255 / maximum)).astype(np.uint8)
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), order="C")
