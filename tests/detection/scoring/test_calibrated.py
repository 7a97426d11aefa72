"""From measurements to calibrated scores: against NumPy and SciPy in float64."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from dskd_fast.detection.scoring import calibrated as calibrated_module
from dskd_fast.detection.scoring.calibrated import CalibratedScore, collected, soft_maximum
from dskd_fast.detection.scoring.parts import PARTS, SHARPNESS
from dskd_fast.models import Measurements

SIZE, SIGMA = 32, 1.5
BOTH = ("local", "global")


def make_score(students=BOTH, gccb=6):
    return CalibratedScore(SimpleNamespace(students=students, gccb=gccb, image_size=SIZE), SIGMA)


def measured(n, seed=0, students=BOTH, gccb=6):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return 1 + torch.rand(n, *shape, generator=generator)

    def levels():
        return [random(side, side) for side in (16, 8, 4)]

    has_global = "global" in students
    return Measurements(
        levels() if "local" in students else None,
        levels() if has_global else None,
        random(gccb) if has_global and gccb else None,
        random(5) if has_global else None,
        random(7),
        random(8, 8, 6),
        [random(3, 16, 16), random(4, 8, 8)] if "local" in students else None,
    )


def trained(normal, n_training=8, batch=8, **which):
    score = make_score(**which)
    score.fit(split(measured(n_training, 1, **which), batch))
    return score, score.calibrate(score.reduced(normal), "validation")


def split(images, size):
    n = len(images.teacher_means)
    for start in range(0, n, size):
        part = slice(start, start + size)
        yield Measurements(
            *([y[part] for y in x] if isinstance(x, list) else x if x is None else x[part] for x in images)
        )


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ({}, tuple(PARTS)),
        ({"gccb": 0}, tuple(name for name in PARTS if name != "condensed")),
        ({"students": ("local",)}, ("local", "local-whitened", "patches", "arrangement", "teacher-means")),
        ({"students": ("global",)}, ("global", "patches", "arrangement", "condensed", "global-means", "teacher-means")),
    ],
    ids=str,
)
def test_a_run_has_the_parts_whose_student_there_is(which, names):
    score, _ = trained(measured(4, **which), **which)
    assert score.names == names
    scored = score(measured(3, 2, **which))
    assert (scored.score.shape, scored.values.shape) == ((3,), (3, len(names)))
    assert {name: tuple(found.shape) for name, found in scored.maps.items()} == {
        name: (3, SIZE, SIZE) for name in names if PARTS[name].has_map
    }
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in (scored.score, scored.values))


@pytest.mark.parametrize(("ratio", "farther"), [(0.9, 0), (1.0, 0), (1.05, 0.5), (1.2, 1), (math.nan, 1)], ids=str)
def test_how_much_farther_validation_images_are_than_training_images_sets_deviations_and_weights(ratio, farther):
    for n_training, kind, expected in ((20, "validation", farther), (20, "train", 1), (19, "validation", 1)):
        score, training = make_score(), measured(n_training, 1)
        score.fit([training])
        own = score.names.index("teacher-means")
        among = score._part("teacher-means").of_training(training.teacher_means).mean()
        raw = np.zeros((3, len(score.names)))
        raw[:, own] = ratio * float(among) * np.array([0.5, 1.0, 1.5])
        assert score._farther(raw, kind) == pytest.approx(expected, abs=1e-5)
    # Images for which it is recalibrated are farther.
    score.calibrate(score.reduced(measured(4)), "new")
    for found, of_kind in zip((score.handicap, score.map_handicap), handicaps(score.names, 0, 1), strict=True):
        np.testing.assert_allclose(found, of_kind, rtol=1e-5)
    assert calibrated_module._least_spread(PARTS["teacher-means"], farther) == pytest.approx(0.25 + 0.75 * farther)
    assert calibrated_module._least_spread(PARTS["condensed"], farther) == 1.0


@pytest.mark.parametrize("are_training", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_a_part_counts_in_deviations_of_normal_images_each_left_out_where_it_is_scored(n, are_training):
    normal, new = measured(n), measured(4, 2)
    score = make_score()
    score.fit([normal if are_training else measured(24, 1)])
    normal = score.reduced(normal, 0 if are_training else None)
    left_out = score.calibrate(normal, "train" if are_training else "validation")
    scored, new = score(new), score.reduced(new)
    expected, of_normal = [], []
    ratio = float(score._part("teacher-means")(normal.teacher_means).mean()) / (score._among_training or math.inf)
    farther = 1.0 if are_training else float(np.clip((ratio - 1) / calibrated_module._FARTHER, 0, 1))
    weights = handicaps(score.names, are_training, farther)[0]
    for i, (name, handicap) in enumerate(zip(score.names, weights, strict=True)):
        part = score._part(name)
        if PARTS[name].has_map:
            of_normal_maps, of_new = (calibrated_module._maps(name, images) for images in (normal, new))
            again = calibrated_module._make_part(name)
            raw_maps = again(of_normal_maps, SIZE) if name == "patches" else again.calibrate(of_normal_maps, SIZE)
            raw = ndimage.gaussian_filter(raw_maps.double(), (0, SIGMA, SIGMA)).max((1, 2))
            maps = part(of_new, SIZE).double()
            raw_new = ndimage.gaussian_filter(maps, (0, SIGMA, SIGMA)).max((1, 2))
            rounding = part.rounding()
            sigma = calibrated_module._MAP_SIGMA * SIGMA
            shown = ndimage.gaussian_filter(maps, (0, sigma, sigma))
            shown = (shown - float(score.centre[i])) / float(score.spread[i]) + handicap
            np.testing.assert_allclose(score.shown(scored.maps[name]), shown, rtol=1e-4, atol=1e-4)
        else:
            vectors = calibrated_module._vectors(name, normal)
            raw = (part.of_training(vectors) if are_training else part(vectors)).double().numpy()
            raw_new = part(calibrated_module._vectors(name, new)).double().numpy()
            rounding = 0

        least = calibrated_module._least_spread(PARTS[name], farther)

        def standardised(values, others, least=least, rounding=rounding, handicap=handicap):
            deviation = others.std(ddof=1) if len(others) > 1 else 0
            spread = max(max(deviation, least * abs(others.mean())) * math.sqrt(1 + 1 / len(others)), rounding)
            return (values - others.mean()) / (spread or 1) + handicap

        expected.append(standardised(raw_new, raw))
        of_normal.append([standardised(raw[j], np.delete(raw, j) if n > 1 else raw) for j in range(n)])
    # Float32 and few images: a deviation as small as 1e-2 of the value that it is of.
    np.testing.assert_allclose(scored.values.T, expected, rtol=1e-4, atol=1e-4)
    of_all = np.log(np.exp(SHARPNESS * np.array(of_normal)).sum(0)) / SHARPNESS
    np.testing.assert_allclose(left_out, of_all, rtol=1e-4, atol=1e-4)


def test_the_score_is_between_the_largest_part_and_that_of_as_many_equal_ones_and_the_largest_decides():
    n = len(PARTS)
    values = 5 * torch.randn(200, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values[0], values[1] = 1e4, -1e4
    raised = soft_maximum(values) - values.amax(1)
    most = math.log(n) / SHARPNESS
    assert (raised >= 0).all()
    assert (raised <= most + 1e-9).all()
    torch.testing.assert_close(raised[:2], torch.full((2,), most, dtype=torch.float64))
    score = make_score()
    assert score.deciding(5 * np.eye(n) - 7) == list(score.names)


def test_a_student_whose_maps_are_constant_does_not_blow_up_rounding():
    def constant(images, value):
        return images._replace(local_levels=[torch.full_like(level, value) for level in images.local_levels])

    values = [0.1 + i * 7.5e-9 for i in range(4)]  # the smallest steps of float32
    normal = [constant(one, value) for one, value in zip(split(measured(4), 1), values, strict=True)]
    score, _ = trained(collected(normal))
    for value in (0.1 - 3e-8, 0.1 + 6e-8):
        local = score(constant(measured(2, 2), value)).values[:, 0]
        np.testing.assert_allclose(local, float(score.handicap[0]), atol=0.1)


@pytest.mark.parametrize("size", [1, 3])
def test_batches_do_not_matter(size):
    normal, new = measured(5), measured(7, 2)
    score, thresholds = trained(normal)
    again, same = trained(collected(split(normal, size)), batch=size)
    np.testing.assert_allclose(thresholds, same, rtol=1e-5)
    parts = [again(batch) for batch in split(new, size)]
    torch.testing.assert_close(torch.cat([part.values for part in parts]), score(new).values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["patches", "arrangement"])
def test_training_images_are_not_compared_with_themselves(name):
    score, _ = trained(measured(4))
    training = measured(8, 1)
    found, with_own = (score.reduced(training, first)._asdict()[name] for first in (0, None))
    torch.testing.assert_close(found, score._part(name).distances(training.patches, 0), rtol=0, atol=0)
    assert all((a > b).all() for a, b in zip(found, with_own, strict=True))


def test_a_saved_score_is_loaded_whatever_the_number_of_its_references_and_no_other():
    score, _ = trained(measured(4), n_training=11)
    loaded, _ = trained(measured(3, 5), n_training=6)
    loaded.load(score.state_dict())
    for found, expected in zip(loaded(measured(3, 2))[:2], score(measured(3, 2))[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="other parts"):
        make_score(gccb=0).load(score.state_dict())


@pytest.mark.parametrize("lacking", [("arrangement",), ("local-whitened", "arrangement")])
@pytest.mark.parametrize("load", ["load", "load_state_dict"])
def test_states_of_earlier_versions_have_their_parts_which_count_in_maps_as_in_scores(load, lacking):
    expected, _ = trained(measured(4))
    score, today = make_score(), expected.state_dict()
    state = dict(today)
    assert not torch.equal(state.pop("map_handicap"), expected.handicap)
    del state["parts.patches.counts_beyond"]
    for key in [key for key in state if key.startswith(tuple(f"parts.{x.replace('-', '_')}." for x in lacking))]:
        del state[key]
    stay = [i for i, name in enumerate(PARTS) if name not in lacking]
    for key in ("handicap", "centre", "spread", "is_used"):
        state[key] = state[key][stay]
    getattr(score, load)(state)
    assert torch.equal(score.map_handicap, score.handicap)
    assert score.names == tuple(name for name in PARTS if name not in lacking)
    new = measured(2)
    torch.testing.assert_close(score(new).values, expected(new).values[:, stay])
    # One of a run of today takes all of it again.
    getattr(score, load)(today)
    torch.testing.assert_close(score(new)[:2], expected(new)[:2], rtol=0, atol=0)
    getattr(score, load)(state)
    # Fitted anew it is as in new runs, from the first batch on.
    assert not score.counts_beyond
    score.fit(measured(4) for _ in range(1) if score.counts_beyond)
    assert score.names == tuple(PARTS)


def with_error(images, times):
    """The same where the local student's error at its coarsest level is so many times as large."""
    *finer, coarsest = images.local_levels
    return images._replace(local_levels=[*finer, times * coarsest])


def handicaps(names, by_heart, farther):
    """Those of the score and of the map."""
    kinds = [PARTS[name] for name in names]
    weights = [kind.weight for kind in kinds], [kind.weight_in_map or kind.weight for kind in kinds]
    last = by_heart * np.log([kind.weight_by_heart for kind in kinds])
    far = [[kind.weight_if_farther or weight for kind, weight in zip(kinds, first, strict=True)] for first in weights]
    between = [(1 - farther) * np.log(first) + farther * np.log(x) for first, x in zip(weights, far, strict=True)]
    return [((1 - by_heart) * first + last) / SHARPNESS for first in between]


@pytest.mark.parametrize("by_heart", [-1, 0, 0.3, 1, 2])
def test_weights_move_the_more_the_larger_the_error_is_on_validation_than_on_training_images(by_heart):
    first, last = calibrated_module._BEGINS_BY_HEART, calibrated_module._BY_HEART
    images, score = measured(4), make_score()
    score.fit([images])
    # New images leave them as they were.
    for normal, source in ((with_error(images, first + by_heart * (last - first)), "validation"), (images, "new")):
        score.calibrate(score.reduced(normal), source)
        expected = handicaps(score.names, min(1, max(0, by_heart)), 1)
        for found, of_kind in zip((score.handicap, score.map_handicap), expected, strict=True):
            np.testing.assert_allclose(found, of_kind, rtol=1e-5)
