"""The ROC curve of image scores and the area under it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dskd_fast.errors import UserError

Scores = Sequence[float] | NDArray[np.floating]


def auroc(good_scores: Scores, anomalous_scores: Scores) -> float | None:
    """Area under the ROC curve of image scores, anomalous images being the positive class.

    It equals the probability that an anomalous image scores higher than a good one, a tie counting one half
    (the Mann-Whitney convention).

    Args:
        good_scores: scores of the good images, shape (n,), any real numbers, higher meaning more anomalous.
        anomalous_scores: scores of the anomalous images, shape (m,).

    Returns:
        A number from 0 to 1, or None if either kind has no images: there is no such area then.

    Raises:
        UserError: a score is NaN or infinite. An infinite score could be ranked, but a detector that gives
            one has overflowed, and its area would mean nothing.
        ValueError: the scores are not one-dimensional.
    """
    good = _as_scores("good_scores", good_scores)
    anomalous = _as_scores("anomalous_scores", anomalous_scores)
    if good.size == 0 or anomalous.size == 0:
        return None
    from sklearn import metrics  # imported late: predictions need none of it

    return float(metrics.roc_auc_score(*_labelled(good, anomalous)))


def roc_curve(good_scores: Scores, anomalous_scores: Scores) -> tuple[np.ndarray, np.ndarray] | None:
    """The ROC curve of image scores, anomalous images being the positive class.

    Args:
        good_scores: as for `auroc`.
        anomalous_scores: as for `auroc`.

    Returns:
        False positive rate and true positive rate, float64, shape (k,) each, of the corners of the curve from (0, 0)
        to (1, 1); or None if either kind has no images.

    Raises:
        UserError: a score is NaN or infinite.
        ValueError: the scores are not one-dimensional.
    """
    good = _as_scores("good_scores", good_scores)
    anomalous = _as_scores("anomalous_scores", anomalous_scores)
    if good.size == 0 or anomalous.size == 0:
        return None
    from sklearn import metrics

    false_positives, true_positives, _ = metrics.roc_curve(*_labelled(good, anomalous))
    return false_positives, true_positives


def _labelled(good: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat([0, 1], [good.size, anomalous.size]), np.concatenate([good, anomalous])


def _as_scores(name: str, values: Scores) -> np.ndarray:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1:
        raise ValueError(f"{name} must have one dimension, one score per image, but has shape {scores.shape}")
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise UserError(
            f"{name}[{bad[0]}] is {scores[bad[0]]}: {bad.size} of {scores.size} image scores are not finite, "
            "so they cannot be ranked; check the maps or the model that gave them"
        )
    return scores
