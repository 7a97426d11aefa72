"""A student's anomaly map, normalised level by level and position by position."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from dskd_fast.models.dskd import enlarged

# Of the Gaussian that smooths the statistics, as a share of the image's side: objects do not lie to the pixel.
_SMOOTHING = 1 / 5
# What is known of a position counts n / (n + 10) for n images, the rest is known of all positions together: few images
# cannot tell positions apart. Of the variance, which takes far more images to know, a tenth as much counts.
_IMAGES_TO_KNOW = 10
_SHARE_OF_VARIANCE = 0.1
# Most that a value of a map before normalisation changes by rounding, as a share of the map's mean: measured, 2e-6.
MAP_ROUNDING = 1e-5
# Deviations below this share of the mean are float32 rounding, which must not be blown up.
_ROUNDING = float(np.finfo(np.float32).eps)


class MapPart(nn.Module):
    """The map of one student: its deviation from what is normal at each place, the mean over the levels that count.

    Paper eq. 8 has one mean and one deviation for all positions and levels. Here each level has its own at every
    position: smoothed, and drawn towards that of all positions the more, the fewer images there are (ours).

    Args:
        levels: which of its three count, from 0, the finest.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        for level in self.levels:
            for name in ("mean", "std"):
                self.register_buffer(f"{name}{level}", torch.empty(0))

    @property
    def least_deviation(self) -> float:
        """What the deviation of a level map is at least."""
        return 0.0

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
            mean, std = (torch.from_numpy(x).float() for x in _statistics(values, self.least_deviation))
            setattr(self, f"mean{level}", mean)
            setattr(self, f"std{level}", std)
            left_out.append(torch.from_numpy(_without_each(values, self.least_deviation)).float())
        return enlarged(left_out, (size, size)).mean(1)

    def forward(self, level_maps: list[Tensor], size: int) -> Tensor:
        """Maps (B, S, S), in deviations from the normal mean."""
        normalised = [
            (level_maps[level] - getattr(self, f"mean{level}")) / getattr(self, f"std{level}") for level in self.levels
        ]
        return enlarged(normalised, (size, size)).mean(1)

    def rounding(self) -> float:
        """By how much rounding of the level maps may change a map, in its own unit."""
        ratios = [(getattr(self, f"mean{x}").abs() / getattr(self, f"std{x}")).max() for x in self.levels]
        return MAP_ROUNDING * float(torch.stack(ratios).mean())


class SumPart(nn.Module):
    """Both students' maps, all levels, each in deviations of its own pixels, added up (as in paper eq. 8).

    What each of them sees faintly, they see together.
    """

    deviations: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.local, self.global_ = MapPart(levels), MapPart(levels)
        self.register_buffer("deviations", torch.ones(2))

    def calibrate(self, level_maps: tuple[list[Tensor], list[Tensor]], size: int) -> Tensor:
        """As `MapPart.calibrate`; the maps are the local student's and the global one's."""
        maps = [
            part.calibrate(of_part, size) for part, of_part in zip((self.local, self.global_), level_maps, strict=True)
        ]
        for i, (part, found) in enumerate(zip((self.local, self.global_), maps, strict=True)):
            self.deviations[i] = max(float(found.std()), part.rounding()) or 1.0
        return maps[0] / self.deviations[0] + maps[1] / self.deviations[1]

    def forward(self, level_maps: tuple[list[Tensor], list[Tensor]], size: int) -> Tensor:
        """Maps (B, S, S)."""
        of_local, of_global = self.local(level_maps[0], size), self.global_(level_maps[1], size)
        return of_local / self.deviations[0] + of_global / self.deviations[1]

    def rounding(self) -> float:
        """See `MapPart.rounding`."""
        local, global_ = (float(x) for x in self.deviations)
        return self.local.rounding() / local + self.global_.rounding() / global_


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    sigma = _SMOOTHING * values.shape[-1]
    return ndimage.gaussian_filter(values, (0,) * (values.ndim - 2) + (sigma, sigma), mode="nearest")


def _towards_all(values: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Maps (..., h, w) of which a share stays and the rest is their mean over positions."""
    return share * values + (1 - share) * values.mean((-2, -1), keepdims=True)


def _deviation(
    variance: NDArray[np.float64], mean: NDArray[np.float64], share: float, least: float
) -> NDArray[np.float64]:
    deviation = np.maximum(np.sqrt(_towards_all(np.maximum(variance, 0), _SHARE_OF_VARIANCE * share)), least)
    return np.where(deviation > _ROUNDING * np.abs(mean), deviation, 1.0)


def _statistics(values: NDArray[np.float64], least: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation (h, w) of maps (n, h, w)."""
    share = len(values) / (len(values) + _IMAGES_TO_KNOW)
    mean = _towards_all(_smoothed(values.mean(0)), share)
    return mean, _deviation(_smoothed(((values - mean) ** 2).mean(0)), mean, share, least)


def _without_each(values: NDArray[np.float64], least: float) -> NDArray[np.float64]:
    """Each of n maps normalised by the statistics of the other n - 1; a single one by its own."""
    n = len(values)
    if n == 1:
        mean, std = _statistics(values, least)
        return (values - mean) / std
    centred = values - values.mean()  # squares of the values themselves would cancel
    of_others = (centred.sum(0) - centred) / (n - 1)
    share = (n - 1) / (n - 1 + _IMAGES_TO_KNOW)
    mean = _towards_all(_smoothed(of_others), share)
    # The mean of the others' squared distances from their smoothed mean.
    squares = ((centred**2).sum(0) - centred**2) / (n - 1) - 2 * mean * of_others + mean**2
    return (centred - mean) / _deviation(_smoothed(squares), mean + values.mean(), share, least)
