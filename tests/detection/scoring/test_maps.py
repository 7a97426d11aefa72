"""A student's calibrated map, by formulas written out in float64."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from dskd_fast.detection.scoring import maps as maps_module
from dskd_fast.detection.scoring.maps import MapPart
from dskd_fast.models import Measurements

SIZE = 32


def measured(n, seed=0):
    """Levels of 16, 8 and 4 positions a side, whose mean and deviation differ from place to place."""
    generator = np.random.default_rng(seed)
    levels = [
        torch.from_numpy(
            np.linspace(1, 3, side) + np.linspace(0.5, 2, side)[:, None] * generator.random((n, side, side))
        )
        for side in (16, 8, 4)
    ]
    return Measurements([x.float() for x in levels], None, None, None, torch.zeros(n, 1))


def smoothed(values):
    return ndimage.gaussian_filter(values, maps_module._SMOOTHING * len(values), mode="nearest")


def statistics(values):
    """Mean and deviation of each place over maps (n, h, w)."""
    mean = smoothed(values.mean(0))
    variance = smoothed(np.mean([(one - mean) ** 2 for one in values], axis=0))
    share = maps_module._SHRINKAGE
    return mean, np.sqrt((1 - share) * variance + share * variance.mean())


def at_size(values):
    """Bilinear between pixel centres, the edges repeated."""
    side = values.shape[-1]
    position = np.clip((np.arange(SIZE) + 0.5) * side / SIZE - 0.5, 0, side - 1)
    weights = np.maximum(1 - np.abs(position[:, None] - np.arange(side)), 0)
    return weights @ values @ weights.T


def expected_map(new, normal, levels):
    of_levels = []
    for level in levels:
        mean, deviation = statistics(normal.local_levels[level].double().numpy())
        of_levels.append(at_size((new.local_levels[level].double().numpy() - mean) / deviation))
    return np.mean(of_levels, axis=0)


def only(images, kept):
    return images._replace(local_levels=[level[kept] for level in images.local_levels])


@pytest.mark.parametrize("levels", [(0,), (0, 1), (0, 1, 2), (1,)])
def test_a_map_is_the_mean_over_levels_of_deviations_from_what_is_normal_at_each_place(levels):
    normal, new = measured(6), measured(3, seed=1)
    part = MapPart("local", levels)
    part.calibrate(normal, SIZE)
    found = part(new, SIZE)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected_map(new, normal, levels), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_normal_images_are_normalised_as_if_each_had_not_been_among_them(n):
    normal, levels = measured(n), (0, 1)
    left_out = MapPart("local", levels).calibrate(normal, SIZE)
    for i in range(n):
        others = [j for j in range(n) if j != i] or [0]  # a single image has none
        expected = expected_map(only(normal, [i]), only(normal, others), levels)
        np.testing.assert_allclose(left_out[i : i + 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-12, 0.1, -3.3, 1e6])
def test_maps_that_are_constant_but_for_rounding_stay_small(value):
    values = torch.full((5, 8, 8), value)
    values[::2, ::3] = torch.nextafter(values[::2, ::3], torch.tensor(np.inf if value else 0.0))
    normal = Measurements(None, [values], None, None, torch.zeros(5, 1))
    part = MapPart("global", (0,))
    for found in (part.calibrate(normal, SIZE), part(normal, SIZE)):
        np.testing.assert_allclose(found, 0, atol=1e-6 * abs(value))
    assert part.rounding() == pytest.approx(1e-5 * abs(value))
