"""The residual blocks that both branches are made of."""

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """ResNet bottleneck block: 1x1, 3x3, 1x1, each with batch norm, and a shortcut.

    Args:
        in_channels, width, out_channels: of the input, the 3x3 convolution and the output.
        resample: "none", "down" (the 3x3 convolution and the shortcut have stride 2) or "up" (both become 2x2
            transposed convolutions with stride 2, as in Reverse Distillation).
        rectified: whether a ReLU follows the sum.

    Names of the parts are torchvision's, so that a teacher's stage 4 can be loaded.
    """

    def __init__(
        self, in_channels: int, width: int, out_channels: int, resample: str = "none", rectified: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _resampling(width, width, 3, resample)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.out = nn.ReLU(inplace=True) if rectified else nn.Identity()
        self.downsample = None
        if resample != "none" or in_channels != out_channels:
            self.downsample = nn.Sequential(
                _resampling(in_channels, out_channels, 1, resample), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.out(self.bn3(self.conv3(x)) + shortcut)


def stage(
    blocks: int, in_channels: int, width: int, out_channels: int, resample: str, rectified: bool = True
) -> nn.Sequential:
    """`blocks` bottleneck blocks, the first of which resamples; `rectified` says whether the stage ends in a ReLU."""
    return nn.Sequential(
        *(
            Bottleneck(
                in_channels if i == 0 else out_channels,
                width,
                out_channels,
                resample if i == 0 else "none",
                rectified or i < blocks - 1,
            )
            for i in range(blocks)
        )
    )


def conv_bn_relu(conv: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    """A convolution without bias, batch norm, ReLU."""
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True))


def _resampling(in_channels: int, out_channels: int, kernel: int, resample: str) -> nn.Conv2d | nn.ConvTranspose2d:
    if resample == "up":
        return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2, bias=False)
    stride = 2 if resample == "down" else 1
    return nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
