"""VM, the variation model: the deviation of each pixel from its mean over aligned good images.

As compared with in Bergmann et al., "Beyond Dents and Scratches" (IJCV 2022), after C. Steger, M. Ulrich, C. Wiedemann,
"Machine Vision Algorithms and Applications". Ours: images are taken for aligned, as the camera gave them, and a pixel
that hardly varies counts as varying by one grey value of 8 bits, so that noise is no defect.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dskd_fast.paper.baselines.blocks import AT_A_TIME
from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.protocol import Baseline, Images

# Luma of ITU-R BT.601, as grey images are usually made.
_GREY = (0.299, 0.587, 0.114)
_LEAST_DEVIATION = 1 / 255


class VariationModel(Baseline):
    """Per-pixel mean and standard deviation of grey images; the map is their z-score's magnitude."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, size: int, channels: Sequence[int]) -> None:
        super().__init__(size, channels)
        self.register_buffer("mean", torch.zeros(size, size))
        self.register_buffer("deviation", torch.ones(size, size))

    def fit(self, images: Images, validation: Images, fitting: Fitting) -> None:
        # In float64, where the difference of sums of squares does not cancel.
        sums = torch.zeros(2, self.size, self.size, dtype=torch.float64, device=self.mean.device)
        for batch in images.batches(AT_A_TIME):
            grey = _grey(batch.pixels).double()
            sums += torch.stack([grey.sum(0), grey.square().sum(0)])
        mean, square = sums / len(images)
        self.mean.copy_(mean)
        self.deviation.copy_((square - mean.square()).clamp(min=0).sqrt().clamp(min=_LEAST_DEVIATION))

    def maps(self, images: Images) -> Tensor:
        return (_grey(images.pixels) - self.mean).abs() / self.deviation


def _grey(pixels: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, S, S)."""
    return torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor(_GREY))
