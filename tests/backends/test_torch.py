"""What the torch backend alone has: slabs of rows, process-wide settings to mind, small angles in float64."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dskd_fast.backends import slabs
from dskd_fast.backends import torch as torch_tiled

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@pytest.fixture
def torch_cpu(all_backends):
    return all_backends["torch-cpu"]


@pytest.mark.parametrize("angle", [1e-3, 1e-6, 1e-9])
def test_cosine_distance_of_a_small_angle(angle):
    """1 - cos x = 2 sin^2(x/2), which is below float64's roundoff for the last."""
    student = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64).view(1, 2, 1, 1)
    teacher = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    distance, gradient = torch_tiled.cosine_distance(student, teacher, torch.ones(1, 1, 1, dtype=torch.float64))
    assert distance.dtype == gradient.dtype == torch.float64
    assert distance.item() == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=1e-9, abs=0)
    expected = torch.tensor([-(math.sin(angle) ** 2), math.sin(angle) * math.cos(angle)], dtype=torch.float64)
    torch.testing.assert_close(gradient.flatten(), expected, rtol=1e-9, atol=1e-24)


@pytest.mark.parametrize("temperature", [0.05, 1])
@pytest.mark.parametrize("slab", [1, 5 * 37, 36 * 37, 2 * 37 * 37])
def test_results_do_not_depend_on_the_slab(monkeypatch, torch_cpu, check_affinity, make_features, slab, temperature):
    """From one row at a time, over rows that do not divide N, to several images at once (3 = 2 + 1)."""
    student, teacher = make_features(37, 21, 0.1, batch=3)
    monkeypatch.setitem(slabs.SLAB_ELEMENTS, "cpu", slab)
    monkeypatch.setattr(slabs, "FEWEST_ROWS", 1)
    for precision in ("fp32", "bf16"):
        check_affinity(torch_cpu, student, teacher, temperature, precision)


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_no_matrix_of_all_pairs_is_stored(torch_cpu, make_features, precision):
    n = 4096
    student, teacher = make_features(n, 8, 0.5)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.elements = max([self.elements, *(x.untyped_storage().nbytes() // 4 for x in tensors)])
            return out

    with Largest() as largest:
        torch_cpu.affinity(student, teacher, 1.0, precision)
    assert 0 < largest.elements <= n * n / 32


def matmul_settings():
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        torch.is_autocast_enabled("cpu"),
    )


@pytest.fixture(params=["highest", "high", "medium"])
def global_precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.usefixtures("global_precision")
def test_settings_neither_change_the_result_nor_are_changed(torch_cpu, check_affinity, make_features, precision):
    settings = matmul_settings()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_affinity(torch_cpu, *make_features(129, 65, 0.1), 0.1, precision)
        assert torch.is_autocast_enabled("cpu")
    assert matmul_settings() == settings


@pytest.mark.parametrize("global_precision", ["medium"], indirect=True)
@pytest.mark.usefixtures("global_precision")
def test_settings_survive_calls_from_several_threads(torch_cpu, make_features):
    student, teacher = make_features(65, 17, 0.1)
    alone = {precision: torch_cpu.affinity(student, teacher, 0.1, precision) for precision in PRECISIONS}
    settings, start = matmul_settings(), threading.Barrier(len(PRECISIONS))

    def call(precision):
        start.wait()
        for _ in range(20):
            assert all(map(torch.equal, torch_cpu.affinity(student, teacher, 0.1, precision), alone[precision]))

    with ThreadPoolExecutor(len(PRECISIONS)) as pool:
        list(pool.map(call, PRECISIONS))
    assert matmul_settings() == settings


def test_tf32_operands_are_rounded_to_nearest():
    x = torch.tensor([1 + 2.0**-10, 1 + 2.0**-12, 1 + 3 * 2.0**-12, -1 - 3 * 2.0**-12, 0, -0.0, math.inf, math.nan])
    expected = [1 + 2.0**-10, 1, 1 + 2.0**-10, -1 - 2.0**-10, 0, -0.0, math.inf, math.nan]
    torch.testing.assert_close(slabs.round_to_tf32(x), torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
