"""The teacher's dense descriptors, and networks that regress them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from dskd_fast.paper.baselines.blocks import AT_A_TIME, SLOPE, down
from dskd_fast.paper.baselines.protocol import Images


class Descriptors(nn.Module):
    """The teacher's second level, each channel in deviations from its mean over the training images.

    The published methods regress descriptors of networks that were distilled on crops of ImageNet. Here the frozen
    backbone's own dense features stand in, those of all methods.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def fit(self, images: Images) -> None:
        sums, n = torch.zeros(2, self.mean.shape[1], dtype=torch.float64, device=self.mean.device), 0
        for batch in images.batches(AT_A_TIME):
            level = batch.features[1].double()
            sums += torch.stack([level.sum((0, 2, 3)), level.square().sum((0, 2, 3))])
            n += level[:, 0].numel()
        mean, square = sums / n
        self.mean.copy_(mean.view(1, -1, 1, 1))
        std = (square - mean.square()).clamp(min=0).sqrt()
        # A channel that is the same everywhere has nothing to learn.
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)).view(1, -1, 1, 1))

    def forward(self, images: Images) -> Tensor:
        """(B, C, h, w)."""
        return (images.features[1] - self.mean) / self.std


class Regression(nn.Sequential):
    """Images (B, 3, S, S) -> descriptors (B, channels, S/8, S/8), each from a patch of 37 x 37 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            down(3, 32, 5),
            down(32, 64, 5),
            down(64, 128, 3),
            nn.Conv2d(128, 128, 3, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(128, channels, 1),
        )


def fitted_to(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) at another size, as for teachers whose second level has another stride than 8."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return nnf.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
