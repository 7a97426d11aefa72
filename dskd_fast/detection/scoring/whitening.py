"""The local student's errors as vectors: directions in which it always errs count less."""

import torch
from torch import Tensor

from dskd_fast.detection.scoring.maps import MapPart

# Added to the covariance, as a share of a channel's mean variance: no direction counts for more than 1 / 0.3.
_RIDGE = 0.3


class WhitenedPart(MapPart):
    """The map of the local student by the square of a Mahalanobis distance in place of the cosine distance.

    Half the squared length of an error, the difference of student's and teacher's features at unit length, is the
    cosine distance (paper eq. 1), in which all directions count alike. Here they count by the inverse of the
    covariance, about zero, of the errors in the training images (ours).

    Args:
        levels: those of the local student's that errors are of, from 0, the finest.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__(levels)
        for level in self.levels:
            self.register_buffer(f"whitening{level}", torch.empty(0))

    def fit(self, covariances: "ErrorCovariances") -> None:
        """Take over what training images have."""
        for level in self.levels:
            variances, axes = torch.linalg.eigh(covariances.sums[level])
            variances = variances.clamp(min=0)
            mean = variances.mean()  # by which the number of errors cancels
            scaled = variances / torch.where(mean > 0, mean, 1.0)  # without errors all count alike
            whitening = (axes / (scaled + _RIDGE).sqrt()).mT
            setattr(self, f"whitening{level}", whitening.float().contiguous())

    def distances(self, errors: list[Tensor]) -> list[Tensor]:
        """Errors (B, C, h, w) of each level -> maps (B, h, w)."""
        return [
            (getattr(self, f"whitening{level}") @ errors[level].flatten(2)).square().sum(1).view_as(errors[level][:, 0])
            for level in self.levels
        ]


class ErrorCovariances:
    """Products of the channels of errors, level by level, summed over any number of images.

    Attributes:
        sums: (C, C), float64, of each level; empty before the first images.
    """

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def add(self, errors: list[Tensor]) -> None:
        """Take errors (B, C, h, w) of each level."""
        vectors = [level.permute(0, 2, 3, 1).flatten(0, 2) for level in errors]
        products = [(x.mT @ x).cpu().double() for x in vectors]
        before = self.sums or [torch.zeros_like(x) for x in products]
        self.sums = [total + x for total, x in zip(before, products, strict=True)]
