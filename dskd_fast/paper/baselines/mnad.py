"""MNAD: reconstruction through a memory of few normal patterns, and the distance from them.

Park et al., "Learning Memory-guided Normality for Anomaly Detection" (CVPR 2020), the form that reconstructs. Theirs:
ten items, to which each position's query attends; losses of compactness and separateness, as in the published code: the
mean over all numbers and a triplet margin of distances, each weighted 0.01 beside the mean squared error (the paper
prints 0.1 beside sums); items move towards the queries that are nearest to them; a frame's score is of the peak
signal-to-noise ratio of its reconstruction, which counts 0.7, and of the mean distance of its queries, 0.3. Ours: a
smaller network; images in place of frames of a video; a map, of errors and distances with the same weights; all of them
in deviations over validation images, where they take the range over a video; no update of the items while testing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from dskd_fast.paper.baselines.blocks import (
    Normaliser,
    OfPixels,
    down,
    fit_normalisers,
    squared_error,
    train_networks,
    up,
)
from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.protocol import Images

ITEMS = 10
CHANNELS = 128
_COMPACTNESS = _SEPARATENESS = 0.01
_MARGIN = 1.0
_OF_RECONSTRUCTION = 0.7


class Mnad(OfPixels):
    """An encoder, memory items (ITEMS, CHANNELS) of length 1, and a decoder of queries and what they recall."""

    relative_steps = 3
    items: Tensor

    def __init__(self, size: int, channels: Sequence[int], side: int = 128) -> None:
        super().__init__(size, channels, side)
        self.encoder = nn.Sequential(
            down(3, 32), down(32, 64), down(64, CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        )
        self.decoder = nn.Sequential(up(2 * CHANNELS, 64), up(64, 32), nn.ConvTranspose2d(32, 3, 4, 2, 1))
        self.register_buffer("items", nnf.normalize(torch.rand(ITEMS, CHANNELS), dim=1))
        self.of_errors, self.of_distances = Normaliser(), Normaliser()
        self.of_ratio, self.of_mean_distance = Normaliser(), Normaliser()

    def fit(self, images: Images, validation: Images, fitting: Fitting) -> None:
        train_networks(self, images, fitting, self._loss)
        fit_normalisers(validation, self._errors_and_distances, self.of_errors, self.of_distances)
        fit_normalisers(validation, self._of_images, self.of_ratio, self.of_mean_distance)

    def maps(self, images: Images) -> Tensor:
        errors, distances = self._errors_and_distances(images).unbind(1)
        return _weighted(self.of_errors(errors), self.of_distances(distances))

    def score(self, images: Images, maps: Tensor) -> Tensor:
        ratio, distance = self._of_images(images).unbind(1)
        return _weighted(self.of_ratio(ratio), self.of_mean_distance(distance))

    def _of_images(self, images: Images) -> Tensor:
        """(B, 2): minus the signal-to-noise ratio, in another unit, which deviations do not see; the mean distance."""
        errors, distances = self._errors_and_distances(images).mean((2, 3)).unbind(1)
        return torch.stack([errors.log(), distances], 1)

    def _errors_and_distances(self, images: Images) -> Tensor:
        """(B, 2, S, S)."""
        inputs = self.inputs(images)
        queries = self._queries(inputs)
        distances = (queries - self.items[self._similarities(queries).argmax(-1)]).square().sum(-1).sqrt()
        errors = squared_error(self._recalled(queries), inputs)
        return torch.stack([self.at_size(errors), self.at_size(distances)], 1)

    def _queries(self, inputs: Tensor) -> Tensor:
        """(B, h, w, CHANNELS), of length 1."""
        return nnf.normalize(self.encoder(inputs).permute(0, 2, 3, 1), dim=-1)

    def _similarities(self, queries: Tensor) -> Tensor:
        return queries @ self.items.mT

    def _recalled(self, queries: Tensor) -> Tensor:
        """Images (B, 3, side, side) from queries and the items that they attend to."""
        recalled = self._similarities(queries).softmax(-1) @ self.items
        return self.decoder(torch.cat([queries, recalled], -1).permute(0, 3, 1, 2))

    def _loss(self, images: Images) -> Tensor:
        inputs = self.inputs(images)
        queries = self._queries(inputs)
        error = squared_error(self._recalled(queries), inputs).mean()
        first, second = self._similarities(queries).topk(2, -1).indices.unbind(-1)
        compactness = nnf.mse_loss(queries, self.items[first])
        separateness = nnf.triplet_margin_loss(queries, self.items[first], self.items[second], _MARGIN)
        self._update(queries.detach().flatten(0, 2))
        return error + _COMPACTNESS * compactness + _SEPARATENESS * separateness

    def _update(self, queries: Tensor) -> None:
        """Move each item towards the queries (n, CHANNELS) whose nearest it is, by their share of its attention."""
        similarities = self._similarities(queries)
        weights = similarities.softmax(0)
        weights = weights / weights.amax(0)
        is_nearest = nnf.one_hot(similarities.argmax(1), ITEMS)
        # Not in place: the loss still needs the items that it was computed with.
        self.items = nnf.normalize(self.items + (weights * is_nearest).mT @ queries, dim=1)


def _weighted(reconstruction: Tensor, distance: Tensor) -> Tensor:
    return _OF_RECONSTRUCTION * reconstruction + (1 - _OF_RECONSTRUCTION) * distance
