"""The frozen teacher as training uses it: cheaper than the one that the run keeps, and not asked twice."""

import copy
import math
import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dskd_fast.data.store import ImageStore
from dskd_fast.detection.detector import to_float
from dskd_fast.device import is_out_of_memory, numerics
from dskd_fast.models.folding import fold
from dskd_fast.models.teacher import Teacher
from dskd_fast.progress import log
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training.distributed import Group

KEPT_BYTES = 2 * 2**30
"""Most that kept features may take in all processes together, where that is no more than a quarter of the memory: those
of 292 images at 256 x 256 of the paper's teacher, of 2131 at 128 x 128 of `lite`, and of twice as many in bf16."""

# So often something is said of features that take long.
PROGRESS_SECONDS = 10.0

# Images for which features are computed together, whatever the batches of the training: the same each time.
_AT_A_TIME = 8


class FrozenTeacher:
    """A teacher that gives the features that the students learn, in the type of the training.

    In bf16 only these are rounded. Computed in bf16, they would be so far from those that score the images that the
    gradients of trained students are off by up to 40 % in place of 5 % (README.md beside this file).

    Args:
        teacher: stays as it is; a copy of it is folded.
        options: the recipe.
    """

    def __init__(self, teacher: Teacher, options: TrainingOptions) -> None:
        self.is_rounded = options.precision == "bf16"
        self.precision = "tf32" if self.is_rounded else options.precision  # which is float32 on a CPU
        self.device = teacher.mean.device
        network = copy.deepcopy(teacher)
        fold(network)
        self._network: Callable[[Tensor], list[Tensor]] = torch.compile(network) if options.compile else network

    def __call__(self, images: Tensor) -> list[Tensor]:
        """RGB images (B, 3, S, S), float in [0, 1] -> three feature maps, finest first."""
        with numerics(self.precision, self.device):
            # Not in inference mode: the students' first convolutions save features for their gradients.
            features = self._network(images)
        return [x.bfloat16() for x in features] if self.is_rounded else features

    def features_of(self, images: ImageStore, n: int, group: Group) -> "KeptFeatures | None":
        """The features of the first n images of a store, each process's share computed there.

        None, and why to the logger, if they are too large for the memory of any process.
        """
        try:
            levels = self._levels_of(images, n, group)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            levels = []
        if group.add(torch.tensor([float(not levels)], dtype=torch.float64)).item():
            log.info(
                "the teacher's features of the %d images are too large to be kept, so it runs in every step "
                "(rounding may differ from that of a training that keeps them)",
                n,
            )
            return None
        for level in levels:
            group.exchange(level)
        return KeptFeatures(levels)

    def _levels_of(self, images: ImageStore, n: int, group: Group) -> list[Tensor]:
        """For each level (n, h, w, C), of which this process's share is computed; none if they are too large."""
        share = group.share(n)
        levels: list[Tensor] = []
        told = time.monotonic()
        for start in range(share.start, share.stop, _AT_A_TIME):
            stop = min(start + _AT_A_TIME, share.stop)
            found = [x.permute(0, 2, 3, 1) for x in self(to_float(images.batch(range(start, stop)), self.device))]
            if not levels:
                n_bytes = n * sum(x[0].nbytes for x in found)
                # Each process has all of them, and the processes may be of one machine.
                if n_bytes * group.size > min(KEPT_BYTES, _physical_memory() // 4):
                    return []
                log.info("keeping the teacher's features of the %d images: %.0f MiB", n, n_bytes / 2**20)
                levels = [x.new_empty((n, *x.shape[1:])) for x in found]
            for level, values in zip(levels, found, strict=True):
                level[start:stop] = values
            if time.monotonic() - told >= PROGRESS_SECONDS:
                told = time.monotonic()
                log.info("features of %d of %d images computed", stop - share.start, share.stop - share.start)
        return levels


def _physical_memory() -> float:
    """In bytes, as far as the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


class KeptFeatures:
    """Features of images that are not augmented, which are the same in every epoch.

    Args:
        levels: (n, h, w, C) for each, finest first.
    """

    def __init__(self, levels: list[Tensor]) -> None:
        self._levels = levels

    def of(self, indices: Sequence[int]) -> list[Tensor]:
        """As `FrozenTeacher` gives them for a batch of these images."""
        chosen = torch.tensor(indices)
        return [level[chosen].permute(0, 3, 1, 2) for level in self._levels]
