import copy
import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.special import softmax

from dskd_fast.data.exposure import measure_exposure
from dskd_fast.detection.calibration import (
    FEW_IMAGES,
    TOLERANCE,
    Exposure,
    Scoring,
    Statistics,
    Threshold,
    decide,
    exposure_from,
    is_above,
    threshold_from,
)
from dskd_fast.detection.detector import Detector
from dskd_fast.detection.scoring.parts import PARTS
from dskd_fast.errors import UserError


class Networks:
    """Stands in for DSKD: maps that are a known function of the pixels, here of values from 0 to 1."""

    mean = torch.zeros(1)
    students = ("local", "global")

    def __init__(self, local=lambda x: x[:, 0], global_=lambda x: x[:, 1].square()):
        self.local, self.global_, self.teacher = local, global_, self
        self.calls = []
        self.scale = 1.0

    def anomaly_maps(self, images, temperature, *, local_map, global_map, align_corners):
        self.calls.append((temperature, local_map, global_map, align_corners, torch.is_inference_mode_enabled()))
        return self.scale * self.local(images), self.scale * self.global_(images)


def make_detector(networks=None, **scoring):
    return Detector(networks or Networks(), Scoring(**{"temperature": 1.0, "sigma": 1.5} | scoring))


@pytest.fixture
def images(random_images):
    return torch.from_numpy(random_images(7, 24, 24))


def test_raw_maps_get_pixels_from_0_to_1_and_what_the_run_says(images):
    networks = Networks()
    local, global_ = make_detector(networks, temperature=0.5, align_corners=True).raw_maps(images)
    torch.testing.assert_close(local, images[:, 0].float() / 255)
    torch.testing.assert_close(global_, (images[:, 1].float() / 255).square())
    assert networks.calls == [(0.5, "cosine", "contextual-affinity", True, True)]


@pytest.mark.parametrize("branch", ["local", "global_"])
def test_maps_that_are_not_finite_are_an_error(images, branch):
    for value in (math.nan, math.inf, -math.inf):
        detector = make_detector(Networks(**{branch: lambda x, value=value: torch.where(x[:, 0] < 0.01, value, 0.5)}))
        with pytest.raises(UserError, match="NaN or infinite"):
            detector.calibrate([images], "validation")
        assert detector.calibration is None


@pytest.mark.parametrize(
    ("batch_size", "offset", "source"), [(1, 0.0, "validation"), (3, 0.0, "validation"), (2, 1e4, "train")]
)
def test_maps_are_normalised_by_mean_and_deviation_of_all_pixels_in_float64_and_added(
    images, batch_size, offset, source
):
    """A small deviation on a large mean, too."""
    detector = make_detector(Networks(local=lambda x: offset + x[:, 0]))
    detector.calibrate(images.split(batch_size), source)
    assert (detector.calibration.n_images, detector.calibration.source) == (7, source)
    assert (detector.calibration.threshold is None) == (source == "train")
    maps = detector.maps(images)
    raw = {"local": offset + images[:, 0].float() / 255, "global": (images[:, 1].float() / 255).square()}
    for name, values in ((name, values.double().numpy()) for name, values in raw.items()):
        assert detector.calibration.statistics[name].mean == pytest.approx(values.mean(), rel=1e-12)
        assert detector.calibration.statistics[name].std == pytest.approx(values.std(), rel=1e-9)
        assert maps.of(name).dtype == np.float32
        np.testing.assert_allclose(maps.of(name), (values - values.mean()) / values.std(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(maps.of("combined"), maps.local + maps.global_, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-12, -3.3, 1e9])
@pytest.mark.parametrize("wobble", [0, 1])
def test_constant_maps_are_not_divided_by_zero_or_by_rounding_noise(images, value, wobble):
    near = float(np.nextafter(np.float32(value), np.float32(wobble * np.inf))) if wobble and value else value
    detector = make_detector(Networks(local=lambda x: torch.where(x[:, 0] > 0.5, value, near)))
    detector.calibrate(images.split(3), "validation")
    assert detector.calibration.statistics["local"].mean == pytest.approx(value)
    assert detector.calibration.statistics["local"].std == 1
    np.testing.assert_allclose(detector.maps(images).local, 0, atol=abs(value) * 1e-6)


def test_the_threshold_comes_from_the_scores_of_the_validation_images(images):
    detector = make_detector()
    detector.calibrate(images.split(4), "validation")
    scores = detector.image_scores(detector.maps(images).combined)
    statistics = detector.calibration.statistics.values()
    rounding = 1e-5 * sum(abs(x.mean) / x.std for x in statistics)
    # Seven images are too few to tell 1 %: the largest score.
    expected = scores.max() + 2e-3 * (1 + scores.max()) + rounding
    assert detector.calibration.threshold.value == pytest.approx(expected, rel=1e-12)
    assert detector.calibration.threshold.n_images == 7
    assert detector.calibration.warnings == []


@pytest.mark.parametrize(
    ("networks", "kept", "warned"),
    [
        ({"local": lambda x: torch.full_like(x[:, 0], 0.1)}, range(7), ["maps of the local student are constant"]),
        ({"local": lambda x: 1 + 1e-5 * x[:, 0]}, range(7), ["maps of the local student are constant", "one score"]),
        ({}, [0] * 7, [r"rests on one score, [\d.]+, which all validation images have \(7"]),
        ({k: lambda x: 0 * x[:, 0] for k in ("local", "global_")}, range(7), ["local", "global", "one score, 0,"]),
    ],
    ids=["a constant map", "a nearly constant map", "copies of one image", "nothing varies"],
)
def test_what_does_not_vary_is_warned_of_and_its_rounding_is_below_the_threshold(images, networks, kept, warned):
    detector, images = make_detector(Networks(**networks)), images[list(kept)]
    detector.calibrate(images.split(3), "validation")
    for found, expected in zip(detector.calibration.warnings, warned, strict=True):
        assert re.search(expected, found)
    # What rounding makes of maps in another batch, or in an exported file.
    for scale in (1 - 2e-6, 1 + 2e-6):
        detector.model.scale = scale
        scores = detector.image_scores(detector.maps(images).combined)
        scores += TOLERANCE * (1 + np.abs(scores))
        assert not is_above(scores, detector.calibration.threshold.value).any()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        *((Statistics, values) for values in ((math.nan, 1), (math.inf, 1), (0, math.nan), (0, math.inf), (0, 0))),
        *((Threshold, (value, "", 1, 0.5)) for value in (math.nan, math.inf)),
        *((Exposure, (limits, (0, 1), "", 1)) for limits in ((-1, 5), (5, 4), (0, 256), (math.nan, 5), (5, math.inf))),
        (Exposure, ((0, 255), (0, 128), "", 1)),
    ],
)
def test_numbers_that_no_image_set_are_an_error(kind, values):
    with pytest.raises(UserError, match=r"cannot normalise|not a finite number|limits"):
        kind(*values)


@pytest.fixture(scope="module")
def calibrated(make_calibrated):
    return make_calibrated()


@pytest.fixture(scope="module")
def others(random_images):
    return torch.from_numpy(random_images(5, seed=2))


def test_calibrated_scores_are_found_with_their_parts_and_the_one_that_decides(calibrated, others):
    found = calibrated.find(others)
    assert tuple(found.parts) == calibrated.parts == tuple(PARTS)
    values = np.stack(list(found.parts.values()), 1)
    assert found.decided_by == [calibrated.parts[i] for i in values.argmax(1)]
    assert tuple(found.scores) == calibrated.variants == ("combined", "local", "global")
    assert (found.scores["combined"] >= values.max(1)).all()
    for student in ("local", "global"):
        np.testing.assert_array_equal(found.scores[student], found.parts[student])
    scores = calibrated.calibrated
    maps = {name: scores.shown(x) for name, x in scores(calibrated.measured(others)).maps.items()}
    raised = (scores.map_handicap - scores.handicap).numpy()
    shares = softmax(1.5 * (values + raised)[:, : len(maps)], axis=1)
    expected = sum(share[:, None, None] * maps[name].numpy() for share, name in zip(shares.T, PARTS, strict=False))
    np.testing.assert_allclose(found.maps.combined, expected, rtol=1e-4, atol=1e-4)
    assert found.maps.combined.dtype == np.float32


@pytest.mark.parametrize(
    ("used", "shown"), [(("global", "teacher-means"), "global"), (("local",), "local"), (("condensed",), None)], ids=str
)
def test_the_map_is_of_the_parts_that_decide_if_they_have_one(calibrated, others, used, shown):
    detector = dataclasses.replace(calibrated, calibrated=copy.deepcopy(calibrated.calibrated))
    detector.calibrated.use(used)
    maps, expected = detector.find(others).maps, calibrated.find(others).maps
    np.testing.assert_array_equal(maps.combined, expected.combined if shown is None else expected.of(shown))
    np.testing.assert_array_equal(maps.local, expected.local)
    np.testing.assert_array_equal(maps.global_, expected.global_)


@pytest.mark.parametrize("student", ["local", "global"])
def test_with_one_student_alone_there_is_no_map_of_the_other_nor_of_both(make_calibrated, others, student):
    detector = make_calibrated(students=student)
    detector.calibrated.use([student])
    (found,) = detector.predict(others[:1])
    assert tuple(found.parts) == detector.parts
    assert detector.variants == ("combined", student)
    assert (found.local_map is None, found.global_map is None) == (student == "global", student == "local")
    np.testing.assert_array_equal(found.map, getattr(found, f"{student}_map"))


def test_calibrated_scores_set_a_threshold_and_few_images_are_warned_of(calibrated, make_calibrated):
    threshold = calibrated.calibration.threshold
    assert "left out" in threshold.rule
    assert threshold.n_images == 6
    (warning,) = calibrated.calibration.warnings
    assert warning.startswith("only 6 validation images set the threshold: expect 14% ")
    assert make_calibrated(n=FEW_IMAGES).calibration.warnings == []
    by_training = make_calibrated(source="train").calibration
    assert (by_training.threshold, by_training.warnings) == (None, [])


def test_the_threshold_is_the_kth_largest_score():
    for n, k in ((1, 1), (2, 1), (8, 1), (98, 1), (99, 1), (198, 1), (199, 2), (299, 3), (999, 10)):
        threshold = threshold_from(np.random.default_rng(n).permutation(n) + 1.0)
        assert threshold.value == pytest.approx((n - k + 1) + 2e-3 * (n - k + 2), rel=1e-15)
        assert threshold.n_images == n
        assert threshold.expected_false_alarm_rate == pytest.approx(k / (n + 1), rel=1e-15)


@pytest.mark.parametrize("n_above", [0, 2])
@pytest.mark.parametrize("score", [-4.0, 0.0, 1e4])
def test_equal_scores_raise_no_alarm_whatever_their_rank(score, n_above):
    """Of 300 scores the third largest sets the threshold: one of the ties."""
    ties = score + np.random.default_rng(0).uniform(-1e-5, 1e-5, 300 - n_above) * (1 + abs(score))
    threshold = threshold_from(iter([*ties, *[score + 100] * n_above]))
    exported = ties + TOLERANCE * (1 + np.abs(ties))
    assert not is_above(exported, threshold.value).any()
    assert is_above(score + 200, threshold.value)


def test_of_images_that_were_left_out_the_threshold_lies_higher_by_what_more_like_them_would_raise_it():
    scores = np.random.default_rng(0).exponential(size=40)
    plain, raised = threshold_from(scores), threshold_from(scores, are_left_out=True)
    step = (scores.max() - np.median(scores)) * math.log(math.sqrt(2)) / math.log(41)
    assert raised.value - plain.value == pytest.approx(step, rel=1e-9)
    assert raised.rule != plain.rule
    assert threshold_from([1.0] * 5, are_left_out=True).value == threshold_from([1.0] * 5).value


def test_a_tie_is_normal_and_the_threshold_is_not_rounded():
    threshold = 1.0 + 2**-30  # 1 in float32
    pair = np.array([threshold, np.nextafter(threshold, 2)])
    for scores, one in ((pair, np.float32(1)), (torch.from_numpy(pair), torch.ones(()))):
        assert is_above(scores, threshold).tolist() == [False, True]
        assert not is_above(one, threshold)
        assert is_above(one, 1.0 - 2**-30)
    for score, decision in zip(pair.tolist(), ("normal", "anomalous"), strict=True):
        assert decide(score, threshold) == decision
        assert decide(score, None) is None
        assert decide(score, threshold, "too dark") == decide(score, None, "too dark") == "suspect"


def test_brightness_and_contrast_are_mean_and_deviation_of_the_luminance(images):
    brightness, contrast = measure_exposure(images)
    luminance = np.tensordot(images.numpy(), [0.299, 0.587, 0.114], axes=(1, 0))
    np.testing.assert_allclose(brightness, luminance.mean(axis=(1, 2)), rtol=1e-12)
    np.testing.assert_allclose(contrast, luminance.std(axis=(1, 2)), rtol=1e-12)
    halves = torch.zeros((1, 3, 8, 8), dtype=torch.uint8)
    halves[..., :4] = 255
    white = torch.full_like(halves, 255)
    assert [x.tolist() for x in measure_exposure(torch.cat([halves, white]))] == [[127.5, 255.0], [127.5, 0.0]]


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ([100.0], (50, 177.5)),
        ([0.0, 255.0], (0, 255)),  # neither of two is the odd one
        ([100.0, 120.0, 0.0], (50, 187.5)),
        ([100.0, 120.0, 255.0, 0.0], (50, 187.5)),
        ([100.0, 120.0, 49.0], (50, 187.5)),
        ([100.0, 120.0, 60.0], (30, 187.5)),
        ([100.0] * 6 + [0.0] * 2, (0, 177.5)),  # a minority that is no accident
        ([100.0] * 297 + [0.0] * 3, (50, 177.5)),
        ([100.0] * 296 + [0.0] * 4, (0, 177.5)),
    ],
)
def test_limits_lie_half_way_from_the_extreme_normal_image_to_the_end_of_the_scale(values, limits):
    exposure = exposure_from(torch.tensor(values), torch.tensor(values) / 2)
    assert (exposure.brightness, exposure.contrast) == (limits, (limits[0] / 2, limits[1] / 2))
    assert exposure.n_images == len(values)


def test_all_normal_images_count_for_brightness_and_contrast_and_one_dead_frame_among_them_is_told(images):
    detector = make_detector()
    alone = images // 2 + 64
    detector.calibrate([alone], "validation")
    narrow = detector.calibration.exposure
    assert (narrow, detector.calibration.warnings) == (exposure_from(*measure_exposure(alone)), [])
    darker, dead = alone // 2, torch.zeros_like(images[:1])
    exposures = measure_exposure(torch.cat([alone, darker, dead]))
    detector.calibrate([alone], "validation", exposures)
    assert detector.calibration.exposure == exposure_from(*exposures) != narrow
    assert detector.calibration.n_images == 7
    (warning,) = detector.calibration.warnings
    assert warning.startswith("1 of 15 normal images is suspect")
    assert [reason is None for reason in detector.suspicions(*exposures)] == [True] * 14 + [False]


@pytest.mark.parametrize("sigma", [0.5, 1.5, 4.0])
def test_the_score_is_the_maximum_of_the_gaussian_filtered_map(sigma):
    maps = np.random.default_rng(0).normal(size=(3, 20, 20)).astype(np.float32)
    before = maps.copy()
    scores = make_detector(sigma=sigma).image_scores(maps)
    assert scores.dtype == np.float64
    expected = [ndimage.gaussian_filter(m.astype(np.float64), sigma).max() for m in maps]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    np.testing.assert_array_equal(maps, before)


@pytest.mark.parametrize("align_corners", [False, True])
def test_enlarging_is_bilinear_between_pixel_centres_or_corners(bilinear, align_corners):
    anomaly_map = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    rows, columns = (bilinear(8, n, align_corners) for n in (20, 24))
    expected = rows @ anomaly_map.astype(np.float64) @ columns.T
    resized = make_detector(align_corners=align_corners).localisation_map(anomaly_map, (20, 24))
    np.testing.assert_allclose(resized, expected, atol=1e-5 if align_corners else 1e-6)


def test_the_map_is_filtered_only_if_the_run_says_so():
    anomaly_map = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    before = anomaly_map.copy()
    np.testing.assert_allclose(make_detector().localisation_map(anomaly_map, (16, 16)), anomaly_map, atol=1e-6)
    filtered = make_detector(filter_maps=True).localisation_map(anomaly_map, (16, 16))
    np.testing.assert_allclose(filtered, ndimage.gaussian_filter(anomaly_map.astype(np.float64), 1.5), atol=1e-5)
    np.testing.assert_array_equal(anomaly_map, before)
