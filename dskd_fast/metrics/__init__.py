"""Figures of an anomaly detector on a test set: AUROC of image scores, sPRO of anomaly maps."""

from dskd_fast.metrics.auroc import auroc, roc_curve
from dskd_fast.metrics.maps import ScoredMap, read_map, read_maps, save_map, score_maps
from dskd_fast.metrics.spro import FPR_LIMITS, SPRO

__all__ = ["FPR_LIMITS", "SPRO", "ScoredMap", "auroc", "read_map", "read_maps", "roc_curve", "save_map", "score_maps"]
