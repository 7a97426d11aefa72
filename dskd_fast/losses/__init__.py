"""The losses of both students, and the affinity's against any keys."""

from dskd_fast.losses.affinity import AffinityDistillationLoss
from dskd_fast.losses.distillation import ContextualAffinityLoss, CosineDistanceLoss, make_loss

__all__ = ["AffinityDistillationLoss", "ContextualAffinityLoss", "CosineDistanceLoss", "make_loss"]
