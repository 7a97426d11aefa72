"""Implementations of the operators, one module per backend.

Each module has

    contextual_affinity(student, teacher, temperature, precision, with_gradient) -> map, gradient or None
    cosine_distance(student, teacher, weights) -> map, gradient or None
    refusal(student, teacher, precision) -> why it cannot serve this call, None if it can; precision None: the cosine

    affinity_distillation(student, teacher, keys, student_temperature, teacher_temperature, key_mask, row_mask,
                          normalize, precision, with_gradient) -> map, gradient or None
    distillation_refusal(student, teacher, keys, precision) -> why it cannot serve this call, None if it can
    prepare_keys(keys, normalize, precision, centre=None) -> list of tensors: `common.PreparedKeys.packed`
    update_keys(packed, keys, start, normalize, precision): writes keys (B', P, C) in place of those from `start` on

on tensors (B, C, H, W) of any strides, of one device and any floating dtypes it does not refuse. The temperature is a
number in `choices.TEMPERATURE_RANGE`, or a tensor () in the memory of a device that is not the CPU: its value is not
read back, since that would stall the queue; out of range it makes all results NaN. The map is (B, H, W), contiguous,
the gradient of each entry with respect to its own student vector (B, C, H, W), laid out like
`torch.empty_like(student)`, both in `common.accumulation_dtype`. Of the cosine distance a position's gradient is
multiplied by its weight, of (B, H, W) contiguous weights of that dtype; without weights there is no gradient. Inputs
are never written to.

Keys are a tensor (B', K, C) of any strides and floating dtype, with B' = 1 where all images share them, or
`common.PreparedKeys` that the same backend made. With a centre given, `prepare_keys` subtracts it in place of one of
its own. Masks are bool, True for what takes part: of keys (B', K) with B' = 1 or B, of rows (B, H, W), None for all.
Masked keys must be finite. Rows that are masked, or have no key left, have KL and gradient 0.

Autograd, argument checks and the choice among backends live above, in `dskd_fast.ops`.

Nothing is defined here: a module named `torch` becomes a name of this package, and would hide PyTorch from it.
"""
