import itertools

import numpy as np
import pytest
from scipy.integrate import trapezoid

from dskd_fast.errors import UserError
from dskd_fast.metrics.auroc import auroc, roc_curve


@pytest.mark.parametrize("seed", range(8))
def test_counts_pairs_and_half_of_the_ties_as_the_area_under_the_curve_does(seed):
    rng = np.random.default_rng(seed)
    good = rng.integers(0, 5, rng.integers(1, 20)).astype(rng.choice([np.float32, np.float64]))
    anomalous = rng.integers(1, 7, rng.integers(1, 20)).astype(float)
    pairs = [(a > g) + 0.5 * (a == g) for g, a in itertools.product(good, anomalous)]
    area = auroc(good, anomalous)
    assert type(area) is float
    assert area == pytest.approx(np.mean(pairs), abs=1e-12)
    false_positives, true_positives = roc_curve(good, anomalous)
    assert trapezoid(true_positives, false_positives) == pytest.approx(area, abs=1e-12)
    assert (false_positives[0], true_positives[0], false_positives[-1], true_positives[-1]) == (0, 0, 1, 1)


@pytest.mark.parametrize(("low", "high"), [(1.0, np.nextafter(1.0, 2.0)), (0.0, 5e-324), (-1e307, 1e307), (-2.0, -1.0)])
def test_tells_any_two_different_scores_apart(low, high):
    assert auroc([low, low], [high]) == 1.0
    assert auroc([high], [low, low]) == 0.0
    assert auroc([low, low], [low]) == 0.5


@pytest.mark.parametrize("function", [auroc, roc_curve])
def test_what_cannot_be_ranked(function):
    assert function([], [1.0]) is function([1.0], []) is function([], []) is None
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(UserError, match=rf"anomalous_scores\[1\] is {bad}: 1 of 3"):
            function([0.0], [1.0, bad, 2.0])
        with pytest.raises(UserError, match=r"good_scores\[0\]"):
            function([bad], [])
    with pytest.raises(ValueError, match=r"good_scores must have one dimension.*\(2, 2\)"):
        function(np.zeros((2, 2)), [1.0])
