"""New calibrations of a detector: what the images are compared with, and what they decide."""

import copy

import numpy as np
import pytest
from PIL import Image

from dskd_fast.data.layout import open_category
from dskd_fast.data.store import ImageStore
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
    recalibrated, paths, data_root, n_first
):
    test = ImageStore([item.path for item in open_category(data_root, "screw_bag").test], 64).batch(range(10))
    once, twice = recalibrated(paths), recalibrated(paths[:n_first], paths)
    assert twice.calibration.threshold.value == pytest.approx(once.calibration.threshold.value, rel=1e-4)
    for name, values in once.find(test).parts.items():
        np.testing.assert_allclose(twice.find(test).parts[name], values, rtol=1e-3, atol=1e-3)


def test_the_threshold_is_that_of_images_each_scored_by_the_others(recalibrated, paths):
    detector = recalibrated(paths)
    scores = detector.calibrated.scores_of(detector.calibrated.left_out)
    threshold = detector.calibration.threshold.value
    expected = threshold_from(scores, detector.calibrated.rounding(), are_left_out=True)
    assert threshold == pytest.approx(expected.value)
    # Each is compared with itself as well by now.
    found = detector.find(ImageStore(paths, 64).batch(range(6)))
    assert (found.scores["combined"] < scores + 1e-3).all()


def test_what_makes_a_new_calibration_doubtful_asks_for_another_and_not_for_a_training(recalibrated, paths, tmp_path):
    Image.fromarray(np.zeros((64, 80, 3), np.uint8)).save(tmp_path / "black.png")
    doubts = recalibrated([*paths, tmp_path / "black.png"]).calibration.warnings + (
        recalibrated(paths[:1]).calibration.warnings
    )
    assert any(text.endswith("take out what does not belong there, and recalibrate") for text in doubts)
    assert any(text.endswith("recalibrate with more good images, and different ones") for text in doubts)
    assert not any("train again" in text or "validation/good" in text for text in doubts)


def test_bad_images_are_scored_and_nothing_is_learned_from_them(recalibrated, paths, data_root):
    bad = [item.path for item in open_category(data_root, "screw_bag").test if item.kind != "good"]
    detector = recalibrated(paths)
    calibration, state = detector.calibration, copy.deepcopy(detector.calibrated.state_dict())
    caught = score_bad(detector, bad, batch_size=4)
    found = detector.find(ImageStore(bad, 64).batch(range(6)))
    np.testing.assert_allclose(caught.parts["score"], found.scores["combined"], rtol=1e-4, atol=1e-4)
    for name, values in found.parts.items():
        np.testing.assert_allclose(caught.parts[name], values, rtol=1e-4, atol=1e-4)
    assert caught.decided_by == found.decided_by
    assert detector.calibration is calibration
    assert all((tensor == state[name]).all() for name, tensor in detector.calibrated.state_dict().items())
