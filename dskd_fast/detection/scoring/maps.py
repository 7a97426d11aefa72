"""A student's anomaly map, normalised level by level and position by position."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from dskd_fast.models.dskd import enlarged

# Of the Gaussian that smooths the statistics, as a share of the image's side: objects do not lie to the pixel.
_SMOOTHING = 1 / 4
# How much of a position's variance is that of all positions: where objects lie anywhere, positions differ by chance.
_SHRINKAGE = 0.7
# Deviations below this share of the mean are float32 rounding, which must not be blown up.
_ROUNDING = float(np.finfo(np.float32).eps)


class MapPart(nn.Module):
    """The map of one student: its deviation from what is normal at each place, the mean over the levels that count.

    Paper eq. 8 has one mean and one deviation for all positions and levels. Here each level has its own at every
    position: smoothed, and the variance drawn towards that of all positions (ours).

    Args:
        levels: which of its three count, from 0, the finest.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        for level in self.levels:
            for name in ("mean", "std"):
                self.register_buffer(f"{name}{level}", torch.empty(0))

    def calibrate(self, level_maps: list[Tensor], size: int) -> Tensor:
        """Take the statistics from normal images.

        Args:
            level_maps: of n images, (n, h, w) for each level.
            size: S of the maps.

        Returns:
            The maps (n, S, S) of these images, each normalised by the others alone where there are others: as new
            images are.
        """
        left_out = []
        for level in self.levels:
            values = level_maps[level].double().cpu().numpy()
            mean, std = (torch.from_numpy(x).float() for x in _statistics(values))
            setattr(self, f"mean{level}", mean)
            setattr(self, f"std{level}", std)
            left_out.append(torch.from_numpy(_without_each(values)).float())
        return enlarged(left_out, (size, size)).mean(1)

    def forward(self, level_maps: list[Tensor], size: int) -> Tensor:
        """Maps (B, S, S), in deviations from the normal mean."""
        normalised = [
            (level_maps[level] - getattr(self, f"mean{level}")) / getattr(self, f"std{level}") for level in self.levels
        ]
        return enlarged(normalised, (size, size)).mean(1)

    def rounding(self) -> float:
        """By how much rounding of 1e-5 of the level maps may change a map, in its own unit."""
        ratios = [(getattr(self, f"mean{x}").abs() / getattr(self, f"std{x}")).max() for x in self.levels]
        return 1e-5 * float(torch.stack(ratios).mean())


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    sigma = _SMOOTHING * values.shape[-1]
    return ndimage.gaussian_filter(values, (0,) * (values.ndim - 2) + (sigma, sigma), mode="nearest")


def _deviation(variance: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    variance = np.maximum(variance, 0)
    of_all = variance.mean((-2, -1), keepdims=True)
    deviation = np.sqrt((1 - _SHRINKAGE) * variance + _SHRINKAGE * of_all)
    return np.where(deviation > _ROUNDING * np.abs(mean), deviation, 1.0)


def _statistics(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation (h, w) of maps (n, h, w)."""
    mean = _smoothed(values.mean(0))
    return mean, _deviation(_smoothed(((values - mean) ** 2).mean(0)), mean)


def _without_each(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each of n maps normalised by the statistics of the other n - 1; a single one by its own."""
    n = len(values)
    if n == 1:
        mean, std = _statistics(values)
        return (values - mean) / std
    centred = values - values.mean()  # squares of the values themselves would cancel
    of_others = (centred.sum(0) - centred) / (n - 1)
    mean = _smoothed(of_others)
    # The mean of the others' squared distances from their smoothed mean.
    squares = ((centred**2).sum(0) - centred**2) / (n - 1) - 2 * mean * of_others + mean**2
    return (centred - mean) / _deviation(_smoothed(squares), mean + values.mean())
