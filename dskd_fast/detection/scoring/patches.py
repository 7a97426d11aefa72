"""How far each place of an image is from every place of the training images, in the teacher's features alone."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dskd_fast.models.dskd import enlarged

# Patches of training images that are looked at.
MAX_PATCHES = 30_000
# Of all of them a tenth is kept, as PatchCore does, but not fewer, and no more than do not hold up scoring.
_SHARE_KEPT = 10
MIN_KEPT, MAX_KEPT = 1000, 2500
# Squares of distances below this share of the patches' own squares are rounding of float32 products.
_ROUNDING = 1e-5
# Dimensions of the random projection in which those are chosen, as in PatchCore's published code: distances in it are
# off by an eighth, with 32 by a quarter.
_N_PROJECTED = 128
# Dimensions in which patches are compared: principal axes, and the length of the rest as the last one. Of `lite`'s
# patches the rest has 5 % of the variance; all 912 channels take five times as long and find no more.
_N_COMPARED = 96
# Batches that a sample keeps apart: each new one costs a look at all of them.
_MAX_BATCHES = 100


class PatchPart(nn.Module):
    """Distance of each patch from the nearest one of the training images' (PatchCore, arXiv 2106.08265).

    It learns no weights, so it cannot learn few training images by heart, as students do.

    Patches of many channels are compared in fewer dimensions (ours), in which no distance is larger than it is.

    Attributes:
        bank: the patches that are kept, (n, D), as they are compared.
        origin, axes: (C,) and (C, D - 1), of the D dimensions; empty where channels are compared as they are: few, and
            all in runs of earlier versions.
        counts_beyond: 1 where the patches' means count zeros beyond the border, see `DSKD.measure`; 0 in runs of
            earlier versions.
    """

    bank: Tensor
    origin: Tensor
    axes: Tensor
    counts_beyond: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("bank", "origin", "axes"):
            self.register_buffer(name, torch.empty(0))
        self.register_buffer("counts_beyond", torch.ones(()))
        self._images = torch.empty(0)  # of which training image each is

    def fit(self, sample: "PatchSample") -> None:
        """Keep those of the training images' patches that are farthest from each other: greedily, in a projection."""
        patches = sample.patches()
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(patches.shape[1], min(_N_PROJECTED, patches.shape[1]), generator=generator)
        projected = patches @ directions
        projected -= projected.mean(0)
        squares = projected.square().sum(1)
        nearest = torch.full_like(squares, torch.inf)
        chosen = [0]
        n_kept = min(MAX_KEPT, max(MIN_KEPT, sample.n_seen // _SHARE_KEPT))
        for _ in range(min(n_kept, len(patches)) - 1):
            last = chosen[-1]
            sums = squares + squares[last]
            to_last = torch.addmv(sums, projected, projected[last], alpha=-2)
            to_last[to_last <= _ROUNDING * sums] = 0  # copies, but for rounding
            torch.minimum(nearest, to_last, out=nearest)
            farthest = int(nearest.argmax())
            if not nearest[farthest] > 0:
                break
            chosen.append(farthest)
        kept = patches[chosen]
        if kept.shape[1] > _N_COMPARED:
            self.origin = kept.mean(0)
            centred = (kept - self.origin).double()
            axes = torch.linalg.eigh(centred.mT @ centred).eigenvectors  # of the smallest variance first
            self.axes = axes[:, 1 - _N_COMPARED :].float().contiguous()
        self.bank = self._compared(kept).contiguous()
        self._images = sample.images()[chosen]

    def distances(self, patches: Tensor, training_image: int | None = None) -> Tensor:
        """Patches (B, h, w, C) -> maps (B, h, w).

        Args:
            patches: of images.
            training_image: the first one's number, where they are the training images themselves: each is then
                compared with the others alone, if there are others.
        """
        if not torch.compiler.is_compiling() and len(patches) > 1:  # the large matrix of one image stays in the caches
            first = training_image
            return torch.cat(
                [self.distances(one, None if first is None else first + i) for i, one in enumerate(patches.split(1))]
            )
        patches = self._compared(patches)
        # |p - b|^2 = |p|^2 - 2 (p b - |b|^2 / 2): of the large matrix only one is made.
        halves = self.bank.square().sum(1) / 2
        products = torch.addmm(-halves, patches.flatten(0, 2), self.bank.mT).unflatten(0, patches.shape[:3])
        if training_image is not None:
            numbers = torch.arange(training_image, training_image + len(patches))
            is_own = (self._images == numbers[:, None]).to(products.device)
            is_own &= ~is_own.all(1, keepdim=True)
            products = products.masked_fill(is_own[:, None, None], -torch.inf)
        return (patches.square().sum(3) - 2 * products.amax(3)).clamp(min=0).sqrt()

    def forward(self, distances: Tensor, size: int) -> Tensor:
        """Maps (B, h, w) of distances -> (B, S, S)."""
        return enlarged([distances], (size, size))[:, 0]

    def _compared(self, patches: Tensor) -> Tensor:
        """(..., C) -> (..., D)."""
        if not self.axes.numel():
            return patches
        centred = patches - self.origin
        along = centred @ self.axes
        rest = (centred.square().sum(-1, keepdim=True) - along.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
        return torch.cat([along, rest], -1)

    def rounding(self) -> float:
        """Distances below this are rounding."""
        return float((_ROUNDING * (self.origin.square().sum() + self.bank.square().sum(1).max())).sqrt())

    @staticmethod
    def complete(state: dict[str, Any], prefix: str) -> None:
        """Add to a state of an earlier version what it lacks: zeros beyond the border counted for nothing."""
        state.setdefault(prefix + "counts_beyond", torch.zeros(()))
        for name in ("origin", "axes"):
            state.setdefault(prefix + name, torch.empty(0))


class PatchSample:
    """Patches of any number of images, of which `MAX_PATCHES` random ones are kept, so that memory is bounded.

    Every k-th one would be of a few columns of the images alone, the same in all of them.

    Attributes:
        n_seen: how many there were.
    """

    def __init__(self) -> None:
        self.n_seen = 0
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # patches, numbers of their images, keys
        self._n_images = 0
        self._limit = torch.inf  # of the keys that are among the smallest
        # Its numbers do not depend on how many are drawn at a time.
        self._generator = np.random.default_rng(0)

    def add(self, patches: Tensor) -> None:
        """Take patches (B, h, w, C)."""
        n, n_places = len(patches), patches.shape[1] * patches.shape[2]
        numbers = torch.arange(self._n_images, self._n_images + n).repeat_interleave(n_places)
        keys = torch.from_numpy(self._generator.random(len(numbers)))
        is_kept = keys < self._limit
        chosen = patches.flatten(0, 2)[is_kept.to(patches.device)].cpu()
        self._kept.append((chosen, numbers[is_kept], keys[is_kept]))
        self._n_images += n
        self.n_seen += len(keys)
        of_all = torch.cat([keys for *_, keys in self._kept])
        if len(of_all) > MAX_PATCHES:
            self._limit = float(of_all.kthvalue(MAX_PATCHES + 1).values)
            for i, (chosen, numbers, keys) in enumerate(self._kept):
                is_kept = keys < self._limit
                if not is_kept.all():
                    self._kept[i] = chosen[is_kept], numbers[is_kept], keys[is_kept]
        if len(self._kept) > _MAX_BATCHES:
            chosen, numbers, keys = map(torch.cat, zip(*self._kept, strict=True))
            self._kept = [(chosen, numbers, keys)]

    def patches(self) -> Tensor:
        """(n, C)."""
        return torch.cat([patches for patches, _, _ in self._kept])

    def images(self) -> Tensor:
        """(n,): the number of the image of each."""
        return torch.cat([numbers for _, numbers, _ in self._kept])
