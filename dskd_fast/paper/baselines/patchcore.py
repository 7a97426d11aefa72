"""PatchCore-25: the distance of each patch from the nearest of a memory of good patches.

Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (CVPR 2022), with a memory of 25 %. Theirs: levels 2
and 3 averaged over 3 x 3 positions, the coreset by greedy selection in a random projection, the image score reweighted
by the neighbours of the nearest memory item, maps filtered with sigma 4 (at 224 pixels; here in proportion). Ours: the
teacher is the one of all methods, and channels are not pooled down to 1024.
"""

from collections.abc import Sequence

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as nnf

from dskd_fast.paper.baselines.blocks import AT_A_TIME
from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.neighbours import Neighbours, nearest
from dskd_fast.paper.baselines.protocol import Baseline, Images

SHARE = 0.25
NEIGHBOURS = 9
"""Items around the nearest one that weigh the image score."""
SIGMA = 4 / 224
"""Of the filter of maps, as a share of their side."""
# Channels in which distances between patches are compared for the selection, as in the published code.
_N_PROJECTED = 128


class PatchCore(Baseline):
    """A memory of a quarter of the good images' patches."""

    memory: Tensor

    def __init__(self, size: int, channels: Sequence[int]) -> None:
        super().__init__(size, channels)
        self.register_buffer("memory", torch.empty(0))
        self._last: tuple[Images | None, Neighbours | None, Tensor | None] = (None, None, None)

    def fit(self, images: Images, validation: Images, fitting: Fitting) -> None:
        patches = torch.cat([patches_of(batch.features).flatten(0, 2) for batch in images.batches(AT_A_TIME)])
        n = max(1, round(SHARE * len(patches)))
        self.memory = patches[coreset(patches, n, fitting)].contiguous()

    def maps(self, images: Images) -> Tensor:
        patches = patches_of(images.features)
        found = nearest(patches.flatten(0, 2), self.memory)
        # Kept for the score, since the search is all that takes time.
        self._last = images, found, patches
        return filtered(self.at_size(found.distances.view(patches.shape[:3])), SIGMA * self.size)

    def score(self, images: Images, maps: Tensor) -> Tensor:
        if self._last[0] is not images:
            self.maps(images)
        _, found, patches = self._last
        assert found is not None  # as `maps` has left it
        assert patches is not None
        distances, worst = found.distances.view(len(images), -1).max(1)
        rows = torch.arange(len(images), device=worst.device)
        item = found.indices.view(len(images), -1)[rows, worst]
        patch = patches.flatten(1, 2)[rows, worst]
        around = nearest(self.memory[item], self.memory, min(NEIGHBOURS, len(self.memory))).indices
        to_around = (self.memory[around] - patch[:, None]).square().sum(2).sqrt()
        # Eq. 7, as differences: the exponentials of distances overflow.
        return (1 - (distances - to_around.logsumexp(1)).exp()) * distances


def patches_of(features: Sequence[Tensor]) -> Tensor:
    """Three levels (B, C, h, w) -> patches (B, h2, w2, C2 + C3) of the second and the third."""
    second, third = (nnf.avg_pool2d(x, 3, stride=1, padding=1) for x in features[1:])
    third = nnf.interpolate(third, second.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([second, third], 1).permute(0, 2, 3, 1).contiguous()


def coreset(patches: Tensor, n: int, fitting: Fitting) -> Tensor:
    """Indices (n,) of patches (m, C): each next one is the farthest from all before, in a random projection.

    Fewer where all others are copies of those that are chosen.
    """
    directions = torch.randn(patches.shape[1], min(_N_PROJECTED, patches.shape[1]), device=patches.device)
    projected = patches @ directions
    projected -= projected.mean(0)
    squares = projected.square().sum(1)
    nearest_square = torch.full_like(squares, torch.inf)
    chosen = [int(torch.randint(len(patches), ()))]
    while len(chosen) < n:
        last = projected[chosen[-1]]
        torch.minimum(
            nearest_square, torch.addmv(squares + squares[chosen[-1]], projected, last, alpha=-2), out=nearest_square
        )
        nearest_square[chosen[-1]] = 0
        farthest = int(nearest_square.argmax())
        if not nearest_square[farthest] > 0:
            break
        chosen.append(farthest)
        if len(chosen) % 256 == 0:
            fitting.heed("selecting patches", len(chosen), n)
    return torch.tensor(chosen, device=patches.device)


def filtered(maps: Tensor, sigma: float) -> Tensor:
    """Maps (B, S, S) after a Gaussian filter."""
    values = ndimage.gaussian_filter(maps.cpu().numpy(), (0, sigma, sigma))
    return torch.from_numpy(values).to(maps.device)
