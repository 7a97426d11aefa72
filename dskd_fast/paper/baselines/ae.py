"""AE: how far each pixel is from its reconstruction by a convolutional autoencoder.

Bergmann et al., "Improving Unsupervised Defect Segmentation by Applying Structural Similarity to Autoencoders" (2018)
and "MVTec AD" (CVPR 2019), the l2 form. Theirs: images of 128 x 128, a bottleneck of 100, Adam. Ours: fewer and larger
convolutions with batch normalisation, and so few steps that batches see an image some dozens of times; they train for
hundreds of passes over augmented images, or crops of them.
"""

from collections.abc import Sequence

from torch import Tensor

from dskd_fast.paper.baselines.blocks import ImageDecoder, ImageEncoder, OfPixels, squared_error, train_networks
from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.protocol import Images

LATENT = 100
SIDE = 128
WIDTHS = (32, 32, 64, 64, 128)


class Autoencoder(OfPixels):
    """An encoder to a vector and a decoder; the map is the squared error, the mean over colours."""

    relative_steps = 5

    def __init__(self, size: int, channels: Sequence[int], side: int = SIDE, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__(size, channels, side)
        self.encoder = ImageEncoder(side, LATENT, widths)
        self.decoder = ImageDecoder(side, LATENT, widths[::-1])

    def fit(self, images: Images, validation: Images, fitting: Fitting) -> None:
        train_networks(self, images, fitting, lambda batch: self._errors(batch).mean())

    def maps(self, images: Images) -> Tensor:
        return self.at_size(self._errors(images))

    def _errors(self, images: Images) -> Tensor:
        inputs = self.inputs(images)
        return squared_error(self.decoder(self.encoder(inputs)), inputs)
