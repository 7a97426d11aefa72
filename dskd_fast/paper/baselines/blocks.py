"""What several methods are built of: small networks, and maps in deviations from the normal mean."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.protocol import Baseline, Images

AT_A_TIME = 16
"""Images in a pass that needs no gradients."""

SLOPE = 0.2


class Normaliser(nn.Module):
    """Maps in standard deviations from their mean, both over all pixels of normal images."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def fit(self, maps: Iterable[Tensor]) -> None:
        """Take the statistics from batches of maps."""
        values = torch.cat([x.flatten() for x in maps]).double()
        self.mean.copy_(values.mean())
        std = values.std()
        self.std.copy_(std if std > 0 else torch.ones_like(std))

    def forward(self, maps: Tensor) -> Tensor:
        return (maps - self.mean) / self.std


def down(inputs: int, outputs: int, kernel: int = 4) -> nn.Sequential:
    """Half the size."""
    padding = (kernel - 1) // 2
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, 2, padding, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(SLOPE)
    )


def up(inputs: int, outputs: int) -> nn.Sequential:
    """Twice the size."""
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(SLOPE)
    )


class ImageDecoder(nn.Sequential):
    """A latent vector (B, latent) -> an image (B, 3, side, side) by transposed convolutions from 4 x 4."""

    def __init__(self, side: int, latent: int, widths: Sequence[int]) -> None:
        first, *rest = widths
        pairs = zip(widths, rest, strict=False)
        super().__init__(
            nn.Linear(latent, first * 16),
            nn.Unflatten(1, (first, 4, 4)),
            *(up(a, b) for a, b in pairs),
            nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1),
        )
        check_side(side, len(widths))


class ImageEncoder(nn.Sequential):
    """An image (B, 3, side, side) -> a vector (B, outputs), by convolutions down to 4 x 4."""

    def __init__(self, side: int, outputs: int, widths: Sequence[int]) -> None:
        pairs = zip((3, *widths), widths, strict=False)
        super().__init__(*(down(a, b) for a, b in pairs), nn.Flatten(), nn.Linear(widths[-1] * 16, outputs))
        check_side(side, len(widths))


def check_side(side: int, n_halvings: int) -> None:
    """Raise ValueError unless so many halvings make 4 of a side."""
    if side != 4 * 2**n_halvings:
        raise ValueError(f"side must be {4 * 2**n_halvings} with {n_halvings} levels, not {side}")


class OfPixels(Baseline):
    """A method that sees the images in one small size, whatever S is.

    Args:
        size, channels: see `Baseline`.
        side: of the images that the networks take.
    """

    def __init__(self, size: int, channels: Sequence[int], side: int) -> None:
        super().__init__(size, channels)
        self.side = side

    def inputs(self, images: Images) -> Tensor:
        """(B, 3, side, side), from -1 to 1."""
        pixels = images.pixels
        if self.side != pixels.shape[-1]:
            smaller = self.side < pixels.shape[-1]
            pixels = nnf.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=smaller)
        return 2 * pixels - 1


def squared_error(found: Tensor, wanted: Tensor) -> Tensor:
    """(B, C, h, w) each -> (B, h, w), the mean over channels."""
    return (found - wanted).square().mean(1)


def fit_normalisers(images: Images, of_batch: Callable[[Images], Tensor], *normalisers: Normaliser) -> None:
    """Take the statistics of normal images' maps (B, n, h, w), one for each of n normalisers."""
    with torch.no_grad():
        found = [of_batch(batch) for batch in images.batches(AT_A_TIME)]
    for i, normaliser in enumerate(normalisers):
        normaliser.fit(maps[:, i] for maps in found)


def train_networks(
    method: Baseline,
    images: Images,
    fitting: Fitting,
    loss_of: Callable[[Images], Tensor],
) -> None:
    """Train all parameters of a method, then leave it in eval mode."""
    method.train()
    fitting.train(method.parameters(), images, method.relative_steps, loss_of)
    method.eval()
