"""What no mixture of training images has: against least squares of NumPy in float64."""

import numpy as np
import pytest
import torch

from dskd_fast.detection.scoring import arrangement
from dskd_fast.detection.scoring.arrangement import ArrangementPart, ImageSample

CHANNELS, SIDE = 6, 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(arrangement, "_N_CHANNELS", 4)
    monkeypatch.setattr(arrangement, "_N_PLACES", SIDE)


def patches(n, seed=0, side=SIDE):
    """Of n images, (n, side, side, C), whose channels vary unequally."""
    generator = torch.Generator().manual_seed(seed)
    return 5 + torch.randn(n, side, side, CHANNELS, generator=generator) * torch.arange(1, 1 + CHANNELS)


def fitted(*batches):
    sample, part = ImageSample(), ArrangementPart()
    for batch in batches:
        sample.add(batch)
    part.fit(sample)
    return part


def left(new, training, of_axes, n_directions=np.inf):
    """Squares (n, h, w) of what training images do not explain of new ones."""
    rows = of_axes.double().flatten(0, -2).numpy()
    axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:4].T
    new, training = (((x.double().numpy() - rows.mean(0)) @ axes).reshape(len(x), -1) for x in (new, training))
    mean = training.mean(0)
    directions = np.linalg.svd(training - mean, full_matrices=False)[2][: int(min(n_directions, len(training) - 1))]
    rest = new - mean - (new - mean) @ directions.T @ directions
    return (rest.reshape(len(new), SIDE, SIDE, 4) ** 2).sum(3)


@pytest.mark.parametrize(("batch", "n_directions"), [(1, 100), (3, 100), (7, 2)])
def test_it_is_what_least_squares_leave_of_a_whole_image(monkeypatch, batch, n_directions):
    monkeypatch.setattr(arrangement, "_N_DIRECTIONS", n_directions)
    training, new = patches(7), patches(3, seed=1)
    (found,) = fitted(*training.split(batch)).distances(new)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, left(new, training, training, n_directions), rtol=1e-4)


def test_finer_maps_are_averaged_and_no_edge_is_lost():
    training, new = patches(5, side=3 * SIDE), patches(2, seed=1, side=3 * SIDE)
    (found,) = fitted(training).distances(new)
    coarse = [x.unflatten(2, (SIDE, 3)).unflatten(1, (SIDE, 3)).mean((2, 4)) for x in (new, training)]
    np.testing.assert_allclose(found, left(*coarse, coarse[1]), rtol=1e-4)
    assert arrangement._coarser(patches(1, side=7)).shape == (1, 7, 7, CHANNELS)


def test_a_mixture_of_training_images_has_nothing_of_its_own_and_what_is_missing_has_a_place():
    training = patches(9)
    new = (0.2 * training[:1] + 0.5 * training[4:5] + 0.3 * training[8:]).repeat(2, 1, 1, 1)
    new[1, 2, 1] += 30
    (found,) = fitted(training).distances(new)
    assert found[0].max() < 1e-6 * found[1].max()
    assert found[1].flatten().argmax() == 2 * SIDE + 1


@pytest.mark.parametrize(("n", "n_folds"), [(2, 2), (11, 5)])
def test_training_images_are_compared_with_those_of_other_folds(n, n_folds):
    training = patches(n)
    part = fitted(training)
    found = torch.cat([part.distances(some, 2 * i)[0] for i, some in enumerate(training.split(2))])
    folds = torch.arange(n) % n_folds
    for fold in range(n_folds):
        expected = left(training[folds == fold], training[folds != fold], training)
        np.testing.assert_allclose(found[folds == fold], expected, rtol=1e-4)
    np.testing.assert_allclose(part.usual, found[folds == 0].mean(), rtol=1e-4)


def test_of_many_images_some_are_kept_and_the_first_ones_give_the_axes(monkeypatch):
    monkeypatch.setattr(arrangement, "_N_FOR_AXES", 3 * SIDE**2)
    monkeypatch.setattr(arrangement, "_MAX_IMAGES", 4)
    training, new = patches(19), patches(2, seed=1)
    (found,) = fitted(*training.split(5)).distances(new)
    np.testing.assert_allclose(found, left(new, training[::4], training[:3]), rtol=1e-4)
    part = fitted(training[:9])  # of which 0, 2, 4, 6 and 8 are kept
    kept, fold = training[:9:2], torch.tensor([0, 2, 4, 1, 3])
    np.testing.assert_allclose(
        part.distances(training[7:8], 7)[0], left(training[7:8], kept[fold != 2], training[:3]), 1e-4
    )


@pytest.mark.parametrize("n", [1, 3])
def test_images_that_are_equal_differ_in_no_direction(n):
    image, new = patches(1), patches(1, seed=1)
    part = fitted(image.repeat(n, 1, 1, 1))
    np.testing.assert_allclose(part.distances(new)[0], left(new, image, image), rtol=1e-4)
    assert (part.distances(image)[0] == 0).all()


@pytest.mark.parametrize("n_others", [0, 1])
def test_copies_of_training_images_do_not_make_rounding_the_measure_of_new_ones(n_others):
    training, new = patches(9), patches(1, seed=1)
    normal = torch.cat([training[:6], patches(n_others, seed=2)])
    part = fitted(training)
    least, usual = 0.1 * float(part.usual), float(part.distances(new)[0].mean())
    left_out = part.calibrate(part.distances(normal), SIDE)
    assert part.std0.min() >= 0.99 * least
    assert left_out.abs().max() < 100 * usual / least
    assert 0 < part(part.distances(new), SIDE).mean() < 2 * usual / least
    twice = fitted(training.repeat_interleave(5, 0)[:10])  # in all folds
    torch.testing.assert_close(twice.usual, 4 * twice._training.square().mean())
