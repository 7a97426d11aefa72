import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.integrate import trapezoid
from sklearn.metrics import roc_auc_score

from dskd_fast.errors import UserError
from dskd_fast.metrics.spro import FPR_LIMITS, SPRO


def defect(mask, saturation=None):
    mask = np.asarray(mask, dtype=bool)
    return SimpleNamespace(mask=mask, saturation=mask.sum() if saturation is None else saturation)


def spro_of(images, limits=FPR_LIMITS):
    accumulator = SPRO()
    for anomaly_map, defects, kind in images:
        accumulator.add(anomaly_map, defects, kind)
    return accumulator.compute(limits)


def one_defect(scores, mask, saturation=None, limits=FPR_LIMITS):
    return spro_of([(np.array(scores), [defect(mask, saturation)], "structural")], limits)["structural"]


def brute_force(images, kind, limit):
    """The definition, threshold by threshold: a polyline through the (FPR, sPRO) of every distinct score."""
    images = [(np.asarray(m, np.float64), d) for m, d, k in images if k in ("good", kind)]
    thresholds = np.unique(np.concatenate([m.ravel() for m, _ in images]))[::-1]
    points = []
    for threshold in [*thresholds, -np.inf]:
        overlaps, false_positives, negatives = [], 0, 0
        for anomaly_map, defects in images:
            positive = anomaly_map > threshold
            union = np.zeros(positive.shape, bool)
            for item in defects:
                overlaps.append(min(np.sum(item.mask & positive) / item.saturation, 1))
                union |= item.mask
            false_positives += np.sum(positive & ~union)
            negatives += np.sum(~union)
        points.append((false_positives / negatives, np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 < limit < x1:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def random_images(rng, draw):
    """Good, structural and logical images of different sizes, with up to three overlapping defects each."""
    images = []
    for kind in ("good", "structural", "logical") * 2:
        shape = tuple(rng.integers(3, 9, 2))
        defects = []
        for _ in range(0 if kind == "good" else rng.integers(1, 4)):
            mask = rng.random(shape) < rng.choice([0.05, 0.3, 0.6])
            mask[tuple(rng.integers(0, shape))] = True
            saturation = rng.choice([0.4, 1, 2.5, 0.37 * mask.sum(), mask.sum(), mask.sum() + 3.2])
            defects.append(defect(mask, saturation))
        anomaly_map = draw(shape) + sum(0.5 * item.mask for item in defects)
        images.append((anomaly_map, defects, kind))
    return images


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_definition_with_many_ties(seed):
    rng = np.random.default_rng(seed)
    images = random_images(rng, lambda shape: rng.integers(0, 5, shape).astype(float))
    limits = (*FPR_LIMITS, 0.5, rng.uniform(0.01, 1))
    result = spro_of(images, limits)
    for kind in ("structural", "logical"):
        expected = {limit: brute_force(images, kind, limit) for limit in limits}
        assert result[kind] == pytest.approx(expected, abs=1e-12)
    for limit in limits:
        both = result["structural"][limit] + result["logical"][limit]
        assert result["mean"][limit] == pytest.approx(both / 2, abs=1e-15)


@pytest.mark.parametrize("seed", range(10))
def test_equals_the_definition_without_ties(seed):
    rng = np.random.default_rng(100 + seed)
    images = random_images(rng, lambda shape: rng.standard_normal(shape))
    result = spro_of(images)
    for kind in ("structural", "logical"):
        expected = {limit: brute_force(images, kind, limit) for limit in FPR_LIMITS}
        assert result[kind] == pytest.approx(expected, abs=1e-12)


def test_equals_the_definition_on_larger_maps():
    rng = np.random.default_rng(7)
    mask = np.zeros((60, 80), bool)
    mask[10:40, 20:50] = True
    other = np.roll(mask, 15, axis=1)
    images = [
        (np.round(rng.standard_normal(mask.shape), 1), [], "good"),
        (np.round(rng.standard_normal(mask.shape) + mask, 1), [defect(mask, 200), defect(other)], "logical"),
    ]
    expected = {limit: brute_force(images, "logical", limit) for limit in FPR_LIMITS}
    assert spro_of(images)["logical"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("saturation", "reached"), [(4, 1.0), (2.5, 1.0), (0.3, 1.0), (8, 0.5)])
def test_constant_map_is_a_straight_line(saturation, reached):
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:3] = True
    areas = one_defect(np.full((4, 5), 3.0), mask, saturation)
    assert areas == pytest.approx({limit: reached * limit / 2 for limit in FPR_LIMITS}, abs=1e-15)


@pytest.mark.parametrize("saturation", [1, 7 / 3, 90, 99.9])
def test_perfect_map_is_exactly_one_and_inverted_zero(saturation):
    mask = np.zeros((30, 30), bool)
    mask[:10, :10] = True
    scores = np.random.default_rng(0).random((30, 30))
    assert one_defect(scores + mask, mask, saturation) == pytest.approx(dict.fromkeys(FPR_LIMITS, 1.0))
    assert max(one_defect(scores + mask, mask, saturation).values()) <= 1.0
    assert one_defect(scores - mask, mask, saturation) == dict.fromkeys(FPR_LIMITS, 0.0)


def test_saturation_above_the_area_is_never_reached():
    mask = [[True, True, False, False]]
    assert one_defect([[9.0, 8.0, 1.0, 0.0]], mask, saturation=5, limits=[0.5])[0.5] == pytest.approx(2 / 5)


@pytest.mark.parametrize("above", range(11))
def test_single_pixel_defect_counts_the_negatives_above_it(above):
    scores = np.array([[above - 0.5, *range(10)]])[:, ::-1]
    mask = np.zeros((1, 11), bool)
    mask[0, -1] = True
    areas = one_defect(-scores, mask)
    for limit, area in areas.items():
        assert area == pytest.approx(max(limit - above / 10, 0) / limit, abs=1e-12)


def test_fractional_saturation_gives_the_last_pixel_the_rest():
    # Of ten negatives 0, 2 and 5 lie above the three pixels, which are worth 0.4, 0.4 and 0.2 at s = 2.5.
    negatives = np.arange(10.0, 0.0, -1.0)
    scores = np.array([[11.0, 8.5, 5.5, 0.0, *negatives]])
    mask = np.arange(14)[None] < 4
    area = 0.4 * 1.0 + 0.4 * 0.8 + 0.2 * 0.5
    assert one_defect(scores, mask, 2.5, [1.0])[1.0] == pytest.approx(area)
    # Up to 0.3 the third pixel has not come yet, and the second has been there for a third of the way.
    assert one_defect(scores, mask, 2.5, [0.3])[0.3] == pytest.approx(0.4 + 0.4 / 3)


def test_pixels_after_saturation_do_not_matter():
    rng = np.random.default_rng(3)
    scores = rng.random((6, 7))
    mask = rng.random((6, 7)) < 0.5
    saturated_at = np.sort(scores[mask])[::-1][2]
    changed = np.where(mask & (scores < saturated_at), -5.0, scores)
    assert one_defect(scores, mask, 3) == one_defect(changed, mask, 3)


def test_limit_inside_a_tie_is_interpolated():
    # Half of the four negatives tie with the defect's only pixel: the curve goes from (0, 0) to (0.5, 1).
    areas = one_defect([[5.0, 5.0, 5.0, 1.0, 1.0]], [[True, False, False, False, False]], limits=[0.25, 0.5])
    assert areas[0.25] == pytest.approx(0.25 * 0.5 / 2 / 0.25)
    assert areas[0.5] == pytest.approx(0.5)


@pytest.mark.parametrize("decimals", [1, 8])
def test_unsaturated_single_defect_up_to_one_is_the_pixel_auroc(decimals):
    rng = np.random.default_rng(11)
    mask = rng.random((20, 20)) < 0.2
    scores = np.round(rng.standard_normal((20, 20)) + mask, decimals)
    expected = roc_auc_score(mask.ravel(), scores.ravel())
    assert one_defect(scores, mask)[1.0] == pytest.approx(expected, abs=1e-12)


def test_all_defects_weigh_the_same_whatever_their_image_and_size():
    found = ([[1.0, 0.0, 0.0, 0.0]], [[True, False, False, False]])
    lost = ([[0.0, 0.0, 0.0, 1.0]], [[True, True, True, False]])
    images = [
        (np.array([[2.0, 2.0, 0.0, 0.0]]), [defect(found[1]), defect(np.roll(found[1], 1))], "logical"),
        (-np.array(lost[0]), [], "good"),
        (np.array(lost[0]) - 2, [defect(lost[1])], "logical"),
    ]
    assert spro_of(images, [0.1])["logical"][0.1] == pytest.approx(2 / 3)


def test_other_kinds_images_do_not_count():
    rng = np.random.default_rng(5)
    images = random_images(rng, rng.standard_normal)
    both = spro_of(images)
    for kind, other in (("structural", "logical"), ("logical", "structural")):
        alone = spro_of([image for image in images if image[2] != other])
        assert alone[kind] == both[kind]
        assert alone[other] == dict.fromkeys(FPR_LIMITS)
        assert alone["mean"] == dict.fromkeys(FPR_LIMITS)


def test_monotone_transformation_of_all_maps_changes_nothing():
    rng = np.random.default_rng(6)
    images = random_images(rng, lambda shape: rng.integers(-3, 4, shape).astype(float))
    transformed = [(np.exp(1.7 * scores) - 40, defects, kind) for scores, defects, kind in images]
    assert spro_of(transformed) == spro_of(images)


def test_order_of_images_and_limits_changes_nothing():
    rng = np.random.default_rng(8)
    images = random_images(rng, rng.standard_normal)
    result = spro_of(images)
    for kind, areas in spro_of(images[::-1], FPR_LIMITS[::-1]).items():
        assert areas == pytest.approx(result[kind], abs=1e-14)
    for limit in FPR_LIMITS:
        assert spro_of(images, [limit])["logical"] == {limit: result["logical"][limit]}


def test_more_can_be_added_after_computing():
    rng = np.random.default_rng(9)
    images = random_images(rng, rng.standard_normal)
    accumulator = SPRO()
    for number, image in enumerate(images):
        accumulator.add(*image)
        if number > 2:
            accumulator.compute()
    assert accumulator.compute() == spro_of(images)
    assert accumulator.compute() == spro_of(images)


def test_inputs_are_neither_modified_nor_kept():
    rng = np.random.default_rng(10)
    images = random_images(rng, lambda shape: rng.random(shape).astype(np.float32))
    expected = spro_of(images)
    accumulator = SPRO()
    for scores, defects, kind in images:
        buffer, masks = scores.copy(), [item.mask.copy() for item in defects]
        accumulator.add(buffer, defects, kind)
        assert np.array_equal(buffer, scores)
        assert all(np.array_equal(item.mask, mask) for item, mask in zip(defects, masks, strict=True))
        buffer[:] = 0
    assert accumulator.compute() == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int16, np.int32, np.int64])
def test_types_of_map_agree(dtype):
    rng = np.random.default_rng(12)
    images = random_images(rng, lambda shape: rng.integers(0, 9, shape))
    images = [(2 * scores, defects, kind) for scores, defects, kind in images]
    converted = [(scores.astype(dtype), defects, kind) for scores, defects, kind in images]
    assert spro_of(converted) == spro_of(images)


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


def test_nothing_to_compute_from_is_none():
    nothing = dict.fromkeys(FPR_LIMITS)
    assert spro_of([]) == {"structural": nothing, "logical": nothing, "mean": nothing}
    assert spro_of([(np.zeros((2, 2)), None, "good")])["mean"] == nothing
    # The defect is the whole image and there are no good ones: no pixel can be a false positive.
    assert one_defect(np.ones((2, 2)), np.ones((2, 2))) == nothing


def test_defect_over_the_whole_image_with_good_images():
    images = [(np.ones((2, 2)), [defect(np.ones((2, 2)))], "logical"), (np.zeros((2, 2)), [], "good")]
    assert spro_of(images)["logical"] == dict.fromkeys(FPR_LIMITS, 1.0)


def test_no_good_images_are_needed():
    assert one_defect([[3.0, 1.0, 2.0]], [[True, False, False]], limits=[0.05]) == {0.05: 1.0}


@pytest.mark.parametrize("unmarked", [None, []])
def test_an_unmarked_anomalous_image_makes_its_kind_none(unmarked):
    mask = np.eye(3, dtype=bool)
    images = [
        (np.ones((3, 3)), [defect(mask)], "structural"),
        (np.ones((3, 3)), [defect(mask)], "logical"),
        (np.ones((3, 3)), unmarked, "logical"),
    ]
    result = spro_of(images, [1.0])
    assert result == {"structural": {1.0: 0.5}, "logical": {1.0: None}, "mean": {1.0: None}}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.array([[0.0, np.nan]]), "the map of x has 1 NaN or infinite"),
        (np.array([[np.inf, -np.inf]], np.float32), "the map of x has 2 NaN or infinite"),
        (np.zeros((1, 2, 3)), r"the map of x has the shape \(1, 2, 3\)"),
        (np.zeros(2), r"the map of x has the shape \(2,\)"),
        (np.zeros((0, 2)), r"the map of x has the shape \(0, 2\)"),
        (np.zeros((1, 2), complex), "the map of x has values of type complex128"),
        (np.array([["a", "b"]]), "the map of x has values of type <U1"),
    ],
)
@pytest.mark.parametrize("kind", ["good", "logical"])
def test_bad_maps_are_named(scores, message, kind):
    with pytest.raises(UserError, match=message):
        SPRO().add(scores, [defect([[True, False]])] if kind == "logical" else [], kind, name="the map of x")


def test_mask_of_another_size_is_named():
    accumulator = SPRO()
    with pytest.raises(UserError, match="mask of defect 2 of the map of x is 5 x 2 pixels, but the map is 3 x 2"):
        accumulator.add(
            np.zeros((2, 3)),
            [defect(np.ones((2, 3))), defect(np.ones((2, 5)))],
            "logical",
            name="the map of x",
        )
    # Nothing of the refused image was taken.
    assert accumulator.compute([1.0])["logical"][1.0] is None


@pytest.mark.parametrize("saturation", [0, -1, np.nan, np.inf])
def test_bad_saturation(saturation):
    with pytest.raises(UserError, match="saturation of defect 1"):
        one_defect([[1.0, 0.0]], [[True, False]], saturation)


def test_bad_masks():
    with pytest.raises(UserError, match="marks no pixel"):
        one_defect([[1.0, 0.0]], [[False, False]], 1)
    with pytest.raises(TypeError, match="must be bool, not uint8"):
        SPRO().add(np.zeros((1, 1)), [SimpleNamespace(mask=np.ones((1, 1), np.uint8), saturation=1)], "logical")


def test_misuse():
    with pytest.raises(ValueError, match="kind must be one of good, structural, logical, not 'bad'"):
        SPRO().add(np.zeros((1, 1)), [], "bad")
    with pytest.raises(ValueError, match="good image has no defects"):
        SPRO().add(np.zeros((1, 1)), [defect([[True]])], "good")


@pytest.mark.parametrize("limit", [0, -0.1, 1.01, np.nan])
def test_bad_limits(limit):
    with pytest.raises(ValueError, match="limits must be > 0 and <= 1"):
        SPRO().compute([0.5, limit])


# ------------------------------------------------------------------------------------------------- the curve


def curve_of(images, kind, limit=1.0):
    accumulator = SPRO()
    for anomaly_map, defects, image_kind in images:
        accumulator.add(anomaly_map, defects, image_kind)
    return accumulator.curve(kind, limit)


@pytest.mark.parametrize("draw", ["ties", "no ties"])
@pytest.mark.parametrize("seed", range(5))
def test_the_area_under_the_curve_up_to_anywhere_is_that_of_the_definition(seed, draw):
    rng = np.random.default_rng(200 + seed)
    images = random_images(rng, lambda shape: rng.integers(0, 5, shape) if draw == "ties" else rng.random(shape))
    for kind in ("structural", "logical"):
        for limit in (*rng.uniform(0.001, 1, 3), 0.05, 1.0):
            fpr, spro = curve_of(images, kind, limit)
            assert fpr.dtype == spro.dtype == np.float64
            assert (fpr[0], spro[0], fpr[-1]) == (0, 0, limit)
            assert (np.diff(fpr) >= 0).all()
            assert (np.diff(spro) >= 0).all()
            assert spro[-1] <= 1
            assert trapezoid(spro, fpr) / limit == pytest.approx(brute_force(images, kind, limit), abs=1e-12)


def test_the_curves_corners_by_hand():
    # Ten negatives 0 to 9; the defect's pixels lie above all, at 6 (a tie with one negative), and below all.
    scores = np.array([[*range(10), 11.0, 6.0, -1.0]])
    fpr, spro = curve_of([(scores, [defect(np.arange(13)[None] > 9)], "logical")], "logical")
    assert fpr == pytest.approx([0, 0, 0, 0.3, 0.4, 1, 1, 1])
    assert spro == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])


def test_a_limit_inside_a_ramp_ends_the_curve_there():
    images = [(np.array([[5.0, 5.0, 5.0, 1.0, 1.0]]), [defect([[True, False, False, False, False]])], "logical")]
    fpr, spro = curve_of(images, "logical", 0.25)
    assert (fpr[-1], spro[-1]) == pytest.approx((0.25, 0.5))


def test_the_curve_may_be_asked_for_before_and_after_the_areas():
    rng = np.random.default_rng(8)
    accumulator = SPRO()
    for image in random_images(rng, rng.standard_normal):
        accumulator.add(*image)
    before = accumulator.curve("logical", 0.3)
    area = accumulator.compute([0.3])["logical"][0.3]
    np.testing.assert_array_equal(before, accumulator.curve("logical", 0.3))
    assert trapezoid(before[1], before[0]) / 0.3 == pytest.approx(area, abs=1e-12)


def test_there_is_no_curve_where_there_is_no_area():
    good = (np.zeros((2, 2)), [], "good")
    assert curve_of([good], "logical") is None
    assert curve_of([good, (np.zeros((2, 2)), None, "logical")], "logical") is None
    assert curve_of([(np.zeros((2, 2)), [defect(np.ones((2, 2)))], "logical")], "logical") is None


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.1, np.nan])
def test_the_curves_limit_is_checked(limit):
    with pytest.raises(ValueError, match="the limit must be > 0 and <= 1"):
        SPRO().curve("logical", limit)
