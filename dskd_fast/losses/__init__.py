"""The losses of both students."""

from dskd_fast.losses.distillation import ContextualAffinityLoss, CosineDistanceLoss, make_loss

__all__ = ["ContextualAffinityLoss", "CosineDistanceLoss", "make_loss"]
