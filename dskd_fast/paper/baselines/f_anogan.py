"""f-AnoGAN: how far an image is from what a generative adversarial network, trained on good ones, can make of it.

Schlegl et al., "f-AnoGAN: Fast unsupervised anomaly detection with generative adversarial networks" (Medical Image
Analysis 2019). Theirs: a WGAN-GP (five critic steps for each of the generator), then an encoder that is trained through
the frozen generator by errors of images and of the critic's features (izi_f, kappa 1); score A_R + kappa A_D, map |x -
G(E(x))|. Ours: whole images of 64 x 64 in place of patches, smaller networks, and few steps, at a rate of 0.001 in
place of 0.0001.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dskd_fast.paper.baselines.blocks import ImageDecoder, ImageEncoder, OfPixels
from dskd_fast.paper.baselines.fitting import Fitting, descend
from dskd_fast.paper.baselines.protocol import Images

LATENT = 128
WIDTHS = (32, 64, 128, 128)
KAPPA = 1.0
_CRITIC_STEPS = 5
_PENALTY = 10.0
_RATE, _BETAS = 1e-3, (0.0, 0.9)


class FAnoGan(OfPixels):
    """Generator, critic and encoder."""

    relative_steps = 1.5

    def __init__(self, size: int, channels: Sequence[int], side: int = 64, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__(size, channels, side)
        self.generator = nn.Sequential(ImageDecoder(side, LATENT, widths[::-1]), nn.Tanh())
        # No batch normalisation: the penalty is on the gradient of each image by itself.
        pairs = zip((3, *widths), widths, strict=False)
        layers = [layer for a, b in pairs for layer in (nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.2))]
        self.critic_features = nn.Sequential(*layers, nn.Flatten())
        self.critic_head = nn.Linear(widths[-1] * 16, 1)
        self.encoder = ImageEncoder(side, LATENT, widths)

    def fit(self, images: Images, validation: Images, fitting: Fitting) -> None:
        self.train()
        self._fit_gan(images, fitting)
        self.generator.requires_grad_(False).eval()
        self.critic_features.requires_grad_(False)
        fitting.train(
            self.encoder.parameters(),
            images,
            2 * self.relative_steps,
            lambda batch: self._residual(batch).mean(),
            "training the encoder",
        )
        self.requires_grad_(True)
        self.eval()

    def maps(self, images: Images) -> Tensor:
        inputs = self.inputs(images)
        return self.at_size((inputs - self._reconstructed(inputs)).abs().mean(1))

    def score(self, images: Images, maps: Tensor) -> Tensor:
        return self._residual(images)

    def _reconstructed(self, inputs: Tensor) -> Tensor:
        return self.generator(self.encoder(inputs))

    def _residual(self, images: Images) -> Tensor:
        """A_R + kappa A_D, (B,)."""
        inputs = self.inputs(images)
        found = self._reconstructed(inputs)
        of_features = (self.critic_features(inputs) - self.critic_features(found)).square().mean(1)
        return (inputs - found).square().flatten(1).mean(1) + KAPPA * of_features

    def _fit_gan(self, images: Images, fitting: Fitting) -> None:
        of_critic = [*self.critic_features.parameters(), *self.critic_head.parameters()]
        critic = torch.optim.Adam(of_critic, lr=_RATE, betas=_BETAS)
        generator = torch.optim.Adam(self.generator.parameters(), lr=_RATE, betas=_BETAS)
        batches = fitting.batches(images, _CRITIC_STEPS * self.relative_steps, "training the generator")
        for step, batch in enumerate(batches, 1):
            real = self.inputs(batch)
            with torch.no_grad():
                made = self.generator(torch.randn(len(real), LATENT, device=real.device))
            descend(critic, self._criticised(made).mean() - self._criticised(real).mean() + self._penalty(real, made))
            if step % _CRITIC_STEPS == 0:
                noise = torch.randn(len(real), LATENT, device=real.device)
                descend(generator, -self._criticised(self.generator(noise)).mean())

    def _criticised(self, inputs: Tensor) -> Tensor:
        return self.critic_head(self.critic_features(inputs))

    def _penalty(self, real: Tensor, made: Tensor) -> Tensor:
        """How far the critic's gradient between real and made images is from length 1."""
        shares = torch.rand(len(real), 1, 1, 1, device=real.device)
        between = (shares * real + (1 - shares) * made).requires_grad_()
        (gradient,) = torch.autograd.grad(self._criticised(between).sum(), between, create_graph=True)
        return _PENALTY * (gradient.flatten(1).norm(dim=1) - 1).square().mean()
