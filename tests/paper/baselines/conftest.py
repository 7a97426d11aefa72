"""Toy images with a planted defect, and features of them, for methods to be right about in a second."""

from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as nnf

from dskd_fast.paper.baselines.protocol import Images

SIZE = 64
CHANNELS = (8, 12, 16)


class Toy(NamedTuple):
    """Good images to train on, to validate and to test with; the latter's first half again with a planted square."""

    train: Images
    validation: Images
    good: Images
    bad: Images
    inside: torch.Tensor  # (B, S, S), where the squares are


def images_of(pixels):
    """Features are pooled random convolutions, as untrained networks give."""
    generator = torch.Generator().manual_seed(1)
    kernels = [torch.randn(c, 3, 5, 5, generator=generator) for c in CHANNELS]

    def features(numbers):
        found = [nnf.conv2d(pixels[list(numbers)] - 0.5, kernel, padding=2).relu() for kernel in kernels]
        return [nnf.avg_pool2d(x, stride) for x, stride in zip(found, (4, 8, 16), strict=True)]

    return Images(lambda numbers: pixels[list(numbers)], features, range(len(pixels)))


@pytest.fixture(scope="session")
def toy():
    generator = torch.Generator().manual_seed(0)
    scene = nnf.interpolate(torch.rand(1, 3, 8, 8, generator=generator), (SIZE, SIZE), mode="bicubic").clamp(0, 1)

    def good(n):
        light = 1 + 0.01 * torch.randn(n, 1, 1, 1, generator=generator)
        return (scene * light + 0.02 * torch.randn(n, 3, SIZE, SIZE, generator=generator)).clamp(0, 1)

    train, validation, test = good(24), good(8), good(8)
    bad, inside = test.clone(), torch.zeros(8, SIZE, SIZE, dtype=torch.bool)
    for i in range(8):
        y, x = torch.randint(4, SIZE - 20, (2,), generator=generator).tolist()
        bad[i, :, y : y + 16, x : x + 16] = 1 - bad[i, :, y : y + 16, x : x + 16].flip(-1)
        inside[i, y : y + 16, x : x + 16] = True
    return Toy(*(images_of(pixels) for pixels in (train, validation, test, bad)), inside)
