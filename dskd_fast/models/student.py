"""The students' architecture: a ResNet run backwards, from the embedding to the teacher's three levels."""

from torch import Tensor, nn

from dskd_fast.models.blocks import stage
from dskd_fast.models.teacher import Level


class Student(nn.Module):
    """Mirrored ResNet: 3, 4 and 6 bottleneck blocks, each stage doubling the size (as in Reverse Distillation).

    Args:
        levels: the teacher's, whose channels and inner widths it takes.
        rectified: whether the outputs are ReLU outputs; they should be where the teacher's are.
    """

    def __init__(self, levels: list[Level], rectified: bool = True) -> None:
        super().__init__()
        first, second, third = levels
        self.up3 = stage(3, 2 * third.channels, third.width, third.channels, "up", rectified)
        self.up2 = stage(4, third.channels, second.width, second.channels, "up", rectified)
        self.up1 = stage(6, second.channels, first.width, first.channels, "up", rectified)

    def forward(self, embedding: Tensor) -> list[Tensor]:
        """Embedding (B, 2 C3, h, h) -> features with the shapes of the teacher's levels, finest first."""
        f3 = self.up3(embedding)
        f2 = self.up2(f3)
        return [self.up1(f2), f2, f3]
