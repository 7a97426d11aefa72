"""Saturated per-region overlap (sPRO), exact.

Bergmann et al., "Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly Detection and
Localization", IJCV 2022. For a threshold t a pixel is positive if its score is > t. With s the saturation
threshold of a defect,

    sPRO(t) = average over defects of min(|defect and positive pixels| / s, 1),

and FPR(t) is the positive share of the pixels outside all defects, pooled over all images. The figure
reported is the area under the curve of sPRO against FPR over all thresholds, up to an FPR limit and divided
by that limit.

The curve is a sum of ramps. Lowering the threshold past the score v of a pixel of a defect that is not yet
saturated adds 1 / s to that defect's overlap while the FPR goes from that of "score > v" to that of
"score >= v": a vertical step if no negative pixel has the score v, else a straight line (the Mann-Whitney
convention for ties). The area under a sum of ramps is the sum of their areas, so each pixel contributes on
its own and the exact area needs no list of thresholds, only the rank of each defect pixel's score among the
negative pixels.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from dskd_fast.data.ground_truth import ANOMALY_KINDS, KINDS, Defect
from dskd_fast.errors import UserError
from dskd_fast.workers import n_threads

FPR_LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)
# Scores of defects that are looked up at a time.
_LOOKED_UP = 4096


class SPRO:
    """Collects anomaly maps one by one and gives the exact area under the sPRO curve.

    Only the scores of the negative pixels and each defect's highest scores up to its saturation are kept.
    Scores are compared exactly: as float32 (4 bytes each) if that holds every value of the types of all maps
    added (float16, float32, integers of up to 16 bits), else as float64 (8 bytes), which rounds nothing but
    64-bit integers beyond 2**53.
    """

    def __init__(self) -> None:
        # Once it is known what they are compared with, the last of a kind's arrays holds all that are not below every
        # defect's kept scores, sorted; the others need no order.
        self._negatives: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
        self._defects: dict[str, list[_SaturatedDefect]] = {kind: [] for kind in ANOMALY_KINDS}
        self._unlabelled: set[str] = set()
        # Of each kind, since figures and curves are made of the same; None until one is asked for.
        self._ramps: dict[str, _Ramps | None] | None = None

    def add(
        self,
        anomaly_map: np.ndarray,
        defects: Sequence[Defect] | None,
        kind: str,
        name: str = "anomaly map",
    ) -> None:
        """Add the anomaly map of one test image.

        Args:
            anomaly_map: scores, shape (H, W), real numbers, higher meaning more anomalous.
            defects: the image's defects; masks of shape (H, W), which may overlap (a shared pixel then counts
                for each of them). Must be empty or None for a good image. Empty or None for an anomalous
                image means that its defects are not marked: the figures of that kind then cannot be
                computed.
            kind: "good", "structural" or "logical".
            name: what error messages call this map.

        Raises:
            UserError: the map is not a two-dimensional array of finite numbers, a mask has another shape or
                is empty, or a saturation is not a finite number > 0.
            ValueError: unknown kind, or a good image with defects.
            TypeError: a mask is not bool.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        scores = as_scores(anomaly_map, name)
        self._ramps = None
        if kind == "good":
            if defects:
                raise ValueError(f"{name}: a good image has no defects, but {len(defects)} were given")
            self._negatives[kind].append(scores.flatten())
            return
        if not defects:
            self._unlabelled.add(kind)
            return

        outside = np.ones(scores.shape, dtype=bool)
        saturated = []
        for number, defect in enumerate(defects, start=1):
            _check_defect(defect, scores.shape, f"defect {number} of {name}")
            saturated.append(_SaturatedDefect(scores[defect.mask], float(defect.saturation)))
            outside &= ~defect.mask
        self._defects[kind] += saturated
        self._negatives[kind].append(scores[outside])

    def compute(self, limits: Iterable[float] = FPR_LIMITS) -> dict[str, dict[float, float | None]]:
        """Area under the sPRO curve up to each FPR limit, divided by the limit: 1 is best.

        "structural" and "logical" each take the images of that kind and all good images; all defects of a
        kind weigh the same. "mean" is half of each. A value is None where it does not exist: there is no
        image of that kind, one of them has no marked defects, or there is no pixel outside the defects; the
        mean needs both kinds.

        Args:
            limits: FPR limits, each > 0 and <= 1.

        Returns:
            {"structural": {limit: area}, "logical": {...}, "mean": {...}}.

        Raises:
            ValueError: a limit is out of range.
        """
        limits = tuple(limits)
        for limit in limits:
            if not 0 < limit <= 1:
                raise ValueError(f"limits must be > 0 and <= 1, but one is {limit!r}")

        ramps = self._all_ramps()
        areas: dict[str, dict[float, float | None]] = {kind: _areas(ramps[kind], limits) for kind in ANOMALY_KINDS}
        areas["mean"] = {limit: mean_of_kinds(areas["structural"][limit], areas["logical"][limit]) for limit in limits}
        return areas

    def curve(self, kind: str, limit: float = 1.0) -> tuple[np.ndarray, np.ndarray] | None:
        """The sPRO curve of "structural" or "logical" anomalies up to an FPR limit, exact.

        Args:
            kind: "structural" or "logical".
            limit: the last FPR, > 0 and <= 1.

        Returns:
            FPR and sPRO, float64, shape (n,) each, of the corners of the polyline that the curve is, the first of
            them (0, 0) and the last at `limit`; or None where `compute` has no figure. Neither ever falls; two
            corners at the same FPR are the ends of a vertical step.

        Raises:
            ValueError: the limit is out of range.
        """
        if not 0 < limit <= 1:
            raise ValueError(f"the limit must be > 0 and <= 1, but is {limit!r}")
        ramps = self._all_ramps()[kind]
        if ramps is None:
            return None
        # From the highest score down, one ramp begins where or after the one before has ended; equal ones are one. Of
        # those that begin beyond the limit the first is kept, to which the last line leads.
        n_begun = np.searchsorted(-ramps.before, -int(limit * ramps.negatives) - 1)
        kept = slice(max(0, n_begun - 1), None)
        before, after, gains = (values[kept][::-1] for values in (ramps.before, ramps.after, ramps.gains))
        is_last = np.append((np.diff(before) != 0) | (np.diff(after) != 0), True)
        heights = np.minimum(np.cumsum(gains)[is_last] / ramps.n_defects, 1.0)
        fpr = np.stack([before[is_last], after[is_last]], axis=1).ravel() / ramps.negatives
        spro = np.stack([np.append(0.0, heights[:-1]), heights], axis=1).ravel()
        fpr, spro = np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], spro, heights[-1:]])
        inside = np.searchsorted(fpr, limit, side="right")
        if inside == len(fpr):
            return fpr, spro
        share = (limit - fpr[inside - 1]) / (fpr[inside] - fpr[inside - 1])
        at_limit = spro[inside - 1] + share * (spro[inside] - spro[inside - 1])
        return np.append(fpr[:inside], limit), np.append(spro[:inside], at_limit)

    def _all_ramps(self) -> "dict[str, _Ramps | None]":
        if self._ramps is None:
            dtypes = {scores.dtype for kept in self._negatives.values() for scores in kept}
            dtypes |= {defect.scores.dtype for kept in self._defects.values() for defect in kept}
            dtype = np.result_type(np.float32, *dtypes)
            floors: dict[str, float] = {
                kind: min((defect.scores[0] for defect in self._defects[kind]), default=np.inf)
                for kind in ANOMALY_KINDS
                if kind not in self._unlabelled
            }
            floors["good"] = min(floors.values(), default=np.inf)

            with ThreadPoolExecutor(n_threads()) as pool:
                for kind in KINDS:
                    _sort(self._negatives[kind], dtype, floors.get(kind, np.inf), pool)
                self._ramps = dict(zip(ANOMALY_KINDS, pool.map(self._ramps_of, ANOMALY_KINDS), strict=True))
        return self._ramps

    def _ramps_of(self, kind: str) -> "_Ramps | None":
        """The ramps whose sum is the curve of a kind; None where there is no curve. The negatives must be sorted."""
        pools = [self._negatives["good"][-1], self._negatives[kind][-1]]
        negatives = sum(pool.size for name in ("good", kind) for pool in self._negatives[name])
        defects = self._defects[kind]
        if negatives == 0 or not defects or kind in self._unlabelled:
            return None

        sizes = [defect.scores.size for defect in defects]
        scores = np.concatenate([defect.scores for defect in defects], dtype=pools[0].dtype)
        gains = np.repeat([1 / defect.saturation for defect in defects], sizes)
        gains[np.cumsum(sizes) - sizes] = [defect.last_gain for defect in defects]
        # In ascending order, neighbouring look-ups below touch neighbouring memory: several times faster.
        order = _order(scores)
        scores, gains = scores[order], gains[order]
        del order

        # False positives just before and just after each pixel becomes positive.
        before = np.full(scores.size, sum(pool.size for pool in pools), np.intp)
        after = before.copy()
        for pool in pools:
            _subtract_ranks(pool, scores, before, after)
        return _Ramps(before, after, gains, negatives, len(defects))


class _Ramps(NamedTuple):
    """What each kept pixel of all defects adds to the sum of their overlaps, the lowest score first.

    Attributes:
        before, after: false positives where the ramp begins and ends, integers, shape (n,).
        gains: its height, shape (n,).
        negatives: how many pixels lie outside all defects.
        n_defects: how many defects the sum is over.
    """

    before: np.ndarray
    after: np.ndarray
    gains: np.ndarray
    negatives: int
    n_defects: int


def _subtract_ranks(pool: np.ndarray, scores: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
    """Take from `before` how many of the pool are not above each score, and from `after` how many are below it.

    Both sorted. A few scores at a time are looked up in the part of the pool between them alone, which a cache holds.
    """
    for start in range(0, scores.size, _LOOKED_UP):
        some = slice(start, start + _LOOKED_UP)
        wanted = scores[some]
        first = np.searchsorted(pool, wanted[0])
        part = pool[first : np.searchsorted(pool, wanted[-1], side="right")]
        up_to = np.searchsorted(part, wanted, side="right")
        below = up_to.copy()
        if part.size:
            # Only those of which the pool has equals are looked up again.
            ties = np.flatnonzero(part[np.maximum(up_to - 1, 0)] == wanted)
            below[ties] = np.searchsorted(part, wanted[ties])
        before[some] -= first + up_to
        after[some] -= first + below


def _order(scores: np.ndarray) -> np.ndarray:
    """Indices that sort scores, (n,) float32 or float64; equal ones stay in their order, save -0 and 0."""
    if scores.dtype != np.float32 or scores.size > 2**32:
        return np.argsort(scores, kind="stable")
    # A third of argsort's time: integers in the order of the scores, each with its index in the lower half.
    bits = scores.view(np.int32)
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64)
    keys <<= 32
    keys |= np.arange(scores.size)
    keys.sort()
    keys &= 0xFFFFFFFF
    return keys


def _areas(ramps: _Ramps | None, limits: tuple[float, ...]) -> dict[float, float | None]:
    if ramps is None:
        return dict.fromkeys(limits)
    before, after, gains, negatives, n_defects = ramps
    double_width = 2 * np.maximum(after - before, 1)
    areas: dict[float, float | None] = {}
    for limit in limits:
        last = float(limit) * negatives
        # A ramp from 0 to 1, then level up to the limit.
        widths = (np.clip(last, before, after) - before) ** 2 / double_width + np.maximum(last - after, 0)
        area = (gains * widths).sum() / n_defects / last
        # The sum of many 1 / s can pass 1 by a rounding error.
        areas[limit] = min(float(area), 1.0)
    return areas


class _SaturatedDefect:
    """The highest scores of a defect up to its saturation, the lowest of them first."""

    def __init__(self, scores: np.ndarray, saturation: float) -> None:
        kept = min(scores.size, math.ceil(saturation))
        self.scores = np.partition(scores, scores.size - kept)[scores.size - kept :].copy()
        self.saturation = saturation
        # The pixel that saturates the defect adds only what is missing.
        self.last_gain = min(kept / saturation, 1.0) - (kept - 1) / saturation


def _sort(scores: list[np.ndarray], dtype: np.dtype, floor: float, threads: ThreadPoolExecutor) -> None:
    """Leave in each array the scores below `floor`, in any order, and append an array of the others, sorted.

    These are put into ranges of about as many each, which threads sort side by side. Each array goes when its scores
    have been moved: beside all of them there is memory for the new one alone.
    """
    sample = np.sort(np.concatenate([np.empty(0, dtype), *(x[::1009] for x in scores)], dtype=dtype))
    sample = sample[sample >= floor]
    n_ranges = n_threads() if sample.size else 1
    limits = [floor, *(sample[i * sample.size // n_ranges] for i in range(1, n_ranges)), np.inf]

    def count(values: np.ndarray) -> np.ndarray:
        n_below = [np.count_nonzero(values < limit) for limit in limits[:-1]]
        return np.diff([*n_below, values.size], prepend=0)

    # Of each array, below the floor and in each range. The pool has range after range, in each array after array.
    counts = np.array([*threads.map(count, scores)], np.intp).reshape(-1, 1 + n_ranges)
    ends = np.cumsum(counts[:, 1:].T).reshape(n_ranges, -1)
    edges = [0, *np.cumsum(counts[:, 1:].sum(0))]
    pool = np.empty(edges[-1], dtype)

    def move(i: int) -> None:
        values = scores[i]
        if counts[i, 0] == values.size:
            return
        for end, n, (low, high) in zip(ends[:, i], counts[i, 1:], itertools.pairwise(limits), strict=True):
            pool[end - n : end] = values[(values >= low) & (values < high)]
        scores[i] = values[values < floor]

    for _ in threads.map(move, range(len(scores))):
        pass
    for _ in threads.map(np.ndarray.sort, [pool[start:stop] for start, stop in itertools.pairwise(edges)]):
        pass
    scores.append(pool)


def mean_of_kinds(structural: float | None, logical: float | None) -> float | None:
    """Half of each kind's figure, or None unless both exist."""
    return None if structural is None or logical is None else (structural + logical) / 2


def as_scores(anomaly_map: np.ndarray, name: str) -> np.ndarray:
    """The anomaly map, shape (H, W), as float32 or, where that could round it, as float64.

    Raises:
        UserError: the map is not two-dimensional, has no pixels, is not of real numbers, or has a score that
            is NaN or infinite.
    """
    scores = np.asarray(anomaly_map)
    if scores.ndim != 2 or scores.size == 0:
        raise UserError(f"{name} has the shape {scores.shape}, but an anomaly map has one score per pixel: (H, W)")
    dtype = next((dtype for dtype in (np.float32, np.float64) if np.can_cast(scores.dtype, dtype)), None)
    if dtype is None:
        raise UserError(
            f"{name} has values of type {scores.dtype}, but scores are integers or floats of at most 64 bits"
        )
    bad = scores.size - np.count_nonzero(np.isfinite(scores))
    if bad:
        raise UserError(
            f"{name} has {bad} NaN or infinite scores, which have no rank; check the model that made the map"
        )
    return scores.astype(dtype, copy=False)


def _check_defect(defect: Defect, shape: tuple[int, ...], name: str) -> None:
    if defect.mask.dtype != bool:
        raise TypeError(f"the mask of {name} must be bool, not {defect.mask.dtype}")
    if defect.mask.shape != shape:
        raise UserError(
            f"the mask of {name} is {defect.mask.shape[-1]} x {defect.mask.shape[0]} pixels, but the map is "
            f"{shape[1]} x {shape[0]}; maps must have the resolution of the original image"
        )
    if not defect.mask.any():
        raise UserError(f"the mask of {name} marks no pixel; remove it or redraw it")
    if not (math.isfinite(defect.saturation) and defect.saturation > 0):
        raise UserError(f"the saturation of {name} is {defect.saturation}, but must be a number of pixels > 0")
