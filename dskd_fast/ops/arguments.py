"""What the functions of `dskd_fast.functional` take: checks, and the forms in which the operators take it."""

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from dskd_fast.backends.common import TEMPERATURE_LIMITS, PreparedKeys
from dskd_fast.ops import dispatch, operators


def check_temperature(temperature: float | Tensor, name: str = "temperature") -> None:
    """Raise ValueError or TypeError unless it is a number in the range of its name, or a tensor that may hold one.

    From 0.01 to 100 is "temperature", from 0.005 to 100 any other.
    """
    if not isinstance(temperature, Tensor):
        operators.check_number(temperature, name)
        return
    if temperature.dim() != 0:
        raise ValueError(f"{name} has shape {tuple(temperature.shape)}: pass a number or a tensor of shape ()")
    if not temperature.is_floating_point():
        raise TypeError(f"{name} has dtype {temperature.dtype}: pass a number or a floating-point tensor")
    _refuse_tangent(name, temperature)
    operators.refuse_grad(**{name: temperature})


def as_tensor(temperature: float | Tensor, device: torch.device, name: str = "temperature") -> Tensor:
    """The temperature, checked, as a tensor () on the CPU or on `device`; on `device` in compiled code."""
    if torch.compiler.is_compiling() and isinstance(temperature, np.ndarray):
        temperature = torch.as_tensor(temperature)  # the compiler takes numpy's numbers for arrays
    check_temperature(temperature, name)
    if isinstance(temperature, Tensor):
        if temperature.device == device:
            return temperature
        if temperature.device.type != "cpu":
            raise ValueError(
                f"{name} is on {temperature.device} and student on {device}: pass it on that device or on the CPU"
            )
    if torch.compiler.is_compiling():
        # A product is what the compiler can do with a float that changes, and with a tensor on the CPU, without a copy
        # to the device. `torch.tensor` would make a constant of the float.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.ones((), dtype=dtype, device=device) * temperature
    if isinstance(temperature, Tensor):
        return temperature
    return torch.tensor(temperature, dtype=torch.float64, device="cpu")


def check_features(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: pass a floating-point tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}: pass a floating-point tensor")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}: pass a dense tensor, x.to_dense()")
    _refuse_tangent(name, x)


_SHAPES = {2: "(M, C)", 3: "(B, N, C)", 4: "(B, C, H, W)"}


def as_maps(student: Tensor, teacher: Tensor, dims: tuple[int, ...] = (3, 4)) -> tuple[Tensor, Tensor]:
    """Check the pair; return both as views (B, C, H, W), of rows (B, C, N, 1)."""
    for name, x in (("student", student), ("teacher", teacher)):
        check_features(name, x)
        if x.dim() not in dims:
            accepted = " or ".join(_SHAPES[dim] for dim in sorted(dims, reverse=True))
            raise ValueError(f"{name} has shape {tuple(x.shape)}: pass {accepted}")
        if x.shape[1 if x.dim() == 4 else -1] == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must have at least one channel")
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher has shape {tuple(teacher.shape)} and student {tuple(student.shape)}: they must be the same "
            "(channels: a 1x1 convolution or nn.Linear; places: interpolate, or cut off class and register tokens; "
            "a map (B, C, H, W) as tokens (B, N, C): x.flatten(2).mT)"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher is on {teacher.device} and student on {student.device}: they must be on the same device"
        )
    operators.refuse_grad(teacher=teacher)
    if student.dim() == 4:
        return student, teacher
    if student.dim() == 2:
        student, teacher = student.unsqueeze(0), teacher.unsqueeze(0)
    return student.mT.unsqueeze(-1), teacher.mT.unsqueeze(-1)


def has_own_keys_range(temperature: float | Tensor) -> bool:
    """Whether `contextual_affinity` takes it; of a tensor that cannot be read without a wait or a graph break, no."""
    if isinstance(temperature, Tensor):
        if torch.compiler.is_compiling() or operators.is_transforming() or temperature.device.type != "cpu":
            return False
        temperature = temperature.item()
    return TEMPERATURE_LIMITS[0] <= temperature <= TEMPERATURE_LIMITS[1]


def as_keys(keys: Tensor, maps: Tensor | None = None) -> Tensor:
    """Check keys, against maps (B, C, H, W) if there are any; return them as (B or 1, K, C)."""
    check_features("keys", keys)
    if keys.dim() not in (2, 3) or keys.shape[-1] == 0:
        raise ValueError(f"keys has shape {tuple(keys.shape)}: pass (K, C) or (B, K, C) with at least one channel")
    operators.refuse_grad(keys=keys)
    keys = keys.unsqueeze(0) if keys.dim() == 2 else keys
    if maps is not None:
        if keys.shape[2] != maps.shape[1]:
            raise ValueError(f"keys has {keys.shape[2]} channels and student {maps.shape[1]}: they must be the same")
        if keys.shape[0] not in (1, maps.shape[0]):
            raise ValueError(
                f"keys is of {keys.shape[0]} images and student of {maps.shape[0]}: pass as many, or (K, C)"
            )
        if keys.device != maps.device:
            raise ValueError(f"keys is on {keys.device} and student on {maps.device}: they must be on the same device")
    return keys


def check_prepared(keys: PreparedKeys, maps: Tensor, precision: str | None, normalize: bool, backend: str) -> None:
    batch, _, channels = keys.shape
    if channels != maps.shape[1] or batch not in (1, maps.shape[0]):
        raise ValueError(
            f"keys were prepared from shape {keys.shape} and student has {maps.shape[0]} images of {maps.shape[1]} "
            "channels: they must have as many, or (K, C)"
        )
    check_layout(keys)
    if keys.packed[-1].device != maps.device:
        raise ValueError(f"keys were prepared on {keys.packed[-1].device} and student is on {maps.device}")
    wanted = keys.precision if precision is None else dispatch.current_name(precision)
    for name, given, prepared in (
        ("normalize", normalize, keys.normalize),
        ("precision", wanted, keys.precision),
        ("backend", keys.backend if backend == "auto" else backend, keys.backend),
    ):
        if given != prepared:
            raise ValueError(f"{name}={given!r}, but the keys were prepared with {prepared!r}: prepare them again")


def check_layout(keys: PreparedKeys) -> None:
    """Raise ValueError if they come from another machine, device or version, whose kernels read another form."""
    if torch.compiler.is_compiling():
        return  # it cannot trace the question
    here = dispatch.layout(keys.backend, keys.packed[-1].device)
    if keys.layout != here:
        raise ValueError(f"keys were prepared in {keys.layout}, and this is {here}: prepare the keys again")


def check_mask(name: str, mask: Tensor, device: torch.device, shapes: tuple[tuple[int, ...], ...]) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} is {kind}: pass a bool tensor, True for what takes part")
    if tuple(mask.shape) not in shapes:
        accepted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: pass {accepted}")
    if mask.device != device:
        raise ValueError(f"{name} is on {mask.device} and student on {device}: they must be on the same device")


def _refuse_tangent(name: str, x: Tensor) -> None:
    # It would pass through the operator as zero. The compiler cannot trace the question, and torch.func's transforms
    # hide the answer, but ask `operators.call`.
    if not torch.compiler.is_compiling() and not operators.is_transforming():
        operators.refuse_tangents(**{name: forward_ad.unpack_dual(x).tangent})
