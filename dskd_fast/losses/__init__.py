"""The losses of both students."""

from dskd_fast.losses.distillation import LOSSES, ContextualAffinityLoss, CosineDistanceLoss, make_loss

__all__ = ["LOSSES", "ContextualAffinityLoss", "CosineDistanceLoss", "make_loss"]
