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


@pytest.mark.parametrize(("threshold", "high"), [(9.5, 19.0), (1.0, 2.0), (0.25, 1.25), (0.0, 1.0), (-3.0, -2.0)])
def test_colours_are_half_way_at_the_threshold_and_go_from_the_normal_mean_where_that_is_far(threshold, high):
    assert colour_range(threshold) == (min(0.0, threshold - 1), high)
    assert colour_range(None) == (0.0, 20.0)


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


def test_no_copy_of_a_photograph_is_drawn_in_floating_point():
    image, anomaly_map = np.full((1500, 1000, 3), 100, np.uint8), np.ones((1500, 1000), np.float32)
    tracemalloc.start()  # NumPy's memory, without Pillow's canvas
    try:
        overlay(image, anomaly_map, "score 1.00", 0, 1)
        assert tracemalloc.get_traced_memory()[1] < 4 * image.nbytes
    finally:
        tracemalloc.stop()
