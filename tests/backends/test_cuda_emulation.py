"""The emulation that the CUDA kernels are tested on finds faults, and what their compiler makes of them."""

import re
import subprocess
from pathlib import Path

import pytest
import triton

from dskd_fast.backends import native_build

from .emulated import HERE, compile_with_emulation

pytestmark = pytest.mark.slow


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
