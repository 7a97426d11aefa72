"""The "triton" backend: the kernels of `dskd_fast.kernels`, on GPUs, or on CPU tensors under Triton's interpreter.

A call is a fixed sequence of launches without any synchronisation; its scratch memory is O(N*C). Importing this module
imports Triton; nothing is compiled before the first call.
"""

import contextlib
import math
import warnings

import numpy as np
import torch
import triton
from torch import Tensor

from dskd_fast.backends.common import PreparedKeys, dtype_refusal, finite_centre, outputs
from dskd_fast.kernels import affinity, configs, cosine, distillation, prepare, prepare_distillation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sums over more positions could leave float32's range at the lowest temperatures (kernels/README.md).
MAX_POSITIONS = 1 << 17
# Offsets within one image are 32-bit.
MAX_ELEMENTS = 1 << 31
# Fewer keys than this are not worth a program of their own.
FEWEST_SPLIT_KEYS = 512


def refusal(student: Tensor, teacher: Tensor, precision: str | None) -> str | None:
    """Why this backend cannot serve a call, None if it can; precision None stands for the cosine distance."""
    if (reason := dtype_refusal(student, teacher, DTYPES)) is not None:
        return reason
    if student.device.type == "cpu":
        if _is_interpreted() and isinstance(triton.language.sum, triton.runtime.JITFunction):
            return "TRITON_INTERPRET was set after Triton had been imported: set it before"
        if not _is_interpreted():
            return "it runs on GPUs (with TRITON_INTERPRET=1, slowly, on CPU tensors too)"
        return interpreter_refusal()
    if student.device.type != "cuda":
        return f"it does not run on {student.device.type} devices"
    if _is_interpreted():
        return "TRITON_INTERPRET is set, under which it takes CPU tensors only"
    if (reason := _device_refusal(student.device)) is not None:
        return reason
    if precision is not None:
        n = student.shape[2] * student.shape[3]
        if n > MAX_POSITIONS:
            return f"it takes at most {MAX_POSITIONS} positions, not {n}"
        return _elements_refusal(student)
    return None


def _elements_refusal(student: Tensor) -> str | None:
    rows = configs.padded_rows(student.shape[2] * student.shape[3])
    if (elements := rows * configs.padded_channels(student.shape[1])) >= MAX_ELEMENTS:
        return f"it takes at most {MAX_ELEMENTS - 1} elements per image, not {elements}"
    return None


def contextual_affinity(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, precision: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """KL map and, if wanted, its gradient; see `dskd_fast.backends`."""
    batch, channels, height, width = student.shape
    device = student.device
    kl, gradient = outputs(student, torch.float32, with_gradient)
    if kl.numel() == 0:
        return kl, gradient
    n = height * width
    n_pad, c_pad = configs.padded_rows(n), configs.padded_channels(channels)
    config = configs.config(architecture(device), precision, c_pad)
    operand_dtype = _operand_dtype(precision)
    operand_scale = prepare.FP16_SCALE.value if operand_dtype == torch.float16 else 1.0

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((batch, *shape), dtype=dtype, device=device)

    mean = scratch(prepare.GROUPS.value, c_pad)
    keys, delta = (scratch(n_pad, c_pad, dtype=operand_dtype) for _ in range(2))
    operand_stats = [scratch(n_pad) for _ in ("bias", "own_logit", "c_shift", "c_scale", "c_bound")]
    c_own = scratch(n_pad)
    row_stats = [scratch(n_pad) for _ in ("u", "teacher_shift", "student_shift", "factor")]
    inverse_norm = scratch(n_pad, dtype=torch.float64)

    per_position = {"C_PAD": c_pad, "BLOCK_P": prepare.BLOCK_P, "BLOCK_C": prepare.BLOCK_C, **prepare.EXACT}
    position_grid = (batch * (n_pad // prepare.BLOCK_P),)
    scalars = torch.empty((prepare.SCALARS,), dtype=torch.float32, device=device)
    near, other, far = ({"NEAR": kind == "near", "WITH_FAR": kind == "far"} for kind in ("near", "other", "far"))
    in_memory = isinstance(temperature, Tensor)
    of_temperature: tuple[Tensor | float, ...]
    kinds: tuple[dict[str, bool], ...]
    if isinstance(temperature, Tensor):  # in the device's memory: kernels of all kinds look there what they have to do
        of_temperature, own_shift, kinds = (temperature.double(), 0.0, 0.0, 0.0), False, (near, other, far)
    else:
        is_far = temperature * prepare.FAR_BELOW.value < 1
        logit_scale = 1 / (temperature * math.log(2) * operand_scale**2)
        of_temperature = (temperature, 1 / temperature, logit_scale, float(is_far))
        own_shift = temperature < prepare.OWN_SHIFT_BELOW.value
        # Rows are near, at the latest, where even opposite vectors are: |s - t| |t_j - t_i| / T <= 4/T.
        kinds = (near,) if temperature >= 4 / affinity.RADIUS.value else (near, far if is_far else other)
    variant = {"PRECISION": precision, "C_PAD": c_pad}

    with _on(device):
        prepare.centre_kernel[batch, prepare.GROUPS.value](
            teacher,
            mean,
            n,
            channels,
            width,
            *teacher.stride(),
            C_PAD=c_pad,
            BLOCK_C=prepare.CENTRE_BLOCK_C,
            **prepare.EXACT,
        )
        prepare.prepare_kernel[position_grid](
            student, teacher, mean, keys, delta, *operand_stats, c_own, inverse_norm, scalars, *of_temperature,
            n, n_pad, channels, width, *student.stride(), *teacher.stride(),
            PRECISION=precision, IN_MEMORY=in_memory, OWN_SHIFT=own_shift, **per_position,
        )  # fmt: skip
        for kind in kinds:
            affinity.forward_kernel[(batch * (n_pad // config.forward.m),)](
                keys, delta, *operand_stats, c_own, kl, *row_stats, scalars, n, n_pad,
                WITH_GRADIENT=with_gradient, **kind, **variant, **config.forward.launch(),
            )  # fmt: skip
        if gradient is not None:
            raw = scratch(n_pad, c_pad)
            for kind in kinds:
                affinity.gradient_kernel[batch * (n_pad // config.gradient.m), c_pad // config.chunk](
                    keys, delta, *operand_stats, *row_stats[:3], raw, scalars, n_pad,
                    CHUNK=config.chunk, **kind, **variant, **config.gradient.launch(),
                )  # fmt: skip
            prepare.project_kernel[position_grid](
                raw, keys, c_own, *row_stats, inverse_norm, student, gradient,
                n, n_pad, channels, width, *student.stride(), *gradient.stride(), **per_position,
            )  # fmt: skip
    return kl, gradient


def distillation_refusal(student: Tensor, teacher: Tensor, keys: Tensor | PreparedKeys, precision: str) -> str | None:
    """Why this backend cannot serve a distillation against any keys, None if it can."""
    if (reason := refusal(student, teacher, None)) is not None:
        return reason
    if isinstance(keys, Tensor) and (reason := dtype_refusal(keys, keys, DTYPES)) is not None:
        return reason
    return _elements_refusal(student)


def prepare_keys(keys: Tensor, normalize: bool, precision: str, centre: Tensor | None = None) -> list[Tensor]:
    """Keys (B', K, C) -> operands (B', K_PAD, C_PAD), their scale (B',) and the centre (B', C), float32 both."""
    images, count, channels = keys.shape
    device = keys.device
    c_pad = configs.padded_channels(channels)
    key_scale = torch.ones((images,), device=device)
    if centre is None or precision == "fp16":
        shape = images, prepare.GROUPS.value
        mean = torch.empty((*shape, c_pad), dtype=torch.float32, device=device)
        length = torch.empty(shape, dtype=torch.float32, device=device)
        with _on(device):
            prepare_distillation.centre_kernel[shape](
                keys, mean, length, count, channels, *keys.stride(), C_PAD=c_pad,
                BLOCK_C=prepare.CENTRE_BLOCK_C, NORMALIZE=normalize, **prepare.EXACT,
            )  # fmt: skip
        if centre is None:
            centre = finite_centre(mean.sum(1)[:, :channels])
        if precision == "fp16":
            exponent = torch.log2(length.nan_to_num(0.0, 0.0).amax(1).clamp(2.0**-60, 2.0**60)).ceil()
            key_scale = torch.exp2(prepare_distillation.KEY_EXPONENT - exponent)
    operands = torch.empty((images, configs.padded_rows(count), c_pad), dtype=_operand_dtype(precision), device=device)
    packed = [operands, key_scale, centre.to(torch.float32).contiguous()]
    _write_keys(packed, keys, 0, operands.shape[1], normalize, precision)
    return packed


def update_keys(packed: list[Tensor], keys: Tensor, start: int, normalize: bool, precision: str) -> None:
    """Write keys (B', P, C) in place of those from `start` on; see `dskd_fast.backends`."""
    _write_keys(packed, keys, start, keys.shape[1], normalize, precision)


def _write_keys(packed: list[Tensor], keys: Tensor, start: int, written: int, normalize: bool, precision: str) -> None:
    operands, key_scale, centre = packed
    images, count, channels = keys.shape
    with _on(keys.device):
        prepare_distillation.keys_kernel[(images * triton.cdiv(written, prepare.BLOCK_P),)](
            keys, centre, key_scale, operands, count, written, start, operands.shape[1], channels, *keys.stride(),
            C_PAD=operands.shape[2], BLOCK_P=prepare.BLOCK_P, BLOCK_C=prepare.BLOCK_C,
            PRECISION=precision, NORMALIZE=normalize, **prepare.EXACT,
        )  # fmt: skip


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
    batch, channels, height, width = student.shape
    device = student.device
    kl, gradient = outputs(student, torch.float32, with_gradient)
    if kl.numel() == 0:
        return kl, gradient
    packed = prepare_keys(keys, normalize, precision) if isinstance(keys, Tensor) else keys.packed
    operands, key_scale, _ = packed
    n = height * width
    n_pad, k_pad, c_pad = configs.padded_rows(n), *operands.shape[1:]
    config = configs.distillation_config(architecture(device), precision, c_pad)
    parts = math.ceil(k_pad / configs.ROW_MULTIPLE / _splits(device, batch * n_pad, k_pad)) * configs.ROW_MULTIPLE
    splits = triton.cdiv(k_pad, parts)
    rows = batch, n_pad

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # Either temperature may be in the device's memory, where its value cannot be looked at: both are put there.
    of_student, of_teacher = (
        x.double() if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=device)
        for x in (student_temperature, teacher_temperature)
    )
    bias = scratch(1 if key_mask is None else len(key_mask), k_pad)
    is_row = scratch(*rows, dtype=torch.int8)
    queries, delta = (scratch(*rows, c_pad, dtype=operands.dtype) for _ in range(2))
    scales = [scratch(*rows) for _ in ("a_scale", "c_scale")]
    inverse_norm = scratch(*rows, dtype=torch.float64)
    partial, final = scratch(distillation.PARTIAL, splits, *rows), scratch(distillation.FINAL, *rows)
    factor = scratch(*rows)
    per_row = {"C_PAD": c_pad, "BLOCK_P": prepare.BLOCK_P, "BLOCK_C": prepare.BLOCK_C, "NORMALIZE": normalize}
    row_grid = (batch * (n_pad // prepare.BLOCK_P),)
    scale_stride = 0 if len(operands) == 1 else 1
    over_pairs = (n_pad, k_pad, parts, batch, k_pad * scale_stride, 0 if len(bias) == 1 else k_pad)
    variant = {"PRECISION": precision, "C_PAD": c_pad}
    of_keys = bias if key_mask is None else key_mask.view(torch.uint8)
    of_rows = bias if row_mask is None else row_mask.contiguous().view(torch.uint8)

    with _on(device):
        prepare_distillation.bias_kernel[k_pad // prepare_distillation.BIAS_BLOCK, len(bias)](
            of_keys, bias, keys.shape[1], k_pad, *of_keys.stride(),
            BLOCK_P=prepare_distillation.BIAS_BLOCK, WITH_MASK=key_mask is not None,
        )  # fmt: skip
        prepare_distillation.rows_kernel[row_grid](
            student, teacher, of_rows, key_scale, queries, delta, *scales, inverse_norm, is_row, of_student, of_teacher,
            n, n_pad, channels, width, scale_stride, *student.stride(), *teacher.stride(),
            PRECISION=precision, WITH_MASK=row_mask is not None, **per_row, **prepare.EXACT,
        )  # fmt: skip
        distillation.forward_kernel[batch * (n_pad // config.forward.m), splits](
            queries, delta, operands, bias, is_row, *scales, partial, *over_pairs,
            **variant, **config.forward.launch(),
        )  # fmt: skip
        block_m, block_s = distillation.MERGE_BLOCK
        distillation.merge_kernel[(batch * (n_pad // block_m),)](
            partial, is_row, key_scale, of_student, kl, final, factor, n, n_pad, splits, batch, scale_stride,
            BLOCK_M=block_m, BLOCK_S=block_s, PRECISION=precision,
        )  # fmt: skip
        if gradient is not None:
            raw = scratch(splits, *rows, c_pad)
            distillation.gradient_kernel[batch * (n_pad // config.gradient.m), splits, c_pad // config.chunk](
                queries, delta, operands, bias, is_row, *scales, final, raw, *over_pairs,
                CHUNK=config.chunk, **variant, **config.gradient.launch(),
            )  # fmt: skip
            if splits > 1:
                block_s, block_e = prepare_distillation.SUM_BLOCK
                prepare_distillation.sum_kernel[(raw[0].numel() // block_e,)](
                    raw, splits, raw[0].numel(), BLOCK_S=block_s, BLOCK_E=block_e
                )  # fmt: skip
            prepare_distillation.project_kernel[row_grid](
                raw, factor, inverse_norm, student, gradient, n, n_pad, channels, width,
                *student.stride(), *gradient.stride(), **per_row, **prepare.EXACT,
            )  # fmt: skip
    return kl, gradient


def _splits(device: torch.device, rows: int, keys: int) -> int:
    """Into how many parts the keys are split: four blocks of 64 rows for each multiprocessor, if there are keys enough.

    It depends on shapes and the device alone, and so do the results' bits. Interpreted there are two, to be merged.
    """
    if device.type == "cpu":
        return 2
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(4 * processors * 64 // rows, keys // FEWEST_SPLIT_KEYS))


def cosine_distance(student: Tensor, teacher: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cosine distance map and, if weights are given, its gradient; see `dskd_fast.backends`."""
    batch, channels, height, width = student.shape
    distance, gradient = outputs(student, torch.float32, weights is not None)
    if distance.numel() == 0:
        return distance, gradient
    n = height * width
    # Without a gradient nothing is read or written: any tensor will do for the pointers.
    target = distance if gradient is None else gradient
    strides = (0, 0, 0, 0) if gradient is None else gradient.stride()
    blocks = configs.cosine_blocks(n)
    options = blocks.launch() | prepare.EXACT
    with _on(student.device):
        cosine.cosine_kernel[(batch * triton.cdiv(n, blocks.p),)](
            student, teacher, distance, distance if weights is None else weights, target, n, channels, width,
            *student.stride(), *teacher.stride(), *strides, WITH_GRADIENT=weights is not None, **options,
        )  # fmt: skip
    return distance, gradient


def _is_interpreted() -> bool:
    """Whether the kernels were loaded under TRITON_INTERPRET=1, which cannot be changed afterwards."""
    return not isinstance(affinity.forward_kernel, triton.runtime.JITFunction)


def interpreter_refusal() -> str | None:
    """Triton's interpreter before 3.7 makes numbers of arrays with one element, which numpy refuses from 2.4 on."""
    triton_version, numpy_version = (
        tuple(map(int, version.split(".")[:2])) for version in (triton.__version__, np.__version__)
    )
    if triton_version < (3, 7) and numpy_version >= (2, 4):
        return (
            f"the interpreter of Triton {triton.__version__} does not work with numpy {np.__version__}: use numpy "
            "below 2.4, or a newer Triton"
        )
    return None


def _operand_dtype(precision: str) -> torch.dtype:
    if precision == "bf16" and _is_interpreted():
        return torch.float32  # rounded to bfloat16's digits: the interpreter multiplies bfloat16 as integers
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def architecture(device: torch.device) -> str:
    """The table's name for a device; the interpreter works through the tiles of the smallest."""
    if device.type == "cpu":
        return "sm_89"
    if torch.version.hip:
        return configs.amd_architecture(torch.cuda.get_device_properties(device).gcnArchName)
    return configs.nvidia_architecture(*torch.cuda.get_device_capability(device))


_REFUSALS: dict[torch.device, str | None] = {}


def _device_refusal(device: torch.device) -> str | None:
    """Why nothing can run on a GPU, found out once by running the smallest kernel there is."""
    if device not in _REFUSALS:
        if torch.cuda.is_current_stream_capturing():
            return None  # a first compilation would end the capture; what can be found out waits for the next call
        try:
            architecture(device)
            student, teacher = torch.ones((2, 1, 1, 1, 1), device=device)
            cosine_distance(student, teacher, student[:, 0])
            _REFUSALS[device] = None
        except torch.OutOfMemoryError:
            raise
        except ValueError as error:
            _REFUSALS[device] = str(error)
        except Exception as error:  # Triton raises whatever its compiler, assembler and launcher do
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            _REFUSALS[device] = f"a trial on {device} failed: {reason}"
            warnings.warn(f"dskd_fast uses no Triton kernels: {_REFUSALS[device]}", stacklevel=2)
    return _REFUSALS[device]
