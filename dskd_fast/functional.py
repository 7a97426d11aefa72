"""Contextual affinity and cosine distance maps, differentiable in the student.

Usable in any PyTorch project: CPU or GPU, under autocast and torch.compile. The N x N affinities are never stored as a
whole beyond N = 512 on a CPU: rows are visited a slab at a time, of at most 2^18 entries or 64 rows.
"""

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from dskd_fast.ops import operators
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
    s, t = _as_maps(student, teacher)
    temperature = _as_tensor(temperature, student.device)
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
    s, t = _as_maps(student, teacher)
    check_backend(backend)
    distance = operators.call(operators.cosine_distance, s, t, backend)
    return distance if student.dim() == 4 else distance.flatten(1)


def check_temperature(temperature: float | Tensor) -> None:
    """Raise ValueError or TypeError unless it is a number from 0.01 to 100 or a tensor that may hold one."""
    if not isinstance(temperature, Tensor):
        operators.check_number(temperature)
        return
    if temperature.dim() != 0:
        raise ValueError(f"temperature has shape {tuple(temperature.shape)}: pass a number or a tensor of shape ()")
    if not temperature.is_floating_point():
        raise TypeError(f"temperature has dtype {temperature.dtype}: pass a number or a floating-point tensor")
    _refuse_tangent("temperature", temperature)
    operators.refuse_grad(temperature=temperature)


def _as_tensor(temperature: float | Tensor, device: torch.device) -> Tensor:
    """The temperature, checked, as a tensor () on the CPU or on `device`; on `device` in compiled code."""
    if torch.compiler.is_compiling() and isinstance(temperature, np.ndarray):
        temperature = torch.as_tensor(temperature)  # the compiler takes numpy's numbers for arrays
    check_temperature(temperature)
    if isinstance(temperature, Tensor):
        if temperature.device == device:
            return temperature
        if temperature.device.type != "cpu":
            raise ValueError(
                f"temperature is on {temperature.device} and student on {device}: pass it on that device or on the CPU"
            )
    if torch.compiler.is_compiling():
        # A product is what the compiler can do with a float that changes, and with a tensor on the CPU, without a copy
        # to the device. `torch.tensor` would make a constant of the float.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.ones((), dtype=dtype, device=device) * temperature
    if isinstance(temperature, Tensor):
        return temperature
    return torch.tensor(temperature, dtype=torch.float64, device="cpu")


def _as_maps(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check the pair; return both as views (B, C, H, W), of rows (B, C, N, 1)."""
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}: pass a floating-point tensor")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}: pass a floating-point tensor")
        if x.layout != torch.strided:
            raise TypeError(f"{name} has layout {x.layout}: pass a dense tensor, x.to_dense()")
        _refuse_tangent(name, x)
        if x.dim() not in (3, 4):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: pass (B, C, H, W) or (B, N, C)")
        if x.shape[1 if x.dim() == 4 else 2] == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must have at least one channel")
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher has shape {tuple(teacher.shape)} and student {tuple(student.shape)}: they must be the same"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher is on {teacher.device} and student on {student.device}: they must be on the same device"
        )
    operators.refuse_grad(teacher=teacher)
    if student.dim() == 4:
        return student, teacher
    return student.mT.unsqueeze(-1), teacher.mT.unsqueeze(-1)


def _refuse_tangent(name: str, x: Tensor) -> None:
    # It would pass through the operator as zero. The compiler cannot trace the question, and torch.func's transforms
    # hide the answer, but ask `operators.call`.
    if not torch.compiler.is_compiling() and not operators.is_transforming():
        operators.refuse_tangents(**{name: forward_ad.unpack_dual(x).tangent})
