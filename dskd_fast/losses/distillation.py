"""Losses between a student's and a teacher's feature maps, at one level or summed over several."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dskd_fast import functional
from dskd_fast.choices import LOSSES
from dskd_fast.ops import arguments

Levels = Tensor | Sequence[Tensor]

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda values: values,
    "mean": torch.mean,
    "sum": torch.sum,
}


class ContextualAffinityLoss(nn.Module):
    """Contextual affinity loss (paper eq. 3-7): the global student learns each position's relation to the whole image.

    Called with `(student, teacher)`, each a tensor (B, C, H, W) or (B, N, C) or a list of such levels.

    Args:
        temperature: T of the softmax, from 0.01 to 100, a number or a tensor () as in
            `dskd_fast.functional.contextual_affinity`. The attribute may change between calls, of compiled code, too.
            A tensor is neither a parameter nor a buffer: it stays where it is.
        reduction: "mean" averages over images and positions (NaN where there are none, as PyTorch's mean), "sum" adds
            them up, "none" returns the map; levels are then added (eq. 7). With "none" and a list of levels, whose maps
            differ in size, a list of maps is returned.
        precision: "fp32", "tf32", "bf16", "fp16" or None, see `dskd_fast.functional.contextual_affinity`.
        backend: as in `dskd_fast.functional.contextual_affinity`.

    Raises:
        ValueError, TypeError: when called, as `dskd_fast.functional.contextual_affinity` does; in particular for a
            teacher that requires grad.

    Example:
        >>> loss_fn = ContextualAffinityLoss(temperature=0.5)
        >>> student = [torch.randn(2, 64, 16, 16, requires_grad=True), torch.randn(2, 128, 8, 8, requires_grad=True)]
        >>> loss = loss_fn(student, [torch.randn(2, 64, 16, 16), torch.randn(2, 128, 8, 8)])
        >>> loss.backward()
        >>> loss.shape, student[0].grad.shape
        (torch.Size([]), torch.Size([2, 64, 16, 16]))
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        reduction: str = "mean",
        precision: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        arguments.check_temperature(temperature)
        self.temperature = temperature
        self.reduction = reduction
        self.precision = precision
        self.backend = backend

    def forward(self, student: Levels, teacher: Levels) -> Tensor | list[Tensor]:
        """Loss, float32: a scalar, or the map(s) (B, H, W) or (B, N) with reduction "none"."""

        def level(s: Tensor, t: Tensor) -> Tensor:
            return functional.contextual_affinity(
                s, t, self.temperature, precision=self.precision, backend=self.backend
            )

        return _over_levels(level, student, teacher, self.reduction)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, reduction={self.reduction!r}, "
            f"precision={self.precision!r}, backend={self.backend!r}"
        )


class CosineDistanceLoss(nn.Module):
    """Cosine distance between student and teacher features: the local student's loss (paper eq. 1-2).

    Called like `ContextualAffinityLoss`.

    Args:
        reduction: "mean", "sum" or "none", as there.
        flatten: False, the paper's form: one cosine per position. True, the form of RD4AD's code: one cosine per image,
            over the flattened feature map (the map then has one entry per image).
        backend: as in `dskd_fast.functional.contextual_affinity`.

    Example:
        >>> features = torch.randn(2, 64, 16, 16)
        >>> CosineDistanceLoss(flatten=True)(features, -features)
        tensor(2.)
    """

    def __init__(self, reduction: str = "mean", flatten: bool = False, backend: str = "auto") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction
        self.flatten = flatten
        self.backend = backend

    def forward(self, student: Levels, teacher: Levels) -> Tensor | list[Tensor]:
        """Loss, float32: a scalar, or the map(s) with reduction "none": (B, H, W), (B, N), or (B, 1) flattened."""

        def level(s: Tensor, t: Tensor) -> Tensor:
            if self.flatten:
                arguments.as_maps(s, t)  # flattened, other shapes may look the same
                s, t = s.flatten(1).unsqueeze(1), t.flatten(1).unsqueeze(1)
            return functional.cosine_distance(s, t, backend=self.backend)

        return _over_levels(level, student, teacher, self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, flatten={self.flatten}, backend={self.backend!r}"


def make_loss(name: str, temperature: float = 1.0) -> nn.Module:
    """The loss of one of the names in `LOSSES`; `temperature` is the contextual affinity's."""
    if name not in LOSSES:
        raise ValueError(f"there is no loss {name!r}: use one of {', '.join(map(repr, LOSSES))}")
    if name == "contextual-affinity":
        return ContextualAffinityLoss(temperature)
    return CosineDistanceLoss(flatten=name == "flattened-cosine")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        accepted = ", ".join(repr(name) for name in REDUCTIONS)
        raise ValueError(f"reduction={reduction!r} is not known: use one of {accepted}")


def _over_levels(
    level: Callable[[Tensor, Tensor], Tensor], student: Levels, teacher: Levels, reduction: str
) -> Tensor | list[Tensor]:
    reduce = REDUCTIONS[reduction]
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        return reduce(level(student, teacher))
    if any(isinstance(x, (Tensor, Mapping)) or not hasattr(x, "__len__") for x in (student, teacher)):
        kinds = " and ".join(f"{name} a {type(x).__name__}" for name, x in (("student", student), ("teacher", teacher)))
        raise TypeError(f"student and teacher must both be tensors or both be lists of levels, not {kinds}")
    if len(student) != len(teacher) or len(student) == 0:
        raise ValueError(
            f"student has {len(student)} levels and teacher {len(teacher)}: pass the same number, at least one"
        )
    values = [reduce(level(s, t)) for s, t in zip(student, teacher, strict=True)]
    return values if reduction == "none" else torch.stack(values).sum()
