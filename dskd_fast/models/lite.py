"""The teacher `lite`, of TensorFlow's EfficientNet-Lite0, without timm, which takes seconds to import."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

# Of the stages after the first: blocks, channels, kernel and stride (of the first block). The fourth begins no level.
_STAGES = [(2, 24, 3, 2), (2, 40, 5, 2), (3, 80, 3, 2), (3, 112, 5, 1)]
_EXPANSION = 6


class LiteFeatures(nn.Module):
    """EfficientNet-Lite0 up to the expansion of its last strided block.

    Features are the expanded activations (after ReLU6) that enter the depthwise convolution of the three strided
    blocks after the first: wide, rectified, and much better for distillation than the narrow linear block outputs.

    Names of the parts are timm's. Building it leaves the process's random numbers as they are.
    """

    channels = (144, 240, 672)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.conv_stem, self.bn1 = _convolution(3, 32, 3, 2), _norm(32)
            stages = [nn.Sequential(_Separable(32, 16))]
            width = 16
            for n_blocks, channels, kernel, stride in _STAGES:
                first = _Inverted(width, channels, kernel, stride)
                others = (_Inverted(channels, channels, kernel, 1) for _ in range(n_blocks - 1))
                stages.append(nn.Sequential(first, *others))
                width = channels
            self.blocks = nn.Sequential(*stages, nn.Sequential(_Expansion(width)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, S, S), S a multiple of 32 -> three levels."""
        x = _rectified(self.bn1(self.conv_stem(_padded(x, self.conv_stem))))
        features = []
        stage: Any
        for index, stage in enumerate(self.blocks):
            if index in (2, 3, 5):
                features.append(stage[0].expanded(x))
            if index in (2, 3):
                x = stage[0].projected(features[-1])
                for later in stage[1:]:
                    x = later(x)
            elif index < 5:
                x = stage(x)
        return features


class _Separable(nn.Module):
    """The first block: a depthwise convolution and a projection."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_dw, self.bn1 = _convolution(in_channels, in_channels, 3, groups=in_channels), _norm(in_channels)
        self.conv_pw, self.bn2 = _convolution(in_channels, out_channels, 1), _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv_pw(_rectified(self.bn1(self.conv_dw(x)))))


class _Expansion(nn.Module):
    """The first convolution of an inverted residual block."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        width = _EXPANSION * in_channels
        self.conv_pw, self.bn1 = _convolution(in_channels, width, 1), _norm(width)

    def expanded(self, x: Tensor) -> Tensor:
        return _rectified(self.bn1(self.conv_pw(x)))


class _Inverted(_Expansion):
    """An inverted residual block, with a shortcut where it keeps size and channels."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__(in_channels)
        width = _EXPANSION * in_channels
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.conv_dw, self.bn2 = _convolution(width, width, kernel, stride, groups=width), _norm(width)
        self.conv_pwl, self.bn3 = _convolution(width, out_channels, 1), _norm(out_channels)

    def projected(self, x: Tensor) -> Tensor:
        x = _rectified(self.bn2(self.conv_dw(_padded(x, self.conv_dw))))
        return self.bn3(self.conv_pwl(x))

    def forward(self, x: Tensor) -> Tensor:
        projected = self.projected(self.expanded(x))
        return projected + x if self.has_shortcut else projected


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = kernel // 2 if stride == 1 else 0  # else `_padded` pads
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _rectified(x: Tensor) -> Tensor:
    return nnf.relu6(x, inplace=True)


def _padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What enters a convolution of stride 2: of TensorFlow's padding for even sides the odd pixel is at the end."""
    if conv.stride == (1, 1):
        return x
    total = conv.kernel_size[0] - 2
    before, after = total // 2, total - total // 2
    return nnf.pad(x, (before, after, before, after))
