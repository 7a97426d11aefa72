"""The CUDA kernels where there is no GPU: their own sources, compiled for the host and run on an emulation.

The emulation (in the folder of that name) has the threads of a block, barriers, shared memory, warp operations, matrix
fragments and asynchronous copies. It runs under AddressSanitizer and UndefinedBehaviorSanitizer, with buffers of
exactly the size that is needed and NaN wherever nothing has been written.
"""

import math
import re
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton

from dskd_fast import reference
from dskd_fast.backends import cuda, native_build
from dskd_fast.backends.common import DISTILLATION_TEMPERATURE_LIMITS, TEMPERATURE_LIMITS

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent / "emulation"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/common/maps.h
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# The prepare and cosine kernels count on products that are not fused, and nvcc is told so, too.
FLAGS = ("-std=c++20", "-Og", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")  # in the order of driver.cpp


class Call(NamedTuple):
    """Maps (B, C, H, W) and what is done with them.

    The temperature None is the cosine distance, a tensor one that lies in the device's memory.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    temperature: float | torch.Tensor | None
    precision: str = "fp32"
    with_gradient: bool = True
    seed: int = 0


class Distillation(NamedTuple):
    """The same with keys (B', K, C); both temperatures are numbers, or tensors that lie in the device's memory."""

    student: torch.Tensor
    teacher: torch.Tensor
    keys: torch.Tensor
    temperature: float | torch.Tensor
    teacher_temperature: float | torch.Tensor
    precision: str = "fp32"
    with_gradient: bool = True
    seed: int = 0
    key_mask: torch.Tensor | None = None
    row_mask: torch.Tensor | None = None
    normalize: bool = True
    multiprocessors: int = 2


class Emulation:
    """The kernels as compiled for sm_75 or for sm_80 and later."""

    def __init__(self, program: Path, capability: int) -> None:
        self.program = program
        self.capability = capability

    def run(self, calls: list[Call | Distillation], folder: Path) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """The map (B, H, W) and the gradient (B, C, H, W) of each call, all in one process."""
        source, result = folder / "calls", folder / "results"
        source.write_bytes(b"".join(map(self._packed, calls)))
        ran = subprocess.run([self.program, source, result], capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[:3000]
        numbers, results = torch.from_numpy(np.fromfile(result, np.float32)), []
        for call in calls:
            shape = call.student.shape
            values, numbers = numbers.tensor_split([shape[0] * shape[2] * shape[3]])
            values, gradient = values.view(shape[0], *shape[2:]), None
            if call.with_gradient:
                gradient, numbers = numbers.tensor_split([shape.numel()])
                gradient = gradient.as_strided(shape, torch.empty_like(call.student, device="meta").stride())
                if call.temperature is None:  # the driver's weights: 1 and 4 by turns
                    weights = 1 + 3 * (torch.arange(values.numel()) % 2)
                    gradient = gradient / weights.view(values.shape)[:, None]
            results.append((values, gradient))
        assert len(numbers) == 0
        return results

    def _packed(self, call: Call | Distillation) -> bytes:
        gradient = torch.empty_like(call.student, dtype=torch.float32, device="meta")
        in_memory = isinstance(call.temperature, torch.Tensor)
        kind = 2 if isinstance(call, Distillation) else call.temperature is not None
        precision = cuda._operands(call.normalize, call.precision) if kind == 2 else call.precision
        header = [call.seed, kind, in_memory, call.with_gradient, PRECISIONS.index(precision), *call.student.shape]
        for x in (call.student, call.teacher, gradient):
            header += [DTYPES.index(x.dtype), *x.stride()]
        storages = [storage_of(x) for x in (call.student, call.teacher)]
        header += map(len, storages)
        temperatures = [call.temperature or 0, 0]
        if isinstance(call, Distillation):
            temperatures[1] = call.teacher_temperature
            storages += [storage_of(call.keys), storage_of(cuda.centre_of(call.keys, call.normalize))]
            header += [*call.keys.shape[:2], DTYPES.index(call.keys.dtype), *call.keys.stride(), len(storages[2])]
            header += [0 if call.key_mask is None else len(call.key_mask), call.row_mask is not None]
            storages += [storage_of(x) for x in (call.key_mask, call.row_mask) if x is not None]
            header += [call.normalize, call.multiprocessors]
        header += [0] * (48 - len(header))
        return struct.pack("<48q2d", *map(int, header), *map(float, temperatures)) + b"".join(storages)


def storage_of(x: torch.Tensor) -> bytes:
    """From the first element to the last, with all between them that is not the tensor's."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return torch.as_strided(x, (extent if x.numel() else 0,), (1,)).contiguous().view(torch.uint8).numpy().tobytes()


def compile_with_emulation(target: Path, sources: list[Path], tensor_cores: bool) -> None:
    try:
        compiler = native_build._compiler()
    except native_build.BuildError as error:
        pytest.skip(str(error))
    folders = [f"-I{native_build.csrc_folder() / 'cuda'}", f"-I{HERE}"]
    objects = [target.with_name(f"{source.stem}.{tensor_cores}.o") for source in sources]

    def build(source, built):
        command = [compiler, *FLAGS, *SANITIZERS, *folders, f"-DDSKD_TENSOR_CORES={int(tensor_cores)}"]
        subprocess.run([*command, "-x", "c++", "-c", source, "-o", built], check=True)

    with ThreadPoolExecutor() as threads:
        list(threads.map(build, sources, objects))
    subprocess.run([compiler, *SANITIZERS, *objects, "-o", target], check=True)


@pytest.fixture(scope="module", params=[80, 75])
def emulation(request, made_once):
    csrc, capability = native_build.csrc_folder() / "cuda", request.param
    sources = [
        *(csrc / f"{name}.cu" for name in ("affinity", "prepare", "cosine", "distillation", "distillation_prepare")),
        HERE / "driver.cpp",
    ]
    folder = made_once(
        f"emulation{capability}", lambda folder: compile_with_emulation(folder / "driver", sources, capability >= 80)
    )
    return Emulation(folder / "driver", capability)


# For what the prepare kernels decide: the two differ in how they multiply, and in how many tiles they keep.
of_sm_80 = pytest.mark.parametrize("emulation", [80], indirect=True)


def maps(rows, image=None):
    """(B, N, C) -> (B, C, H, W), of one column if not told."""
    return rows.mT.unflatten(2, image or (rows.shape[1], 1))


def as_rows(values, gradient):
    return values.flatten(1), gradient.flatten(2).mT


# The emulation


@pytest.fixture(scope="module")
def faults(made_once):
    sources = [HERE / "faults.cpp"]
    folder = made_once("faults", lambda folder: compile_with_emulation(folder / "faults", sources, True))
    return lambda fault: subprocess.run([folder / "faults", fault], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        ("sound", 0, ""),
        ("fragments", 0, ""),
        ("barrier", 4, ""),  # NaN in the result
        ("wait", 4, ""),
        ("bounds", 1, "AddressSanitizer: heap-buffer-overflow"),
        ("divergence", 3, "threads wait at different barriers"),
        ("exit", 3, "a thread waits for others that never come"),
        ("alignment", 3, "a copy is not aligned to 16 bytes"),
    ],
)
def test_the_emulation_sees_faults(faults, fault, code, told):
    result = faults(fault)
    assert result.returncode == code, result.stderr
    assert told in result.stderr


# The kernels

# Every N, C and temperature at which they take another way, from unrelated students to all but equal ones.
CASES = [
    (1, 1, 1.0, 0.1),
    (2, 300, 0.05, 1),
    (15, 3, 0.01, 30),
    (17, 48, 4.0, 0.01),
    (63, 65, 0.02, 0.1),
    (65, 130, 100.0, 0.1),
    (127, 48, 0.1, 1),
    (129, 65, 0.5, 0.001),
    (65, 300, 1.0, 30),
]


# With 1, fp16 and tf32 meet the lowest temperatures, as the others do in the next test.
@pytest.mark.parametrize("k", [1, 2])
def test_error_is_no_more_than_rounding_makes_it(emulation, tmp_path, truth, make_features, k):
    cases = [(*case, PRECISIONS[(i + k) % 4]) for i, case in enumerate(CASES)]
    if emulation.capability < 80:
        cases = cases[k // 2 :: 2]  # all precisions take the same way there
    features = [make_features(n, c, noise, "normal" if n % 4 == 1 else "rectified") for n, c, _, noise, _ in cases]
    calls = [
        Call(maps(student), maps(teacher), temperature, precision)
        for (student, teacher), (_, _, temperature, _, precision) in zip(features, cases, strict=True)
    ]
    for result, (student, teacher), case in zip(emulation.run(calls, tmp_path), features, cases, strict=True):
        limits = truth.limits(student, teacher, case[2], case[4])
        truth.check(as_rows(*result), truth(student, teacher, case[2]), limits)


def test_students_that_are_far_off(emulation, tmp_path, truth, make_features):
    """Opposite, unrelated, zero and close vectors in one image; exp(c) over- and underflows at the low temperatures."""
    student, teacher = make_features(65, 16, 0.01, "normal")
    student[:, 10:20] = -teacher[:, 10:20]
    student[:, 20:40] = make_features(65, 16, 0.01, "normal", seed=1)[0][:, 20:40]
    student[:, 40:45] = 0
    forms = list(zip((0.01, 0.01, 0.02, 1 / 32, 0.1, 1, 3.9), (*PRECISIONS, *PRECISIONS[:3]), strict=True))
    calls = [Call(maps(student), maps(teacher), temperature, precision) for temperature, precision in forms]
    for result, form in zip(emulation.run(calls, tmp_path), forms, strict=True):
        truth.check(as_rows(*result), truth(student, teacher, form[0]), truth.limits(student, teacher, *form))


def test_student_equal_to_teacher_gives_exactly_zero(emulation, tmp_path, make_features):
    _, teacher = make_features(70, 20, 0.0)
    teacher[0, :3] = 0
    student = torch.cat((teacher, 4 * teacher))
    teacher = teacher.expand(2, -1, -1)
    forms = [*zip((0.01, 0.1, 1, 4), PRECISIONS, strict=True), (None, "fp32")]
    calls = [Call(maps(student)[:, :, 3:], maps(teacher)[:, :, 3:], *form) for form in forms]
    for result in emulation.run(calls, tmp_path):
        for x in result:
            assert torch.equal(x, torch.zeros_like(x))


@of_sm_80
def test_any_strides_and_types(emulation, tmp_path, truth, make_features, layouts):
    student, teacher = (maps(x, (4, 6)) for x in make_features(24, 5, 0.1, batch=2))
    student, teacher = layouts[0](student.contiguous()), layouts[1](teacher.contiguous())
    types = ((torch.float32, torch.float32), (torch.bfloat16, torch.float16))
    calls = [
        Call(student.to(s) if s != student.dtype else student, teacher.to(t) if t != teacher.dtype else teacher, form)
        for s, t in types
        for form in (0.1, None)
    ]
    for (values, gradient), call in zip(emulation.run(calls, tmp_path), calls, strict=True):
        s, t = (x.float().flatten(2).mT for x in (call.student, call.teacher))
        if call.temperature is None:
            exact = reference.cosine_distance(s.double(), t.double())
            torch.testing.assert_close(values.flatten(1).double(), exact, rtol=1e-6, atol=1e-12)
        else:
            truth.check(as_rows(values, gradient), truth(s, t, 0.1), truth.limits(s, t, 0.1, "fp32"))


@of_sm_80
def test_a_temperature_in_memory_gives_the_same_bits_and_nan_out_of_range(emulation, tmp_path, make_features):
    """At the temperatures between which the kinds of kernels change."""
    student, teacher = make_features(65, 16, 0.5, "normal", batch=2)
    student[0, :20] = -teacher[0, :20]
    forms = list(zip((*TEMPERATURE_LIMITS, 1 / 32, 0.1, 0.15, 3.9, 4), (*PRECISIONS, *PRECISIONS[:3]), strict=True))
    lowest, highest = TEMPERATURE_LIMITS
    outside = (math.nextafter(lowest, 0), math.nextafter(highest, math.inf), 0, -1, math.nan, math.inf)
    known = [Call(maps(student), maps(teacher), t, precision) for t, precision in forms]
    in_memory, refused = (
        [call._replace(temperature=torch.tensor(t, dtype=torch.float64)) for call, t in pairs]
        for pairs in ([(call, call.temperature) for call in known], [(known[0], t) for t in outside])
    )
    results = emulation.run(known + in_memory + refused, tmp_path)
    for found, expected in zip(results[len(known) :], results[: len(known)], strict=False):
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
    for result in results[-len(outside) :]:
        for x in result:
            assert x.isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_spoils_no_more_than_it_must(emulation, tmp_path, make_features, bad):
    student, teacher = make_features(70, 9, 0.1, batch=2)
    student[1, 4, 2] = bad
    spoiled = torch.zeros(2, 70, dtype=torch.bool)
    spoiled[1, 4] = True
    forms = list(zip((0.5, 0.02, 4), ("fp32", "bf16", "fp16"), strict=True))
    calls = [Call(maps(student), maps(teacher), *form) for form in (*forms, (None, "fp32"))]
    for result in emulation.run(calls, tmp_path):
        values, gradient = as_rows(*result)
        assert torch.equal(values.isnan(), spoiled)
        assert torch.equal(gradient.isnan().any(-1), spoiled)
    teacher[1, 35, 2] = bad
    for result in emulation.run([Call(maps(student), maps(teacher), *form) for form in forms], tmp_path):
        for x in as_rows(*result):
            assert torch.isfinite(x[0]).all()
            assert x[1].isnan().all()


def test_the_order_of_threads_changes_no_bit_nor_does_the_gradient(emulation, tmp_path, make_features):
    student, teacher = make_features(70, 66, 0.5)
    student[0, :7] *= -1
    forms = ((0.02, "bf16"), (0.5, "tf32"), (None, "fp32"))
    calls = [
        Call(maps(student), maps(teacher), *form, with_gradient, seed)
        for form in forms
        for with_gradient, seed in ((True, 0), (True, 1), (False, 2))
    ]
    results = emulation.run(calls, tmp_path)
    for first, second, third in zip(results[::3], results[1::3], results[2::3], strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert torch.equal(first[0], third[0])
        assert third[1] is None


# Any keys

# Rows, keys, channels; both temperatures; noise; precision; multiprocessors, of which the number of splits depends.
KEY_CASES = [
    ((1, 1, 3), (1, 1), 1, "fp32", 2),
    ((65, 63, 17), (0.07, 0.01), 1, "bf16", 2),
    ((15, 300, 65), (0.1, 0.04), 0.1, "fp16", 2),
    ((18, 129, 300), (4, 4), 0.001, "tf32", 1),
    ((63, 130, 40), (0.005, 0.005), 0.1, "fp32", 50),
    ((17, 65, 48), (100, 0.02), 30, "fp16", 50),
    ((65, 129, 1), (0.02, 0.005), 1, "bf16", 50),
]


def check_distillations(emulation, folder, keys_truth, calls):
    """Against what is exact of rows that take part, 0 of others."""
    for result, call in zip(emulation.run(calls, folder), calls, strict=True):
        mask = torch.ones(result[0].shape) if call.row_mask is None else call.row_mask
        student, teacher = (x.float().flatten(2).mT for x in (call.student, call.teacher))
        rows = torch.where(mask.flatten(1).unsqueeze(-1) > 0, student, teacher), teacher, call.keys
        options = {"student_temperature": call.temperature, "teacher_temperature": call.teacher_temperature}
        options |= {"key_mask": call.key_mask, "normalize": call.normalize}
        taken = mask.flatten(1).numpy()
        kl, gradient = keys_truth(*rows, **options)
        limits = keys_truth.limits(*rows, precision=call.precision, **options)
        keys_truth.check(as_rows(*result), (kl * taken, gradient * taken[..., None]), limits)
        for x in as_rows(*result):
            assert (x[taken == 0] == 0).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_distillation_error_is_no_more_than_rounding_makes_it(
    emulation, tmp_path, keys_truth, make_features, normalize
):
    calls = []
    for (n, k, c), t, noise, precision, multiprocessors in KEY_CASES[emulation.capability < 80 :: 2 - normalize]:
        student, teacher = make_features(n, c, noise, "normal" if n % 4 == 1 else "rectified")
        keys = make_features(k, c, 0, "clustered", seed=1)[1]
        length = 1 if normalize else math.sqrt(min(t) * 100 / c)  # logits up to about 100
        features = maps(student * length), maps(teacher * length), keys * length
        calls.append(Distillation(*features, *t, precision, normalize=normalize, multiprocessors=multiprocessors))
    check_distillations(emulation, tmp_path, keys_truth, calls)


@of_sm_80
def test_masks_strides_and_types_of_keys(emulation, tmp_path, keys_truth, make_features):
    """Keys of each image, under masks of each, or of all; masked ones few, whole tiles from the first on, or all."""
    student, teacher = (maps(x, (4, 5)) for x in make_features(20, 10, 0.3, "normal", batch=3))
    student = student.contiguous(memory_format=torch.channels_last)
    keys = (
        make_features(200, 10, 0, batch=3, seed=1)[1].to(torch.float16).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    )
    key_mask = torch.ones(3, 200, dtype=torch.bool)
    key_mask[0, 60:160] = False
    key_mask[1, :135] = False
    key_mask[2] = False
    row_mask = torch.arange(60).view(3, 4, 5) % 3 > 0
    student.masked_fill_(~row_mask.unsqueeze(1), math.nan)
    some = [(keys, key_mask), (keys[:1], key_mask), (keys[:1], key_mask[:1]), (keys, key_mask[1:2]), (keys[1:2], None)]
    calls = [
        Distillation(student, teacher.bfloat16(), of, 0.1, 0.05, precision, key_mask=mask, row_mask=row_mask)
        for (of, mask), precision in zip(some, (*PRECISIONS, "fp32"), strict=True)
    ]
    check_distillations(emulation, tmp_path, keys_truth, calls)


@pytest.mark.parametrize("descending", [False, True])
def test_distilled_rows_that_are_far_off(emulation, tmp_path, keys_truth, make_features, descending):
    """Opposite, unrelated, zero and close vectors; every tile has larger logits than all before it, or none has."""
    student, teacher = make_features(40, 16, 0.01, "normal")
    student[:, 10:20] = -teacher[:, 10:20]
    student[:, 20:30] = make_features(10, 16, 0, "normal", seed=1)[1]
    student[:, 30:35] = 0
    keys = make_features(200, 16, 0, "normal", seed=2)[1]
    keys[:, :20] = teacher[:, :20] + 0.01 * keys[:, 20:40]  # rows that lie on one key
    order = (torch.nn.functional.normalize(keys[0], dim=-1) @ teacher[0, 25]).argsort(descending=descending)
    forms = [(0.005, 0.005, "fp32"), (0.005, 0.005, "fp16"), (0.01, 1, "bf16"), (0.07, 0.01, "tf32")]
    calls = [Distillation(maps(student), maps(teacher), keys[:, order], *form, multiprocessors=1) for form in forms]
    check_distillations(emulation, tmp_path, keys_truth, calls)


def test_distillation_is_exactly_zero_of_equal_vectors(emulation, tmp_path, make_features):
    teacher, keys = make_features(20, 20, 0)[1], make_features(150, 20, 0, seed=1)[1]
    calls = [Distillation(maps(4 * teacher), maps(teacher), keys, 0.05, 0.05, precision) for precision in PRECISIONS]
    for x in (x for result in emulation.run(calls, tmp_path) for x in result):
        assert torch.equal(x, torch.zeros_like(x))


def test_bits_of_a_distillation_and_temperatures_in_memory(emulation, tmp_path, make_features):
    """The order of threads, the gradient, and where temperatures lie change no bit; out of range they give NaN."""
    student, teacher = make_features(20, 20, 0.5)
    keys = make_features(150, 20, 0, seed=1)[1]
    lowest, highest = DISTILLATION_TEMPERATURE_LIMITS

    def call(t, u, *options):
        return Distillation(maps(student), maps(teacher), keys, t, u, *options)

    def in_memory(*t):
        return [torch.tensor(x, dtype=torch.float64) for x in t]

    for t, precision in (((lowest, highest), "bf16"), ((0.07, lowest), "fp16")):
        calls = [call(*t, precision), call(*t, precision, True, 1), call(*in_memory(*t), precision)]
        first, *others, (kl, none) = emulation.run([*calls, call(*t, precision, False)], tmp_path)
        assert all(torch.equal(x, y) for result in others for x, y in zip(result, first, strict=True))
        assert torch.equal(kl, first[0])
        assert none is None
    outside = [(math.nextafter(lowest, 0), 1), (1, math.nextafter(highest, math.inf)), (math.nan, 1)]
    for x in (x for result in emulation.run([call(*in_memory(*t)) for t in outside], tmp_path) for x in result):
        assert x.isnan().all()


def test_what_is_not_finite_in_a_distillation_spoils_no_more_than_it_must(emulation, tmp_path, make_features):
    student, teacher = make_features(20, 9, 0.1, batch=2)
    keys = make_features(70, 9, 0.1, batch=2, seed=1)[1]
    student[1, 4, 2], teacher[0, 18, 0] = math.nan, math.inf
    spoiled = torch.zeros(2, 20, dtype=torch.bool)
    spoiled[1, 4] = spoiled[0, 18] = True
    forms = [(0.5, 0.5, "fp32"), (0.02, 0.1, "fp16")]
    calls = [
        Distillation(maps(student), maps(teacher), keys, *form, normalize=n) for form in forms for n in (True, False)
    ]
    for result in emulation.run(calls, tmp_path):
        values, gradient = as_rows(*result)
        assert torch.equal(values.isnan(), spoiled)
        assert torch.equal(gradient.isnan().any(-1), spoiled)
    keys[1, 35, 2] = math.nan
    for result in emulation.run([call._replace(keys=keys) for call in calls], tmp_path):
        for x in as_rows(*result):
            assert torch.isfinite(x[0, :18]).all()
            assert x[1].isnan().all()


# The compiler


@pytest.mark.parametrize("architecture", [75, 80])
def test_nothing_spills_and_tensor_cores_are_used(tmp_path, architecture):
    """Of all instances: no stack, no spills; matrix and asynchronous copy instructions from sm_80 on; no atomics."""
    try:
        toolkit = native_build._toolkit()
    except native_build.BuildError as error:
        pytest.skip(str(error))
    for unit in native_build.units("cuda"):
        if not unit.source.endswith(".cu"):
            continue
        target = tmp_path / f"{unit.target}.cubin"
        command = [toolkit.nvcc, "-std=c++20", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v", *unit.flags]
        source = native_build.csrc_folder() / unit.source
        result = subprocess.run([*command, source, "-o", target], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr
        )
        kernels = re.findall(r"Compiling entry function", result.stderr)
        assert len(frames) >= len(kernels) > 0
        assert {*frames} == {("0", "0", "0")}
        declared = [int(size) for size in re.findall(r"(\d+) bytes smem", result.stderr)]
        assert max(declared, default=0) <= 48 << 10
        if Path(unit.source).stem in ("affinity", "distillation"):
            check_instructions(toolkit, target, architecture)


def check_instructions(toolkit, cubin, architecture):
    of_triton = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = next(filter(Path.exists, (toolkit.nvcc.with_name("cuobjdump"), of_triton)))
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    assert re.search(r"(?<![.\w])(RED|ATOM|ATOMS|ATOMG)\b", text) is None  # BAR.RED is a barrier's vote
    found = {name: re.search(rf"\b{name}\b", text) is not None for name in ("HMMA", "LDGSTS")}
    assert set(found.values()) == {architecture >= 80}
