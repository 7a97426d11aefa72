import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile

from dskd_fast.data.images import (
    IMAGE_LIKE_SUFFIXES,
    IMAGE_SUFFIXES,
    ImageError,
    image_size,
    is_image_like,
    list_images,
    pixel_limit,
    read_image,
    read_image_and_peak,
    read_mask,
    resize_square,
)
from dskd_fast.errors import UserError


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def rgb(rng):
    return rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def encode_tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def encode_png16(array, interlaced=False):
    """A 16-bit PNG of shape (H, W, C), by the book: big-endian samples, filter 1 (minus the pixel to the
    left)."""
    height, width, channels = array.shape
    # Adam7: first row, first column, step between rows, step between columns.
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [
            (0, 0, 8, 8),
            (0, 4, 8, 8),
            (4, 0, 8, 4),
            (0, 2, 4, 4),
            (2, 0, 4, 2),
            (0, 1, 2, 2),
            (1, 0, 2, 1),
        ]
    rows = b""
    for top, left, row_step, column_step in passes:
        for row in array[top::row_step, left::column_step]:
            raw = np.frombuffer(row.astype(">u2").tobytes(), np.uint8).reshape(-1, 2 * channels)
            rows += b"\1" + np.diff(raw, axis=0, prepend=np.zeros_like(raw[:1])).tobytes()
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, interlaced)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def write(path, data):
    path.write_bytes(data)
    return path


def all_16_bit_values():
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


def rounded(values):
    """16 to 8 bits in whole numbers: round(v / 257), where 257 = 65535 / 255 is odd and no tie can occur."""
    return ((2 * values.astype(np.int64) + 257) // 514).astype(np.uint8)


def test_list_images_is_natural_and_takes_only_images(tmp_path):
    wanted = ["1.png", "2.PNG", "10.JpEg", "a b.bmp", "ä.tif", "ö.tiff", "ü.webp", "字.jpg"]
    for name in [*wanted, ".hidden.png", "._1.png", "notes.txt", "png", "x.png.part"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == wanted


def test_image_formats_are_either_read_or_image_like(tmp_path):
    assert not set(IMAGE_SUFFIXES) & set(IMAGE_LIKE_SUFFIXES)
    for name, expected in {"a.GIF": True, "b.heic": True, "c.png": False, "d.txt": False, "gif": False}.items():
        assert is_image_like(tmp_path / name) is expected


def test_list_images_keeps_dangling_links_so_that_reading_fails(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (path,) = list_images(tmp_path)
    with pytest.raises(ImageError, match="no such file"):
        read_image(path)


def test_list_images_of_something_else(tmp_path):
    with pytest.raises(UserError, match="missing"):
        list_images(tmp_path / "missing")


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", {"compression": "packbits"}),
    ],
)
def test_lossless_rgb_is_exact_whatever_the_suffix(tmp_path, rgb, format, options):
    path = write(tmp_path / "ein Bild ü.png", encode(Image.fromarray(rgb), format, **options))
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    np.testing.assert_array_equal(image, rgb)
    assert image_size(path) == (40, 48)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_close(tmp_path, progressive):
    ramp = np.linspace(0, 255, 48).astype(np.uint8)
    rgb = np.broadcast_to(ramp[None, :, None], (40, 48, 3))
    data = encode(Image.fromarray(np.ascontiguousarray(rgb)), "JPEG", quality=95, progressive=progressive)
    difference = read_image(write(tmp_path / "a.jpg", data)).astype(int) - rgb
    assert np.abs(difference).max() <= 6


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF"])
def test_grey_is_repeated(tmp_path, format):
    grey = Image.new("L", (48, 40), 77)
    image = read_image(write(tmp_path / "a", encode(grey, format)))
    np.testing.assert_array_equal(image, np.full((40, 48, 3), 77))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_ignored(tmp_path, rng, format, mode):
    channels = len(mode)
    array = rng.integers(0, 256, (40, 48, channels), dtype=np.uint8)
    array[:20, :, -1] = 0
    image = read_image(write(tmp_path / "a", encode(Image.fromarray(array, mode), format)))
    np.testing.assert_array_equal(image, np.broadcast_to(array[..., : channels - 1], (40, 48, 3)))


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255, 0])])
def test_palette(tmp_path, rng, transparency):
    colours = np.array([[255, 0, 0], [1, 2, 3], [9, 200, 7], [250, 251, 252]], np.uint8)
    indices = rng.integers(0, 4, (40, 48), dtype=np.uint8)
    picture = Image.fromarray(indices, "L").copy()
    picture.putpalette(colours.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    image = read_image(write(tmp_path / "a.png", encode(picture, "PNG", **options)))
    np.testing.assert_array_equal(image, colours[indices])


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_one_bit(tmp_path, rng, format):
    bits = rng.random((40, 48)) < 0.5
    image = read_image(write(tmp_path / "a", encode(Image.fromarray(bits), format)))
    np.testing.assert_array_equal(image, np.where(bits[..., None], 255, 0) * np.ones(3, int))


@pytest.mark.parametrize(("cmyk", "rgb"), [((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((255, 255, 255, 0), 0)])
def test_cmyk_jpeg(tmp_path, cmyk, rgb):
    image = read_image(write(tmp_path / "a.jpg", encode(Image.new("CMYK", (48, 40), cmyk), "JPEG")))
    assert np.abs(image.astype(int) - rgb).max() <= 2


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("interlaced", [False, True])
def test_16_bit_png_is_rounded_for_every_value(tmp_path, rng, channels, interlaced):
    array = np.stack([rng.permutation(all_16_bit_values().ravel()) for _ in range(channels)], axis=1)
    array = array.reshape(256, 256, channels)
    image = read_image(write(tmp_path / "a.png", encode_png16(array, interlaced)))
    colours = array[..., :1] if channels <= 2 else array[..., :3]
    np.testing.assert_array_equal(image, np.broadcast_to(rounded(colours), (256, 256, 3)))


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_16_bit_rgb_tiff_is_rounded_for_every_value(tmp_path, rng, byteorder, compression, planar):
    array = np.stack([rng.permutation(all_16_bit_values().ravel()).reshape(256, 256) for _ in range(3)], axis=2)
    stored = array if planar == "contig" else array.transpose(2, 0, 1)
    data = encode_tiff(stored, byteorder=byteorder, compression=compression, planarconfig=planar, photometric="rgb")
    np.testing.assert_array_equal(read_image(write(tmp_path / "a.tif", data)), rounded(array))


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_16_bit_grey_tiff_is_rounded_for_every_value(tmp_path, byteorder, photometric):
    array = all_16_bit_values()
    data = encode_tiff(array, byteorder=byteorder, photometric=photometric)
    shown = array if photometric == "minisblack" else 65535 - array
    image = read_image(write(tmp_path / "a.tif", data))
    np.testing.assert_array_equal(image, np.broadcast_to(rounded(shown)[..., None], (256, 256, 3)))


def test_16_bit_grey_lzw_tiff(tmp_path):
    array = all_16_bit_values()
    image = read_image(write(tmp_path / "a.tif", encode(Image.fromarray(array), "TIFF", compression="tiff_lzw")))
    np.testing.assert_array_equal(image, np.broadcast_to(rounded(array)[..., None], (256, 256, 3)))


def test_16_bit_lzw_rgb_tiff_is_not_quietly_cut_to_its_high_bytes(tmp_path, rgb, monkeypatch):
    data = encode_tiff(rgb.astype(np.uint16) * 257, photometric="rgb")

    def refuse(*args, **kwargs):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    with pytest.raises(ImageError, match="needs imagecodecs"):
        read_image(write(tmp_path / "a.tif", data))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(40, 48), (40, 48, 3)])
def test_float_tiff_from_0_to_1(tmp_path, rng, dtype, shape):
    levels = rng.integers(0, 256, shape)
    data = encode_tiff((levels / 255).astype(dtype), photometric="rgb" if len(shape) == 3 else "minisblack")
    image = read_image(write(tmp_path / "a.tif", data))
    expected = levels if len(shape) == 3 else levels[..., None]
    np.testing.assert_array_equal(image, np.broadcast_to(expected, (40, 48, 3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1.5, 255.0])
def test_float_tiff_out_of_range(tmp_path, bad):
    array = np.full((40, 48), 0.5, np.float32)
    array[3, 4] = bad
    with pytest.raises(ImageError, match="from 0 to 1"):
        read_image(write(tmp_path / "a.tif", encode_tiff(array)))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint32])
def test_integer_tiff_of_another_width_is_refused(tmp_path, dtype):
    data = encode_tiff(np.zeros((40, 48), dtype), photometric="minisblack")
    with pytest.raises(ImageError, match="8- or 16-bit"):
        read_image(write(tmp_path / "a.tif", data))


# ------------------------------------------------------------------------------------------ one file, one picture


def encode_pages(*pages):
    """Each page is (array, options of tifffile)."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for array, options in pages:
            writer.write(array, **{"photometric": "rgb"} | options)
    return buffer.getvalue()


def without_second_page(data):
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        return data[: tiff.pages[1].offset]


def lookup_tables(*colours):
    """ImageJ's tables of 256 colours, from black to each of `colours`."""
    return [np.outer(colour, np.arange(256)).astype(np.uint8) for colour in colours]


RGB_TABLES = lookup_tables((1, 0, 0), (0, 1, 0), (0, 0, 1))


def encode_imagej(planes, **metadata):
    return encode_tiff(planes, imagej=True, metadata={"axes": "CYX"} | metadata)


# Files of which one picture can be read, from an array (40, 48, 3).
ONE_PICTURE = {
    "planes": lambda rgb: encode_tiff(rgb.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
    "compressed planes": lambda rgb: encode_tiff(
        rgb.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", compression="zlib"
    ),
    "planes and alpha": lambda rgb: encode_tiff(
        np.concatenate([rgb, rgb[..., :1]], axis=2).transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
    ),
    "ImageJ channels": lambda rgb: encode_imagej(rgb.transpose(2, 0, 1)),
    "ImageJ composite": lambda rgb: encode_imagej(rgb.transpose(2, 0, 1), mode="composite", LUTs=RGB_TABLES),
    "three channels called grey": lambda rgb: encode_tiff(rgb, photometric="minisblack", planarconfig="contig"),
    "thumbnail behind": lambda rgb: encode_pages((rgb, {}), (rgb[::2, ::2], {"subfiletype": 1})),
    "thumbnail before": lambda rgb: encode_pages((rgb[::2, ::2], {"subfiletype": 1}), (rgb, {})),
    "pyramid": lambda rgb: encode_pages((rgb, {"subifds": 1}), (rgb[::2, ::2], {"subfiletype": 1})),
    "transparency mask": lambda rgb: encode_pages(
        (rgb, {}), (rgb[..., 0] > 9, {"subfiletype": 4, "photometric": "minisblack"})
    ),
    "a thumbnail alone": lambda rgb: encode_pages((rgb, {"subfiletype": 1})),
}


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ONE_PICTURE)
def test_one_picture_in_a_tiff_is_read_however_it_lies_there(tmp_path, rgb, kind, deep):
    path = write(tmp_path / "a.tif", ONE_PICTURE[kind](rgb.astype(np.uint16) * 257 if deep else rgb))
    np.testing.assert_array_equal(read_image(path), rgb)
    np.testing.assert_array_equal(read_mask(path), rgb.max(axis=2).astype(int) * (257 if deep else 1))


def test_a_page_behind_a_thumbnail_is_turned_as_it_says(tmp_path, rgb):
    tag = (274, 3, 1, 6, True)
    data = encode_pages((rgb[::2, ::2], {"subfiletype": 1}), (rgb, {"extratags": [tag]}))
    np.testing.assert_array_equal(read_image(write(tmp_path / "a.tif", data)), np.rot90(rgb, -1))


def test_the_first_picture_of_a_phones_jpeg_is_the_photograph(tmp_path, rgb):
    photograph, depth = Image.fromarray(rgb), Image.new("L", (24, 20))
    expected = read_image(write(tmp_path / "a.jpg", encode(photograph, "JPEG")))
    both = encode(photograph, "MPO", save_all=True, append_images=[depth])
    np.testing.assert_array_equal(read_image(write(tmp_path / "b.jpg", both)), expected)


def frames(rgb):
    return {"save_all": True, "append_images": [Image.fromarray(rgb[::-1].copy())]}


# Files of which none can be chosen, or of which something would be lost, and what is said.
NOT_ONE_PICTURE = {
    "pages": (lambda rgb: encode_pages((rgb, {}), (rgb, {})), "a TIFF of 2 pages or planes"),
    "mask's pages": (lambda rgb: encode_tiff(rgb.transpose(2, 0, 1), photometric="minisblack"), "a mask's parts"),
    "planes behind one page": (
        lambda rgb: encode_tiff(rgb.transpose(2, 0, 1), photometric="minisblack", truncate=True),
        "3 pages or planes",
    ),
    "ImageJ slices": (lambda rgb: encode_imagej(rgb.transpose(2, 0, 1), axes="ZYX"), "3 pages or planes"),
    "two ImageJ channels": (lambda rgb: encode_imagej(rgb.transpose(2, 0, 1)[:2]), "2 pages or planes"),
    "ImageJ channels in other colours": (
        lambda rgb: encode_imagej(rgb.transpose(2, 0, 1), mode="composite", LUTs=RGB_TABLES[::-1]),
        "3 pages or planes",
    ),
    "floating ImageJ channels": (
        lambda rgb: encode_imagej(rgb.transpose(2, 0, 1).astype(np.float32) / 255),
        "3 pages or planes",
    ),
    "OME channels": (
        lambda rgb: encode_tiff(rgb.transpose(2, 0, 1), photometric="minisblack", ome=True, metadata={"axes": "CYX"}),
        "3 pages or planes",
    ),
    "volume": (
        lambda rgb: encode_tiff(
            np.zeros((2, 64, 64), np.uint8), volumetric=True, tile=(16, 16, 16), photometric="minisblack"
        ),
        "2 pages or planes",
    ),
    "two channels": (lambda rgb: encode_tiff(rgb[..., :2], photometric="minisblack", planarconfig="contig"), "2 chann"),
    "four channels called grey": (
        lambda rgb: encode_tiff(
            rgb[:, :, [0, 1, 2, 0]].astype(np.uint16), photometric="minisblack", planarconfig="contig"
        ),
        "4 channels",
    ),
    "five channels": (lambda rgb: encode_tiff(rgb[:, :, [0, 1, 2, 0, 1]], photometric="rgb"), "5 channels"),
    "raw file": (
        lambda rgb: encode_pages((rgb[::2, ::2], {"subfiletype": 1, "subifds": 1}), (rgb, {})),
        "raw file: save it as PNG",
    ),
    "missing page": (
        lambda rgb: without_second_page(encode_pages((rgb, {}), (rgb[::2, ::2], {"subfiletype": 1}))),
        "a page is missing",
    ),
    "animated PNG": (lambda rgb: encode(Image.fromarray(rgb), "PNG", **frames(rgb)), "an animation of 2 frames"),
    "animated WebP": (lambda rgb: encode(Image.fromarray(rgb), "WEBP", **frames(rgb)), "an animation of 2 frames"),
    "GIF": (lambda rgb: encode(Image.fromarray(rgb), "GIF"), "it is a GIF, and no PNG"),
    "HEIF": (lambda rgb: b"\0\0\0\x18ftypheic" + bytes(99), "it is a HEIF, AVIF or other"),
}


@pytest.mark.parametrize("kind", NOT_ONE_PICTURE)
def test_what_is_not_one_picture_is_refused_by_name(tmp_path, rgb, kind):
    make, reason = NOT_ONE_PICTURE[kind]
    path = write(tmp_path / "a", make(rgb))
    for function in (read_image, read_mask, image_size):
        with pytest.raises(ImageError, match=reason):
            function(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda rgb: encode_tiff(rgb.astype(np.float16) / 255, photometric="rgb"),
        lambda rgb: encode_tiff(rgb.astype(np.float32) / 255, photometric="rgb"),
        lambda rgb: encode_tiff(rgb[..., 0] / 255),
        lambda rgb: encode_tiff(rgb[..., 0].astype(">u2"), bigtiff=True, byteorder=">"),
        lambda rgb: encode_tiff(rgb.astype(np.float32), photometric="rgb"),
        lambda rgb: encode_tiff(rgb.astype(np.int16), photometric="rgb"),
        lambda rgb: encode(Image.fromarray(rgb[:31]), "PNG"),
        *(lambda rgb, f=f: encode(Image.fromarray(rgb), f)[:-30] for f in ("PNG", "JPEG", "BMP", "TIFF", "WEBP")),
    ],
)
def test_the_size_is_that_of_what_is_read_or_refused_for_the_same_reason(tmp_path, rgb, make):
    path = write(tmp_path / "a", make(rgb))

    def outcome(function):
        try:
            return function(path)
        except ImageError as error:
            return str(error)

    assert outcome(image_size) == outcome(lambda path: read_image(path).shape[:2])


# What each orientation means, by the side that row 0 and column 0 of the stored image show (EXIF 2.32, table
# 6).
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored_for(upright, orientation):
    """The stored image whose row 0 and column 0 show the given sides of the upright one."""
    row, column = SIDES[orientation]
    stored = upright if row in ("top", "bottom") else upright.transpose(1, 0, 2)
    if row in ("bottom", "right"):
        stored = stored[::-1]
    if column in ("bottom", "right"):
        stored = stored[:, ::-1]
    return np.ascontiguousarray(stored)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PNG16", "TIFF16", "JPEG"])
def test_exif_orientation(tmp_path, orientation, kind):
    # Four flat quadrants, so that JPEG keeps them; 40 x 64 tells rows from columns.
    upright = np.zeros((40, 64, 3), np.uint8)
    upright[:20, :32], upright[:20, 32:], upright[20:, :32], upright[20:, 32:] = 40, 100, 160, 220
    stored = stored_for(upright, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "PNG16":
        data = encode_png16(stored.astype(np.uint16) * 257)
        # The EXIF chunk goes behind the signature (8 bytes) and the header (25 bytes).
        data = data[:33] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[33:]
    elif kind == "TIFF16":
        data = encode_tiff(
            stored.astype(np.uint16) * 257, photometric="rgb", extratags=[(274, 3, 1, orientation, True)]
        )
    elif kind == "JPEG":
        data = encode(Image.fromarray(stored), kind, exif=exif, quality=95, subsampling=0)
    else:
        data = encode(Image.fromarray(stored), kind, exif=exif)
    path = write(tmp_path / "a", data)
    image = read_image(path)
    assert image.shape == upright.shape
    assert image_size(path) == (40, 64)
    assert np.abs(image.astype(int) - upright).max() <= (25 if kind == "JPEG" else 0)


# Pillow warns about what it then raises an error for.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_truncation_is_found_at_every_cut(tmp_path, rng, rgb):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    picture = Image.fromarray(rgb)
    deep = rng.integers(0, 65536, (40, 48, 3)).astype(np.uint16)
    files = {
        "png": encode(picture, "PNG"),
        "png 16": encode_png16(deep),
        "jpeg": encode(picture, "JPEG"),
        "progressive jpeg": encode(picture, "JPEG", progressive=True),
        "bmp": encode(picture, "BMP"),
        "tiff": encode(picture, "TIFF"),
        "tiff lzw": encode(picture, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encode(picture, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": encode(picture, "TIFF", compression="jpeg"),
        "tiff 16": encode_tiff(deep, photometric="rgb"),
        "tiff 16 deflate": encode_tiff(deep, photometric="rgb", compression="zlib"),
        "webp": encode(picture, "WEBP"),
        "lossless webp": encode(picture, "WEBP", lossless=True),
    }
    path = tmp_path / "a"
    for name, data in files.items():
        read_image(write(path, data))
        cuts = {*range(0, len(data), 97), *range(max(0, len(data) - 20), len(data))}
        for cut in sorted(cuts):
            write(path, data[:cut])
            try:
                read_image(path)
            except ImageError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                pytest.fail(f"{name}: the first {cut} of {len(data)} bytes passed for an image")


def test_nothing_is_read_where_the_program_lets_truncated_files_pass(tmp_path, rgb, monkeypatch):
    path = write(tmp_path / "a.bmp", encode(Image.fromarray(rgb), "BMP")[:-2000])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match=r"LOAD_TRUNCATED_IMAGES, .* set it to False"):
        read_image(path)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("layout", [{"rowsperstrip": 16}, {"tile": (32, 32), "compression": "zlib"}])
@pytest.mark.parametrize("left", [[1, 0, 1, 1], [1, 1, 1]])
def test_a_tiff_without_one_of_its_strips_or_tiles_is_refused(tmp_path, dtype, layout, left):
    path = write(tmp_path / "a.tif", encode_tiff(np.ones((64, 64), dtype), photometric="minisblack", **layout))
    read_image(path)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for tag in [tag for tag in tiff.pages[0].tags if tag.name.endswith(("Offsets", "ByteCounts"))]:
            tag.overwrite([value * present for value, present in zip(tag.value, left, strict=False)])
    with pytest.raises(ImageError, match="1 of its strips or tiles missing"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_never_escapes_as_another_exception(tmp_path, rng, rgb):
    picture = Image.fromarray(rgb)
    path = tmp_path / "a"
    for format in ("PNG", "JPEG", "BMP", "TIFF", "WEBP"):
        data = np.frombuffer(encode(picture, format), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            # Headers, where most can go wrong, get half of the damage.
            end = len(data) if rng.random() < 0.5 else 200
            damaged[rng.integers(0, end, 5)] = rng.integers(0, 256, 5)
            write(path, damaged.tobytes())
            try:
                image = read_image(path)
            except ImageError:
                continue
            assert image.dtype == np.uint8
            assert image.shape[2] == 3


def test_a_flipped_bit_in_a_png_is_found(tmp_path, rgb):
    data = bytearray(encode(Image.fromarray(rgb), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(ImageError):
        read_image(write(tmp_path / "a.png", data))


def test_a_jpeg_thumbnail_does_not_hide_that_the_end_is_missing(tmp_path, rgb):
    thumbnail = encode(Image.new("RGB", (8, 8)), "JPEG")
    data = encode(Image.fromarray(rgb), "JPEG")
    segment = b"\xff\xe5" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = data[:2] + segment + data[2:]
    expected = read_image(write(tmp_path / "plain.jpg", data))
    np.testing.assert_array_equal(read_image(write(tmp_path / "a.jpg", whole)), expected)
    with pytest.raises(ImageError, match="truncated"):
        read_image(write(tmp_path / "a.jpg", whole[:-2]))


def test_bytes_behind_the_end_of_a_jpeg_do_no_harm(tmp_path, rgb):
    data = encode(Image.fromarray(rgb), "JPEG")
    expected = read_image(write(tmp_path / "plain.jpg", data))
    trailed = write(tmp_path / "a.jpg", data + b"video\xff\xda\0\0" * 9)
    np.testing.assert_array_equal(read_image(trailed), expected)


@pytest.fixture
def photograph(rng):
    """Soft shapes under a little noise, of which a JPEG has a few thousand bytes."""
    soft = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((160, 128), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(soft) * 0.9 + rng.integers(0, 20, (128, 160, 3))).astype(np.uint8))


JPEGS = {
    "baseline": {},
    "all colours": {"quality": 100, "subsampling": 0},
    "own codes": {"quality": 30, "optimize": True},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "many restart markers": {"restart_marker_blocks": 1},
    "progressive with restart markers": {"progressive": True, "restart_marker_blocks": 9},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_whose_data_end_early_is_refused_and_a_sound_one_is_not(tmp_path, photograph, kind, mode):
    data = encode(photograph.convert(mode), "JPEG", **JPEGS[kind])
    white = encode(Image.new(mode, (160, 128), "white"), "JPEG", **JPEGS[kind])
    # An end mark before a comment's end, fill bytes before a marker, and what cameras put behind the picture.
    comment = b"\xff\xfe\0\x06\xff\xd9\xff\xda"
    for sound in (
        data,
        white,
        data[:2] + comment + data[2:],
        data[:-2] + b"\xff\xff\xd9",
        data + b"\xff\xda\0" * 9 + data,
    ):
        read_image(write(tmp_path / "a.jpg", sound))
    # Between scans a progressive JPEG may end, with a picture of less detail.
    longest = max(data.split(b"\xff\xda"), key=len)
    for share in (0.3, 0.5, 0.8):
        at = data.index(longest) + int(share * len(longest))
        with pytest.raises(ImageError, match="some of its coded data is missing"):
            read_image(write(tmp_path / "a.jpg", data[:at] + b"\xff\xd9"))


def test_a_jpeg_without_one_of_its_restart_intervals_is_refused(tmp_path, photograph):
    data = encode(photograph, "JPEG", restart_marker_rows=1)
    begin, end = data.index(b"\xff\xd1"), data.index(b"\xff\xd2")
    with pytest.raises(ImageError, match="some of its coded data is missing"):
        read_image(write(tmp_path / "a.jpg", data[:begin] + data[end:]))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "folder"),
        (lambda path: path.touch(), "empty"),
        (lambda path: path.write_text("hello, I am a text"), "no PNG"),
        (lambda path: path.write_bytes(b"II*\0" + b"\xff" * 50), "damaged"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.write_bytes(encode(Image.new("RGB", (31, 500)), "PNG")), "31 x 500"),
        (lambda path: path.write_bytes(encode(Image.new("RGB", (64, 64)), "GIF")), "no PNG"),
    ],
)
def test_unusable_files_are_named_with_the_reason(tmp_path, make, reason):
    path = tmp_path / "ä b.png"
    make(path)
    for function in (read_image, read_mask):
        with pytest.raises(ImageError) as caught:
            function(path)
        message = str(caught.value)
        assert str(path) in message
        assert reason in message
        assert "\n" not in message
        assert caught.value.failures[0][0] == path


def test_32_pixels_are_enough(tmp_path):
    assert read_image(write(tmp_path / "a.png", encode(Image.new("L", (32, 32)), "PNG"))).shape == (32, 32, 3)


def bomb_png():
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def bomb_tiff():
    # 16-bit RGB of 60000 x 60000 pixels, of which one byte is there.
    tags = [
        (256, 60000),
        (257, 60000),
        (258, 16),
        (259, 1),
        (262, 2),
        (273, 8),
        (277, 3),
        (278, 60000),
        (279, 1),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("make", [bomb_png, bomb_tiff])
def test_decompression_bomb(tmp_path, make):
    path = write(tmp_path / "a", make())
    for read in (read_image, read_mask, image_size):
        with pytest.raises(ImageError, match=r"60000 x 60000 pixels, more than the limit of 250,000,000 .*bomb"):
            read(path)


@pytest.mark.parametrize(
    ("file_format", "options", "deep"),
    [
        ("PNG", {}, False),
        ("PNG", {}, True),
        ("JPEG", {"quality": 95}, False),
        ("BMP", {}, False),
        ("TIFF", {}, False),
        ("TIFF", {"compression": "tiff_lzw"}, False),
        ("TIFF", {}, True),
    ],
)
def test_the_limit_of_pixels_is_ours_and_pillows_is_neither_used_nor_changed(
    tmp_path, rng, monkeypatch, file_format, options, deep
):
    values = rng.integers(0, 256, (40, 48), dtype=np.uint8)
    image = Image.fromarray(values * np.uint16(257)) if deep else Image.fromarray(values)
    path = write(tmp_path / "a", encode(image, file_format, **options))
    expected = read_image(path)
    for pillows in (1919, 900, None):  # it warns, fails, and has been switched off
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(read_image(path), expected)
            assert image_size(path) == (40, 48)
        assert pillows == Image.MAX_IMAGE_PIXELS
    with pixel_limit(1919), pytest.raises(ImageError, match=r"48 x 40 pixels, .* 1,919 .*--max-pixels 1920"):
        read_image(path)
    with pixel_limit(1920):
        read_image(path)


def test_errors_survive_pickling_and_list_every_file():
    import pickle

    error = ImageError(("a.png", "the file is empty"), ("b.png", "it is a folder"))
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert "a.png: the file is empty; b.png: it is a folder" in str(error)
    assert isinstance(error, UserError)


def test_masks_keep_their_values(tmp_path, rng):
    values = rng.integers(0, 256, (40, 48), dtype=np.uint8)
    path = tmp_path / "m.png"
    np.testing.assert_array_equal(read_mask(write(path, encode(Image.fromarray(values), "PNG"))), values)
    deep = rng.integers(0, 65536, (40, 48, 1)).astype(np.uint16)
    np.testing.assert_array_equal(read_mask(write(path, encode_png16(deep))), deep[..., 0])
    bits = values > 127
    np.testing.assert_array_equal(read_mask(write(path, encode(Image.fromarray(bits), "PNG"))), bits * 255)
    with_alpha = np.stack([values, np.full_like(values, 255)], axis=2)
    data = encode(Image.fromarray(with_alpha, "LA"), "PNG")
    np.testing.assert_array_equal(read_mask(write(path, data)), values)
    data = encode_tiff(np.zeros((40, 48), np.float32))
    with pytest.raises(ImageError, match="integers"):
        read_mask(write(path, data))


@pytest.mark.parametrize(("format", "options"), [("JPEG", {}), ("WEBP", {}), ("TIFF", {"compression": "jpeg"})])
def test_a_mask_in_a_format_that_smears_is_refused(tmp_path, rgb, format, options):
    with pytest.raises(ImageError, match="save masks as PNG"):
        read_mask(write(tmp_path / "m.png", encode(Image.fromarray(rgb), format, **options)))


# -------------------------------------------------------------------------------------- fewer bits than the file has


@pytest.mark.parametrize("bits", [9, 12, 16])
@pytest.mark.parametrize(
    ("channels", "make"),
    [
        (1, lambda array: encode_png16(array)),
        (2, lambda array: encode_png16(array)),
        (3, lambda array: encode_png16(array)),
        (1, lambda array: encode_tiff(array[..., 0])),
        (3, lambda array: encode_tiff(array, photometric="rgb")),
        (3, lambda array: encode_imagej(array.transpose(2, 0, 1))),
    ],
)
def test_values_of_fewer_bits_than_the_file_has(tmp_path, rng, bits, channels, make):
    largest = 2**bits - 1
    array = rng.integers(0, largest, (40, 48, channels)).astype(np.uint16)
    array[7, 8, 0] = largest
    if channels == 2:
        array[..., 1] = 65535  # alpha has its own range
    path = write(tmp_path / "a", make(array))
    colours = array[..., :1] if channels == 2 else array
    # In whole numbers, as above: the largest value is odd.
    expected = (510 * colours.astype(np.int64) + largest) // (2 * largest)
    image, peak = read_image_and_peak(path, bits=bits)
    np.testing.assert_array_equal(image, np.broadcast_to(expected, (40, 48, 3)))
    assert peak == largest
    if bits < 16:
        array[7, 8, 0] += 1
        with pytest.raises(
            ImageError, match=rf"holds the value {largest + 1}, above {largest}, the largest of {bits} b"
        ):
            read_image(write(path, make(array)), bits=bits)


def test_fewer_bits_where_white_is_zero(tmp_path):
    array = np.full((40, 48), 95, np.uint16)
    path = write(tmp_path / "a.tif", encode_tiff(array, photometric="miniswhite"))
    image, peak = read_image_and_peak(path, bits=12)
    assert (image == 249).all()  # 4000 of 4095
    assert peak == 95


def test_fewer_bits_change_nothing_where_values_have_8_or_are_floating(tmp_path, rgb):
    for data in (
        *(encode(Image.fromarray(rgb), format) for format in ("PNG", "JPEG", "BMP", "TIFF", "WEBP")),
        encode_tiff(rgb.astype(np.float32) / 255, photometric="rgb"),
    ):
        path = write(tmp_path / "a", data)
        image, peak = read_image_and_peak(path, bits=9)
        np.testing.assert_array_equal(image, read_image(path))
        assert peak is None


def triangle_resize(signal, size):
    """Antialiased bilinear resize of one axis: a triangle as wide as the output pixel, normalised at the
    borders."""
    scale = len(signal) / size
    support = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    weights = 1 - np.abs(np.arange(len(signal)) + 0.5 - centres[:, None]) / support
    weights = np.clip(weights, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)) @ signal


@pytest.mark.parametrize("size", [1, 16, 32, 77])
def test_resize_square_is_an_antialiased_triangle_filter(rgb, size):
    before = rgb.copy()
    resized = resize_square(rgb, size)
    across = np.stack([triangle_resize(rgb[..., c].astype(float), size) for c in range(3)], axis=2)
    expected = np.stack([triangle_resize(across[..., c].T, size).T for c in range(3)], axis=2)
    assert resized.shape == (size, size, 3)
    assert resized.dtype == np.uint8
    # Pillow rounds after each of its two passes.
    assert np.abs(resized - expected).max() <= 1.01
    np.testing.assert_array_equal(rgb, before)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (np.zeros((40, 48), np.uint8), 32),
        (np.zeros((40, 48, 4), np.uint8), 32),
        (np.zeros((40, 48, 3), np.float32), 32),
        (np.zeros((40, 48, 3), np.uint8), 0),
    ],
)
def test_resize_square_refuses(image, size):
    with pytest.raises(ValueError, match="must be"):
        resize_square(image, size)
