"""`DSKD.load(run).predict(images)`: from whatever a program has its images in, and from many threads."""

import dataclasses
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import dskd_fast
from dskd_fast import DSKD
from dskd_fast.data.images import ImageError, read_image
from dskd_fast.detection.predict import predict as predict_files
from dskd_fast.evaluation.evaluate import evaluate


@pytest.fixture(scope="module")
def detector(tiny_run):
    return DSKD.load(tiny_run, device="cpu")


@pytest.fixture(scope="module")
def paths(category):
    return [item.path for item in category.test]


@pytest.fixture(scope="module")
def pixels(paths):
    return np.stack([read_image(path) for path in paths])


@pytest.fixture(scope="module")
def expected(detector, paths):
    return detector.predict(paths)


def assert_same(found, expected):
    """To the bit."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.score, one.anomalous) == (other.score, other.anomalous)
        for name in ("map", "local_map", "global_map"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_results_are_those_of_the_command_line(detector, paths, expected, tmp_path):
    threshold = detector.calibration.threshold.value
    written = predict_files(detector, paths, tmp_path, threshold=threshold, save_maps=True)
    for one, other in zip(expected, written, strict=True):
        assert (one.score, one.parts, one.decided_by) == (other.score, other.parts, other.decided_by)
        assert other.decision == ("anomalous" if one.anomalous else "normal")
        np.testing.assert_array_equal(one.map, tifffile.imread(tmp_path / other.map))


@pytest.mark.parametrize("threshold", [1e6, None])
def test_dead_frames_are_suspect_and_never_pass_and_no_other_image_is(tiny_run, data_root, dead_frames, threshold):
    detector = DSKD.load(tiny_run, device="cpu")
    decided = None if threshold is None else dataclasses.replace(detector.calibration.threshold, value=threshold)
    detector.calibration = dataclasses.replace(detector.calibration, threshold=decided)
    frames, reasons = zip(*dead_frames.values(), strict=True)
    figures = r"brightness [\d.]+, contrast [\d.]+; normal images allow brightness [\d.]+ to"
    for found, reason in zip(detector.predict(frames), reasons, strict=True):
        assert re.match(rf"{reason} \({figures}", found.suspect)
        assert found.anomalous is True
        assert np.isfinite(found.score)
    others = detector.predict(sorted((data_root / "screw_bag").glob("*/*/*.png")))
    assert len(others) == 26
    assert {(one.suspect, one.anomalous) for one in others} == {(None, None if threshold is None else False)}
    # A run from before there was the check.
    detector.calibration = dataclasses.replace(detector.calibration, exposure=None)
    assert {one.suspect for one in detector.predict(frames)} == {None}


def test_the_networks_can_still_be_built_by_that_name_and_load_is_the_packages(tiny_run, paths, expected):
    assert isinstance(DSKD("test_resnet", pretrained=False, image_size=64), torch.nn.Module)
    assert_same(dskd_fast.load(str(tiny_run), "cpu").predict(paths), expected)


def tensor(pixels):
    return torch.from_numpy(pixels).movedim(-1, -3)


CONVERSIONS = {
    "text": lambda paths, pixels: [str(path) for path in paths],
    "generator": lambda paths, pixels: (path for path in paths),
    "one array": lambda paths, pixels: pixels,
    "turned arrays": lambda paths, pixels: [np.asfortranarray(image) for image in pixels],
    "float array, rounded": lambda paths, pixels: np.maximum(pixels - 0.4, 0).astype(np.float32) / 255,
    "half array": lambda paths, pixels: (pixels / 255).astype(np.float16),
    "one tensor": lambda paths, pixels: tensor(pixels),
    "tensors": lambda paths, pixels: tuple(tensor(pixels)),
    "tensor with grad": lambda paths, pixels: (tensor(pixels) / 255).requires_grad_(),
    "Pillow": lambda paths, pixels: [Image.open(path) for path in paths],
    "mixed": lambda paths, pixels: [
        *(paths[0], pixels[1], tensor(pixels[2]), Image.fromarray(pixels[3])),
        *pixels[4:] / 255,
    ],
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_every_kind_of_images_gives_the_same(detector, paths, pixels, expected, kind):
    before = pixels.copy()
    assert_same(detector.predict(CONVERSIONS[kind](paths, pixels)), expected)
    np.testing.assert_array_equal(pixels, before)


def test_a_single_image_gives_a_list_of_one_and_none_gives_none(detector, paths, pixels):
    expected = detector.predict(paths[:1])
    for image in (str(paths[0]), pixels[0], tensor(pixels[0]), Image.fromarray(pixels[0])):
        assert_same(detector.predict(image), expected)
    for none in ([], pixels[:0], tensor(pixels[:0])):
        assert detector.predict(none) == []


def test_images_of_different_sizes_go_together(detector, pixels):
    images = [pixels[0], pixels[1, :40, :50], pixels[2, :, :33], np.tile(pixels[3], (2, 3, 1))]
    for one, image in zip(detector.predict(images), images, strict=True):
        assert one.map.shape == image.shape[:2]
        assert one.score == pytest.approx(detector.predict(image)[0].score, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_pillow_images_are_turned_and_converted_as_when_they_are_read(detector, pixels, tmp_path, mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[0]).convert(mode).save(tmp_path / "turned.png", exif=exif)
    expected = detector.predict(tmp_path / "turned.png")
    assert expected[0].map.shape == (120, 96)
    assert_same(detector.predict(Image.open(tmp_path / "turned.png")), expected)


IMAGE = np.zeros((64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (None, TypeError, "images is a NoneType: pass paths"),
        (b"image.png", TypeError, "images is a bytes"),
        ([[IMAGE]], TypeError, r"images\[0\] is a list"),
        (IMAGE[..., 0], ValueError, r"images is an array of shape \(64, 64\): pass \(H, W, 3\)"),
        (IMAGE.transpose(2, 0, 1), ValueError, r"images is an array of shape \(3, 64, 64\)"),
        ([IMAGE[None]], ValueError, r"images\[0\] is an array of shape \(1, 64, 64, 3\)"),
        (torch.from_numpy(IMAGE), ValueError, r"images is a tensor of shape \(64, 64, 3\): pass \(3, H, W\)"),
        (IMAGE.astype(np.int64), ValueError, "images has dtype int64: pass uint8, or floating values from 0 to 1"),
        (IMAGE + 1.5, ValueError, "images has floating values from 1.5 to 1.5: pass values from 0 to 1, or uint8"),
        (IMAGE + np.float32(1.0000001), ValueError, "images has floating values from 1.000000119"),
        (IMAGE * np.nan, ValueError, "images has floating values from nan"),
        ([IMAGE, IMAGE[:31]], ValueError, r"images\[1\] has 64 x 31 pixels: pass at least 32"),
        (Image.new("F", (64, 64)), ValueError, "images is a Pillow image of mode F: pass one of 1, L"),
        ("nowhere.png", ImageError, "no such file"),
    ],
)
def test_what_is_no_image_is_named(detector, images, error, message):
    with pytest.raises(error, match=message):
        detector.predict(images)


@pytest.mark.parametrize("batch_size", [0, 8.0, "8", None, True])
def test_a_batch_size_that_is_no_whole_number_from_1_up_is_refused(detector, category, tmp_path, batch_size):
    for call in (
        lambda: detector.predict(IMAGE, batch_size=batch_size),
        lambda: predict_files(detector, [category.root], tmp_path / "out", threshold=None, batch_size=batch_size),
        lambda: evaluate(detector, category, threshold=None, batch_size=batch_size),
    ):
        with pytest.raises(ValueError, match=f"^batch_size={batch_size!r} is not possible: use a whole number from 1"):
            call()
    assert not (tmp_path / "out").exists()


def test_threads_get_the_bits_of_a_single_one(detector, paths, pixels):
    work = [paths[:3], pixels[3:5], list(pixels[5:]), paths[::-1]]
    expected = [detector.predict(images) for images in work]
    start = threading.Barrier(4)

    def many(thread):
        start.wait()
        for i in [(thread + call) % len(work) for call in range(3)]:
            assert_same(detector.predict(work[i], batch_size=8), expected[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(many, range(4)))  # raises what a thread has raised
