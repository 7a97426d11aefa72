"""Contextual Affinity Distillation (DSKD, arXiv 2307.03101) for image anomaly detection."""

from typing import TYPE_CHECKING

from dskd_fast import functional
from dskd_fast.losses import ContextualAffinityLoss, CosineDistanceLoss

if TYPE_CHECKING:
    from dskd_fast.api import DSKD

__version__ = "0.1.0"

__all__ = ["DSKD", "ContextualAffinityLoss", "CosineDistanceLoss", "__version__", "functional"]


def __getattr__(name: str) -> object:
    # timm takes a second or two to import, which the losses alone do not need.
    if name == "DSKD":
        from dskd_fast.api import DSKD

        return DSKD
    raise AttributeError(f"module 'dskd_fast' has no attribute {name!r}")
