"""The registered operator of the distillation against any keys: `torch.ops.dskd_fast.affinity_distillation`.

As `dskd_fast.ops.operators` has it for the contextual affinity: the gradient is computed in the same call as the map
and saved, the backward is one multiplication, and a second derivative is refused.
"""

import torch
from torch import Tensor

from dskd_fast.backends.common import PreparedKeys, accumulation_dtype
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
        operators.number_of(student_temperature, "student_temperature"),
        operators.number_of(teacher_temperature, "teacher_temperature"),
    ]
    kl, gradient = module.affinity_distillation(
        student, teacher, some, *temperatures, key_mask, row_mask, normalize, precision, with_gradient
    )
    return kl, kl.new_empty(0) if gradient is None else gradient


@affinity_distillation.register_fake
def _(student, teacher, keys, count, student_temperature, teacher_temperature, *options):
    *_, precision, _, with_gradient = options
    dtype = accumulation_dtype(student, teacher, precision)
    values = student.new_empty((student.shape[0], *student.shape[2:]), dtype=dtype)
    return values, torch.empty_like(student, dtype=dtype) if with_gradient else values.new_empty(0)


def _share_keys(student, teacher, keys, count, student_temperature, teacher_temperature, key_mask, row_mask, *options):
    return len(keys[-1]) == 1 and (key_mask is None or len(key_mask) == 1) and row_mask is None


operators.register(
    affinity_distillation,
    ("student", "teacher", "keys", "count", "student_temperature", "teacher_temperature"),
    _share_keys,
)
