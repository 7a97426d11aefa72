"""The loss against any keys as a module."""

import torch
from torch import Tensor, nn

from dskd_fast import functional
from dskd_fast.backends.common import PreparedKeys
from dskd_fast.losses.distillation import REDUCTIONS, check_reduction
from dskd_fast.ops import arguments


class AffinityDistillationLoss(nn.Module):
    """KL divergence of the student's from the teacher's affinities with any keys: a queue, a memory, masked tokens.

    Called with `(student, teacher, keys=None, key_mask=None, row_mask=None)`, as
    `dskd_fast.functional.affinity_distillation` takes them. dskd_fast/losses/README.md tells which published losses are
    which arguments.

    Args:
        student_temperature, teacher_temperature: from 0.005 to 100, numbers or tensors () as there; None for the same.
            The attributes may change between calls, of compiled code, too.
        normalize: whether vectors are divided by their length.
        reduction: "mean" averages over the rows that are not masked, "sum" adds them up, "none" returns all.
        precision, backend: as in `dskd_fast.functional.contextual_affinity`.

    Raises:
        ValueError, TypeError: for unsuitable options here, for unsuitable tensors when called.

    Example:
        >>> loss_fn = AffinityDistillationLoss(student_temperature=0.07, teacher_temperature=0.01)
        >>> student = torch.randn(32, 128, requires_grad=True)
        >>> loss = loss_fn(student, torch.randn(32, 128), keys=torch.randn(4096, 128))
        >>> loss.backward()
        >>> loss.shape, student.grad.shape
        (torch.Size([]), torch.Size([32, 128]))
    """

    def __init__(
        self,
        student_temperature: float | Tensor,
        teacher_temperature: float | Tensor | None = None,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        precision: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        arguments.check_temperature(student_temperature, "student_temperature")
        if teacher_temperature is not None:
            arguments.check_temperature(teacher_temperature, "teacher_temperature")
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.normalize = normalize
        self.reduction = reduction
        self.precision = precision
        self.backend = backend

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        keys: Tensor | PreparedKeys | None = None,
        key_mask: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> Tensor:
        """Loss, float32: a scalar, or the rows' with reduction "none"; 0 where all rows are masked."""
        kl = functional.affinity_distillation(
            student,
            teacher,
            keys,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            key_mask=key_mask,
            row_mask=row_mask,
            normalize=self.normalize,
            precision=self.precision,
            backend=self.backend,
        )
        if self.reduction == "mean" and row_mask is not None:
            return kl.sum() / torch.clamp(row_mask.sum(), min=1)
        return REDUCTIONS[self.reduction](kl)

    def extra_repr(self) -> str:
        return (
            f"student_temperature={self.student_temperature}, teacher_temperature={self.teacher_temperature}, "
            f"normalize={self.normalize}, reduction={self.reduction!r}, "
            f"precision={self.precision!r}, backend={self.backend!r}"
        )
