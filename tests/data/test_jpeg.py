import struct

import numpy as np
import pytest
from PIL import Image

from dskd_fast.data.images import ImageError, read_image

from .conftest import encode


@pytest.fixture
def photograph():
    """Soft shapes under a little noise, of which a JPEG has a few thousand bytes."""
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((160, 128), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(soft) * 0.9 + rng.integers(0, 20, (128, 160, 3))).astype(np.uint8))


JPEGS = {
    "baseline": {},
    "all colours": {"quality": 100, "subsampling": 0},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "progressive with restart markers": {"progressive": True, "restart_marker_blocks": 9},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_whose_data_end_early_is_refused_and_a_sound_one_is_not(tmp_path, photograph, kind, mode):
    def read(data):
        (tmp_path / "a.jpg").write_bytes(data)
        return read_image(tmp_path / "a.jpg")

    data = encode(photograph.convert(mode), "JPEG", **JPEGS[kind])
    read(encode(Image.new(mode, (160, 128), "white"), "JPEG", **JPEGS[kind]))
    expected = read(data)
    comment = b"\xff\xfe\0\x06\xff\xd9\xff\xda"  # with an end mark in it
    small = encode(Image.new("RGB", (8, 8)), "JPEG")
    thumbnail = b"\xff\xe5" + struct.pack(">H", len(small) + 2) + small
    for part in (comment, thumbnail):
        np.testing.assert_array_equal(read(data[:2] + part + data[2:]), expected)
        with pytest.raises(ImageError, match="truncated"):
            read(data[:2] + part + data[2:-2])
    # Fill bytes before a marker, and what cameras put behind the picture.
    for sound in (data[:-2] + b"\xff\xff\xd9", data + b"video\xff\xda\0\0" * 9 + data):
        np.testing.assert_array_equal(read(sound), expected)
    # Between scans a progressive JPEG may end, with a picture of less detail.
    longest = max(data.split(b"\xff\xda"), key=len)
    for share in (0.3, 0.5, 0.8):
        at = data.index(longest) + int(share * len(longest))
        with pytest.raises(ImageError, match="some of its coded data is missing"):
            read(data[:at] + b"\xff\xd9")
    if kind == "restart markers":
        begin, end = data.index(b"\xff\xd1"), data.index(b"\xff\xd2")
        with pytest.raises(ImageError, match="some of its coded data is missing"):
            read(data[:begin] + data[end:])
