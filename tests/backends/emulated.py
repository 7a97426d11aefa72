"""The CUDA kernels where there is no GPU: their own sources, compiled for the host and run on an emulation.

The emulation (in the folder of that name) has the threads of a block, barriers, shared memory, warp operations, matrix
fragments and asynchronous copies. It runs under AddressSanitizer and UndefinedBehaviorSanitizer, with buffers of
exactly the size that is needed and NaN wherever nothing has been written.
"""

import math
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dskd_fast.backends import cuda, native_build

HERE = Path(__file__).parent / "emulation"
SOURCES = ("affinity", "prepare", "cosine", "distillation", "distillation_prepare")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/common/maps.h
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")  # in the order of driver.cpp
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# The prepare and cosine kernels count on products that are not fused, and nvcc is told so, too.
FLAGS = ("-std=c++20", "-Og", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off")


def compile_with_emulation(target: Path, sources: list[Path], tensor_cores: bool) -> None:
    try:
        compiler = native_build._compiler()
    except native_build.BuildError as error:
        pytest.skip(str(error))
    folders = [f"-I{native_build.csrc_folder() / 'cuda'}", f"-I{HERE}"]
    objects = [target.with_name(f"{source.stem}.o") for source in sources]

    def build(source, built):
        command = [compiler, *FLAGS, *SANITIZERS, *folders, f"-DDSKD_TENSOR_CORES={int(tensor_cores)}"]
        subprocess.run([*command, "-x", "c++", "-c", source, "-o", built], check=True)

    with ThreadPoolExecutor() as threads:
        list(threads.map(build, sources, objects))
    subprocess.run([compiler, *SANITIZERS, *objects, "-o", target], check=True)


class Emulation:
    """The module of a backend, as `dskd_fast.backends` describes it, of the kernels for sm_75 or for sm_80 and later.

    One process serves all calls, each with another order of threads.
    """

    def __init__(self, folder: Path, capability: int) -> None:
        self.capability = capability
        self.calls = 0
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen([folder / "driver"], **pipes)

    def close(self) -> None:
        self.process.stdin.close()
        code = self.process.wait(60)
        self.errors.seek(0)
        assert code == 0, self.errors.read(3000)  # what a sanitizer has found

    def refusal(self, student, teacher, precision):
        self._take(student, student.shape[2] * student.shape[3], precision)

    def distillation_refusal(self, student, teacher, keys, precision):
        self._take(student, keys.shape[1], precision)

    def _take(self, student, keys, precision):
        b, c, h, w = student.shape
        if not 0 < b * -(-h * w // 64) * -(-keys // 64) * -(-c // 32) <= 40 or extent(student) > 1e6:
            pytest.skip("an emulation would take long, and has none of the host's code")

    def prepare_keys(self, *_):
        pytest.skip("the emulation prepares keys in every call, in two parts")

    def contextual_affinity(self, student, teacher, temperature, precision, with_gradient):
        return self._run(1, (student, teacher), precision, with_gradient, [temperature, 0], [], [])

    def cosine_distance(self, student, teacher, weights):
        distance, gradient = self._run(0, (student, teacher), "fp32", weights is not None, [0, 0], [], [])
        if weights is not None:  # the driver's own are 1 and 4 by turns
            own = 1 + 3 * (torch.arange(distance.numel()) % 2)
            gradient = gradient / own.view(distance.shape)[:, None]
        return distance, gradient

    def affinity_distillation(
        self, student, teacher, keys, student_temperature, teacher_temperature, key_mask, row_mask, normalize,
        precision, with_gradient,
    ):  # fmt: skip
        multiprocessors = (2, 50, 1)[(student.shape[2] + keys.shape[1]) % 3]  # the number of splits depends on it
        further = [*keys.shape[:2], DTYPES.index(keys.dtype), *keys.stride(), len(storage_of(keys))]
        further += [0 if key_mask is None else len(key_mask), row_mask is not None, normalize, multiprocessors]
        storages = [keys, cuda.centre_of(keys, normalize), *(x for x in (key_mask, row_mask) if x is not None)]
        temperatures = [student_temperature, teacher_temperature]
        precision = cuda._operands(normalize, precision)
        return self._run(2, (student, teacher), precision, with_gradient, temperatures, further, storages)

    def _run(self, kind, pair, precision, with_gradient, temperatures, further, storages):
        student = pair[0]
        self.calls += 1
        in_memory = any(isinstance(x, torch.Tensor) for x in temperatures)
        header = [self.calls, kind, in_memory, with_gradient, PRECISIONS.index(precision), *student.shape]
        gradient = torch.empty_like(student, dtype=torch.float32)
        for x in (*pair, gradient):
            header += [DTYPES.index(x.dtype), *x.stride()]
        header += [*(len(storage_of(x)) for x in pair), *further]
        packed = struct.pack("<48q2d", *map(int, header + [0] * (48 - len(header))), *map(float, temperatures))
        try:
            self.process.stdin.write(b"".join((packed, *map(storage_of, (*pair, *storages)))))
            self.process.stdin.flush()
        except BrokenPipeError:
            self.close()
        kl = self._read((student.shape[0], *student.shape[2:]))
        if not with_gradient:
            return kl, None
        return kl, self._read(student.shape).as_strided(student.shape, gradient.stride())

    def _read(self, shape):
        found = bytearray(self.process.stdout.read(4 * math.prod(shape)))
        if len(found) < 4 * math.prod(shape):
            self.close()
        return torch.frombuffer(found, dtype=torch.float32).view(shape)


def extent(x: torch.Tensor) -> int:
    """Elements from the first to the last, with all between them that is not the tensor's."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def storage_of(x: torch.Tensor) -> bytes:
    return torch.as_strided(x, (extent(x),), (1,)).contiguous().view(torch.uint8).numpy().tobytes()
