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
    folds = np.arange(n) % distances_module._FOLDS
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
