"""Distances from the training images, by plain formulas in float64 and by scikit-learn's estimator."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf

from dskd_fast.detection.scoring import distances as distances_module
from dskd_fast.detection.scoring.distances import Mahalanobis, NearestNeighbour

KINDS = (NearestNeighbour, Mahalanobis)


def vectors(n, channels=6, seed=0):
    """Correlated, each channel with a mean and a deviation of its own."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(channels, channels)) * np.logspace(-1, 1, channels)
    return torch.from_numpy(generator.normal(size=(n, channels)) @ mixing + np.arange(channels)).float()


def fitted(kind, training):
    part = kind()
    part.fit(training)
    return part


def expected(kind, training, new):
    training, new = training.double().numpy(), new.double().numpy()
    mean, std = training.mean(0), training.std(0)
    training, new = (training - mean) / std, (new - mean) / std
    if kind is NearestNeighbour:
        return cdist(new, training).min(1) / np.sqrt(new.shape[1])
    return np.sqrt(LedoitWolf(assume_centered=True).fit(training).mahalanobis(new) / new.shape[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "channels"), [(40, 6), (5, 30), (3, 4)])
def test_distances_are_those_of_the_formula(kind, n, channels):
    training, new = vectors(n, channels), vectors(7, channels, seed=1)
    found = fitted(kind, training)(new)
    assert (found.shape, found.dtype) == ((7,), torch.float32)
    np.testing.assert_allclose(found, expected(kind, training, new), rtol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 3, 13])
def test_each_training_image_is_measured_from_images_that_it_is_not_among(kind, n):
    training = vectors(n)
    found = kind().of_training(training)
    folds = np.arange(n) % distances_module.FOLDS
    for i in range(n):
        others = fitted(kind, training[folds != folds[i]])
        torch.testing.assert_close(found[i : i + 1], others(training[i : i + 1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_training_image_is_at_no_distance_from_itself_and_others_are_at_a_plain_one(kind):
    single, new = vectors(1), vectors(4, seed=1)
    assert kind().of_training(single).tolist() == [0]
    plain = (new - single).square().mean(1).sqrt() / single.abs().max()
    torch.testing.assert_close(fitted(kind, single)(new), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_constant", [1, 6], ids=["one channel", "all channels"])
def test_what_does_not_vary_does_not_blow_up_rounding(kind, n_constant):
    training = vectors(20)
    training[:, :n_constant] = 7.0 + 1e-6 * torch.rand(20, n_constant, generator=torch.Generator().manual_seed(0))
    new = training[:5].clone()
    new[:, :n_constant] = 7.0 - 2e-6
    part = fitted(kind, training)
    torch.testing.assert_close(part(new), part(training[:5]), rtol=0, atol=1e-3)


def test_of_many_training_images_some_stand_for_all(monkeypatch):
    monkeypatch.setattr(distances_module, "MAX_REFERENCES", 10)
    training = vectors(25)
    part = fitted(NearestNeighbour, training)
    assert len(part.references) == 10
    kept = part(training) < 1e-6
    assert kept.sum() == 10
    assert kept[[0, -1]].all()
    # The others' deviations are known all the same.
    np.testing.assert_allclose(part.std, training.double().numpy().std(0), rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_added_images_are_measured_from_the_training_images_and_the_others_among_them(n):
    training, new = vectors(20), vectors(n, seed=1) + 3
    part = fitted(NearestNeighbour, training)
    found = part.add(new)
    std = training.double().std(0, correction=0)
    for i in range(n):
        others = torch.cat([training, new[:i], new[i + 1 :]])
        assert float(found[i]) == pytest.approx(cdist(new[i : i + 1] / std, others / std).min() / np.sqrt(6), rel=1e-4)
    assert part(new).max() < 1e-5


@pytest.mark.parametrize("n", [1, 2, 9])
def test_added_images_are_measured_from_the_mean_of_the_others_in_the_covariance_of_the_training_images(n):
    training, new, later = (x.double().numpy() for x in (vectors(20), vectors(n, seed=1) + 3, vectors(5, seed=2)))
    part = fitted(Mahalanobis, torch.from_numpy(training).float())
    found = part.add(torch.from_numpy(new).float())
    std = training.std(0)
    precision = LedoitWolf(assume_centered=True).fit((training - training.mean(0)) / std).precision_

    def distance(vector, others):
        difference = (vector - others.mean(0)) / std
        return np.sqrt(difference @ precision @ difference / 6)

    # A single one has no others.
    expected = [distance(new[i], np.delete(new, i, 0)) if n > 1 else 0 for i in range(n)]
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    found_later = part(torch.from_numpy(later).float())
    np.testing.assert_allclose(found_later, [distance(one, new) for one in later], rtol=2e-4)


def test_an_image_that_is_among_the_references_is_not_its_own_neighbour():
    training, new = vectors(20), vectors(5, seed=1)
    part, once = (fitted(NearestNeighbour, training) for _ in range(2))
    part.add(new[:3])
    moved = new * (1 + 1e-7)  # by rounding
    torch.testing.assert_close(part.add(moved), once.add(new), rtol=1e-4, atol=1e-5)
    assert len(part.references) == len(once.references) == 25
    alone = fitted(NearestNeighbour, vectors(1))
    assert alone.add(vectors(1)).tolist() == [0]
