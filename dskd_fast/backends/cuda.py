"""The "cuda" backend: the CUDA C++ kernels of csrc/cuda, built at first use (`dskd_fast.backends.native_build`).

For NVIDIA GPUs on which Triton is missing or does not work. A call is a fixed sequence of launches on the current
stream, without any synchronisation; its scratch memory is O(N*C).
"""

import torch
from torch import Tensor

from dskd_fast.backends import native_build
from dskd_fast.backends.common import PreparedKeys, dtype_refusal, outputs

# Sums over more positions could leave float32's range at the lowest temperatures (kernels/README.md).
MAX_POSITIONS = 1 << 17
# Blocks of a grid.
MAX_BLOCKS = (1 << 31) - 1


def refusal(student: Tensor, teacher: Tensor, precision: str | None) -> str | None:
    """Why this backend cannot serve a call, None if it can; precision None stands for the cosine distance."""
    if student.device.type != "cuda":
        return f"it does not run on {student.device.type} devices"
    if (reason := dtype_refusal(student, teacher, (torch.float32, torch.bfloat16, torch.float16))) is not None:
        return reason
    if torch.version.hip:
        return "it runs on NVIDIA's GPUs"
    n = student.shape[2] * student.shape[3]
    if precision is not None and n > MAX_POSITIONS:
        return f"it takes at most {MAX_POSITIONS} positions, not {n}"
    if student.shape[0] * (n // 32 + 1) > MAX_BLOCKS:
        return f"it takes at most {32 * MAX_BLOCKS} positions of all images together"
    try:
        capability = torch.cuda.get_device_capability(student.device)
    except (RuntimeError, AssertionError) as error:  # no driver, or a PyTorch without CUDA
        return str(error).strip().splitlines()[0]
    if capability < (7, 5):
        return "it needs compute capability 7.5, and {}.{} is what this GPU has".format(*capability)
    if not native_build.is_loaded("cuda") and torch.cuda.is_current_stream_capturing():
        return "it is not built or loaded while a graph is captured: call it once before"
    try:
        native_build.load("cuda")
    except ImportError as error:
        return str(error)
    return _device_refusal(student.device)


def contextual_affinity(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, precision: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """KL map and, if wanted, its gradient; see `dskd_fast.backends`."""
    major, minor = torch.cuda.get_device_capability(student.device)
    kl, gradient = outputs(student, torch.float32, with_gradient)
    value, in_memory = (0.0, temperature.double()) if isinstance(temperature, Tensor) else (temperature, None)
    torch.ops.dskd_fast_cuda.contextual_affinity(
        student, teacher, value, in_memory, precision, 10 * major + minor, kl, gradient
    )
    return kl, gradient


def cosine_distance(student: Tensor, teacher: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cosine distance map and, if weights are given, its gradient; see `dskd_fast.backends`."""
    distance, gradient = outputs(student, torch.float32, weights is not None)
    torch.ops.dskd_fast_cuda.cosine_distance(student, teacher, distance, weights, gradient)
    return distance, gradient


_REFUSALS: dict[torch.device, str | None] = {}


def _device_refusal(device: torch.device) -> str | None:
    """Why nothing can run on a GPU, found out once by running the smallest call there is."""
    if device not in _REFUSALS:
        if torch.cuda.is_current_stream_capturing():
            return None  # what can be found out waits for the next call
        try:
            one = torch.ones((1, 1, 1, 1), device=device)
            cosine_distance(one, one, one[:, 0])
            torch.cuda.synchronize(device)
            _REFUSALS[device] = None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # no code for this GPU, or a driver that is too old
            _REFUSALS[device] = f"a trial on {device} failed: {str(error).strip().splitlines()[0]}"
    return _REFUSALS[device]


def distillation_refusal(student: Tensor, teacher: Tensor, keys: Tensor | PreparedKeys, precision: str) -> str | None:
    """Why this backend cannot serve a distillation against any keys, None if it can."""
    return "it has no kernels for keys other than the teacher's own"
