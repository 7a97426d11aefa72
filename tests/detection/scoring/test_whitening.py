"""Errors of which usual directions count less: against NumPy in float64."""

import numpy as np
import pytest
import torch

from dskd_fast.detection.scoring import whitening
from dskd_fast.detection.scoring.whitening import ErrorCovariances, WhitenedPart


def errors(n, seed=0):
    """Of two levels, with directions that are usual and others that are not."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.einsum("nchw,cd->ndhw", torch.randn(n, c, side, side, generator=generator), torch.rand(c, c).cumsum(0))
        for c, side in ((3, 8), (5, 4))
    ]


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_distance_is_mahalanobis_of_training_errors_about_zero_and_of_a_ridge(batch):
    torch.manual_seed(0)
    training, new = errors(7), errors(2, seed=1)
    covariances = ErrorCovariances()
    for start in range(0, 7, batch):
        covariances.add([level[start : start + batch] for level in training])
    part = WhitenedPart((0, 1))
    part.fit(covariances)
    for level, found in enumerate(part.distances(new)):
        of_training, vectors = (np.moveaxis(x[level].double().numpy(), 1, 3) for x in (training, new))
        rows = of_training.reshape(-1, of_training.shape[3])
        covariance = rows.T @ rows / len(rows)
        scaled = covariance / np.trace(covariance) * len(covariance)
        metric = np.linalg.inv(scaled + whitening._RIDGE * np.eye(len(scaled)))
        expected = np.einsum("nhwc,cd,nhwd->nhw", vectors, metric, vectors)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_students_without_errors_leave_all_directions_alike():
    part, covariances = WhitenedPart((0,)), ErrorCovariances()
    covariances.add([torch.zeros(2, 4, 3, 3)])
    part.fit(covariances)
    error = torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    expected = error.square().sum() / whitening._RIDGE
    torch.testing.assert_close(part.distances([error])[0].squeeze(), expected)
