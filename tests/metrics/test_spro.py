import itertools
import tracemalloc

import numpy as np
import pytest
from scipy.integrate import trapezoid

from dskd_fast.data.ground_truth import Defect
from dskd_fast.errors import UserError
from dskd_fast.metrics import spro as spro_module
from dskd_fast.metrics.spro import FPR_LIMITS, SPRO

NOTHING = dict.fromkeys(FPR_LIMITS)


def defect(mask, saturation=None):
    mask = np.asarray(mask, dtype=bool)
    return Defect(mask, mask.sum() if saturation is None else saturation, "a defect")


def collect(images):
    spro = SPRO()
    for anomaly_map, defects, kind in images:
        spro.add(anomaly_map, defects, kind)
    return spro


def spro_of(images, limits=FPR_LIMITS):
    return collect(images).compute(limits)


def one_defect(scores, mask, saturation=None, limits=FPR_LIMITS):
    return spro_of([(scores, [defect(mask, saturation)], "structural")], limits)["structural"]


def brute_force(images, kind, limit):
    """The definition, threshold by threshold: a polyline through the (FPR, sPRO) of every distinct score."""
    images = [(np.asarray(m, np.float64), d) for m, d, k in images if k in ("good", kind)]
    thresholds = np.unique(np.concatenate([m.ravel() for m, _ in images]))[::-1]
    points = []
    for threshold in [*thresholds, -np.inf]:
        overlaps, are_false = [], []
        for anomaly_map, defects in images:
            positive = anomaly_map > threshold
            overlaps += [min(np.sum(item.mask & positive) / item.saturation, 1) for item in defects]
            are_false += [positive[~np.any([np.zeros(positive.shape), *(item.mask for item in defects)], axis=0)]]
        points.append((np.mean(np.concatenate(are_false)), np.mean(overlaps)))
    rates, heights = np.transpose(points)
    inner = rates < limit
    end = np.flatnonzero(~inner)[0]  # of the segment that crosses the limit
    height = np.interp(limit, rates[end - 1 : end + 1], heights[end - 1 : end + 1])
    return trapezoid([*heights[inner], height], [*rates[inner], limit]) / limit


def random_images(rng, ties=False):
    """Good, structural and logical images of different sizes, with up to three overlapping defects each."""
    images = []
    for kind in ("good", "structural", "logical") * 2:
        shape = tuple(rng.integers(3, 9, 2))
        defects = []
        for _ in range(0 if kind == "good" else rng.integers(1, 4)):
            mask = rng.random(shape) < rng.choice([0.05, 0.3, 0.6])
            mask[tuple(rng.integers(0, shape))] = True
            defects.append(defect(mask, rng.choice([0.4, 1, 2.5, 0.37 * mask.sum(), mask.sum(), mask.sum() + 3.2])))
        scores = rng.integers(0, 10, shape) if ties else rng.standard_normal(shape)
        images.append((scores + sum(item.mask for item in defects), defects, kind))
    return images


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_areas_and_curves_are_those_of_the_definition(seed, ties, monkeypatch):
    monkeypatch.setattr(spro_module, "_LOOKED_UP", 5)
    rng = np.random.default_rng(seed)
    images = random_images(rng, ties)
    limits = (*FPR_LIMITS, rng.uniform(0.01, 1))
    spro = collect(images)
    before = spro.curve("logical", 0.3)
    result = spro.compute(limits)
    np.testing.assert_array_equal(spro.curve("logical", 0.3), before)
    for kind, limit in itertools.product(("structural", "logical"), limits):
        expected = pytest.approx(brute_force(images, kind, limit), abs=1e-12)
        assert result[kind][limit] == expected
        fpr, height = spro.curve(kind, limit)
        assert fpr.dtype == height.dtype == np.float64
        assert (fpr[0], height[0], fpr[-1]) == (0, 0, limit)
        assert min(np.diff(fpr).min(), np.diff(height).min()) >= 0
        assert height[-1] <= 1
        assert trapezoid(height, fpr) / limit == expected
    for limit in limits:
        both = result["structural"][limit] + result["logical"][limit]
        assert result["mean"][limit] == pytest.approx(both / 2, abs=1e-15)


@pytest.mark.parametrize("saturation", [1, 7 / 3, 90, 99.9])
def test_perfect_map_is_exactly_one_and_inverted_zero(saturation):
    mask = np.zeros((30, 30), bool)
    mask[:10, :10] = True
    scores = np.random.default_rng(0).random((30, 30))
    perfect = one_defect(scores + mask, mask, saturation)
    assert perfect == pytest.approx(dict.fromkeys(FPR_LIMITS, 1.0))
    assert max(perfect.values()) <= 1.0
    assert one_defect(scores - mask, mask, saturation) == dict.fromkeys(FPR_LIMITS, 0.0)


def test_the_type_of_the_maps_changes_nothing_and_neither_does_what_becomes_of_them():
    images = random_images(np.random.default_rng(6), ties=True)
    expected = spro_of(images)
    for dtype in (np.float16, np.float32, np.float64, np.uint8, np.int16, np.int32, np.int64):
        assert spro_of([(scores.astype(dtype), *rest) for scores, *rest in images]) == expected
    # Adding changes no array, and computing in between no figure.
    spro = SPRO()
    for scores, defects, kind in images:
        buffer, masks = scores.astype(np.float32), [item.mask.copy() for item in defects]  # kept as they are
        spro.add(buffer, defects, kind)
        assert np.array_equal(buffer, scores)
        assert all(np.array_equal(item.mask, mask) for item, mask in zip(defects, masks, strict=True))
        buffer[:] = 0
        spro.compute()
    assert spro.compute() == spro.compute() == expected


def test_a_missed_defect_takes_memory_for_one_sorted_copy_of_the_scores(monkeypatch):
    monkeypatch.setattr(spro_module, "n_threads", lambda: 2)
    rng, spro = np.random.default_rng(0), SPRO()
    mask = np.zeros((200, 200), bool)
    mask[:9, :9] = True
    maps = [rng.normal(size=mask.shape).astype(np.float32) for _ in range(40)]
    maps[0][mask] = -9  # nothing is below that
    spro.add(maps[0], [defect(mask)], "structural")
    for scores in maps[1:]:
        spro.add(scores, None, "good")
    tracemalloc.start()
    areas = spro.compute()["structural"]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert areas[1.0] == 0.0
    assert most < 1.3 * sum(scores.nbytes for scores in maps)


def test_scores_that_float32_cannot_tell_apart_are_not_ties():
    mask = [[True, False, False]]
    close = np.array([[1 + 1e-12, 1.0, 1.0]])
    assert np.all(close.astype(np.float32) == 1)
    assert one_defect(close, mask, limits=[0.5])[0.5] == 1.0
    # Nor are they when a float32 map lies beside.
    images = [(close, [defect(mask)], "logical"), (np.ones((2, 2), np.float32), [], "good")]
    assert spro_of(images, [0.5])["logical"][0.5] == 1.0
    swapped = [(np.ones((1, 3), np.float32), [defect(mask)], "logical"), (close + 1e-12, [], "good")]
    assert spro_of(swapped, [1.0])["logical"][1.0] == pytest.approx(2 / 5 * 0.5)


def test_where_there_is_nothing_to_compute_from_there_is_neither_area_nor_curve():
    ones, whole = np.ones((2, 2)), defect(np.ones((2, 2)))
    good, structural = (np.zeros((2, 2)), None, "good"), (ones, [defect(np.eye(2))], "structural")
    for images in (
        [],
        [good],
        [(ones, [whole], "logical")],  # no pixel can be a false positive
        *([good, (ones, [whole], "logical"), (ones, unmarked, "logical")] for unmarked in (None, [])),
    ):
        spro = collect([*images, structural])
        areas = spro.compute()
        assert (areas["logical"], areas["mean"], spro.curve("logical")) == (NOTHING, NOTHING, None)
        assert None not in areas["structural"].values()
    assert spro_of([(ones, [whole], "logical"), good])["logical"] == dict.fromkeys(FPR_LIMITS, 1.0)


ZEROS = np.zeros((2, 3))
MASK = defect(np.ones((2, 3)))


@pytest.mark.parametrize(
    ("scores", "defects", "kind", "error", "message"),
    [
        (ZEROS + np.nan, [], "good", UserError, "x has 6 NaN or infinite"),
        (ZEROS[None], [], "good", UserError, r"x has the shape \(1, 2, 3\)"),
        (ZEROS * 1j, [], "good", UserError, "x has values of type complex128"),
        (ZEROS.T, [MASK], "logical", UserError, "mask of defect 1 of x is 3 x 2 pixels, but .* 2 x 3"),
        (ZEROS, [MASK, defect(ZEROS, 1)], "logical", UserError, "mask of defect 2 of x marks no pixel"),
        (ZEROS, [Defect(np.ones((2, 3), np.uint8), 1, "")], "logical", TypeError, "must be bool, not uint8"),
        *(
            (ZEROS, [defect(MASK.mask, saturation)], "logical", UserError, "saturation of defect 1 of x")
            for saturation in (0, -1, np.nan, np.inf)
        ),
        (ZEROS, [MASK], "bad", ValueError, "kind must be one of good, structural, logical, not 'bad'"),
        (ZEROS, [MASK], "good", ValueError, "good image has no defects"),
    ],
)
def test_bad_maps_and_defects_are_named_and_nothing_of_their_image_is_taken(scores, defects, kind, error, message):
    spro = SPRO()
    with pytest.raises(error, match=message):
        spro.add(scores, defects, kind, name="x")
    assert spro.compute() == {"structural": NOTHING, "logical": NOTHING, "mean": NOTHING}


@pytest.mark.parametrize("limit", [0, -0.1, 1.01, np.nan])
def test_bad_limits(limit):
    with pytest.raises(ValueError, match="limits must be > 0 and <= 1"):
        SPRO().compute([0.5, limit])
    with pytest.raises(ValueError, match="the limit must be > 0 and <= 1"):
        SPRO().curve("logical", limit)
