"""What an export holds, as a module, does what `predict` does."""

import numpy as np
import pytest
import torch

from dskd_fast.data.images import resize_square as resize_with_pillow
from dskd_fast.detection.program import Inspection, enlarge, resize_square

from .conftest import assert_agrees, module_run, small_detector


@pytest.mark.parametrize(
    "scoring",
    [
        {"align_corners": True, "temperature": 0.05},
        {"sigma": 20.0, "filter_maps": True},  # wider than the map: reflected more than once
    ],
    ids=str,
)
def test_settings_of_a_run_are_in_the_module(random_images, scoring):
    detector = small_detector(**scoring)
    run = module_run(Inspection(detector, 20.0))
    for images in (random_images(1, 32, 45), random_images(4, 61, 32), random_images(2, 90, 70)):
        assert_agrees(run(images), detector.predict(images.transpose(0, 2, 3, 1)), 20.0)


@pytest.mark.parametrize(
    ("networks", "scoring", "used"),
    [
        ({"students": "local"}, {}, None),
        ({"students": "global"}, {"filter_maps": True}, None),
        ({"gccb": 0}, {"align_corners": True}, None),
        ({}, {}, ["global", "condensed"]),
        ({}, {}, ["sum", "patches"]),
    ],
    ids=str,
)
def test_calibrated_scores_of_any_run_are_in_the_module(make_calibrated, random_images, networks, scoring, used):
    detector = make_calibrated(scoring=scoring, **networks)
    detector.calibrated.use(used or detector.parts)
    module = Inspection(detector, 2.0)
    assert {x.dtype for x in module.calibrated.buffers()} == {torch.float32}
    for images in (random_images(1, 40, 64), random_images(3, 70, 90)):
        assert_agrees(module_run(module)(images), detector.predict(images.transpose(0, 2, 3, 1)), 2.0)


def test_the_decision_is_strict(random_images):
    images = torch.from_numpy(random_images(1, 40, 40))
    score = Inspection(small_detector(), None)(images)["score"].item()
    # In float32 the second threshold would be rounded to the score.
    for threshold, expected in ((score, False), (float(np.nextafter(score, -np.inf)), True)):
        assert Inspection(small_detector(), threshold)(images)["anomalous"].tolist() == [expected]


def test_resizing_is_that_of_predict_to_the_bit():
    generator = np.random.default_rng(0)
    for _ in range(40):
        size = int(generator.choice([32, 64, 96]))
        height, width = generator.choice([32, 33, 50, 64, 96, 127, 200, 311], 2)
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image[: height // 2] = 255 * (image[: height // 2] > 127)
        ours = resize_square(torch.from_numpy(image).permute(2, 0, 1)[None], size)[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(ours, resize_with_pillow(image, size))


@pytest.mark.parametrize("align_corners", [False, True])
def test_maps_are_enlarged_as_those_of_predict(align_corners):
    detector = small_detector(align_corners=align_corners)
    anomaly_map = torch.randn((1, 32, 32), generator=torch.Generator().manual_seed(0))
    for size in ((32, 32), (20, 31), (31, 100), (100, 20), (32, 100), (200, 130)):
        expected = detector.localisation_map(anomaly_map[0].numpy(), size)
        # PyTorch's own coordinates are in float32.
        np.testing.assert_allclose(enlarge(anomaly_map, size, align_corners)[0].numpy(), expected, atol=1e-4)
