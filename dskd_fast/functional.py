"""Contextual affinity, its form for any keys, and cosine distance: maps that are differentiable in the student.

Usable in any PyTorch project: CPU or GPU, under autocast and torch.compile. The N x N (or N x K) affinities are never
stored as a whole beyond N = 512 on a CPU: rows are visited a slab at a time, of at most 2^18 entries or 64 rows.
"""

import torch
from torch import Tensor

from dskd_fast.backends.common import PreparedKeys
from dskd_fast.ops import arguments, dispatch, distillation, operators
from dskd_fast.ops.dispatch import check_backend, resolve_precision


def contextual_affinity(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Per-position contextual affinity loss: the KL map of the paper's eq. 6 (arXiv 2307.03101).

    For each position i, the affinities of the student's and of the teacher's vector with all of the teacher's vectors
    (cosines, eq. 3-4) become distributions by a softmax with temperature T (eq. 5); the map is
    T^2 KL(p_teacher_i || p_student_i). A vector of zeros has cosine 0 with everything and takes no gradient.

    Args:
        student: (B, C, H, W) or (B, N, C), floating, any strides. Differentiable, once, by reverse-mode autograd,
            torch.func's grad, vjp and jacrev included, unless they are part of a fullgraph of torch.compile. Its vmap
            makes one batch of all.
        teacher: same shape and device, any floating dtype. Must not require grad: it is a constant here.
        temperature: T, from 0.01 to 100: a number, or a floating tensor () on the CPU or the student's device, which
            must not require grad. Either may change from call to call, in compiled code, too. A tensor on another
            device than the CPU is never read back: out of range it makes the map and its gradient NaN.
        precision: type to which the operands of the matrix products are rounded; accumulation is in float32 at least.
            "fp32" (float32; float64 for float64 inputs), "tf32", "bf16" or "fp16". None follows PyTorch: the autocast
            dtype if autocast is on, the dtype of half-precision inputs, else `torch.get_float32_matmul_precision()`.
            The lower T, the more rounding costs, since logits grow with 1/T: relative to the KL map, bf16 keeps two
            to three digits from T = 0.1 up and about one at T = 0.01.
        backend: "triton", "cuda", "cpu" or "torch" forces one; "auto" takes what the environment variable
            DSKD_FAST_BACKEND names, else the first of the device's that can serve the call (`dskd-fast doctor` tells).

    Returns:
        (B, H, W) or (B, N), float32, whatever the inputs' dtype: values reach below the range of half precision
        (float64 if an input is float64 and the precision "fp32").

    Raises:
        TypeError: an input is not a dense floating tensor.
        NotImplementedError: forward-mode autograd is asked for.
        ValueError: shapes, devices, temperature, precision or backend outside of the above, or the teacher or the
            temperature requires grad.
        RuntimeError: the forced backend cannot serve the call, or a second derivative is asked for.

    Example:
        >>> student = torch.randn(2, 256, 16, 16, requires_grad=True)
        >>> kl = contextual_affinity(student, torch.randn(2, 256, 16, 16), temperature=0.5)
        >>> kl.shape
        torch.Size([2, 16, 16])
        >>> kl.mean().backward()
    """
    s, t = arguments.as_maps(student, teacher)
    temperature = arguments.as_tensor(temperature, student.device)
    check_backend(backend)
    kl, _ = operators.call(
        operators.contextual_affinity,
        s,
        t,
        temperature,
        resolve_precision(precision, s, t),
        backend,
        torch.is_grad_enabled() and student.requires_grad,
    )
    return kl if student.dim() == 4 else kl.flatten(1)


def affinity_distillation(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor | PreparedKeys | None = None,
    *,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor | None = None,
    key_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    normalize: bool = True,
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Per-row KL divergence of the student's from the teacher's affinities with any keys.

    KL(softmax_k <t_i, k>/T_t || softmax_k <s_i, k>/T_s) for each row i, with all vectors normalised: the loss of SEED
    and CompRess (keys: a queue of embeddings), of CIRKD (a memory of pixels) and, with the teacher's own vectors as
    keys and one temperature, the paper's contextual affinity divided by T^2. dskd_fast/losses/README.md tells which
    published loss is which arguments. Neither the N x K affinities nor a copy of the features for a mask is stored.

    Args:
        student: (B, N, C), (B, C, H, W) or (M, C), floating, any strides. Differentiable as in `contextual_affinity`.
        teacher: same shape and device, any floating dtype. Must not require grad.
        keys: (B, K, C), or (K, C) shared by all images, any floating dtype; or what `prepare_keys` made of them; or
            None for the teacher's own vectors. K from 1 to 2^20. Must not require grad.
        student_temperature: T_s, from 0.005 to 100, a number or a floating tensor () as in `contextual_affinity`.
        teacher_temperature: T_t, likewise; None for T_s.
        key_mask: bool, (B, K), or (K,) for all images alike, True for keys that take part. Masked ones must be finite.
        row_mask: bool, of the result's shape, True for rows that take part; the others give 0 whatever they hold.
        normalize: whether vectors are divided by their length. Otherwise logits are what they are; up to 300 in size
            they keep their digits.
        precision: as in `contextual_affinity`; None with prepared keys stands for theirs. From T of 0.1 up bf16 is off
            by at most 2e-3 of the map and 5e-3 of the gradient (L2 norms, features with 32 channels or more) where a
            row's weight is spread over many keys. Where keys all but repeat the rows, so that one key has most of it, a
            single logit's rounding is not averaged: then by at most 6e-3 and 1.2e-2. tf32 and fp16: an eighth of all.
        backend: as in `contextual_affinity`; prepared keys stay with the backend that made them.

    Returns:
        (B, N), (B, H, W) or (M,), float32 (float64 as there). 0 in rows of which all keys are masked.

    Raises:
        TypeError: an input is not a dense floating tensor, a mask is not bool.
        NotImplementedError: forward-mode autograd is asked for.
        ValueError: shapes, devices, temperatures, precision or backend outside of the above, or an input other than the
            student requires grad.
        RuntimeError: the forced backend cannot serve the call, or a second derivative is asked for.

    Example:
        >>> student = torch.randn(32, 128, requires_grad=True)
        >>> teacher, queue = torch.randn(32, 128), torch.randn(4096, 128)
        >>> kl = affinity_distillation(student, teacher, queue, student_temperature=0.07, teacher_temperature=0.01)
        >>> kl.shape
        torch.Size([32])
        >>> kl.mean().backward()
    """
    s, t = arguments.as_maps(student, teacher, dims=(2, 3, 4))
    check_backend(backend)
    ts = arguments.as_tensor(student_temperature, student.device, "student_temperature")
    tt = (
        ts
        if teacher_temperature is None
        else arguments.as_tensor(teacher_temperature, student.device, "teacher_temperature")
    )
    resolved = resolve_precision(precision, s, t)
    shape = student.shape[:-1] if student.dim() < 4 else (student.shape[0], *student.shape[2:])
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    own = keys is None and teacher_temperature is None and key_mask is None and row_mask is None and normalize
    if own and arguments.has_own_keys_range(student_temperature):
        kl, _ = operators.call(operators.contextual_affinity, s, t, ts, resolved, backend, with_gradient)
        # T^2 as one factor would underflow with the smallest T.
        scale = ts.to(kl.device)
        return ((kl / scale) / scale).to(kl.dtype).reshape(shape)
    packed, count = [t.flatten(2).mT], None
    if isinstance(keys, PreparedKeys):
        arguments.check_prepared(keys, s, precision, normalize, backend)
        packed, count, resolved, backend = keys.packed, keys.shape[1], keys.precision, keys.backend
    elif keys is not None:
        packed = [arguments.as_keys(keys, s)]
    n_keys = packed[0].shape[1] if count is None else count
    if n_keys == 0 and keys is not None:
        raise ValueError("keys has no rows: pass at least one key")
    if key_mask is not None:
        accepted = ((n_keys,), (s.shape[0], n_keys))
        arguments.check_mask("key_mask", key_mask, s.device, accepted)
        key_mask = key_mask.unsqueeze(0) if key_mask.dim() == 1 else key_mask
    if row_mask is not None:
        arguments.check_mask("row_mask", row_mask, s.device, (tuple(shape),))
        row_mask = row_mask.reshape(s.shape[0], *s.shape[2:])
    kl, _ = operators.call(
        distillation.affinity_distillation,
        s, t, packed, count, ts, tt, key_mask, row_mask, normalize, resolved, backend, with_gradient,
    )  # fmt: skip
    return kl.reshape(shape)


@torch.inference_mode(False)  # an inference tensor could not be updated outside of that mode
@torch.no_grad()
def prepare_keys(
    keys: Tensor, *, normalize: bool = True, precision: str | None = None, backend: str = "auto"
) -> PreparedKeys:
    """Keys as `affinity_distillation` reads them, for those that do not change between calls: a queue, a memory.

    Args:
        keys: (K, C), shared by all images, or (B, K, C), floating. One that is not finite makes rows NaN until it is
            replaced.
        normalize, precision, backend: as in `affinity_distillation`, which takes them from here.

    Returns:
        What `affinity_distillation` takes as keys, about as large as they are in the precision's type (twice that on a
        CPU). Not differentiable; made and updated outside of compiled code. It may be copied, pickled to other
        processes, saved by torch.save and, once dskd_fast.functional is imported, loaded by torch.load with
        weights_only=True, to be used on the same kind of device by the same version; elsewhere it is an error that says
        so, and the keys are to be prepared again.

    Example:
        >>> queue = prepare_keys(torch.randn(4096, 128), precision="bf16")
        >>> x = torch.randn(32, 128)
        >>> affinity_distillation(x, x, queue, student_temperature=0.07).sum()
        tensor(0.)
        >>> update_keys(queue, torch.randn(32, 128), start=0)
    """
    check_backend(backend)
    keys = arguments.as_keys(keys)
    if keys.shape[1] == 0:
        raise ValueError("keys has no rows: pass at least one key")
    one = keys[:, :1].mT.unsqueeze(-1)
    resolved = resolve_precision(precision, one, one)
    if resolved == dispatch.AMBIENT:
        resolved = dispatch.ambient_precision(keys.device.type)
    name = dispatch.choose(backend, one, one, resolved, keys).name
    packed = dispatch.load(name).prepare_keys(keys, normalize, resolved)
    layout = dispatch.layout(name, keys.device)
    return PreparedKeys(packed, (len(keys), keys.shape[1], keys.shape[2]), normalize, resolved, name, layout)


@torch.no_grad()
def update_keys(prepared: PreparedKeys, keys: Tensor, start: int) -> None:
    """Put (P, C) or (B, P, C) keys in place of those from `start` on, beyond the end from the beginning on: a queue.

    Only these are prepared, in place. The centre, which is subtracted from all keys and changes no result but rounding,
    stays that of the keys that `prepare_keys` had.

    Raises:
        ValueError: P is larger than K, `start` is not from 0 to K - 1, or the shapes do not fit.
    """
    if not isinstance(prepared, PreparedKeys):
        raise TypeError(f"prepared is a {type(prepared).__name__}: pass what prepare_keys returns")
    arguments.check_layout(prepared)
    batch, count, channels = prepared.shape
    keys = arguments.as_keys(keys)
    if keys.shape[0] != batch or keys.shape[2] != channels or keys.shape[1] > count:
        raise ValueError(f"keys has shape {tuple(keys.shape)} as (B, P, C): pass part of {prepared.shape}, (B, K, C)")
    if not hasattr(start, "__index__") or not 0 <= start < count:
        raise ValueError(f"start={start!r} is not a place of one of {count} keys: use 0 to {count - 1}")
    module = dispatch.load(prepared.backend)
    first = min(keys.shape[1], count - start)
    for part, place in ((keys[:, :first], start), (keys[:, first:], 0)):
        if part.shape[1]:
            module.update_keys(prepared.packed, part, place, prepared.normalize, prepared.precision)


def cosine_distance(student: Tensor, teacher: Tensor, *, backend: str = "auto") -> Tensor:
    """Per-position cosine distance 1 - <s_i, t_i>/(|s_i||t_i|), the paper's eq. 1.

    Args:
        student: (B, C, H, W) or (B, N, C), floating, any strides. Differentiable, once, by reverse-mode autograd.
        teacher: same shape and device, any floating dtype. Must not require grad. Both are saved for the backward, so
            neither may be changed in place before it; and under torch.compile, which saves no tensors of inference
            mode, let the teacher run under torch.no_grad.
        backend: as in `contextual_affinity`.

    Returns:
        (B, H, W) or (B, N), float32 (float64 if an input is float64). 1 where either vector is zero.

    Raises:
        TypeError: an input is not a dense floating tensor.
        NotImplementedError: forward-mode autograd is asked for.
        ValueError: shapes, devices or backend outside of the above, or the teacher requires grad.
        RuntimeError: the forced backend cannot serve the call, or a second derivative is asked for.

    Example:
        >>> x = torch.randn(2, 49, 64)
        >>> cosine_distance(x, -x).mean()
        tensor(2.)
    """
    s, t = arguments.as_maps(student, teacher)
    check_backend(backend)
    distance = operators.call(operators.cosine_distance, s, t, backend)
    return distance if student.dim() == 4 else distance.flatten(1)
