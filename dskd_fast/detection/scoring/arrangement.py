"""What a whole image has otherwise than any mixture of the training images, in the teacher's features alone."""

import torch
from torch import Tensor
from torch.nn import functional as nnf

from dskd_fast.detection.scoring.distances import FOLDS
from dskd_fast.detection.scoring.maps import MapPart

# Of the patches' principal axes: what an image is made of, not how it is textured.
_N_CHANNELS = 32
# Images of which these axes are taken; more would hold too much memory with all their channels.
_N_FOR_AXES = 100
# Places along a side: finer maps are averaged.
_N_PLACES = 16
# Directions in which training images differ that are kept, the largest ones; all where they are fewer images.
_N_DIRECTIONS = 100
# Twice as many images are thinned out.
_MAX_IMAGES = 1000
# Variances below this share of all squares are float32 rounding.
_ROUNDING = 1e-6


class ArrangementPart(MapPart):
    """The map of what is left of the teacher's patches after the mixture of training images nearest to them.

    An image counts as one vector, all its places and channels. A thing that is missing, too much or elsewhere is in no
    mixture of images without it. (As eigenfaces do with pixels, Turk and Pentland 1991; with the teacher's features
    and a map by places, ours.) It learns no weights, so it cannot learn few training images by heart.

    Attributes:
        origin, axes: (C,) and (C, c), of the c channels in which patches are compared.
        mean: (h w c,), of the training images.
        directions: (n, h w c), orthonormal, in which training images differ.
    """

    origin: Tensor
    axes: Tensor
    mean: Tensor
    directions: Tensor

    def __init__(self) -> None:
        super().__init__((0,))
        for name in ("origin", "axes", "mean", "directions"):
            self.register_buffer(name, torch.empty(0))
        self._without_fold: list[tuple[Tensor, Tensor]] = []  # mean and directions of the training images but for each

    def fit(self, sample: "ImageSample") -> None:
        """Learn the mean of the training images and how they differ."""
        vectors, numbers, self.origin, self.axes = sample.finished()
        self.mean, self.directions = _mean_and_directions(vectors)
        n_folds = min(FOLDS, len(vectors)) if len(vectors) > 1 else 0
        self._without_fold = [_mean_and_directions(vectors[numbers % n_folds != fold]) for fold in range(n_folds)]

    def distances(self, patches: Tensor, training_image: int | None = None) -> list[Tensor]:
        """Patches (B, h, w, C) -> maps (B, h', w'), squares of lengths, as the only level.

        Args:
            patches: of images.
            training_image: the first one's number, where they are the training images themselves: each is then
                compared with those of other folds alone, if there are others.
        """
        places = _coarser(patches) @ self.axes - self.origin @ self.axes
        vectors = places.flatten(1)
        if training_image is None or not self._without_fold:
            left = _left(vectors, self.mean, self.directions)
        else:
            left = torch.empty_like(vectors)
            for i, vector in enumerate(vectors):
                fold = self._without_fold[(training_image + i) % len(self._without_fold)]
                left[i] = _left(vector, *(x.to(vector.device) for x in fold))
        return [left.view(places.shape).square().sum(3)]


class ImageSample:
    """Training images as vectors, of bounded memory.

    The channels are the principal axes of the first images' patches; of many images every second, fourth, ... one is
    kept.
    """

    def __init__(self) -> None:
        self._first: list[Tensor] = []  # (h, w, C), until the axes are known
        self._kept: list[Tensor] = []
        self._origin = self._axes = torch.empty(0)
        self._n_seen, self._every = 0, 1

    def add(self, patches: Tensor) -> None:
        """Take patches (B, h, w, C)."""
        for image in _coarser(patches).cpu():
            if self._n_seen < _N_FOR_AXES:
                self._first.append(image.clone())
            elif self._n_seen % self._every == 0:
                self._find_axes()
                self._kept.append(self._projected(image))
                if len(self._kept) == 2 * _MAX_IMAGES:
                    self._kept, self._every = self._kept[::2], 2 * self._every
            self._n_seen += 1

    def finished(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The images that are kept, (n, h w c), their numbers (n,), and origin and axes of their channels."""
        self._find_axes()
        return torch.stack(self._kept), self._every * torch.arange(len(self._kept)), self._origin, self._axes

    def _find_axes(self) -> None:
        if self._axes.numel():
            return
        patches = torch.cat([image.flatten(0, 1) for image in self._first])
        self._origin = patches.mean(0)
        centred = patches - self._origin
        axes = torch.linalg.eigh((centred.mT @ centred).double()).eigenvectors  # of the smallest variance first
        self._axes = axes[:, -_N_CHANNELS:].float().contiguous()
        self._kept = [self._projected(image) for image in self._first]
        self._first = []

    def _projected(self, image: Tensor) -> Tensor:
        return ((image - self._origin) @ self._axes).flatten()


def _coarser(patches: Tensor) -> Tensor:
    """Patches (B, h, w, C) of `_N_PLACES` or a little more places along a side, means of what there is."""
    side = patches.shape[1]
    size = max((x for x in range(1, side // _N_PLACES + 1) if side % x == 0), default=1)
    return patches if size == 1 else nnf.avg_pool2d(patches.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)


def _mean_and_directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) of vectors (n, D) and the orthonormal directions of their largest variances, fewer than n."""
    mean = vectors.mean(0)
    centred = vectors - mean
    variances, mixtures = torch.linalg.eigh((centred @ centred.mT).double())
    counts = variances > _ROUNDING * vectors.square().sum()
    counts[: max(0, len(counts) - _N_DIRECTIONS)] = False
    directions = (mixtures[:, counts] / variances[counts].sqrt()).float().mT @ centred
    return mean, directions


def _left(vectors: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
    """Vectors (..., D) less the mixtures nearest to them."""
    centred = vectors - mean
    return centred - (centred @ directions.mT) @ directions
