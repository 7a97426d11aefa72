"""What a whole image has otherwise than any mixture of the training images, in the teacher's features alone."""

import torch
from torch import Tensor
from torch.nn import functional as nnf

from dskd_fast.detection.scoring.distances import FOLDS
from dskd_fast.detection.scoring.maps import MapPart

# Of the patches' principal axes: what an image is made of, not how it is textured.
_N_CHANNELS = 32
# Places of which these axes are taken; more would hold too much memory with all their channels.
_N_FOR_AXES = 25_600
# Places along a side: finer maps are averaged.
_N_PLACES = 16
# Directions in which training images differ that are kept, the largest ones; all where they are fewer images.
_N_DIRECTIONS = 100
# Twice as many images are thinned out.
_MAX_IMAGES = 1000
# Squares below this share of an image's, or of all images', are float32 rounding.
_ROUNDING = 1e-6
# Of what training images have that the others have not: less than this share of it is no deviation.
_LEAST_SHARE = 0.1


class ArrangementPart(MapPart):
    """The map of what is left of the teacher's patches after the mixture of training images nearest to them.

    An image counts as one vector, all its places and channels, and a mixture is any sum of training images whose
    weights add up to 1. (As eigenfaces do with pixels, Turk and Pentland 1991; with the teacher's features and a map by
    places, ours.)

    Attributes:
        origin, axes: (C,) and (C, c), of the c channels in which patches are compared.
        mean: (h w c,), of the training images.
        directions: (n, h w c), orthonormal, in which training images differ.
        usual: what a fifth of the training images has at a place that the others have not, the mean square.
    """

    origin: Tensor
    axes: Tensor
    mean: Tensor
    directions: Tensor
    usual: Tensor

    def __init__(self) -> None:
        super().__init__((0,))
        for name in ("origin", "axes", "mean", "directions"):
            self.register_buffer(name, torch.empty(0))
        self.register_buffer("usual", torch.zeros(()))
        self._training = self._numbers = torch.empty(0)  # the vectors, and which training image each is
        self._without_fold: dict[int, tuple[Tensor, Tensor]] = {}

    def fit(self, sample: "ImageSample") -> None:
        """Learn the mean of the training images and how they differ."""
        self._training, self._numbers, self.origin, self.axes = sample.finished()
        self._without_fold = {}
        self.mean, self.directions = _mean_and_directions(self._training)
        n_channels = self.axes.shape[1]
        self.usual = self._training.square().mean() * n_channels
        if self._n_folds > 1:
            fold = self._training[self._numbers % self._n_folds == 0]
            of_fold = _left(fold, *self._without(0)).square().mean() * n_channels
            if of_fold > _ROUNDING * self.usual:  # nothing is left of images that are there twice
                self.usual = of_fold

    @property
    def least_deviation(self) -> float:
        return _LEAST_SHARE * float(self.usual)

    def distances(self, patches: Tensor, training_image: int | None = None) -> list[Tensor]:
        """Patches (B, h, w, C) -> maps (B, h', w'), squares of lengths, as the only level.

        Args:
            patches: of images.
            training_image: the first one's number, where they are the training images themselves: each is then
                compared with those of other folds alone, if there are others.
        """
        places = _projected(_coarser(patches), self.origin, self.axes)
        vectors = places.flatten(1)
        if training_image is None or self._n_folds < 2:
            left = _left(vectors, self.mean, self.directions)
        else:
            left = torch.empty_like(vectors)
            for i, vector in enumerate(vectors):
                fold = self._without((training_image + i) % self._n_folds)
                left[i] = _left(vector, *(x.to(vector.device) for x in fold))
        squares = left.view(places.shape).square().sum(3)
        of_image = places.square().sum(3).mean((1, 2), keepdim=True)
        return [torch.where(squares > _ROUNDING * of_image, squares, 0.0)]  # copies leave nothing, but for rounding

    @property
    def _n_folds(self) -> int:
        return min(FOLDS, len(self._training))

    def _without(self, fold: int) -> tuple[Tensor, Tensor]:
        """Mean and directions of the training images but for a fold, which few calibrations ask for."""
        if fold not in self._without_fold:
            self._without_fold[fold] = _mean_and_directions(self._training[self._numbers % self._n_folds != fold])
        return self._without_fold[fold]


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
            n_places = (len(self._first) + 1) * image.shape[0] * image.shape[1]
            if not self._axes.numel() and (not self._first or n_places <= _N_FOR_AXES):
                self._first.append(image.clone())
            elif self._n_seen % self._every == 0:
                self._find_axes()
                self._keep(image)
            self._n_seen += 1

    def finished(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The images that are kept, (n, h w c), their numbers (n,), and origin and axes of their channels."""
        self._find_axes()
        return torch.stack(self._kept), self._every * torch.arange(len(self._kept)), self._origin, self._axes

    def _find_axes(self) -> None:
        if self._axes.numel():
            return
        self._origin = torch.stack([image.mean((0, 1)) for image in self._first]).mean(0)
        products = torch.zeros(len(self._origin), len(self._origin), dtype=torch.float64)
        for image in self._first:
            centred = image.flatten(0, 1) - self._origin
            products += centred.mT @ centred
        axes = torch.linalg.eigh(products).eigenvectors  # of the smallest variance first
        self._axes = axes[:, -_N_CHANNELS:].float().contiguous()
        for image in self._first:
            self._keep(image)
        self._first = []

    def _keep(self, image: Tensor) -> None:
        self._kept.append(_projected(image, self._origin, self._axes).flatten())
        if len(self._kept) == 2 * _MAX_IMAGES:
            self._kept, self._every = self._kept[::2], 2 * self._every


def _coarser(patches: Tensor) -> Tensor:
    """Patches (B, h, w, C) of at least `_N_PLACES` places along a side where there are these, and below twice as many.

    Means of what there is; sides that no number divides stay as they are.
    """
    side = patches.shape[1]
    size = max((x for x in range(1, side // _N_PLACES + 1) if side % x == 0), default=1)
    return patches if size == 1 else nnf.avg_pool2d(patches.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)


def _projected(patches: Tensor, origin: Tensor, axes: Tensor) -> Tensor:
    """Patches (..., C) less the origin along the axes, (..., c)."""
    return patches @ axes - origin @ axes


def _mean_and_directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) of vectors (n, D), and orthonormal directions of their largest variances; without any, a zero."""
    mean = vectors.mean(0)
    centred = vectors - mean
    variances, mixtures = torch.linalg.eigh((centred @ centred.mT).double())
    counts = variances > _ROUNDING * vectors.square().sum()
    counts[: max(0, len(counts) - _N_DIRECTIONS)] = False
    if not counts.any():
        return mean, torch.zeros_like(mean)[None]  # a row of zeros: exported files take no empty matrix
    directions = (mixtures[:, counts] / variances[counts].sqrt()).float().mT @ centred
    return mean, directions


def _left(vectors: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
    """Vectors (..., D) less the mixtures nearest to them."""
    centred = vectors - mean
    return centred - (centred @ directions.mT) @ directions
