import tracemalloc

import numpy as np
import pytest
import torch
from torch.nn import functional

import dskd_fast.detection.overlay as overlay_module
from dskd_fast.detection.overlay import colour_range, colours, heat, overlay


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def halves(image, anomaly_map, low=0.0, high=10.0):
    """The photograph and the heat map as drawn, each (H, W, 3), and the strip below."""
    drawn = np.asarray(overlay(image, anomaly_map, "score 1.00", low, high))
    height, width = image.shape[:2]
    return drawn[:height, :width], drawn[:height, -width:], drawn[height:]


@pytest.mark.parametrize("size", [(32, 32), (60, 90), (700, 40), (33, 500)])
def test_photograph_and_heat_map_stand_side_by_side_above_the_caption(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    anomaly_map = np.zeros(size, np.float32)
    before = image.copy(), anomaly_map.copy()
    left, right, strip = halves(image, anomaly_map)
    for unchanged, original in ((left, image), (right, image), (image, before[0]), (anomaly_map, before[1])):
        np.testing.assert_array_equal(unchanged, original)
    assert 2 * size[1] < strip.shape[1] <= 2 * size[1] + max(2, size[1] // 100)
    assert 20 <= strip.shape[0] <= 80
    assert (strip == 24).all(axis=2).any()
    assert (strip > 128).all(axis=2).any()


@pytest.mark.parametrize("value", [-1e30, 10.0, 1e30])
def test_normal_pixels_are_unchanged_and_the_hottest_have_three_quarters_of_the_last_colour(image, value):
    _, right, _ = halves(image, np.full((60, 90), value, np.float32))
    hottest = (image * 0.25 + np.array([255, 255, 190]) * 0.75).round()
    np.testing.assert_allclose(right, image if value <= 0 else hottest, atol=0 if value <= 0 else 1)


@pytest.mark.parametrize("limit", [0.0, 5.0])
def test_equal_limits_split_the_map_in_two(image, limit):
    anomaly_map = np.full((60, 90), limit, np.float32)
    anomaly_map[:, 45:] = limit + 1
    _, right, _ = halves(image, anomaly_map, limit, limit)
    np.testing.assert_array_equal(right[:, :45], image[:, :45])
    hottest = image[:, 45:] * 0.25 + np.array([255, 255, 190]) * 0.75
    np.testing.assert_allclose(right[:, 45:], hottest, atol=1)


def test_no_copy_of_a_photograph_is_drawn_in_floating_point():
    image, anomaly_map = np.full((1500, 1000, 3), 100, np.uint8), np.ones((1500, 1000), np.float32)
    tracemalloc.start()  # NumPy's memory, without Pillow's canvas
    try:
        overlay(image, anomaly_map, "score 1.00", 0, 1)
        assert tracemalloc.get_traced_memory()[1] < 4 * image.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("threshold", "high"), [(9.5, 19.0), (1.0, 2.0), (0.25, 1.25), (0.0, 1.0), (-3.0, -2.0)])
def test_colours_are_half_way_at_the_threshold_and_go_from_the_normal_mean_where_that_is_far(threshold, high):
    assert colour_range(threshold) == (min(0.0, threshold - 1), high)
    assert colour_range(None) == (0.0, 20.0)


def test_colours_are_those_of_the_drawn_map():
    strength = np.linspace(0, 1, 33, dtype=np.float32)
    rgb, opacity = colours(strength)
    assert (rgb.shape, opacity.shape) == ((33, 3), (33,))
    _, drawn, _ = halves(np.full((40, 33, 3), 100, np.uint8), 10 * np.tile(strength, (40, 1)))
    # Half of a strength's, half of an opacity's and half of a colour's step.
    atol = (457 * 0.75 + 1.5 * 155) / 2 / 1023 + 155 / 2 / 256 + 0.5
    np.testing.assert_allclose(drawn[0], 100 * (1 - opacity[:, None]) + rgb * opacity[:, None], atol=atol)


@pytest.mark.parametrize("size", [(33, 200), (300, 40), (50, 700), (97, 131)])
@pytest.mark.parametrize("mean", [0, -3, -8])
def test_a_small_map_is_enlarged_and_drawn_as_in_double_precision(size, mean, monkeypatch):
    """Within 1 of 255, wherever nothing is drawn and however the photograph is taken apart."""
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    small = random.normal(mean, 2, (64, 64)).astype(np.float32)
    enlarged = functional.interpolate(
        torch.from_numpy(small).double()[None, None], size, mode="bilinear", antialias=min(size) < 64
    )[0, 0].numpy()
    rgb, opacity = colours(np.clip(enlarged / 4, 0, 1))
    expected = (image * (1 - opacity[..., None]) + rgb * opacity[..., None]).round()
    monkeypatch.setattr(overlay_module, "_BLOCK", 1000)
    drawn = heat(image, small, 0.0, 4.0)
    assert np.abs(drawn - expected).max() <= 1
    assert mean > -8 or (drawn == image).all()
