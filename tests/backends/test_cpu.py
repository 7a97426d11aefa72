"""What the cpu backend alone has: panels and slabs, threads, capabilities, oneDNN's products or its own, float64."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dskd_fast.backends import torch as torch_tiled


@pytest.mark.parametrize(
    ("precision", "temperature", "side"), [("bf16", 1, 50), ("bf16", 0.1, 50), ("fp32", 0.1, 66), ("fp32", 0.02, 50)]
)
def test_several_panels_are_as_good_as_one(cpu, truth, make_features, precision, temperature, side):
    """Which has up to 2,048 keys with oneDNN's products, up to 4,096 with our own: the next ones correct its mean."""
    rows = 320
    student, teacher = make_features(side**2, 24, 0.3, "clustered")
    student[:, 200:300] *= -1
    student[:, rows:] = teacher[:, rows:]
    result = cpu.affinity(student, teacher, temperature, precision, image=(side, side))
    for x in result:
        assert torch.equal(x[:, rows:], torch.zeros_like(x[:, rows:]))
    exact = truth(student, teacher, temperature, rows)
    truth.check([x[:, :rows] for x in result], exact, truth.limits(student, teacher, temperature, precision, rows=rows))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("batch", "n", "temperature"), [(1, 200, 1), (5, 70, 0.1), (3, 130, 0.02), (70, 3, 0.5)])
def test_the_number_of_threads_changes_no_bit(cpu, threads, make_features, precision, batch, n, temperature):
    student, teacher = make_features(n, 20, 0.5, "normal", batch=batch)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append((*cpu.affinity(student, teacher, temperature, precision), *cpu.cosine(student, teacher)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_own_products_where_onednns_are_switched_off(cpu, truth, make_features, precision):
    student, teacher = make_features(97, 40, 0.1, batch=2)
    before = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)  # what mkldnn.flags() does, less a warning about GPUs
    try:
        result = cpu.affinity(student, teacher, 0.5, precision)
    finally:
        torch._C._set_mkldnn_enabled(before)
    truth.check(result, truth(student, teacher, 0.5), truth.limits(student, teacher, 0.5, precision))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_is_read_as_it_is(cpu, dtype):
    """Subnormal numbers, infinities and NaN included; the distance to the direction (1, 1) tells which was read."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    student = torch.stack((values, torch.ones_like(values)))[None, :, :, None]
    teacher = torch.ones(1, 2, 2**16, 1)
    exact = cpu.cosine_of_maps(student.float(), teacher)
    for layout in (torch.contiguous_format, torch.channels_last):
        got = cpu.cosine_of_maps(student.contiguous(memory_format=layout), teacher)
        torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("of_student", "of_teacher"), [*itertools.product(_DTYPES, _DTYPES)])
def test_the_cosine_distance_does_not_depend_on_the_layout(cpu, make_features, of_student, of_teacher):
    """Positions that lie side by side are read in place, others by vectors; a block has 64, the last one less."""
    maps = (x.mT.unflatten(2, (11, 13)) for x in make_features(143, 21, 0.1, batch=2))
    student, teacher = (x.to(dtype) for x, dtype in zip(maps, (of_student, of_teacher), strict=True))
    student[0, :, 0, 0] = teacher[0, :, 0, 0] = teacher[1, :, 0, 1] = 0
    student[1, 3, 2, 0] = math.nan
    exact = torch_tiled.cosine_distance(student.double(), teacher.double(), torch.ones(2, 11, 13).double())
    for layout in (torch.contiguous_format, torch.channels_last):
        got = cpu.cosine_of_maps(*(x.contiguous(memory_format=layout) for x in (student, teacher)))
        for x, y in zip(got, exact, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_capabilities_pass_the_same_tests(cpu, capability):
    """As on processors without AVX-512, and without any of what is compiled apart. ATen reads the variable once."""
    files = ["tests/backends/test_backends.py", "tests/backends/test_distillation.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    # Without the whole suite's conftest.py, whose imports take longer than these tests, and without its options.
    command += ["--confcutdir=tests/backends", "-m", "not slow", "-k", "cpu-cpu and (rounding_makes or far_off)"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTEST_ADDOPTS": ""}
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_scratch_memory_does_not_grow_with_the_square(cpu):
    """9,216 positions: a dense matrix would take 324 MiB."""
    code = """if True:
        import resource, torch
        from dskd_fast import functional
        torch.set_num_threads(1)
        x = torch.randn(1, 16, 96, 96)
        s = (x + 0.1 * torch.randn(x.shape)).requires_grad_()
        for side in (8, 96):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            functional.contextual_affinity(s[..., :side, :side], x[..., :side, :side], backend="cpu").sum().backward()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 16 * 1024  # KiB


def test_other_tensors_are_refused(cpu):
    good = torch.ones(1, 2, 3, 3)
    refusal = cpu.module.refusal
    assert refusal(good, good.half(), "fp32") is None
    assert refusal(good.to("meta"), good.to("meta"), "fp32") == "it does not run on meta devices"
    for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn):
        assert refusal(good, good.to(dtype), None) == f"it does not take {str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("power", [-80, 80])
def test_only_directions_count_where_positions_lie_side_by_side(cpu, make_features, power):
    """Their centre is summed in another way than those of other tests, whose channels lie side by side."""
    student, teacher = (x.mT.unflatten(2, (8, 8)).contiguous() for x in make_features(64, 33, 0.1))
    for x, y in zip(*(cpu.affinity_of_maps(student, t, 0.1) for t in (teacher, teacher * 2.0**power)), strict=True):
        assert torch.equal(x, y)
