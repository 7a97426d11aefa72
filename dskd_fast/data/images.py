"""Reading image files as 8-bit RGB, whatever the file holds."""

import contextlib
import io
import logging
import math
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image, ImageFile

from dskd_fast.data import jpeg
from dskd_fast.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# Formats that people keep images in and that are not read.
IMAGE_LIKE_SUFFIXES = (
    *(".gif", ".apng", ".mpo", ".jfif", ".jpe", ".dib", ".ico", ".svg", ".psd", ".psb", ".xcf"),
    *(".heic", ".heif", ".hif", ".avif", ".jp2", ".j2k", ".jpx", ".jxl", ".jxr", ".jls", ".qoi"),
    *(".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srw", ".orf", ".rw2", ".raf", ".pef"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".pfm", ".tga", ".pcx", ".sgi", ".ras", ".xpm", ".dds"),
    *(".exr", ".hdr", ".btf", ".dcm", ".fits", ".nii", ".czi", ".lif", ".nd2", ".lsm", ".svs"),
)
MIN_SIDE = 32
MAX_PIXELS = 250_000_000
"""Images with more pixels are not read, unless `pixel_limit` says otherwise: a small file may unpack to any size."""

# For a damaged file tifffile logs several lines, and the caller gets an error that says the same.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_ORIENTATION_TAG = 0x0112
_max_pixels = MAX_PIXELS
_PILLOW_LIMIT_LOCK = threading.Lock()
# The type and checksum of the empty chunk that ends every PNG.
_PNG_END = b"IEND\xaeB`\x82"
# How the content of formats that are not read begins, which people have under other suffixes, too.
_OTHER_FORMATS = {
    b"GIF8": "a GIF",
    b"\0\0\0\x0cjP  ": "a JPEG 2000",
    b"\xff\x4f\xff\x51": "a JPEG 2000",
    b"\0\0\0\x0cJXL ": "a JPEG XL",
    b"\xff\x0a": "a JPEG XL",
    b"8BPS": "a Photoshop file",
}
_GREY = (tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.MINISBLACK)
_TIFF_COLOURS = {
    tifffile.PHOTOMETRIC.RGB: 3,
    tifffile.PHOTOMETRIC.YCBCR: 3,
    tifffile.PHOTOMETRIC.CIELAB: 3,
    tifffile.PHOTOMETRIC.SEPARATED: 4,
}
_TIFF_ALPHA = ((tifffile.EXTRASAMPLE.ASSOCALPHA,), (tifffile.EXTRASAMPLE.UNASSALPHA,))
_TIFF_JPEG = (tifffile.COMPRESSION.OJPEG, tifffile.COMPRESSION.JPEG)


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


class _Picture(NamedTuple):
    """What a file holds: upright pixels (H, W, C), uint8, uint16 or float, as they are stored, alpha included.

    `maximum` is the largest value of their type, and means black instead of white where `is_white_zero`.
    """

    pixels: np.ndarray
    maximum: int
    is_white_zero: bool = False
    is_lossy: bool = False


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


def is_image_like(path: Path) -> bool:
    """Whether a file is, by its suffix (any case), an image of a format that is not read (`IMAGE_LIKE_SUFFIXES`)."""
    return Path(path).suffix.lower() in IMAGE_LIKE_SUFFIXES


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """A sort key that compares runs of digits by their value, and the whole name where that leaves a tie."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)], name


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
            limit (`MAX_PIXELS`, `pixel_limit`). (Damage inside a file is found by the checksums of a PNG and as far as
            `dskd_fast.data.jpeg.is_damaged` does; other formats have nothing to tell it by.)
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
    except _Unusable as error:
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
            raise _Unusable("it holds floating-point values, where a mask needs integers")
        if picture.is_lossy:
            raise _Unusable("it is a JPEG or WebP, whose compression changes a mask's values: save masks as PNG")
        return _colours(picture)[0].max(axis=2)
    except _Unusable as error:
        raise ImageError((Path(path), str(error))) from error


def image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels of what `read_image` returns.

    The file is decoded as there, so that both agree on every file.

    Raises:
        ImageError: as `read_image`.
    """
    try:
        return _decode(_read_bytes(path)).pixels.shape[:2]
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


@contextlib.contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Pillow's own limit of pixels is the whole process's, and warns: ours takes its place while a file is opened."""
    with _PILLOW_LIMIT_LOCK:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def open_image(data: bytes, formats: Sequence[str] = _FORMATS) -> Image.Image:
    """`Image.open` with `pixel_limit` in place of Pillow's own limit, raising what it raises; for `load_image`."""
    with _without_pillows_limit():
        image = Image.open(io.BytesIO(data), formats=formats)
    _check_pixels(*image.size)
    return image


def load_image(image: Image.Image) -> None:
    """`Image.load` without Pillow's limit, which its TIFF reader looks at again."""
    with _without_pillows_limit() if image.format == "TIFF" else contextlib.nullcontext():
        image.load()


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


def _decode(data: bytes) -> _Picture:
    try:
        picture = _decode_tiff(data) if _is_tiff(data) else _decode_pillow(data)
    except _Unusable:
        raise
    except Exception as error:
        # The decoders raise whatever a damaged file makes them stumble over: KeyError, struct.error,
        # EOFError, ...
        raise _Unusable(_reason(error, data)) from error
    height, width = picture.pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise _Unusable(f"it has {width} x {height} pixels, and each side needs at least {MIN_SIDE}")
    return picture


def _decode_pillow(data: bytes, page: int = 0) -> _Picture:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise _Unusable(
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
                raise _Unusable("it is damaged or truncated (the end mark is missing)")
        if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
            raise _Unusable(f"it is an animation of {image.n_frames} frames: save the one that counts as PNG")
        image.seek(page)
        load_image(image)
        is_jpeg = image.format in ("JPEG", "MPO")
        if is_jpeg and jpeg.is_damaged(data):
            raise _Unusable("it is damaged or truncated (some of its coded data is missing)")
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        is_white_zero = False
        if image.format == "PNG" and _png_bit_depth(data) == 16:
            pixels = _decode_png16(data, image.size)
        elif image.mode in ("L", "LA", "RGB", "RGBA"):
            pixels = np.asarray(image)
        elif image.mode.startswith("I;16"):
            pixels = np.asarray(image).astype(np.uint16)
            # Of 8-bit values Pillow has made differences from white itself.
            is_white_zero = image.format == "TIFF" and image.tag_v2.get(262) == tifffile.PHOTOMETRIC.MINISWHITE
        elif image.mode in ("1", "P", "PA", "CMYK", "YCbCr"):
            # Pillow warns about, and otherwise has no use here for, transparency given per palette entry.
            image.info.pop("transparency", None)
            pixels = np.asarray(image.convert("RGB"))
        else:
            raise _Unusable(f"its pixel format ({image.mode} in Pillow's terms) is not supported")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    maximum = int(np.iinfo(pixels.dtype).max)
    return _Picture(_upright(pixels, orientation), maximum, is_white_zero, is_jpeg or image.format == "WEBP")


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


def _is_tiff(data: bytes) -> bool:
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _decode_tiff(data: bytes) -> _Picture:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        parts = [_decode_page(data, page) for page in _pages_of_picture(tiff)]
    if len(parts) == 1:
        return parts[0]
    return parts[0]._replace(pixels=np.concatenate([part.pixels for part in parts], axis=2))


def _pages_of_picture(tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """The page that is the picture, or the three that are its red, green and blue."""
    all_pages = [tiff.pages.get(i) for i in range(len(tiff.pages))]
    last_link = tiff.pages.next_page_offset
    if last_link is not None:
        tiff.filehandle.seek(last_link)
        # tifffile ends the chain of pages where a link leads nowhere.
        if any(tiff.filehandle.read(tiff.tiff.offsetsize)):
            raise _Unusable("it is damaged or truncated (a page is missing)")
    pages = [page for page in all_pages if not page.is_reduced and not page.is_mask]
    if not pages and len(all_pages) == 1 and not all_pages[0].subifds:
        pages = all_pages
    if not pages:
        raise _Unusable(
            "its picture is not among its pages but in a part of one, as in a camera's raw file: save it as PNG"
        )
    n_planes = len(pages) * int(pages[0].imagedepth)
    if tiff.is_imagej or tiff.is_shaped or tiff.is_stk:
        # These may keep planes behind a single page.
        n_planes = max(n_planes, tiff.series[0].size // pages[0].size)
    if n_planes > 1 and not _is_imagej_rgb(tiff, pages):
        raise _Unusable(
            f"it is a TIFF of {n_planes} pages or planes, where one picture is needed: save each as a file of its own, "
            "the channels of a colour picture as RGB, and a mask's parts united in one page"
        )
    return pages


def _is_imagej_rgb(tiff: tifffile.TiffFile, pages: list[tifffile.TiffPage]) -> bool:
    """Whether pages are ImageJ's channels red, green and blue, which they are if no other colours are set."""
    if not tiff.is_imagej or len(pages) != 3 or tiff.series[0].axes != "CYX" or tiff.series[0].shape[0] != 3:
        return False
    colours = [np.asarray(table).reshape(3, -1).any(axis=1) for table in tiff.imagej_metadata.get("LUTs", ())]
    return (not colours or np.array_equal(colours, np.eye(3, dtype=bool))) and all(
        page.dtype in (np.uint8, np.uint16) and page.samplesperpixel == 1 for page in pages
    )


def _decode_page(data: bytes, page: tifffile.TiffPage) -> _Picture:
    # A damaged tag may hold a text, whose multiple could fill the memory.
    _check_pixels(int(page.imagewidth), int(page.imagelength))
    n_present = sum(
        offset > 0 and size > 0 for offset, size in zip(page.dataoffsets, page.databytecounts, strict=False)
    )
    # Both decoders take what is missing for black, or the file's first bytes for it. (An old JPEG has no such parts.)
    if n_present < math.prod(page.chunked) and page.compression != tifffile.COMPRESSION.OJPEG:
        raise _Unusable(
            f"it is damaged or truncated ({math.prod(page.chunked) - n_present} of its strips or tiles missing)"
        )
    bits, n_channels = page.bitspersample, page.samplesperpixel
    n_colours = _TIFF_COLOURS.get(page.photometric, 1)
    # What says grey, but has three values per pixel, is RGB to all but Pillow.
    is_rgb_named_grey = page.photometric in _GREY and n_channels == 3 and bits >= 8
    n_others = n_channels - (3 if is_rgb_named_grey else n_colours)
    is_alpha = n_colours > 1 or page.extrasamples[:1] in _TIFF_ALPHA
    if n_others > 1 or (n_others == 1 and not is_alpha):
        raise _Unusable(
            f"it is a TIFF of {n_channels} channels, where grey or RGB, with or without alpha, is needed: save the "
            "channels that count"
        )
    is_lossy = page.compression in _TIFF_JPEG
    # Pillow knows more colour spaces and codecs, but drops the low byte of channels of 16 bits.
    signed = page.dtype is not None and page.dtype.kind == "i"
    if bits <= 8 and not signed and not is_rgb_named_grey:
        return _decode_pillow(data, page.index)._replace(is_lossy=is_lossy)
    if page.photometric not in (*_GREY, tifffile.PHOTOMETRIC.RGB):
        raise _Unusable(
            f"it is a TIFF of {n_channels} channels of {bits} bits, photometric interpretation "
            f"{int(page.photometric)}, where grey or RGB is needed"
        )
    if page.dtype is None or not (page.dtype.kind == "f" or page.dtype in (np.uint8, np.uint16)):
        raise _Unusable(
            f"it is a TIFF of {bits}-bit {page.dtype or 'values'}, where unsigned 8- or 16-bit integers "
            "or floating-point values from 0 to 1 are needed"
        )
    try:
        pixels = page.asarray().reshape(page.shape)  # of no pixels it loses the shape
    except ValueError as error:
        if "imagecodecs" in str(error):
            if bits == 16 and n_channels == 1:
                return _decode_pillow(data, page.index)
            raise _Unusable(f"its compression ({page.compression.name} with {bits} bits) needs imagecodecs") from error
        raise
    if page.axes == "SYX":
        pixels = pixels.transpose(1, 2, 0)
    elif page.axes == "YX":
        pixels = pixels[:, :, None]
    elif page.axes != "YXS":
        raise _Unusable(f"it is a TIFF with axes {page.axes}, where one plane of pixels is needed")
    maximum = 2**bits - 1
    if pixels.dtype.kind == "f":
        maximum = 1
        # Written so that NaN fails, too.
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise _Unusable(f"its floating-point values, {pixels.min()} to {pixels.max()}, leave the range from 0 to 1")
    orientation = page.tags[274].value if 274 in page.tags else 1
    is_white_zero = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    return _Picture(_upright(pixels, orientation), maximum, is_white_zero, is_lossy)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8; anything else counts as 1)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _colours(picture: _Picture, bits: int | None = None) -> tuple[np.ndarray, int]:
    """Values (H, W, C) from black to white without alpha, C 1 or 3, and the value of white."""
    pixels, maximum = picture.pixels, picture.maximum
    pixels = pixels[:, :, :1] if pixels.shape[2] <= 2 else pixels[:, :, :3]
    if bits is not None and pixels.dtype == np.uint16:
        maximum = 2**bits - 1
        if pixels.max() > maximum:
            raise _Unusable(
                f"it holds the value {pixels.max()}, above {maximum}, the largest of {bits} bits, as which images are "
                "read here (--bits)"
            )
    return maximum - pixels if picture.is_white_zero else pixels, maximum


def _to_rgb(colours: np.ndarray, maximum: int) -> np.ndarray:
    if colours.dtype != np.uint8:
        colours = np.rint(colours.astype(np.float64) * (255 / maximum)).astype(np.uint8)
    return np.array(np.broadcast_to(colours, (*colours.shape[:2], 3)), order="C")
