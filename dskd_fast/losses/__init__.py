"""The two students' training losses."""

from dskd_fast.losses.distillation import ContextualAffinityLoss, CosineDistanceLoss

__all__ = ["ContextualAffinityLoss", "CosineDistanceLoss"]
