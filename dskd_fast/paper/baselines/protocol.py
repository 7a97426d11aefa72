"""What every method of the paper's table is: fitted on good images, it gives maps and scores."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from dskd_fast.models.dskd import enlarged
from dskd_fast.paper.baselines.fitting import Fitting


class Images:
    """Images as all methods are given them: pixels, and the teacher's features, which are shared.

    Args:
        pixels: numbers of images -> (B, 3, S, S), float32 from 0 to 1.
        features: numbers of images -> the teacher's levels, (B, C, h, w) each, finest first.
        numbers: of the images that these are.
    """

    def __init__(
        self,
        pixels: Callable[[Sequence[int]], Tensor],
        features: Callable[[Sequence[int]], list[Tensor]],
        numbers: Sequence[int],
    ) -> None:
        self._pixels = pixels
        self._features = features
        self._numbers = list(numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def of(self, chosen: Sequence[int]) -> "Images":
        """Those at these positions, in that order."""
        return Images(self._pixels, self._features, [self._numbers[i] for i in chosen])

    def batches(self, size: int) -> Iterator["Images"]:
        """All, in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.of(range(start, min(start + size, len(self))))

    @property
    def pixels(self) -> Tensor:
        """(B, 3, S, S), float32 from 0 to 1."""
        return self._pixels(self._numbers)

    @cached_property
    def features(self) -> list[Tensor]:
        """The teacher's levels, (B, C, h, w) each, finest first."""
        return self._features(self._numbers)


class Baseline(nn.Module, ABC):
    """A method that is compared with. Its parameters and buffers are all that it keeps.

    Args:
        size: S of the images and maps.
        channels: of the teacher's levels, finest first.

    Attributes:
        relative_steps: training steps for each step that the paper's method takes; 0 where nothing is trained.
    """

    relative_steps: ClassVar[float] = 0

    def __init__(self, size: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.size = size
        self.channels = tuple(channels)

    @abstractmethod
    def fit(self, images: Images, validation: Images, fitting: Fitting) -> None:
        """Learn from good images alone.

        Args:
            images: to train on.
            validation: to normalise maps by; the training images where there are no others.
            fitting: how long, and whom to tell how far it is.

        Raises:
            UserError: the training diverges.
            TrainingStopped: by a signal.
        """

    @abstractmethod
    def maps(self, images: Images) -> Tensor:
        """Images -> maps (B, S, S), float32, higher meaning more anomalous."""

    def score(self, images: Images, maps: Tensor) -> Tensor:
        """Images and their `maps` -> image scores (B,): the maximum of a map, unless the method has its own."""
        return maps.amax((1, 2))

    def at_size(self, maps: Tensor) -> Tensor:
        """(B, h, w) -> (B, S, S)."""
        return enlarged([maps], (self.size, self.size))[:, 0]

    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        """Take the parameters and buffers of a method that was fitted, as its `state_dict` gave them.

        Raises:
            RuntimeError: they are not this method's.
        """
        for name, buffer in self.named_buffers():
            if name in arrays:  # of a memory the length depends on the images
                buffer.data = torch.empty_like(arrays[name], device=buffer.device)
        self.load_state_dict(arrays)
        self.eval()
