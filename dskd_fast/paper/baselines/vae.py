"""VAE: how far each pixel is from its reconstruction by a variational autoencoder.

As compared with in Bergmann et al., "Beyond Dents and Scratches" (IJCV 2022); Kingma and Welling, "Auto-Encoding
Variational Bayes" (2014). Theirs: squared errors and the Kullback-Leibler divergence from a standard normal
distribution. Ours: the autoencoder of `ae`, both of the mean and the variance from its bottleneck, unit variance of the
pixels, so that the divergence weighs as the bound says; scored by the reconstruction of the mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dskd_fast.paper.baselines.ae import LATENT, SIDE, WIDTHS
from dskd_fast.paper.baselines.blocks import ImageDecoder, ImageEncoder, OfPixels, squared_error, train_networks
from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.protocol import Images

# Log variances beyond are no longer finite as variances in a step or two.
_MOST = 10.0


class VariationalAutoencoder(OfPixels):
    """An encoder to a distribution and a decoder; the map is the squared error, the mean over colours."""

    relative_steps = 5

    def __init__(self, size: int, channels: Sequence[int], side: int = SIDE, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__(size, channels, side)
        self.encoder = ImageEncoder(side, 2 * LATENT, widths)
        self.decoder = ImageDecoder(side, LATENT, widths[::-1])

    def fit(self, images: Images, validation: Images, fitting: Fitting) -> None:
        train_networks(self, images, fitting, self._loss)

    def maps(self, images: Images) -> Tensor:
        inputs = self.inputs(images)
        mean, _ = self.encoder(inputs).chunk(2, 1)
        return self.at_size(squared_error(self.decoder(mean), inputs))

    def _loss(self, images: Images) -> Tensor:
        """Minus the evidence lower bound, for each number of an image."""
        inputs = self.inputs(images)
        mean, log_variance = self.encoder(inputs).chunk(2, 1)
        log_variance = log_variance.clamp(-_MOST, _MOST)
        latent = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        error = (self.decoder(latent) - inputs).square().flatten(1).sum(1) / 2
        return (error + divergence).mean() / inputs[0].numel()
