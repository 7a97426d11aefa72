"""The CUDA kernels where there is no GPU: their own sources, compiled for the host and run on an emulation.

The emulation (in the folder of that name) has the threads of a block, barriers, shared memory, warp operations, matrix
fragments and asynchronous copies. It runs under AddressSanitizer and UndefinedBehaviorSanitizer, with buffers of exactly
the size that is needed and NaN wherever nothing has been written.
"""

import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dskd_fast import reference
from dskd_fast.backends import native_build

HERE = Path(__file__).parent / "emulation"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of launch.h, as are the next
PRODUCTS = ("bf16", "fp16", "tf32", "plain")
FLAGS = (
    "-std=c++20 -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -Wall -Wextra -Werror "
    "-Wno-unknown-pragmas"
).split()


class Call(NamedTuple):
    """Maps (B, C, H, W) and what is done with them; temperature None is the cosine distance."""

    student: torch.Tensor
    teacher: torch.Tensor
    temperature: float | None
    precision: str = "ieee"
    with_gradient: bool = True
    seed: int = 0


class Emulation:
    """The kernels as compiled for sm_75 or for sm_80 and later."""

    def __init__(self, program: Path, capability: int) -> None:
        self.program = program
        self.capability = capability

    def run(self, calls: list[Call], folder: Path) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """The map (B, H, W) and the gradient (B, C, H, W) of each call, all in one process."""
        source, result = folder / "calls", folder / "results"
        source.write_bytes(b"".join(map(self._packed, calls)))
        ran = subprocess.run([self.program, source, result], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[:3000]
        numbers, results = torch.from_numpy(np.fromfile(result, np.float32)), []
        for call in calls:
            shape = call.student.shape
            values, numbers = numbers.tensor_split([shape[0] * shape[2] * shape[3]])
            values, gradient = values.view(shape[0], *shape[2:]), None
            if call.with_gradient:
                gradient, numbers = numbers.tensor_split([shape.numel()])
                gradient = gradient.as_strided(shape, torch.empty_like(call.student, device="meta").stride())
            results.append((values, gradient))
        assert len(numbers) == 0
        return results

    def _packed(self, call: Call) -> bytes:
        product, dropped_bits = PRODUCTS.index("plain"), 0
        if call.precision != "ieee" and self.capability >= 80:
            product = PRODUCTS.index(call.precision)
        elif call.precision != "ieee":
            dropped_bits = {"bf16": 16, "fp16": 13, "tf32": 13}[call.precision]
        gradient = torch.empty_like(call.student, dtype=torch.float32, device="meta")
        header = [call.seed, call.temperature is not None, call.with_gradient, product, dropped_bits, *call.student.shape]
        for x in (call.student, call.teacher, gradient):
            header += [DTYPES.index(x.dtype), *x.stride()]
        storages = []
        for x in (call.student, call.teacher):
            extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            bits = torch.as_strided(x, (extent if x.numel() else 0,), (1,)).contiguous().view(torch.uint8)
            storages.append(bits.numpy().tobytes())
        header += map(len, storages)
        header += [0] * (32 - len(header))
        return struct.pack("<32qd", *map(int, header), call.temperature or 0.0) + b"".join(storages)


def compile_all(folder: Path, tensor_cores: int) -> Path:
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    csrc = native_build.csrc_folder() / "cuda"
    flags = [*FLAGS, f"-I{csrc}", f"-I{HERE}", f"-DDSKD_TENSOR_CORES={tensor_cores}"]
    sources = [*(csrc / f"{name}.cu" for name in ("affinity", "prepare", "cosine")), HERE / "driver.cpp"]
    objects = [folder / f"{source.stem}.{tensor_cores}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        # The prepare and cosine kernels count on it, and nvcc is told so, too.
        command = [compiler, *flags, "-ffp-contract=off", "-x", "c++", "-c", source, "-o", target]
        subprocess.run(command, check=True, capture_output=True)
    program = folder / f"driver{tensor_cores}"
    subprocess.run([compiler, "-fsanitize=address,undefined", *objects, "-o", program], check=True, capture_output=True)
    return program


@pytest.fixture(scope="module")
def emulations(tmp_path_factory):
    """By compute capability."""
    folder = tmp_path_factory.mktemp("emulation")
    return {75: Emulation(compile_all(folder, 0), 75), 80: Emulation(compile_all(folder, 1), 80)}
