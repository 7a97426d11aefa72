"""SPADE: the distance of each pixel's features from those of the nearest good images.

Cohen and Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences" (arXiv 2005.02357). Theirs: the 50
nearest good images by pooled features, whose mean distance is the image score; the map is the distance to the nearest
pixel of any of them, in the features of three levels at the finest's resolution, filtered with sigma 4 (at 224 pixels;
here in proportion). Ours: pooled features are of the teacher's third level, since not every teacher has a fourth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as nnf

from dskd_fast.paper.baselines.blocks import AT_A_TIME
from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.neighbours import nearest
from dskd_fast.paper.baselines.patchcore import SIGMA, filtered
from dskd_fast.paper.baselines.protocol import Baseline, Images

NEAREST_IMAGES = 50


class Spade(Baseline):
    """The features of all good images, and their means."""

    pooled: Tensor

    def __init__(self, size: int, channels: Sequence[int]) -> None:
        super().__init__(size, channels)
        self.register_buffer("pooled", torch.empty(0))
        for i in range(len(self.channels)):
            self.register_buffer(f"level{i}", torch.empty(0))

    def fit(self, images: Images, validation: Images, fitting: Fitting) -> None:
        batches = [batch.features for batch in images.batches(AT_A_TIME)]
        for i, levels in enumerate(zip(*batches, strict=True)):
            setattr(self, f"level{i}", torch.cat(levels))
        self.pooled = _pooled(getattr(self, f"level{len(self.channels) - 1}"))

    def maps(self, images: Images) -> Tensor:
        features = images.features
        retrieved = nearest(_pooled(features[-1]), self.pooled, self._n_nearest).indices
        found = []
        for i, chosen in enumerate(retrieved):
            queries = _pyramid([level[i : i + 1] for level in features])
            gallery = _pyramid([getattr(self, f"level{j}")[chosen] for j in range(len(self.channels))])
            distances = nearest(queries.flatten(0, 2), gallery.flatten(0, 2)).distances
            found.append(distances.view(queries.shape[:3]))
        return filtered(self.at_size(torch.cat(found)), SIGMA * self.size)

    def score(self, images: Images, maps: Tensor) -> Tensor:
        return nearest(_pooled(images.features[-1]), self.pooled, self._n_nearest).distances.mean(1)

    @property
    def _n_nearest(self) -> int:
        return min(NEAREST_IMAGES, len(self.pooled))


def _pooled(level: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C)."""
    return level.mean((2, 3))


def _pyramid(levels: Sequence[Tensor]) -> Tensor:
    """Levels (B, C, h, w) -> (B, h1, w1, sum of C) at the finest's resolution."""
    size = levels[0].shape[-2:]
    same = [levels[0]] + [nnf.interpolate(x, size, mode="bilinear", align_corners=False) for x in levels[1:]]
    return torch.cat(same, 1).permute(0, 2, 3, 1).contiguous()
