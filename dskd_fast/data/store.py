"""Images that are decoded and resized once and served in batches."""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dskd_fast.data.exposure import measure_exposure
from dskd_fast.data.images import ImageError, n_bytes_in_header, read_image_and_peak, resize_square
from dskd_fast.progress import Progress, silent
from dskd_fast.workers import Workers


class Pixels(Protocol):
    """Images of one size, uint8: an `ImageStore`, or what stands for one; see there."""

    exposures: tuple[torch.Tensor, torch.Tensor]

    def __len__(self) -> int: ...

    def batch(self, indices: Iterable[int]) -> torch.Tensor: ...


class ImageStore:
    """The images of ``paths``, resized to ``size`` x ``size``, as uint8 tensors.

    Every image is decoded at construction, so that a bad file is found before any training. The resized
    images stay in memory while they take at most ``memory_limit`` bytes (3 * size * size per image; the
    default of 2 GiB holds 10,922 images at 256 x 256). Beyond that none of them does, and each access decodes
    its images again.

    Args:
        paths: image files; the position in ``paths`` is the index of an image.
        size: side in pixels.
        memory_limit: bytes the resized images may take; 0 keeps none.
        bits: of values of more than 8 bits, see `dskd_fast.data.images.read_image`.
        progress: called after each decoded image, from the constructing thread.
        besides: called with the index and the native image (H, W, 3), uint8, once for each, from several threads.

    Attributes:
        paths: the image files.
        size: side in pixels.
        native_sizes: (height, width) in pixels of each image before it was resized.
        exposures: brightness and contrast of each resized image, (n,) each, see `measure_exposure`.
        peaks: the largest value that each file stores, where its values have 16 bits; else None.
        in_memory: whether the resized images are kept.

    Raises:
        ImageError: names every file that cannot be used.
        ValueError: ``size`` is below 1 or ``memory_limit`` is negative.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: int,
        *,
        memory_limit: int = 2 * 2**30,
        bits: int | None = None,
        progress: Progress = silent,
        besides: Callable[[int, np.ndarray], None] | None = None,
    ):
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, not {size}")
        if memory_limit < 0:
            raise ValueError(f"memory_limit must not be negative, but is {memory_limit}")
        self.paths = tuple(Path(path) for path in paths)
        self.size = size
        self.bits = bits
        self.in_memory = len(self.paths) * 3 * size * size <= memory_limit
        self._images = torch.empty((len(self.paths), 3, size, size), dtype=torch.uint8) if self.in_memory else None
        brightness, contrast = torch.empty((2, len(self.paths)), dtype=torch.float64)
        self.exposures = (brightness, contrast)
        decoded = self._decode_all(progress, besides)
        self.native_sizes: tuple[tuple[int, int], ...] = tuple(size for size, _ in decoded)
        self.peaks: tuple[int | None, ...] = tuple(peak for _, peak in decoded)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Iterable[int]) -> torch.Tensor:
        """The images at ``indices``, in that order: a new uint8 tensor of shape (B, 3, size, size).

        Raises:
            IndexError: an index is negative or too large.
            ImageError: a file that is not kept in memory was damaged after construction.
        """
        chosen = [operator.index(i) for i in indices]
        for i in chosen:
            if not 0 <= i < len(self.paths):
                raise IndexError(f"indices must be from 0 to {len(self.paths) - 1}, but one is {i}")
        if self._images is not None:
            return self._images[torch.tensor(chosen, dtype=torch.long)]
        images = torch.empty((len(chosen), 3, self.size, self.size), dtype=torch.uint8)
        with Workers() as workers:
            for position, image in enumerate(workers.ahead(chosen, lambda i: self._decode(i)[0], self._weight)):
                images[position] = image
        return images

    def _weight(self, index: int) -> float:
        return n_bytes_in_header(self.paths[index])

    def _decode(
        self, index: int, besides: Callable[[int, np.ndarray], None] | None = None
    ) -> tuple[torch.Tensor, tuple[int, int], int | None]:
        image, peak = read_image_and_peak(self.paths[index], bits=self.bits)
        if besides is not None:
            besides(index, image)
        return torch.from_numpy(resize_square(image, self.size)).permute(2, 0, 1), image.shape[:2], peak

    def _decode_all(
        self, progress: Progress, besides: Callable[[int, np.ndarray], None] | None
    ) -> list[tuple[tuple[int, int], int | None]]:
        """Native size and peak of each image."""

        def decode(index: int) -> tuple[tuple[int, int], int | None] | ImageError:
            try:
                image, native_size, peak = self._decode(index, besides)
            except ImageError as error:
                return error
            for values, (value,) in zip(self.exposures, measure_exposure(image[None]), strict=True):
                values[index] = value
            if self._images is not None:
                self._images[index] = image
            return native_size, peak

        decoded: list[tuple[tuple[int, int], int | None]] = []
        failures: list[tuple[Path, str]] = []
        with Workers() as workers:
            results = workers.ahead(range(len(self.paths)), decode, self._weight)
            for done, result in enumerate(results, start=1):
                if isinstance(result, ImageError):
                    failures.extend(result.failures)
                else:
                    decoded.append(result)
                progress("reading images", done, len(self.paths))
        if failures:
            raise ImageError(*failures)
        return decoded


class Batches:
    """Batches of the images at `indices` of a store, uint8 (B, 3, S, S) each; may be gone through again."""

    def __init__(self, store: Pixels, indices: list[int], batch_size: int) -> None:
        self.store = store
        self.indices = indices
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in range(0, len(self.indices), self.batch_size):
            yield self.store.batch(self.indices[i : i + self.batch_size])
