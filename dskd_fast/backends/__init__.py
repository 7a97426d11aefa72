"""Implementations of the operators, one module per backend.

Each module has

    contextual_affinity(student, teacher, temperature, precision, with_gradient) -> map, gradient or None
    cosine_distance(student, teacher, weights) -> map, gradient or None
    refusal(student, teacher, precision) -> why it cannot serve this call, None if it can; precision None: the cosine

on tensors (B, C, H, W) of any strides, of one device and any floating dtypes it does not refuse. The temperature is a
number in `choices.TEMPERATURE_RANGE`, or a tensor () in the memory of a device that is not the CPU: its value is not
read back, since that would stall the queue; out of range it makes all results NaN. The map is (B, H, W), contiguous,
the gradient of each entry with respect to its own student vector (B, C, H, W), laid out like
`torch.empty_like(student)`, both in `common.accumulation_dtype`. Of the cosine distance a position's gradient is
multiplied by its weight, of (B, H, W) contiguous weights of that dtype; without weights there is no gradient. Inputs
are never written to. Autograd, argument checks and the choice among backends live above, in `dskd_fast.ops`.

Nothing is defined here: a module named `torch` becomes a name of this package, and would hide PyTorch from it.
"""
