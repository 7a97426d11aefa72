"""GCAD: a local branch that regresses descriptors, and a global one that does so through a narrow bottleneck.

Bergmann et al., "Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly Detection and Localization"
(IJCV 2022). Its code is not public; this was written from notes of readers of the paper. Theirs: the local network
regresses a pretrained encoder's descriptors; the global encoder condenses the image to g = 32 numbers and makes maps
of d = 10 channels of them, from which an upsampling network of three 1 x 1 convolutions makes the same descriptors; a
network without the bottleneck learns the d maps. The regression networks are of U-Net's form and see the whole image.
All losses are mean squares; maps are lengths of differences, each branch's in deviations over validation images, and
the two are added. Ours: the descriptors, see `Descriptors`, one kind in place of two (patches of 17 and 33), whose maps
they average; smaller networks with batch normalisation; the global encoder has no connections past the bottleneck,
which theirs fades out; gradients of the third loss reach the network without the bottleneck alone, so that it may be
trained from the start, where theirs joins after a tenth of the training; few steps, at the rate of all methods here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dskd_fast.paper.baselines.blocks import (
    SLOPE,
    Normaliser,
    down,
    fit_normalisers,
    squared_error,
    train_networks,
    up,
)
from dskd_fast.paper.baselines.descriptors import Descriptors, fitted_to
from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.protocol import Baseline, Images

BOTTLENECK = 32
"""g, the numbers that an image is condensed to."""
DEPTH = 10
"""d, the channels of the maps that are made of them."""
_GRID = 4


class Gcad(Baseline):
    """The networks of both branches."""

    relative_steps = 2

    def __init__(self, size: int, channels: Sequence[int]) -> None:
        super().__init__(size, channels)
        n = self.channels[1]
        self.descriptors = Descriptors(n)
        self.local = _Regression(n)
        self.condensing = nn.Sequential(
            *(down(a, b) for a, b in ((3, 32), (32, 64), (64, 128), (128, 128), (128, 128))),
            nn.AdaptiveAvgPool2d(_GRID),
            nn.Flatten(),
            nn.Linear(128 * _GRID**2, BOTTLENECK),
            nn.Linear(BOTTLENECK, 128 * _GRID**2),
            nn.Unflatten(1, (128, _GRID, _GRID)),
            up(128, 128),
            up(128, 128),
            nn.Conv2d(128, DEPTH, 3, padding=1),
        )
        self.upsampling = nn.Sequential(
            nn.Conv2d(DEPTH, 128, 1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(128, 128, 1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(128, n, 1),
        )
        self.unconstrained = _Regression(DEPTH)
        self.of_local, self.of_global = Normaliser(), Normaliser()

    def fit(self, images: Images, validation: Images, fitting: Fitting) -> None:
        self.descriptors.fit(images)
        train_networks(self, images, fitting, self._loss)
        fit_normalisers(validation, self._local_and_global, self.of_local, self.of_global)

    def maps(self, images: Images) -> Tensor:
        local, global_ = self._local_and_global(images).unbind(1)
        return self.at_size(self.of_local(local) + self.of_global(global_))

    def _outputs(self, images: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Descriptors and the local network's; what is made of the condensed image, and the unconstrained network's."""
        wanted = self.descriptors(images)
        pixels = 2 * images.pixels - 1
        networks = (self.local, self.condensing, self.unconstrained)
        local, condensed, unconstrained = (fitted_to(network(pixels), wanted.shape[-2:]) for network in networks)
        return wanted, local, condensed, unconstrained

    def _loss(self, images: Images) -> Tensor:
        wanted, local, condensed, unconstrained = self._outputs(images)
        pairs = ((local, wanted), (self.upsampling(condensed), wanted), (unconstrained, condensed.detach()))
        return torch.stack([squared_error(found, target).mean() for found, target in pairs]).sum()

    def _local_and_global(self, images: Images) -> Tensor:
        """The lengths of the differences in both branches, (B, 2, h, w)."""
        wanted, local, condensed, unconstrained = self._outputs(images)
        return torch.stack([squared_error(local, wanted), squared_error(unconstrained, condensed)], 1).sqrt()


class _Regression(nn.Module):
    """Images (B, 3, S, S) -> (B, channels, S/8, S/8), from the whole image, past no bottleneck."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(down(3, 32), down(32, 64), down(64, 128))
        self.middle = down(128, 128)
        self.deep = nn.Sequential(down(128, 128), up(128, 128))
        self.shallow = up(256, 128)
        self.head = nn.Conv2d(256, channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        fine = self.stem(pixels)
        middle = self.middle(fine)
        deep = fitted_to(self.deep(middle), middle.shape[-2:])
        shallow = fitted_to(self.shallow(torch.cat([middle, deep], 1)), fine.shape[-2:])
        return self.head(torch.cat([fine, shallow], 1))
