import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile, ImageOps

from dskd_fast.data.images import ImageError, image_size, pixel_limit, read_image, read_image_and_peak, read_mask

from .conftest import encode


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def rgb(rng):
    return rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)


def encode_tiff(*pages, byteorder=None, imagej=False, **options):
    """Each page is an array, or (array, more options of tifffile)."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, byteorder=byteorder, imagej=imagej) as writer:
        for page in pages:
            array, more = page if isinstance(page, tuple) else (page, {})
            writer.write(array, **{"photometric": "rgb"} | options | more)
    return buffer.getvalue()


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def encode_png16(array, interlaced=False):
    """A 16-bit PNG of shape (H, W, C): big-endian samples, filter 1 (minus the pixel to the left)."""
    height, width, channels = array.shape
    # First row, first column, step between rows, step between columns of each pass; seven are Adam7.
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
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


def as_rgb(array):
    """(H, W) or (H, W, C) without alpha, C from 1 to 4 -> (H, W, 3)."""
    array = array.reshape(*array.shape[:2], -1)
    return np.broadcast_to(array[..., : 1 if array.shape[2] <= 2 else 3], (*array.shape[:2], 3))


def without_second_page(data):
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        return data[: tiff.pages[1].offset]


def encode_imagej(rgb, **metadata):
    return encode_planes(rgb, imagej=True, photometric=None, metadata={"axes": "CYX"} | metadata)


def encode_planes(rgb, **options):
    return encode_tiff(rgb.transpose(2, 0, 1), **options)


# ImageJ's tables of 256 colours, from black to red, green and blue.
RGB_TABLES = [np.outer(colour, np.arange(256)).astype(np.uint8) for colour in np.eye(3)]
SEPARATE = {"planarconfig": "separate"}
GREY = {"photometric": "minisblack"}
MIXED_GREY = GREY | {"planarconfig": "contig"}
REDUCED = {"subfiletype": 1}


TIFFS = [("TIFF", "1 L RGB LA RGBA", {"compression": f}) for f in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")]
OTHERS = [("PNG", "1 L RGB LA RGBA", {}), ("BMP", "1 L RGB", {}), ("WEBP", "L RGB RGBA", {"lossless": 1, "exact": 1})]


@pytest.mark.parametrize(("format", "kinds", "options"), TIFFS + OTHERS)
def test_lossless_images_and_masks_are_exact_whatever_the_suffix_without_alpha(tmp_path, rng, format, kinds, options):
    for kind in kinds.split():
        array = rng.integers(0, 256, (40, 48, len(kind)), dtype=np.uint8).squeeze()
        if kind == "1":
            array = array // 128 * 255
        elif kind.endswith("A"):
            array[:20, :, -1] = 0
        data = encode(array > 0 if kind == "1" else array, format, **options)
        path = write(tmp_path / "ein Bild ü.png", data)
        image = read_image(path)
        assert image.dtype == np.uint8
        assert image.flags.writeable
        np.testing.assert_array_equal(image, as_rgb(array))
        assert image_size(path) == (40, 48)
        if format != "WEBP":
            np.testing.assert_array_equal(read_mask(path), as_rgb(array).max(axis=2))


# Files of 16 bits, from an array (H, W, channels).
DEEP = {
    **{f"PNG of {n} channels": (n, encode_png16) for n in (1, 2, 3, 4)},
    **{f"interlaced PNG of {n} channels": (n, lambda array: encode_png16(array, True)) for n in (1, 2, 3, 4)},
    "grey TIFF": (1, lambda array: encode_tiff(array[..., 0], **GREY)),
    "LZW TIFF": (1, lambda array: encode(array[..., 0], "TIFF", compression="tiff_lzw")),
    "RGB TIFF": (3, lambda array: encode_tiff(array, byteorder=">", compression="zlib")),
}


@pytest.mark.parametrize("kind", DEEP)
def test_values_of_up_to_16_bits_are_rounded_for_every_value_of_an_image_and_kept_in_a_mask(tmp_path, rng, kind):
    channels, make = DEEP[kind]
    values = np.stack([rng.permutation(65536) for _ in range(channels)], 1).reshape(256, 256, channels)
    for bits in (9, 16):
        largest = 2**bits - 1
        array = (values >> (16 - bits)).astype(np.uint16)
        if channels in (2, 4):
            array[..., -1] = 65535  # alpha has its own range
        path = write(tmp_path / "a", make(array))
        image, peak = read_image_and_peak(path, bits=None if bits == 16 else bits)
        # In whole numbers: the largest value is odd, so no tie can occur.
        np.testing.assert_array_equal(image, as_rgb((510 * array.astype(np.int64) + largest) // (2 * largest)))
        assert peak == largest
        np.testing.assert_array_equal(read_mask(path), as_rgb(array).max(axis=2))
        if bits < 16:
            array[7, 8, 0] = largest + 1
            with pytest.raises(ImageError, match=f"value {largest + 1}, above {largest}, the largest of {bits} bits"):
                read_image(write(path, make(array)), bits=bits)


# From an array (40, 48, 3).
ONE_PICTURE = {
    "planes": lambda rgb: encode_planes(rgb, **SEPARATE),
    "planes and alpha": lambda rgb: encode_planes(rgb[..., [0, 1, 2, 0]], **SEPARATE),
    "ImageJ channels": encode_imagej,
    "ImageJ composite": lambda rgb: encode_imagej(rgb, mode="composite", LUTs=RGB_TABLES),
    "three channels called grey": lambda rgb: encode_tiff(rgb, **MIXED_GREY),
    "pyramid": lambda rgb: encode_tiff((rgb, {"subifds": 1}), (rgb[::2, ::2], REDUCED)),
    "transparency mask": lambda rgb: encode_tiff(rgb, (rgb[..., 0] > 9, GREY | {"subfiletype": 4})),
    "thumbnail before a page that says how it is turned": lambda rgb: encode_tiff(
        (rgb[::2, ::2], REDUCED), (np.rot90(rgb), {"extratags": [(274, 3, 1, 6, True)]})
    ),
    "a thumbnail alone": lambda rgb: encode_tiff((rgb, REDUCED)),
}


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ONE_PICTURE)
def test_one_picture_in_a_tiff_is_read_however_it_lies_there(tmp_path, rgb, kind, deep):
    path = write(tmp_path / "a.tif", ONE_PICTURE[kind](rgb.astype(np.uint16) * 257 if deep else rgb))
    np.testing.assert_array_equal(read_image(path), rgb)
    np.testing.assert_array_equal(read_mask(path), rgb.max(axis=2).astype(int) * (257 if deep else 1))


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def bomb_png():
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def bomb_tiff():
    """16-bit RGB of 60000 x 60000 pixels, of which one byte is there."""
    tags = {256: 60000, 257: 60000, 258: 16, 259: 1, 262: 2, 273: 8, 277: 3, 278: 60000, 279: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags)) + entries + bytes(4)


BOMB = r"60000 x 60000 pixels, more than the limit of 250,000,000 .*bomb"
# Files of which none can be chosen, or of which something would be lost, and what is said.
NOT_ONE_PICTURE = {
    "pages": (lambda rgb: encode_tiff(rgb, rgb), "a TIFF of 2 pages or planes"),
    "mask's pages": (lambda rgb: encode_planes(rgb, **GREY), "a mask's parts"),
    "planes behind one page": (lambda rgb: encode_planes(rgb, **GREY, truncate=True), "3 pages or planes"),
    "ImageJ slices": (lambda rgb: encode_imagej(rgb, axes="ZYX"), "3 pages or planes"),
    "volume": (
        lambda rgb: encode_tiff(np.zeros((2, 64, 64), np.uint8), volumetric=True, tile=(16, 16, 16), **GREY),
        "2 pages or planes",
    ),
    "two channels": (lambda rgb: encode_tiff(rgb[..., :2], **MIXED_GREY), "2 channels"),
    "raw file": (lambda rgb: encode_tiff((rgb, REDUCED | {"subifds": 1}), rgb), "raw file: save it as PNG"),
    "missing page": (lambda rgb: without_second_page(encode_tiff(rgb, (rgb, REDUCED))), "a page is missing"),
    "animated PNG": (
        lambda rgb: encode(rgb, "PNG", save_all=True, append_images=[Image.fromarray(255 - rgb)]),
        "an animation of 2 frames",
    ),
    "GIF": (lambda rgb: encode(rgb, "GIF"), "it is a GIF, and no PNG"),
    "HEIF": (lambda rgb: b"\0\0\0\x18ftypheic" + bytes(99), "it is a HEIF, AVIF or other"),
    "text": (lambda rgb: b"hello, I am a text", "no PNG"),
    "flipped bit": (lambda rgb: flipped(encode(rgb, "PNG")), "damaged"),
    "nothing": (lambda rgb: b"", "empty"),
    "PNG that is a bomb": (lambda rgb: bomb_png(), BOMB),
    "TIFF that is a bomb": (lambda rgb: bomb_tiff(), BOMB),
    "narrow": (lambda rgb: encode(np.zeros((500, 31), np.uint8), "PNG"), "31 x 500"),
    **{
        f"TIFF of {dtype}": (lambda rgb, t=dtype: encode_tiff(rgb[..., 0].astype(t), **GREY), "8- or 16-bit")
        for dtype in ("int8", "int16", "int32", "uint32")
    },
}  # fmt: skip


NO_FILE = {
    "missing": (lambda _: None, "no such file"),
    "folder": (os.mkdir, "folder"),
    "pipe": (os.mkfifo, "not a regular file"),
}


@pytest.mark.parametrize("kind", [*NOT_ONE_PICTURE, *NO_FILE])
def test_what_is_not_one_picture_is_refused_by_name(tmp_path, rgb, kind):
    path = tmp_path / "ä b.png"
    if kind in NOT_ONE_PICTURE:
        make, reason = NOT_ONE_PICTURE[kind]
        write(path, make(rgb))
    else:
        make, reason = NO_FILE[kind]
        make(path)
    for function in (read_image, read_mask, image_size):
        with pytest.raises(ImageError, match=rf"^1 image .*{path}: [^\n]*{reason}[^\n]*$") as caught:
            function(path)
        assert caught.value.failures[0][0] == path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PNG16", "TIFF16", "JPEG"])
def test_exif_orientation(tmp_path, orientation, kind):
    # Four flat quadrants, so that JPEG keeps them; 32 x 64, the least that is read, tells rows from columns.
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :32], stored[:16, 32:], stored[16:, :32], stored[16:, 32:] = 40, 100, 160, 220
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(image))
    deep = stored.astype(np.uint16) * 257
    if kind == "PNG16":
        data = encode_png16(deep)
        # The EXIF chunk goes behind the signature (8 bytes) and the header (25 bytes).
        data = data[:33] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[33:]
    elif kind == "TIFF16":
        data = encode_tiff(deep, extratags=[(274, 3, 1, orientation, True)])
    else:
        data = encode(image, kind, exif=exif, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    path = write(tmp_path / "a", data)
    found = read_image(path)
    assert found.shape == (*image_size(path), 3) == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= (25 if kind == "JPEG" else 0)


# Pillow warns about what it then raises an error for.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_truncation_is_found_at_every_cut_unless_the_program_lets_it_pass(tmp_path, rng, rgb, monkeypatch):
    deep = rng.integers(0, 65536, (40, 48, 3)).astype(np.uint16)
    files = {
        "png 16": encode_png16(deep),
        "tiff 16": encode_tiff(deep),
        "tiff 16 deflate": encode_tiff(deep, compression="zlib"),
        "progressive jpeg": encode(rgb, "JPEG", progressive=True),
        "lossless webp": encode(rgb, "WEBP", lossless=True),
        **{name: encode(rgb, name) for name in ("PNG", "JPEG", "BMP", "TIFF", "WEBP")},
        **{name: encode(rgb, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")},
    }
    path = tmp_path / "a"
    for name, data in files.items():
        read_image(write(path, data))
        for cut in {*range(0, len(data), 197), *range(max(0, len(data) - 20), len(data))}:
            write(path, data[:cut])
            try:
                read_image(path)
            except ImageError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                pytest.fail(f"{name}: the first {cut} of {len(data)} bytes passed for an image")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match=r"LOAD_TRUNCATED_IMAGES, .* set it to False"):
        read_image(write(path, files["BMP"][:-2000]))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("layout", [{"rowsperstrip": 16}, {"tile": (32, 32), "compression": "zlib"}])
@pytest.mark.parametrize("left", [[1, 0, 1, 1], [1, 1, 1]])
def test_a_tiff_without_one_of_its_strips_or_tiles_is_refused(tmp_path, dtype, layout, left):
    path = write(tmp_path / "a.tif", encode_tiff(np.ones((64, 64), dtype), **GREY, **layout))
    read_image(path)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for tag in [tag for tag in tiff.pages[0].tags if tag.name.endswith(("Offsets", "ByteCounts"))]:
            tag.overwrite([value * present for value, present in zip(tag.value, left, strict=False)])
    with pytest.raises(ImageError, match="1 of its strips or tiles missing"):
        read_image(path)


@pytest.mark.parametrize(("file_format", "deep"), [("PNG", False), ("JPEG", False), ("TIFF", True)])
def test_the_limit_of_pixels_is_ours_and_pillows_is_neither_used_nor_changed(
    tmp_path, rng, monkeypatch, file_format, deep
):
    values = rng.integers(0, 256, (40, 48), dtype=np.uint8)
    path = write(tmp_path / "a", encode(values * np.uint16(257) if deep else values, file_format))
    expected = read_image(path)
    for pillows in (1919, 900, None):  # it warns, fails, and has been switched off
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(read_image(path), expected)
        assert pillows == Image.MAX_IMAGE_PIXELS
    with pixel_limit(1919), pytest.raises(ImageError, match=r"48 x 40 pixels, .* 1,919 .*--max-pixels 1920"):
        read_image(path)
    read_image(path)  # the limit ends with its context
    with pixel_limit(1920):
        read_image(path)


def test_a_mask_without_exact_values_is_refused(tmp_path, rgb):
    smeared = (encode(rgb, "JPEG"), encode(rgb, "WEBP"), encode(rgb, "TIFF", compression="jpeg"))
    floats = encode_tiff(rgb[..., 0] / np.float32(255), **GREY)
    for data, reason in (*((data, "save masks as PNG") for data in smeared), (floats, "integers")):
        with pytest.raises(ImageError, match=reason):
            read_mask(write(tmp_path / "m.png", data))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_tiff_from_0_to_1(tmp_path, rng, dtype):
    for shape, options in (((40, 48), GREY), ((40, 48, 3), {})):
        levels = rng.integers(0, 256, shape)
        array = (levels / 255).astype(dtype)
        path = write(tmp_path / "a.tif", encode_tiff(array, **options))
        np.testing.assert_array_equal(read_image(path), as_rgb(levels))
        assert read_image_and_peak(path, bits=9)[1] is None
        for bad in (np.nan, np.inf, -0.1, 1.5):
            array[3, 4] = bad
            with pytest.raises(ImageError, match="from 0 to 1"):
                read_image(write(path, encode_tiff(array, **options)))
