"""The "cuda" backend: the CUDA C++ kernels of csrc/cuda, built at first use (`dskd_fast.backends.native_build`).

For NVIDIA GPUs on which Triton is missing or does not work. A call is a fixed sequence of launches on the current
stream, without any synchronisation; its scratch memory is O(N*C), and that of a distillation O((N + K)*C).
"""

import torch
from torch import Tensor

from dskd_fast.backends import native_build, slabs
from dskd_fast.backends.common import PreparedKeys, dtype_refusal, finite_centre, outputs

# Sums over more positions could leave float32's range at the lowest temperatures (kernels/README.md).
MAX_POSITIONS = 1 << 17
# Blocks of a grid.
MAX_BLOCKS = (1 << 31) - 1
# Keys are padded to a multiple of the first, their channels of the second, and centred by the mean of as many as the
# third: csrc/cuda/launch.h.
TILE, PAD, SAMPLE = 64, 64, 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(student: Tensor, teacher: Tensor, precision: str | None) -> str | None:
    """Why this backend cannot serve a call, None if it can; precision None stands for the cosine distance."""
    return _refusal(student, teacher, None if precision is None else MAX_POSITIONS)


def distillation_refusal(student: Tensor, teacher: Tensor, keys: Tensor | PreparedKeys, precision: str) -> str | None:
    """Why this backend cannot serve a distillation against any keys, None if it can."""
    if isinstance(keys, Tensor) and (reason := dtype_refusal(keys, keys, _DTYPES)) is not None:
        return reason
    return _refusal(student, teacher, None)


def _refusal(student: Tensor, teacher: Tensor, most_positions: int | None) -> str | None:
    if student.device.type != "cuda":
        return f"it does not run on {student.device.type} devices"
    if (reason := dtype_refusal(student, teacher, _DTYPES)) is not None:
        return reason
    if torch.version.hip:
        return "it runs on NVIDIA's GPUs"
    n = student.shape[2] * student.shape[3]
    if most_positions is not None and n > most_positions:
        return f"it takes at most {most_positions} positions, not {n}"
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
    kl, gradient = outputs(student, torch.float32, with_gradient)
    torch.ops.dskd_fast_cuda.contextual_affinity(
        student, teacher, *_value_or_memory(temperature), precision, _capability(student.device), kl, gradient
    )
    return kl, gradient


def affinity_distillation(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor | PreparedKeys,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    normalize: bool,
    precision: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """KL map and, if wanted, its gradient; see `dskd_fast.backends`."""
    kl, gradient = outputs(student, torch.float32, with_gradient)
    packed = prepare_keys(keys, normalize, precision) if isinstance(keys, Tensor) else keys.packed
    masks = (None if mask is None else mask.contiguous() for mask in (key_mask, row_mask))
    torch.ops.dskd_fast_cuda.affinity_distillation(
        student, teacher, packed[0], keys.shape[1], *_value_or_memory(student_temperature),
        *_value_or_memory(teacher_temperature), *masks, normalize, _operands(normalize, precision),
        _capability(student.device), torch.cuda.get_device_properties(student.device).multi_processor_count,
        kl, gradient,
    )  # fmt: skip
    return kl, gradient


def prepare_keys(keys: Tensor, normalize: bool, precision: str, centre: Tensor | None = None) -> list[Tensor]:
    """Operands (B', K, C) as bytes, K and C padded, and the centre (B', C), float64; see `dskd_fast.backends`."""
    batch, count, channels = keys.shape
    capability = _capability(keys.device)
    is_half = capability >= 80 and _operands(normalize, precision) in ("bf16", "fp16")
    size = -(-channels // PAD) * PAD * (2 if is_half else 4)
    operands = torch.empty((batch, -(-count // TILE) * TILE, size), dtype=torch.uint8, device=keys.device)
    operands[:, count:].zero_()
    packed = [operands, centre_of(keys, normalize) if centre is None else centre.double().contiguous()]
    update_keys(packed, keys, 0, normalize, precision)
    return packed


def update_keys(packed: list[Tensor], keys: Tensor, start: int, normalize: bool, precision: str) -> None:
    """Write keys (B', P, C) in place of those from `start` on; see `dskd_fast.backends`."""
    operands, centre = packed
    torch.ops.dskd_fast_cuda.prepare_keys(
        keys.mT.unsqueeze(-1), centre, normalize, _operands(normalize, precision), _capability(keys.device), start,
        operands,
    )  # fmt: skip


def centre_of(keys: Tensor, normalize: bool) -> Tensor:
    """The mean (B', C), float64, of keys (B', K, C), or of `SAMPLE` of them at equal distances."""
    count = keys.shape[1]
    if count > SAMPLE:
        keys = keys[:, torch.arange(SAMPLE, device=keys.device) * count // SAMPLE]
    return finite_centre((slabs.normalise(keys)[0] if normalize else keys.double()).mean(1))


def cosine_distance(student: Tensor, teacher: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cosine distance map and, if weights are given, its gradient; see `dskd_fast.backends`."""
    distance, gradient = outputs(student, torch.float32, weights is not None)
    torch.ops.dskd_fast_cuda.cosine_distance(student, teacher, distance, weights, gradient)
    return distance, gradient


def _value_or_memory(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, temperature.double()) if isinstance(temperature, Tensor) else (temperature, None)


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _operands(normalize: bool, precision: str) -> str:
    """What products round to: fp16 has no range for vectors of any length, and tf32 has its digits."""
    return "tf32" if precision == "fp16" and not normalize else precision


_REFUSALS: dict[torch.device, str | None] = {}


def _device_refusal(device: torch.device) -> str | None:
    """Why nothing can run on a GPU, found out once by running the smallest call there is."""
    if device not in _REFUSALS:
        if torch.cuda.is_current_stream_capturing():
            return None  # what can be found out waits for the next call
        try:
            one, map_ = torch.ones((1, 1, 1, 1), device=device), torch.ones((1, 1, 1), device=device)
            cosine_distance(one, one, map_)
            torch.cuda.synchronize(device)
            _REFUSALS[device] = None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # no code for this GPU, or a driver that is too old
            _REFUSALS[device] = f"a trial on {device} failed: {str(error).strip().splitlines()[0]}"
    return _REFUSALS[device]
