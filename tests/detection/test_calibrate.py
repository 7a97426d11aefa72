"""New calibrations of a detector: what the images are compared with, and what they decide."""

import copy

import numpy as np
import pytest
from PIL import Image

from dskd_fast.detection.calibrate import recalibrate, score_bad
from dskd_fast.detection.calibration import threshold_from


@pytest.fixture
def paths(write_images, tmp_path):
    return write_images(tmp_path, 6)


@pytest.fixture
def recalibrated(tiny_detector):
    """A detector that was calibrated on some images, then on others."""

    def calibrate(*batches):
        detector = copy.deepcopy(tiny_detector)
        for paths in batches:
            recalibrate(detector, paths, batch_size=4)
        return detector

    return calibrate


@pytest.mark.parametrize("n_first", [3, 6])
def test_images_that_a_detector_was_calibrated_on_before_are_not_their_own_neighbours(
    recalibrated, paths, category, n_first
):
    test = [item.path for item in category.test]
    once, twice = recalibrated(paths), recalibrated(paths[:n_first], paths)
    assert twice.calibration.threshold.value == pytest.approx(once.calibration.threshold.value, rel=1e-4)
    for found, expected in zip(twice.predict(test), once.predict(test), strict=True):
        assert found.parts == pytest.approx(expected.parts, rel=1e-3, abs=1e-3)


def test_the_threshold_is_that_of_images_each_scored_by_the_others(recalibrated, paths):
    detector = recalibrated(paths)
    scores = detector.calibrated.scores_of(detector.calibrated.left_out)
    expected = threshold_from(scores, detector.calibrated.rounding(), are_left_out=True)
    assert detector.calibration.threshold.value == pytest.approx(expected.value)
    # Each is compared with itself as well by now.
    assert all(found.score < score + 1e-3 for found, score in zip(detector.predict(paths), scores, strict=True))


def test_what_makes_a_new_calibration_doubtful_asks_for_another_and_not_for_a_training(recalibrated, paths, tmp_path):
    Image.fromarray(np.zeros((64, 80, 3), np.uint8)).save(tmp_path / "black.png")
    doubts = recalibrated([*paths, tmp_path / "black.png"]).calibration.warnings + (
        recalibrated(paths[:1]).calibration.warnings
    )
    assert any(text.endswith("take out what does not belong there, and recalibrate") for text in doubts)
    assert any(text.endswith("recalibrate with more good images, and different ones") for text in doubts)
    assert not any("train again" in text or "validation/good" in text for text in doubts)


def test_bad_images_are_scored_and_nothing_is_learned_from_them(recalibrated, paths, category):
    bad = [item.path for item in category.test if item.kind != "good"]
    detector = recalibrated(paths)
    calibration, state = detector.calibration, copy.deepcopy(detector.calibrated.state_dict())
    caught = score_bad(detector, bad, batch_size=4)
    for i, found in enumerate(detector.predict(bad, batch_size=4)):
        expected = pytest.approx({"score": found.score} | found.parts, rel=1e-4, abs=1e-4)
        assert {name: values[i] for name, values in caught.parts.items()} == expected
        assert caught.decided_by[i] == found.decided_by
    assert detector.calibration is calibration
    assert all((tensor == state[name]).all() for name, tensor in detector.calibrated.state_dict().items())
