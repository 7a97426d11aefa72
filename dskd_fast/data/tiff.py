"""The one picture of a TIFF, however it lies there."""

import io
import logging
import math
from typing import cast

import numpy as np
import tifffile

from dskd_fast.data.decoding import Picture, Unusable, check_pixels, decode_pillow, upright

# For a damaged file tifffile logs several lines, and the caller gets an error that says the same.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_GREY = (tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.MINISBLACK)
_TIFF_COLOURS: dict[int, int] = {
    tifffile.PHOTOMETRIC.RGB: 3,
    tifffile.PHOTOMETRIC.YCBCR: 3,
    tifffile.PHOTOMETRIC.CIELAB: 3,
    tifffile.PHOTOMETRIC.SEPARATED: 4,
}
_TIFF_ALPHA = ((tifffile.EXTRASAMPLE.ASSOCALPHA,), (tifffile.EXTRASAMPLE.UNASSALPHA,))
_TIFF_JPEG = (tifffile.COMPRESSION.OJPEG, tifffile.COMPRESSION.JPEG)


def is_tiff(data: bytes) -> bool:
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def decode_tiff(data: bytes) -> Picture:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        parts = [_decode_page(data, page) for page in _pages_of_picture(tiff)]
    if len(parts) == 1:
        return parts[0]
    return parts[0]._replace(pixels=np.concatenate([part.pixels for part in parts], axis=2))


def _pages_of_picture(tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """The page that is the picture, or the three that are its red, green and blue."""
    # Frames, the other type that `get` states, have to be asked for.
    all_pages = [cast(tifffile.TiffPage, tiff.pages.get(i)) for i in range(len(tiff.pages))]
    last_link = tiff.pages.next_page_offset
    if last_link is not None:
        tiff.filehandle.seek(last_link)
        # tifffile ends the chain of pages where a link leads nowhere.
        if any(tiff.filehandle.read(tiff.tiff.offsetsize)):
            raise Unusable("it is damaged or truncated (a page is missing)")
    pages = [page for page in all_pages if not page.is_reduced and not page.is_mask]
    if not pages and len(all_pages) == 1 and not all_pages[0].subifds:
        pages = all_pages
    if not pages:
        raise Unusable(
            "its picture is not among its pages but in a part of one, as in a camera's raw file: save it as PNG"
        )
    n_planes = len(pages) * int(pages[0].imagedepth)
    if tiff.is_imagej or tiff.is_shaped or tiff.is_stk:
        # These may keep planes behind a single page.
        n_planes = max(n_planes, tiff.series[0].size // pages[0].size)
    if n_planes > 1 and not _is_imagej_rgb(tiff, pages):
        raise Unusable(
            f"it is a TIFF of {n_planes} pages or planes, where one picture is needed: save each as a file of its own, "
            "the channels of a colour picture as RGB, and a mask's parts united in one page"
        )
    return pages


def _is_imagej_rgb(tiff: tifffile.TiffFile, pages: list[tifffile.TiffPage]) -> bool:
    """Whether pages are ImageJ's channels red, green and blue, which they are if no other colours are set."""
    if not tiff.is_imagej or len(pages) != 3 or tiff.series[0].axes != "CYX" or tiff.series[0].shape[0] != 3:
        return False
    colours = [np.asarray(table).reshape(3, -1).any(axis=1) for table in (tiff.imagej_metadata or {}).get("LUTs", ())]
    return (not colours or np.array_equal(colours, np.eye(3, dtype=bool))) and all(
        page.dtype in (np.uint8, np.uint16) and page.samplesperpixel == 1 for page in pages
    )


def check_parts(page: tifffile.TiffPage) -> None:
    """Raise Unusable if strips or tiles are missing, which decoders take for black or for the file's first bytes."""
    n_present = sum(
        offset > 0 and size > 0 for offset, size in zip(page.dataoffsets, page.databytecounts, strict=False)
    )
    # An old JPEG has no such parts.
    if n_present < math.prod(page.chunked) and page.compression != tifffile.COMPRESSION.OJPEG:
        raise Unusable(
            f"it is damaged or truncated ({math.prod(page.chunked) - n_present} of its strips or tiles missing)"
        )


def _decode_page(data: bytes, page: tifffile.TiffPage) -> Picture:
    # A damaged tag may hold a text, whose multiple could fill the memory.
    check_pixels(int(page.imagewidth), int(page.imagelength))
    check_parts(page)
    bits, n_channels = page.bitspersample, page.samplesperpixel
    n_colours = _TIFF_COLOURS.get(page.photometric, 1)
    # What says grey, but has three values per pixel, is RGB to all but Pillow.
    is_rgb_named_grey = page.photometric in _GREY and n_channels == 3 and bits >= 8
    n_others = n_channels - (3 if is_rgb_named_grey else n_colours)
    is_alpha = n_colours > 1 or page.extrasamples[:1] in _TIFF_ALPHA
    if n_others > 1 or (n_others == 1 and not is_alpha):
        raise Unusable(
            f"it is a TIFF of {n_channels} channels, where grey or RGB, with or without alpha, is needed: save the "
            "channels that count"
        )
    is_lossy = page.compression in _TIFF_JPEG
    # Pillow knows more colour spaces and codecs, but drops the low byte of channels of 16 bits.
    signed = page.dtype is not None and page.dtype.kind == "i"
    if bits <= 8 and not signed and not is_rgb_named_grey:
        return decode_pillow(data, page.index)._replace(is_lossy=is_lossy)
    if page.photometric not in (*_GREY, tifffile.PHOTOMETRIC.RGB):
        raise Unusable(
            f"it is a TIFF of {n_channels} channels of {bits} bits, photometric interpretation "
            f"{int(page.photometric)}, where grey or RGB is needed"
        )
    if page.dtype is None or not (page.dtype.kind == "f" or page.dtype in (np.uint8, np.uint16)):
        raise Unusable(
            f"it is a TIFF of {bits}-bit {page.dtype or 'values'}, where unsigned 8- or 16-bit integers "
            "or floating-point values from 0 to 1 are needed"
        )
    try:
        pixels = page.asarray().reshape(page.shape)  # of no pixels it loses the shape
    except ValueError as error:
        if "imagecodecs" in str(error):
            if bits == 16 and n_channels == 1:
                return decode_pillow(data, page.index)
            raise Unusable(
                f"its compression ({tifffile.COMPRESSION(page.compression).name} with {bits} bits) needs imagecodecs"
            ) from error
        raise
    if page.axes == "SYX":
        pixels = pixels.transpose(1, 2, 0)
    elif page.axes == "YX":
        pixels = pixels[:, :, None]
    elif page.axes != "YXS":
        raise Unusable(f"it is a TIFF with axes {page.axes}, where one plane of pixels is needed")
    maximum = 2**bits - 1
    if pixels.dtype.kind == "f":
        maximum = 1
        # Written so that NaN fails, too.
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise Unusable(f"its floating-point values, {pixels.min()} to {pixels.max()}, leave the range from 0 to 1")
    orientation = page.tags[274].value if 274 in page.tags else 1
    is_white_zero = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    return Picture(upright(pixels, orientation), maximum, is_white_zero, is_lossy)
