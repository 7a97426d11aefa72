"""Contextual Affinity Distillation (DSKD, arXiv 2307.03101) for image anomaly detection."""

from dskd_fast import functional
from dskd_fast.losses import ContextualAffinityLoss, CosineDistanceLoss

__version__ = "0.1.0"

__all__ = ["ContextualAffinityLoss", "CosineDistanceLoss", "__version__", "functional"]
