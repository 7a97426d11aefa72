"""The registered operators: `torch.ops.dskd_fast.contextual_affinity` and `torch.ops.dskd_fast.cosine_distance`.

Both take (B, C, H, W) and give a map (B, H, W), each entry of which depends on its own student vector alone: the
gradient for any grad_output is the map's gradient (B, C, H, W) times a scalar per position. That of the affinity, which
is dear, is computed in the same call as the map and saved: the backward is one multiplication. That of the cosine
distance is computed in the backward, which takes less time than to write and to read it, by an operator of its own.
Running a backward again gives the same. A second derivative is refused.

The temperature is a tensor: a number would be a constant of a compiled graph, so that each new one would be compiled
anew or, worse, an old one stay (pytorch/pytorch#197889). On a CPU the operator reads and checks it; elsewhere the
kernels read it. The overload with a number is there for direct calls and for programs that were exported with it.

Autocast does not cast their inputs, which would round what must be subtracted first: `dskd_fast.functional` turns it
into a precision, the type to which the operands of the products are rounded. The backend is chosen when the operator
runs, so that a compiled or exported graph runs on any machine.
"""

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dskd_fast.backends.common import DISTILLATION_TEMPERATURE_LIMITS, TEMPERATURE_LIMITS, accumulation_dtype
from dskd_fast.choices import DISTILLATION_TEMPERATURE_RANGE, TEMPERATURE_RANGE
from dskd_fast.ops import dispatch

# Defined without `custom_op`, whose checks at every call take as long as the smallest maps do.
_LIBRARY = torch.library.Library("dskd_fast", "FRAGMENT")
_LIBRARY.define(
    "contextual_affinity.tensor(Tensor student, Tensor teacher, Tensor temperature, str precision, str backend, "
    "bool with_gradient) -> (Tensor, Tensor)"
)
contextual_affinity = torch.ops.dskd_fast.contextual_affinity.tensor


@torch.library.impl(_LIBRARY, "contextual_affinity.tensor", "CompositeExplicitAutograd")
def _(
    student: Tensor, teacher: Tensor, temperature: Tensor, precision: str, backend: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) twice -> KL (B, H, W) and its gradient (B, C, H, W), the latter empty unless `with_gradient`.

    The temperature () is on the CPU or on the device of the others.
    """
    precision = dispatch.current_name(precision)
    if precision == dispatch.AMBIENT:
        precision = dispatch.ambient_precision(student.device.type)
    module = dispatch.load(dispatch.choose(backend, student, teacher, precision).name)
    kl, gradient = module.contextual_affinity(
        student, teacher, number_of(temperature, "temperature"), precision, with_gradient
    )
    return kl, kl.new_empty(0) if gradient is None else gradient


# After the overload above: of those that take an argument the first serves a call, and a float takes a tensor, too.
_LIBRARY.define(
    "contextual_affinity(Tensor student, Tensor teacher, float temperature, str precision, str backend, "
    "bool with_gradient) -> (Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "contextual_affinity", "CompositeImplicitAutograd")
def _(student, teacher, temperature, *options):
    return contextual_affinity(student, teacher, torch.tensor(temperature, dtype=torch.float64, device="cpu"), *options)


_LIBRARY.define("cosine_distance.map(Tensor student, Tensor teacher, str backend) -> Tensor")
_LIBRARY.define("cosine_gradient(Tensor student, Tensor teacher, Tensor weights, str backend) -> Tensor")
cosine_distance = torch.ops.dskd_fast.cosine_distance.map
cosine_gradient = torch.ops.dskd_fast.cosine_gradient.default


@torch.library.impl(_LIBRARY, "cosine_distance.map", "CompositeExplicitAutograd")
def _(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    """(B, C, H, W) twice -> distance (B, H, W)."""
    module = dispatch.load(dispatch.choose(backend, student, teacher, None).name)
    return module.cosine_distance(student, teacher, None)[0]


# As programs that were exported before the backward made the gradient call it.
_LIBRARY.define("cosine_distance(Tensor student, Tensor teacher, str backend, bool with_gradient) -> (Tensor, Tensor)")


@torch.library.impl(_LIBRARY, "cosine_distance", "CompositeImplicitAutograd")
def _(student, teacher, backend, with_gradient):
    distance = cosine_distance(student, teacher, backend)
    return distance, distance.new_empty(0)


@torch.library.impl(_LIBRARY, "cosine_gradient", "CompositeExplicitAutograd")
def _(student: Tensor, teacher: Tensor, weights: Tensor, backend: str) -> Tensor:
    """(B, C, H, W) twice and (B, H, W) -> the distance's gradient (B, C, H, W), each position's times its weight."""
    module = dispatch.load(dispatch.choose(backend, student, teacher, None).name)
    weights = weights.to(accumulation_dtype(student, teacher, "fp32")).contiguous()
    return module.cosine_distance(student, teacher, weights)[1]


@torch.library.register_fake(contextual_affinity, lib=_LIBRARY)
def _(student, teacher, temperature, precision, backend, with_gradient):
    dtype = accumulation_dtype(student, teacher, dispatch.current_name(precision))
    values = student.new_empty((student.shape[0], *student.shape[2:]), dtype=dtype)
    return values, torch.empty_like(student, dtype=dtype) if with_gradient else values.new_empty(0)


@torch.library.register_fake(cosine_distance, lib=_LIBRARY)
def _(student, teacher, backend):
    dtype = accumulation_dtype(student, teacher, "fp32")
    return student.new_empty((student.shape[0], *student.shape[2:]), dtype=dtype)


@torch.library.register_fake(cosine_gradient, lib=_LIBRARY)
def _(student, teacher, weights, backend):
    return torch.empty_like(student, dtype=accumulation_dtype(student, teacher, "fp32"))


def _save_gradient(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.others = [[None] * len(x) if isinstance(x, (list, tuple)) else None for x in inputs[1:]]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _scale_gradient(ctx, grad_map, _):
    _refuse_second_derivative()
    return (_scaled(ctx, grad_map), *ctx.others)


def _refuse_second_derivative():
    if torch.is_grad_enabled():
        # True under create_graph=True alone: the gradient is a constant to autograd, so that a second derivative would
        # come out without its larger part.
        raise RuntimeError("the loss has no second derivative: call backward or grad without create_graph=True")


def _scaled(ctx, grad_map):
    (gradient,) = ctx.saved_tensors
    if gradient.dim() == 1:
        raise RuntimeError(
            "the loss was computed without its gradient, as when it is exported with a student that does not require "
            "grad: compute or export it again with one that does"
        )
    return None if grad_map is None else (grad_map.unsqueeze(1) * gradient).to(ctx.dtype)


def _save_pair(ctx, inputs, output):
    student, teacher, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    # Of what ran in inference mode autograd saves a copy alone.
    ctx.save_for_backward(student, teacher.clone() if teacher.is_inference() else teacher)


def _gradient_of_pair(ctx, grad_map):
    _refuse_second_derivative()
    return _weighted(ctx, grad_map), None, None


def _weighted(ctx, grad_map):
    student, teacher = ctx.saved_tensors
    if grad_map is None:
        return None
    return call(cosine_gradient, student, teacher, grad_map, ctx.backend).to(student.dtype)


def _transformed(operator: Any, names: Sequence[str], joins: Callable[..., bool]) -> Callable[..., Any]:
    """An operator for torch.func, whose transforms do not know what is registered with it; see `register`."""

    class Transformed(torch.autograd.Function):
        """Of the leaves of the inputs: what lies within a list would have no derivative, and nobody would be told."""

        @staticmethod
        def forward(spec, *leaves):
            return operator(*tree_unflatten(leaves, spec))

        @staticmethod
        def setup_context(ctx, inputs, output):
            spec, *leaves = inputs
            ctx.spec = spec
            ctx.dtype = leaves[0].dtype
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(output[1])

        @staticmethod
        def backward(ctx, grad_map, grad_gradient):
            if grad_gradient is not None:  # torch.func.grad differentiates the backward only if it is asked to
                raise RuntimeError("the loss has no second derivative: differentiate it once")
            return (None, _scaled(ctx, grad_map), *(None for _ in ctx.needs_input_grad[2:]))

        @staticmethod
        def jvp(ctx, _, *tangents):
            for name, tangent in zip(names, tree_unflatten(tangents, ctx.spec), strict=False):
                refuse_tangents(**{name: next((x for x in tree_leaves(tangent) if x is not None), None)})

        @staticmethod
        def vmap(info, in_dims, spec, *leaves):
            function, dims = functools.partial(call, operator), tree_unflatten(in_dims[1:], spec)
            return _fold(function, names, joins, info, dims, *tree_unflatten(leaves, spec))

    def apply(*inputs: Any) -> Any:
        leaves, spec = tree_flatten(inputs)
        return Transformed.apply(spec, *leaves)

    return apply


class _TransformedCosine(torch.autograd.Function):
    """The cosine distance for torch.func."""

    forward = staticmethod(cosine_distance)
    setup_context = staticmethod(_save_pair)

    @staticmethod
    def backward(ctx, grad_map):
        return _weighted(ctx, grad_map), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        refuse_tangents(**dict(zip(("student", "teacher"), tangents, strict=False)))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _fold_images(functools.partial(call, cosine_distance), info, in_dims, *inputs)


class _TransformedGradient(torch.autograd.Function):
    """The cosine distance's gradient for torch.func, which would take a second derivative of it to be zero."""

    forward = staticmethod(cosine_gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad_gradient):
        raise RuntimeError("the loss has no second derivative: differentiate it once")

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("the loss has no second derivative: differentiate it once")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _fold_images(functools.partial(call, cosine_gradient), info, in_dims, *inputs)


REPLACED: ContextVar[Mapping[Any, Callable[..., Any]]] = ContextVar("REPLACED", default=MappingProxyType({}))
"""What `call` takes instead of the operators; see `dskd_fast.ops.portable.without_operators`."""


def call(operator: Callable[..., Any], *inputs: Any) -> Any:
    """Call one of the operators such that torch.func can differentiate it, too."""
    # The compiler knows no context variables; `torch.export.export(..., strict=False)` does without it.
    if not torch.compiler.is_dynamo_compiling() and operator in (replaced := REPLACED.get()):
        return replaced[operator](*inputs)
    return _TRANSFORMED[operator](*inputs) if is_transforming() else operator(*inputs)


def is_transforming() -> bool:
    """Whether a transform of torch.func is at work, and not the compiler, which cannot trace what `call` then uses."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _fold(function, names, joins, info, in_dims, *inputs):
    """The rule for vmap: images do not know of each other, so what is mapped over joins them, if nothing else is."""
    # Inside of vmap nothing shows that it requires grad.
    refuse_grad(**dict(zip(names[1:], inputs[1:], strict=False)))
    student, *options, with_gradient = inputs
    inputs = student, *options, with_gradient or (torch.is_grad_enabled() and student.requires_grad)
    if any(dim is not None for dim in tree_leaves(in_dims[2:])) or not joins(*inputs):
        entries = [
            function(*(_entry(x, dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(x) for x in zip(*entries, strict=True)), (0, 0)
    moved = _with_images_first(info, in_dims, inputs[:2])
    values, gradient = function(*(x.flatten(0, 1) for x in moved), *inputs[2:])
    images = moved[0].shape[:2]
    if not inputs[-1]:
        return (values.unflatten(0, images), gradient), (0, None)
    return (values.unflatten(0, images), gradient.unflatten(0, images)), (0, 0)


def _entry(x, dim, i):
    """The i-th of what is mapped over."""
    if isinstance(x, (list, tuple)):
        return [_entry(part, d, i) for part, d in zip(x, dim or [None] * len(x), strict=True)]
    return x if dim is None else x.select(dim, i)


def _with_images_first(info, in_dims, tensors):
    """The first inputs, with what is mapped over as a new first dimension of each."""
    dims = in_dims[: len(tensors)]
    return [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=True)
    ]


def _fold_images(function, info, in_dims, *inputs):
    """The same of operators that take images and a backend, and give something for each image."""
    *tensors, backend = inputs
    refuse_grad(teacher=tensors[1])
    moved = _with_images_first(info, in_dims, tensors)
    return function(*(x.flatten(0, 1) for x in moved), backend).unflatten(0, moved[0].shape[:2]), 0


_TRANSFORMED: dict[Any, Callable[..., Any]] = {
    cosine_distance: _TransformedCosine.apply,
    cosine_gradient: _TransformedGradient.apply,
}


def register(operator: Any, names: Sequence[str], joins: Callable[..., bool] = lambda *inputs: True) -> None:
    """Make an operator that gives a map and its gradient differentiable in its first input, by torch.func too.

    Args:
        operator: of student, teacher and more, whether a gradient is wanted last.
        names: of its inputs up to the last one that could have a derivative: that by any but the first is refused.
        joins: of its inputs, whether images of several calls make one call, as they know nothing of each other.
    """
    torch.library.register_autograd(operator, _scale_gradient, setup_context=_save_gradient, lib=_LIBRARY)
    torch.library.register_vmap(operator, functools.partial(_fold, operator, names, joins), lib=_LIBRARY)
    _TRANSFORMED[operator] = _transformed(operator, names, joins)


register(contextual_affinity, ("student", "teacher", "temperature"))
torch.library.register_autograd(cosine_distance, _gradient_of_pair, setup_context=_save_pair, lib=_LIBRARY)
for _operator in (cosine_distance, cosine_gradient):
    torch.library.register_vmap(_operator, functools.partial(_fold_images, _operator), lib=_LIBRARY)


def number_of(temperature: Tensor, name: str) -> float | Tensor:
    """The number, checked, of a tensor on the CPU; that of another device is never read back."""
    if temperature.device.type != "cpu":
        return temperature
    number = temperature.item()
    check_number(number, name)
    return number


def check_number(temperature: float, name: str) -> None:
    """Raise ValueError unless it is a number in the range of its name: "temperature", or another, of any keys."""
    limits, stated = TEMPERATURE_LIMITS, TEMPERATURE_RANGE
    if name != "temperature":
        limits, stated = DISTILLATION_TEMPERATURE_LIMITS, DISTILLATION_TEMPERATURE_RANGE
    is_number = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
    if not is_number or not limits[0] <= temperature <= limits[1]:
        raise ValueError(f"{name}={temperature!r} is not supported: use a number from {stated[0]} to {stated[1]:g}")


def refuse_tangents(**tangents: Tensor | None) -> None:
    """Raise NotImplementedError if one of the inputs, given by name, has a tangent."""
    for name, tangent in tangents.items():
        if tangent is not None:
            raise NotImplementedError(f"{name} carries a tangent of forward-mode autograd: use reverse mode (backward)")


def refuse_grad(**tensors: Any) -> None:
    """Raise ValueError if one of the inputs, tensors or lists of them by name, requires grad."""
    for name, x in tensors.items():
        parts = x if isinstance(x, (list, tuple)) else (x,)
        if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
            remedy = "run the teacher under torch.no_grad() or " if name == "teacher" else ""
            raise ValueError(
                f"{name} requires grad, but the loss is differentiable in the student, its first argument, alone: "
                f"{remedy}pass {name}.detach()"
            )
