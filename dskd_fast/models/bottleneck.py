"""The bottlenecks between teacher and students: OCBE of the local branch, OCBE with GCCB of the global one."""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from dskd_fast.models.blocks import conv_bn_relu, stage
from dskd_fast.models.teacher import Level


class LocalBottleneck(nn.Module):
    """OCBE_loc: multi-scale fusion of the three levels, then a one-class embedding (as in Reverse Distillation).

    Level 1 passes two 3x3 convolutions with stride 2, level 2 one; concatenated with level 3 they enter a ResNet stage
    of three bottleneck blocks that halves the size and gives twice level 3's channels.
    """

    def __init__(self, levels: list[Level]) -> None:
        super().__init__()
        c1, c2, c3 = (level.channels for level in levels)
        self.fuse1 = nn.Sequential(conv_bn_relu(_halving(c1, c2)), conv_bn_relu(_halving(c2, c3)))
        self.fuse2 = conv_bn_relu(_halving(c2, c3))
        self.embed = stage(3, 3 * c3, 2 * levels[2].width, 2 * c3, "down")

    def forward(self, features: list[Tensor]) -> Tensor:
        f1, f2, f3 = features
        return self.embed(torch.cat([self.fuse1(f1), self.fuse2(f2), f3], dim=1))


class GlobalBottleneck(nn.Module):
    """OCBE_glo: a trainable ResNet stage 4 on level 3, then the global context condensing block.

    Args:
        levels: the teacher's.
        size: height and width of the embedding (the image size divided by twice level 3's stride).
        gccb: g, channels of the condensed vector; 0 leaves the block out; as many as the embedding's channels leave its
            1x1 convolutions out.
    """

    def __init__(self, levels: list[Level], size: int, gccb: int) -> None:
        super().__init__()
        c3 = levels[2].channels
        self.embed = stage(3, c3, 2 * levels[2].width, 2 * c3, "down")
        self.condense = GlobalContextCondensing(2 * c3, size, gccb) if gccb else nn.Identity()

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The teacher's levels -> the embedding and the condensed vectors (B, g), None without a GCCB."""
        embedding = self.embed(features[2])
        if isinstance(self.condense, GlobalContextCondensing):
            return self.condense(embedding)
        return embedding, None


class GlobalContextCondensing(nn.Module):
    """GCCB: the whole map is condensed into one vector of g channels and restored from it.

    1x1 convolution to g, a convolution as large as the map, a transposed one back, 1x1 convolution from g. The vector
    itself is linear, without norm or activation: batch norm over one value per image would make every image's vector
    depend on its batch. The other convolutions are followed by batch norm and ReLU. (The paper names neither kernels
    nor norms.)
    """

    def __init__(self, channels: int, size: int, g: int) -> None:
        super().__init__()
        same = g == channels
        self.reduce = nn.Identity() if same else conv_bn_relu(nn.Conv2d(channels, g, 1, bias=False))
        self.condense = WholeMapConv2d(g, g, size)
        self.restore = conv_bn_relu(WholeMapConvTranspose2d(g, g, size))
        self.expand = nn.Identity() if same else conv_bn_relu(nn.Conv2d(g, channels, 1, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, k, k) -> the map restored from the vectors (B, g), and these."""
        condensed = self.condense(self.reduce(x))
        return self.expand(self.restore(condensed)), condensed.flatten(1)


# A convolution as large as the map is one matrix product, bound by the reading of its weights (67 million in the
# paper's block). They are multiplied as they lie, without the reordering of a convolution library, and in float32
# whatever autocast says: to round them first would read and write more than it saves.


class WholeMapConv2d(nn.Conv2d):
    """(B, C, k, k) -> (B, O, 1, 1) for a kernel of size k."""

    def forward(self, x: Tensor) -> Tensor:
        with _float32_products(x.device):
            rows, weight = (_in_order_of(self.weight, y) for y in (x.to(self.weight.dtype), self.weight))
            return nnf.linear(rows, weight, self.bias)[..., None, None]


class WholeMapConvTranspose2d(nn.ConvTranspose2d):
    """(B, C, 1, 1) -> (B, O, k, k) for a kernel of size k, without bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # its output has one size only
        channels, height, width = self.weight.shape[1:]
        with _float32_products(x.device):
            restored = x.to(self.weight.dtype).flatten(1) @ _in_order_of(self.weight, self.weight)
        if self.weight.is_contiguous():
            return restored.unflatten(1, (channels, height, width))
        return restored.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)


def _float32_products(device: torch.device) -> contextlib.AbstractContextManager:
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else contextlib.nullcontext()


def _in_order_of(weight: Tensor, x: Tensor) -> Tensor:
    """(A, C, k, k) -> (A, C k k), in the order in which `weight` lies in memory."""
    return (x if weight.is_contiguous() else x.permute(0, 2, 3, 1)).flatten(1)


def _halving(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
