"""Exact sPRO against the straightforward way: all thresholds of a grid, one after the other."""

from typing import NamedTuple

import numpy as np

from bench.lab import row
from dskd_fast.metrics.spro import SPRO

_LIMIT = 0.05


class _Defect(NamedTuple):
    mask: np.ndarray
    saturation: float


class _Image(NamedTuple):
    kind: str
    anomaly_map: np.ndarray
    defects: list[_Defect]


class Case(NamedTuple):
    images: int
    size: tuple[int, int]
    contestant: str

    @property
    def id(self) -> str:
        return f"{self.images}x{self.size[0]}x{self.size[1]}-{self.contestant}"

    @property
    def work(self) -> str:
        return f"{self.images} maps of {self.size[0]} x {self.size[1]}"

    @property
    def group(self) -> str:
        return f"sPRO of {self.work}"

    def row(self) -> dict:
        is_finest = self.contestant == "loop over 1,000 thresholds"
        return row("spro", self.work, "sPRO", self.contestant, ours=self.contestant == _EXACT, reference=is_finest)


_EXACT = "exact, all thresholds"


def cases(is_full: bool) -> list[Case]:
    works = [(24, (256, 256)), (60, (1000, 1700))]
    contestants = (_EXACT, "loop over 200 thresholds", "loop over 1,000 thresholds")
    return [Case(*work, contestant) for work in works[: 2 if is_full else 1] for contestant in contestants]


def test_spro(benchmark, lab, case):
    info, key, pixels = case.row(), ("spro", case.contestant), case.images * case.size[0] * case.size[1]
    if reason := lab.too_long(key, pixels):
        lab.leave_out(info, case.group, reason)
    images = _category(case.images, case.size)
    exact = _exact(images)
    if case.contestant == _EXACT:  # what the others' errors are measured by; its own tests have the definition

        def call() -> float:
            return _exact(images)

    else:
        thresholds = int(case.contestant.split()[2].replace(",", ""))
        info["errors"] = {"area": [abs(_loop(images, thresholds) - exact) / exact, None]}

        def call() -> float:
            return _loop(images, thresholds)

    lab.note_time(key, pixels, lab.time(benchmark, case.group, info, call), case.work)


def _category(n: int, size: tuple[int, int]) -> list[_Image]:
    """Smooth noise with a raised ellipse in two images of three."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[: size[0], : size[1]]
    images = []
    for i in range(n):
        scores = random.random(size, dtype=np.float32)
        defects = []
        if i % 3:
            centre = random.uniform(0.2, 0.8, 2) * size
            inside = ((rows - centre[0]) / (size[0] / 12)) ** 2 + ((columns - centre[1]) / (size[1] / 15)) ** 2 < 1
            scores[inside] += random.uniform(0.1, 0.8)
            defects.append(_Defect(inside, inside.sum() * random.uniform(0.3, 1)))
        images.append(_Image(("good", "structural", "logical")[i % 3], scores, defects))
    return images


def _exact(images: list[_Image]) -> float:
    spro = SPRO()
    for image in images:
        spro.add(image.anomaly_map, image.defects, image.kind)
    return spro.compute([_LIMIT])["structural"][_LIMIT]


def _loop(images: list[_Image], n_thresholds: int) -> float:
    """As it is usually written: thresholds at quantiles of the good pixels' scores, the curve, the trapezoidal rule."""
    chosen = [image for image in images if image.kind in ("good", "structural")]
    outside = [~np.any([d.mask for d in image.defects], 0) if image.defects else None for image in chosen]
    negatives = np.concatenate(
        [
            image.anomaly_map[mask] if mask is not None else image.anomaly_map.ravel()
            for image, mask in zip(chosen, outside, strict=True)
        ]
    )
    thresholds = np.quantile(negatives, np.linspace(1, 1 - 1.2 * _LIMIT, n_thresholds))
    curve = [(0.0, 0.0)]
    for threshold in thresholds:
        overlaps, false_positives = [], 0
        for image, mask in zip(chosen, outside, strict=True):
            positive = image.anomaly_map > threshold
            overlaps += [min((positive & d.mask).sum() / d.saturation, 1) for d in image.defects]
            false_positives += (positive & mask).sum() if mask is not None else positive.sum()
        curve.append((false_positives / len(negatives), np.mean(overlaps)))
    fpr, overlap = np.array(curve).T
    below = fpr <= _LIMIT
    fpr = np.append(fpr[below], _LIMIT)
    overlap = np.append(overlap[below], np.interp(_LIMIT, *np.array(curve).T))
    return float(np.trapezoid(overlap, fpr) / _LIMIT)
