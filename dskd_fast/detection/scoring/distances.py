"""How far an image as a whole is from the training images: for what has no place in a map."""

import numpy as np
import torch
from torch import Tensor, nn

# More training images than these are thinned out: each new image is compared with every one of them.
MAX_REFERENCES = 1000
# Images whose differences from all references are in memory together.
_AT_A_TIME = 8
# Parts into which training images are divided where they have to stand in for others.
FOLDS = 5
# Vectors that differ by less than this share of their largest value are equal but for float32 rounding.
_ROUNDING = 1e-5


class NearestNeighbour(nn.Module):
    """Distance of a vector from the nearest one of the training images, each channel in its own deviations.

    The root of the mean square over channels, so that it does not depend on their number.
    """

    mean: Tensor
    std: Tensor
    references: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("mean", "std", "references"):
            self.register_buffer(name, torch.empty(0))

    def fit(self, vectors: Tensor) -> None:
        """Take over the vectors (n, C) of training images."""
        self.mean, self.std = _channel_statistics(vectors)
        self.references = (_thinned_out(vectors) - self.mean) / self.std

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, C) -> (B,)."""
        if not torch.compiler.is_compiling() and len(vectors) > _AT_A_TIME:
            return torch.cat([self(some) for some in vectors.split(_AT_A_TIME)])
        # Differences, not products: a neighbour is much nearer than vectors are long.
        differences = ((vectors - self.mean) / self.std)[:, None] - self.references
        return differences.square().mean(2).amin(1).sqrt()

    def of_training(self, vectors: Tensor) -> Tensor:
        """Distances (n,) of the training images, each from the others: a fold of them is left out at a time."""
        return _cross_fitted(NearestNeighbour, vectors)

    def add(self, vectors: Tensor) -> Tensor:
        """Compare with these normal images (n, C), too, from now on; their distances (n,) from all others.

        Those from before are thinned out where they are many.
        """
        own = (vectors - self.mean) / self.std
        # An image that was added before would be at no distance from itself.
        rounding = _ROUNDING * vectors.abs().max()
        is_other = [((vector - self.references) * self.std).abs().amax(1) > rounding for vector in own]
        self.references = torch.cat([_thinned_out(self.references[torch.stack(is_other).all(0)]), own])
        first = len(self.references) - len(own)
        distances = torch.zeros(len(own), device=own.device)
        if len(self.references) > 1:
            for i, vector in enumerate(own):  # one at a time: there may be many of both
                squares = (vector - self.references).square().mean(1)
                squares[first + i] = torch.inf
                distances[i] = squares.amin().sqrt()
        return distances


class Mahalanobis(nn.Module):
    """Mahalanobis distance of a vector from the training images', their covariance shrunk as Ledoit and Wolf do.

    Divided by the root of the number of channels. (The distance of whole images' features is PUAD's, arXiv 2402.15143.)
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("mean", "whitening"):
            self.register_buffer(name, torch.empty(0))

    def fit(self, vectors: Tensor) -> None:
        """Learn mean and covariance from the vectors (n, C) of training images."""
        from sklearn.covariance import ledoit_wolf  # a second to import, which only training needs

        mean, std = _channel_statistics(vectors)
        standardised = ((vectors - mean) / std).double().cpu().numpy()
        is_alone = len(standardised) == 1
        covariance = np.eye(len(mean)) if is_alone else ledoit_wolf(standardised, assume_centered=True)[0]
        variances, axes = np.linalg.eigh(covariance)
        # Equal images have no covariance: then it is the plain distance.
        variances = np.where(variances > 1e-8, variances, 1.0)
        whitening = (axes / np.sqrt(variances * len(variances))).T / std.double().cpu().numpy()
        self.mean, self.whitening = mean, torch.from_numpy(whitening).float().contiguous().to(vectors.device)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, C) -> (B,)."""
        return ((vectors - self.mean) @ self.whitening.mT).square().sum(1).sqrt()

    def of_training(self, vectors: Tensor) -> Tensor:
        """Distances (n,) of the training images from the others: a fold of them is left out at a time."""
        return _cross_fitted(Mahalanobis, vectors)

    def add(self, vectors: Tensor) -> Tensor:
        """Measure from the mean of these normal images (n, C) from now on; the distances (n,) from that of the others.

        The covariance stays that of the training images: new ones are few.
        """
        n = len(vectors)
        of_others = (vectors.sum(0) - vectors) / (n - 1) if n > 1 else vectors
        distances = ((vectors - of_others) @ self.whitening.mT).square().sum(1).sqrt()
        self.mean = vectors.mean(0)
        return distances


def _channel_statistics(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C,) of vectors (n, C); of a single one, or equal ones, the largest value as deviation."""
    mean = vectors.mean(0)
    std = (vectors - mean).square().mean(0).sqrt()
    largest, size = float(std.max()), float(vectors.abs().max())
    if largest <= _ROUNDING * size:
        return mean, torch.full_like(std, size or 1.0)
    # A channel that is constant but for rounding says nothing, and must not blow up a new image's rounding.
    return mean, std.clamp(min=1e-3 * largest)


def _thinned_out(vectors: Tensor) -> Tensor:
    """At most `MAX_REFERENCES` of them, evenly."""
    chosen = torch.linspace(0, len(vectors) - 1, min(len(vectors), MAX_REFERENCES)).round().long()
    return vectors[chosen]


def _cross_fitted(kind: type[NearestNeighbour] | type[Mahalanobis], vectors: Tensor) -> Tensor:
    n = len(vectors)
    distances = torch.zeros(n)
    for fold in range(min(FOLDS, n) if n > 1 else 0):
        is_out = torch.arange(n) % min(FOLDS, n) == fold
        part = kind()
        part.fit(vectors[~is_out])
        distances[is_out] = part(vectors[is_out]).cpu()
    return distances
