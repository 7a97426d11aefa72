"""Calibrated maps of students, by formulas written out in float64."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from dskd_fast.detection.scoring import maps as maps_module
from dskd_fast.detection.scoring.maps import MapPart, SumPart

SIZE = 32


def level_maps(n, seed=0):
    """Levels of 16, 8 and 4 positions a side, whose mean and deviation differ from place to place."""
    generator = torch.Generator().manual_seed(seed)

    def level(side):
        noise = torch.rand(n, side, side, generator=generator)
        return torch.linspace(1, 3, side) + torch.linspace(0.5, 2, side)[:, None] * noise

    return [level(side) for side in (16, 8, 4)]


def smoothed(values):
    return ndimage.gaussian_filter(values, maps_module._SMOOTHING * len(values), mode="nearest")


def statistics(values):
    """Mean and deviation of each place over maps (n, h, w)."""
    share = len(values) / (len(values) + maps_module._IMAGES_TO_KNOW)
    of_places = smoothed(values.mean(0))
    mean = share * of_places + (1 - share) * of_places.mean()
    variance = smoothed(np.mean([(one - mean) ** 2 for one in values], axis=0))
    share *= maps_module._SHARE_OF_VARIANCE
    return mean, np.sqrt(share * variance + (1 - share) * variance.mean())


@pytest.fixture
def expected_map(bilinear):
    def make(new, normal, levels):
        of_levels = []
        for level in levels:
            mean, deviation = statistics(normal[level].double().numpy())
            weights = bilinear(new[level].shape[-1], SIZE)
            of_levels.append(weights @ ((new[level].double().numpy() - mean) / deviation) @ weights.T)
        return np.mean(of_levels, axis=0)

    return make


@pytest.mark.parametrize("levels", [(0,), (0, 1), (0, 1, 2), (1,)])
def test_a_map_is_the_mean_over_levels_of_deviations_from_what_is_normal_at_each_place(expected_map, levels):
    normal, new = level_maps(6), level_maps(3, seed=1)
    part = MapPart(levels)
    part.calibrate(normal, SIZE)
    found = part(new, SIZE)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected_map(new, normal, levels), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_normal_images_are_normalised_as_if_each_had_not_been_among_them(expected_map, n):
    normal, levels = level_maps(n), (0, 1)
    left_out = MapPart(levels).calibrate(normal, SIZE)
    for i in range(n):
        others = [j for j in range(n) if j != i] or [0]  # a single image has none
        expected = expected_map(*([level[kept] for level in normal] for kept in ([i], others)), levels)
        np.testing.assert_allclose(left_out[i : i + 1], expected, rtol=1e-5, atol=1e-5)


def constant(value, n=5, side=8):
    """One level, (n, side, side), of which some values are larger by the smallest step of float32."""
    values = torch.full((n, side, side), value)
    values[::2, ::3] = torch.nextafter(values[::2, ::3], torch.tensor(np.inf if value else 0.0))
    return values


@pytest.mark.parametrize("value", [0.0, 1e-12, 0.1, -3.3, 1e6])
def test_maps_that_are_constant_but_for_rounding_stay_small(value):
    normal = [constant(value)]
    part = MapPart((0,))
    for found in (part.calibrate(normal, SIZE), part(normal, SIZE)):
        np.testing.assert_allclose(found, 0, atol=1e-6 * abs(value))
    assert part.rounding() == pytest.approx(1e-5 * abs(value))


def test_the_sum_is_of_both_students_maps_each_in_deviations_of_its_own_pixels(expected_map):
    normal, new = (level_maps(6), level_maps(6, seed=1)), (level_maps(3, seed=2), level_maps(3, seed=3))
    part, levels = SumPart((0, 1, 2)), (0, 1, 2)
    left_out = part.calibrate(normal, SIZE)
    of_students = [MapPart(levels).calibrate(of_normal, SIZE).double().numpy() for of_normal in normal]
    expected = [expected_map(*of_student, levels) for of_student in zip(new, normal, strict=True)]
    for found, maps in ((left_out, of_students), (part(new, SIZE), expected)):
        summed = sum(one / alone.std() for one, alone in zip(maps, of_students, strict=True))
        np.testing.assert_allclose(found, summed, rtol=1e-4, atol=1e-5)
