"""The registered operators: `torch.ops.dskd_fast.contextual_affinity` and `torch.ops.dskd_fast.cosine_distance`.

Both take (B, C, H, W) and return a map (B, H, W) and, if wanted, the map's gradient (B, C, H, W), computed in the
same call. Each entry of the map depends on its own student vector alone, so the gradient for any grad_output is the
saved one times a scalar per position: the backward is one multiplication, and running it again gives the same. A second
derivative is refused.

Autocast does not cast their inputs, which would round what must be subtracted first: `dskd_fast.functional` turns it
into a precision, the type to which the operands of the products are rounded. The backend is chosen when the operator
runs, so that a compiled or exported graph runs on any machine.
"""

import torch
from torch import Tensor

from dskd_fast.backends.common import accumulation_dtype
from dskd_fast.ops import dispatch


@torch.library.custom_op("dskd_fast::contextual_affinity", mutates_args=())
def contextual_affinity(
    student: Tensor, teacher: Tensor, temperature: float, precision: str, backend: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) twice -> KL (B, H, W) and its gradient (B, C, H, W), the latter empty unless `with_gradient`."""
    if precision == dispatch.AMBIENT:
        precision = dispatch.ambient_precision(student.device.type)
    module = dispatch.load(dispatch.choose(backend, student, teacher, precision).name)
    kl, gradient = module.contextual_affinity(student, teacher, temperature, precision, with_gradient)
    return kl, kl.new_empty(0) if gradient is None else gradient


@torch.library.custom_op("dskd_fast::cosine_distance", mutates_args=())
def cosine_distance(student: Tensor, teacher: Tensor, backend: str, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) twice -> distance (B, H, W) and its gradient (B, C, H, W), empty unless `with_gradient`."""
    module = dispatch.load(dispatch.choose(backend, student, teacher, None).name)
    distance, gradient = module.cosine_distance(student, teacher, with_gradient)
    return distance, distance.new_empty(0) if gradient is None else gradient


def _fake_map(student, dtype, with_gradient):
    values = student.new_empty((student.shape[0], *student.shape[2:]), dtype=dtype)
    return values, torch.empty_like(student, dtype=dtype) if with_gradient else values.new_empty(0)


@contextual_affinity.register_fake
def _(student, teacher, temperature, precision, backend, with_gradient):
    return _fake_map(student, accumulation_dtype(student, teacher, precision), with_gradient)


@cosine_distance.register_fake
def _(student, teacher, backend, with_gradient):
    return _fake_map(student, accumulation_dtype(student, teacher, "ieee"), with_gradient)


def _save_gradient(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _scale_gradient(ctx, grad_map, _):
    if torch.is_grad_enabled():
        # True under create_graph=True alone: the saved gradient is a constant to autograd, so that a second derivative
        # would come out without its larger part.
        raise RuntimeError("the loss has no second derivative: call backward or grad without create_graph=True")
    (gradient,) = ctx.saved_tensors
    if gradient.dim() == 1:
        raise RuntimeError(
            "the loss was computed without its gradient, as when it is exported with a student that does not require "
            "grad: compute or export it again with one that does"
        )
    grad = None if grad_map is None else (grad_map.unsqueeze(1) * gradient).to(ctx.dtype)
    return (grad, *(None for _ in ctx.needs_input_grad[1:]))


for _operator in (contextual_affinity, cosine_distance):
    _operator.register_autograd(_scale_gradient, setup_context=_save_gradient)
