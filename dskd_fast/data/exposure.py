"""Brightness and contrast of images."""

import torch
from torch import Tensor

MAX_LUMINANCE = 255.0
# Thousandths of red, green and blue in the luminance (ITU-R BT.601): whole numbers, so that white is 255 exactly.
_LUMA = (299, 587, 114)


def measure_exposure(images: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the luminance, from 0 to 255, of uint8 RGB images (B, 3, H, W): (B,) each."""
    red, green, blue = (weight * images[:, i].to(dtype) for i, weight in enumerate(_LUMA))
    luminance = ((red + green + blue) / 1000).flatten(1)
    mean = luminance.mean(1)
    deviation = (luminance - mean[:, None]).square().mean(1).sqrt()
    # Rounding must not lift them beyond limits that no image can be beyond.
    return mean.clamp(max=MAX_LUMINANCE), deviation.clamp(max=MAX_LUMINANCE / 2)
