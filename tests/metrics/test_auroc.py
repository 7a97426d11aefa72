import itertools

import numpy as np
import pytest
from scipy.integrate import trapezoid

from dskd_fast.errors import UserError
from dskd_fast.metrics.auroc import auroc, roc_curve


def mann_whitney(good, anomalous):
    pairs = [(a > g) + 0.5 * (a == g) for g, a in itertools.product(good, anomalous)]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(20))
def test_counts_pairs_and_half_of_the_ties(seed):
    rng = np.random.default_rng(seed)
    good = rng.integers(0, 5, rng.integers(1, 20)).astype(float)
    anomalous = rng.integers(1, 7, rng.integers(1, 20)).astype(float)
    assert auroc(good, anomalous) == pytest.approx(mann_whitney(good, anomalous), abs=1e-12)


def test_all_scores_tied_is_one_half():
    assert auroc([2.0] * 5, [2.0] * 3) == 0.5


def test_perfect_and_inverted():
    assert auroc([1, 2, 3], [4, 5]) == 1.0
    assert auroc([4, 5], [1, 2, 3]) == 0.0


@pytest.mark.parametrize(("low", "high"), [(1.0, np.nextafter(1.0, 2.0)), (0.0, 5e-324), (-1e307, 1e307), (-2.0, -1.0)])
def test_tells_any_two_different_scores_apart(low, high):
    assert auroc([low, low], [high]) == 1.0
    assert auroc([high], [low, low]) == 0.0


def test_float32_scores_and_python_result():
    value = auroc(np.array([0.1, 0.4], np.float32), np.array([0.3], np.float32))
    assert value == 0.5
    assert type(value) is float


def test_no_images_of_a_kind_is_none():
    assert auroc([], [1.0]) is None
    assert auroc([1.0], []) is None
    assert auroc([], []) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_named(bad):
    with pytest.raises(UserError, match=rf"anomalous_scores\[1\] is {bad}: 1 of 3"):
        auroc([0.0], [1.0, bad, 2.0])
    with pytest.raises(UserError, match=r"good_scores\[0\]"):
        auroc([bad], [])


def test_shape_is_checked():
    with pytest.raises(ValueError, match=r"good_scores must have one dimension.*\(2, 2\)"):
        auroc(np.zeros((2, 2)), [1.0])


@pytest.mark.parametrize("seed", range(10))
def test_the_area_under_the_roc_curve_is_the_auroc(seed):
    rng = np.random.default_rng(seed)
    good, anomalous = rng.integers(0, 9, 30), rng.integers(2, 12, 20)
    false_positives, true_positives = roc_curve(good, anomalous)
    assert trapezoid(true_positives, false_positives) == pytest.approx(auroc(good, anomalous), abs=1e-12)
    assert (false_positives[0], true_positives[0], false_positives[-1], true_positives[-1]) == (0, 0, 1, 1)


def test_the_roc_curve_rises_with_each_anomalous_score_and_slopes_over_ties():
    false_positives, true_positives = roc_curve([1.0, 2.0], [2.0, 3.0])
    assert (false_positives.tolist(), true_positives.tolist()) == ([0, 0, 0.5, 1], [0, 0.5, 1, 1])


def test_a_kind_without_images_has_no_roc_curve_and_bad_scores_are_named():
    assert roc_curve([], [1.0]) is None
    assert roc_curve([1.0], []) is None
    with pytest.raises(UserError, match=r"good_scores\[0\]"):
        roc_curve([np.nan], [1.0])
