"""The registered operator of the distillation against any keys: `torch.ops.dskd_fast.affinity_distillation`.

As `dskd_fast.ops.operators` has it for the contextual affinity: the gradient is computed in the same call as the map
and saved, the backward is one multiplication, and a second derivative is refused.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from dskd_fast.backends.common import DISTILLATION_TEMPERATURE_LIMITS, PreparedKeys, accumulation_dtype
from dskd_fast.choices import DISTILLATION_TEMPERATURE_RANGE
from dskd_fast.ops import dispatch, operators


@torch.library.custom_op("dskd_fast::affinity_distillation", mutates_args=())
def affinity_distillation(
    student: Tensor,
    teacher: Tensor,
    keys: list[Tensor],
    count: int | None,
    student_temperature: Tensor,
    teacher_temperature: Tensor,
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    normalize: bool,
    precision: str,
    backend: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) twice -> KL (B, H, W) and its gradient (B, C, H, W), the latter empty unless `with_gradient`.

    Keys are one tensor (B', K, C), or what `PreparedKeys` holds of K = `count` keys, made by the backend of that name.
    """
    if precision == dispatch.AMBIENT:
        precision = dispatch.ambient_precision(student.device.type)
    some: Tensor | PreparedKeys = keys[0]
    if count is not None:
        shape = (len(keys[-1]), count, student.shape[1])
        some = PreparedKeys(keys, shape, normalize, precision, backend)
    module = dispatch.load(dispatch.choose(backend, student, teacher, precision, some).name)
    temperatures = [
        number_of(x, f"{name}_temperature")
        for x, name in ((student_temperature, "student"), (teacher_temperature, "teacher"))
    ]
    kl, gradient = module.affinity_distillation(
        student, teacher, some, *temperatures, key_mask, row_mask, normalize, precision, with_gradient
    )
    return kl, kl.new_empty(0) if gradient is None else gradient


def number_of(temperature: Tensor, name: str) -> float | Tensor:
    """The number, checked, of a tensor on the CPU; that of another device is never read back."""
    if temperature.device.type != "cpu":
        return temperature
    number = temperature.item()
    check_number(number, name)
    return number


def check_number(temperature: float, name: str) -> None:
    """Raise ValueError unless `temperature` is a number in `DISTILLATION_TEMPERATURE_RANGE`."""
    operators.check_number(temperature, name, DISTILLATION_TEMPERATURE_LIMITS, DISTILLATION_TEMPERATURE_RANGE)


@affinity_distillation.register_fake
def _(student, teacher, keys, count, student_temperature, teacher_temperature, *options):
    *_, precision, _, with_gradient = options
    dtype = accumulation_dtype(student, teacher, precision)
    values = student.new_empty((student.shape[0], *student.shape[2:]), dtype=dtype)
    return values, torch.empty_like(student, dtype=dtype) if with_gradient else values.new_empty(0)


class _Transformed(torch.autograd.Function):
    """The operator for torch.func, whose transforms do not know what is registered with it."""

    @staticmethod
    def forward(*inputs):
        return affinity_distillation(*inputs)

    setup_context = staticmethod(operators.save_gradient_of_transformed)
    backward = staticmethod(operators.scale_gradient_of_transformed)

    @staticmethod
    def jvp(ctx, *tangents):
        operators.refuse_tangents(**dict(zip(("student", "teacher"), tangents, strict=False)))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _fold(functools.partial(operators.call, affinity_distillation), info, in_dims, *inputs)


def _fold(function: Any, info: Any, in_dims: Any, *inputs: Any) -> Any:
    """The rule for vmap: images that share their keys do not know of each other, so what is mapped over joins them."""
    student, teacher, keys, *options, with_gradient = inputs
    operators.refuse_grad(teacher=teacher)
    with_gradient = with_gradient or (torch.is_grad_enabled() and student.requires_grad)
    key_mask, row_mask = options[3:5]
    shares = len(keys[-1]) == 1 and (key_mask is None or len(key_mask) == 1) and row_mask is None
    others = [dim for dims in in_dims[2:] for dim in (dims if isinstance(dims, list | tuple) else [dims])]
    if shares and all(dim is None for dim in others):
        moved = operators.with_images_first(info, in_dims, (student, teacher))
        values, gradient = function(*(x.flatten(0, 1) for x in moved), keys, *options, with_gradient)
        images = moved[0].shape[:2]
        if not with_gradient:
            return (values.unflatten(0, images), gradient), (0, None)
        return (values.unflatten(0, images), gradient.unflatten(0, images)), (0, 0)

    def entry(x: Any, dim: Any, i: int) -> Any:
        if isinstance(x, list | tuple):
            dims = dim if isinstance(dim, list | tuple) else [dim] * len(x)
            return [entry(part, d, i) for part, d in zip(x, dims, strict=True)]
        return x if dim is None else x.select(dim, i)

    inputs = student, teacher, keys, *options, with_gradient
    entries = [
        function(*(entry(x, dim, i) for x, dim in zip(inputs, in_dims, strict=True))) for i in range(info.batch_size)
    ]
    return tuple(torch.stack(x) for x in zip(*entries, strict=True)), (0, 0)


operators.register(affinity_distillation, _Transformed, _fold)
