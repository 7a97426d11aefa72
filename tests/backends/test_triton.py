"""What the Triton backend alone has: launches and scratch memory, kernels for near and far rows, refusals."""

import contextlib
import itertools
import re
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.runtime import JITFunction

from dskd_fast.backends import triton as triton_fused
from dskd_fast.kernels import affinity, configs, cosine, prepare

# numpy, which the interpreter computes with, warns of infinities and NaN; on a GPU nothing does.
pytestmark = pytest.mark.filterwarnings(r"ignore::RuntimeWarning:triton\.runtime\.interpreter")

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
KERNELS = {
    "centre": prepare.centre_kernel,
    "prepare": prepare.prepare_kernel,
    "forward": affinity.forward_kernel,
    "gradient": affinity.gradient_kernel,
    "project": prepare.project_kernel,
    "cosine": cosine.cosine_kernel,
}
# Without a gradient, with one; where all rows are near, at a temperature below that, and at one in the device's memory.
LAUNCHES = {
    (False, 4.0): {"centre": 1, "prepare": 1, "forward": 1},
    (True, 4.0): {"centre": 1, "prepare": 1, "forward": 1, "gradient": 1, "project": 1},
    (False, 1.0): {"centre": 1, "prepare": 1, "forward": 2},
    (True, 1.0): {"centre": 1, "prepare": 1, "forward": 2, "gradient": 2, "project": 1},
    (True, None): {"centre": 1, "prepare": 1, "forward": 3, "gradient": 3, "project": 1},
}


@pytest.fixture
def large_tiles(triton_backend, set_tiles):
    if triton_backend.is_interpreted:
        set_tiles(64, 64)


@pytest.mark.parametrize(("with_gradient", "temperature"), LAUNCHES)
def test_launches(large_tiles, triton_backend, make_features, watch, with_gradient, temperature):
    """The kernels really run, interpreted where there is no GPU; and only those that have something to do."""
    found = watch(KERNELS)
    student, teacher = make_features(5, 3, 0.1)
    given = torch.ones((), device=triton_backend.device) if temperature is None else temperature
    kl, gradient = triton_backend.affinity(student, teacher, given, with_gradient=with_gradient)
    assert (kl > 0).all()
    assert gradient is None or (gradient != 0).all()
    for shape in ((0, 5, 3), (2, 0, 3)):  # nothing is launched for nothing
        triton_backend.affinity(torch.zeros(shape), torch.zeros(shape), 1.0)
        triton_backend.cosine(torch.zeros(shape), torch.zeros(shape))
    assert found.launches == LAUNCHES[with_gradient, temperature]
    triton_backend.cosine(student, teacher, with_gradient)
    assert found.launches["cosine"] == 1


@pytest.mark.parametrize("with_gradient", [False, True])
def test_the_host_only_allocates_and_launches(triton_backend, make_features, layouts, watch, with_gradient):
    """No copy of an input of any strides, nothing that would wait for the device, nothing that fills a buffer."""
    maps = [x.to(triton_backend.device).mT.reshape(2, 5, 4, 6) for x in make_features(24, 5, 0.1, batch=2)]
    student, teacher = (layout(x) for layout, x in zip(layouts, maps, strict=True))
    in_memory = torch.ones((), dtype=torch.float64, device=triton_backend.device)
    weights = torch.ones(2, 4, 6, device=triton_backend.device) if with_gradient else None
    with watch(KERNELS, launches=False) as found:
        for precision, temperature in itertools.product(PRECISIONS, (0.1, in_memory)):
            triton_backend.affinity_of_maps(student, teacher, temperature, precision, with_gradient)
        triton_backend.module.cosine_distance(student, teacher, weights)
    assert found.launches["prepare"] == 8
    assert set(found.operations) <= {"empty", "empty_like"}


@pytest.mark.gpu
@pytest.mark.parametrize("triton_backend", ["triton-cuda"], indirect=True)
def test_nothing_waits_for_the_gpu(triton_backend, make_features):
    pair = [x.to(triton_backend.device).mT.unsqueeze(-1) for x in make_features(65, 20, 0.1)]
    before = torch.cuda.get_sync_debug_mode()
    try:
        for mode in ("default", "error"):  # compiling may wait
            torch.cuda.set_sync_debug_mode(mode)
            triton_backend.affinity_of_maps(*pair, 0.1)
            triton_backend.cosine_of_maps(*pair)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(
    ("n", "c", "temperature", "precision"), [(129, 17, 0.02, "fp32"), (1, 1, 4, "bf16"), (65, 130, 0.1, "fp16")]
)
@pytest.mark.usefixtures("large_tiles")
def test_nothing_is_written_outside_of_the_buffers(
    triton_backend, make_features, guarded, n, c, temperature, precision
):
    pair = [x.to(triton_backend.device).mT.unsqueeze(-1) for x in make_features(n, c, 0.1)]
    results = []
    for around in (contextlib.nullcontext, guarded):
        with around():
            results += triton_backend.affinity_of_maps(*pair, temperature, precision)
            results += triton_backend.cosine_of_maps(*pair)
    assert all(map(torch.equal, results[:4], results[4:]))


@pytest.mark.parametrize(
    ("precision", "temperature", "far_row", "rows"),
    [
        ("fp32", 0.02, 3, (64, 32)),
        ("fp16", 0.02, 67, (32, 64)),
        pytest.param("tf32", 0.05, 67, (64, 64), marks=pytest.mark.slow),
        pytest.param("bf16", 0.5, 3, (32, 64), marks=pytest.mark.slow),
        ("fp16", 0.5, 67, (64, 32)),
        pytest.param("fp32", 3.99, 3, (64, 64), marks=pytest.mark.slow),
    ],
)
def test_near_and_far_blocks_in_one_image(
    triton_backend, check_affinity, make_features, use_tiles, precision, temperature, far_row, rows
):
    """A single far row: its block of rows, whatever a kernel takes for one, is far, and all others are near."""
    use_tiles(*((m, 64, 64) for m in rows))
    student, teacher = make_features(100, 20, 1e-4, "normal")
    student[0, far_row] = -teacher[0, far_row]
    s, t = (x[0].double() / x[0].double().norm(dim=-1, keepdim=True) for x in (student, teacher))
    bound = 2 * (s - t).norm(dim=-1) / temperature
    assert (bound > affinity.RADIUS.value).nonzero().flatten().tolist() == [far_row]
    check_affinity(triton_backend, student, teacher, temperature, precision)


@pytest.mark.usefixtures("large_tiles")
def test_rows_on_both_sides_of_the_radius_by_a_rounding(triton_backend, check_affinity, make_features):
    """None may be left out by both kinds of a kernel, nor served by both."""
    factors = torch.linspace(1 - 2e-7, 1 + 2e-7, 6, dtype=torch.float64)
    teacher = make_features(5, 2, 0.1, "normal")[1].double().expand(6, -1, -1)
    teacher = teacher / teacher.norm(dim=-1, keepdim=True)
    angle = 2 * torch.asin(factors * affinity.RADIUS.value / 4)  # |s - t| = 2 sin(angle/2), at T = 1
    student = teacher.clone()
    turned = torch.view_as_complex(teacher[:, 2].contiguous()) * torch.polar(torch.ones_like(angle), angle)
    student[:, 2] = torch.view_as_real(turned)
    check_affinity(triton_backend, student.float(), teacher.float(), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "temperature", "tiles"),
    [
        ("fp32", 0.02, ((128, 32, 64), (32, 128, 16), 64)),
        ("tf32", 1, ((32, 64, 32), (64, 32, 64), 32)),
        ("bf16", 0.1, ((16, 128, 16), (128, 16, 32), 16)),
        ("fp16", 0.05, ((64, 128, 64), (64, 64, 64), 32)),
    ],
)
def test_results_do_not_depend_on_the_tiles(
    triton_backend, check_affinity, make_features, use_tiles, precision, temperature, tiles
):
    """More rows than keys and fewer; all channels in a product or not; all columns of the gradient at once or not."""
    use_tiles(*tiles)
    student, teacher = make_features(129, 40, 0.1)
    student[:, 40:50] = -teacher[:, 40:50]
    check_affinity(triton_backend, student, teacher, temperature, precision)


def fake(*shape, device="cuda", dtype=torch.float32):
    """A tensor without memory, on a device that need not be there."""
    with FakeTensorMode():
        return torch.empty(shape, device=device, dtype=dtype)


@pytest.fixture
def working_gpu(monkeypatch):
    """As if the kernels had been compiled, and a trial on GPU 0 had succeeded."""
    monkeypatch.setattr(triton_fused, "_is_interpreted", lambda: False)
    monkeypatch.setattr(triton_fused, "_REFUSALS", {torch.device("cuda", 0): None})


@pytest.mark.parametrize("precision", [*PRECISIONS, None])
def test_only_half_precision_and_float32_are_served(working_gpu, precision):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert triton_fused.refusal(fake(16, 1024, 64, 64), fake(16, 1024, 64, 64, dtype=dtype), precision) is None
    for device, dtype in itertools.product(("cpu", "cuda"), (torch.float64, torch.float8_e4m3fn)):
        single, other = fake(1, 2, 3, 4, device=device), fake(1, 2, 3, 4, device=device, dtype=dtype)
        for pair in ((single, other), (other, single), (other, other)):
            assert triton_fused.refusal(*pair, precision) == f"it does not take {dtype}".replace("torch.", "")


@pytest.mark.parametrize("precision", ["bf16", None])
def test_devices_and_installations_that_do_not_fit_are_refused(working_gpu, monkeypatch, precision):
    def refusal(device):
        return triton_fused.refusal(fake(1, 2, 3, 4, device=device), fake(1, 2, 3, 4, device=device), precision)

    assert refusal("meta") == "it does not run on meta devices"
    assert refusal("cpu") == "it runs on GPUs (with TRITON_INTERPRET=1, slowly, on CPU tensors too)"
    monkeypatch.setattr(triton_fused, "_device_refusal", lambda device: f"a trial on {device} failed: it smokes")
    assert refusal("cuda") == "a trial on cuda:0 failed: it smokes"
    monkeypatch.setattr(triton_fused, "_is_interpreted", lambda: True)
    assert refusal("cuda") == "TRITON_INTERPRET is set, under which it takes CPU tensors only"
    monkeypatch.setattr(triton.language, "sum", None)  # interpreted, too
    for versions, fits in ((("3.6.0", "2.3.5"), True), (("3.6.0", "2.4.0"), False), (("3.7.0", "2.4.0"), True)):
        for library, version in zip((triton, np), versions, strict=True):
            monkeypatch.setattr(library, "__version__", version)
        assert (refusal("cpu") is None) == fits
        assert fits or "use numpy below 2.4, or a newer Triton" in refusal("cpu")
    monkeypatch.setattr(triton.language, "sum", object.__new__(JITFunction))
    assert refusal("cpu") == "TRITON_INTERPRET was set after Triton had been imported: set it before"


def test_more_positions_or_elements_than_numbers_can_take_are_refused(working_gpu):
    """The cosine distance, which relates no pairs of positions, takes any number of both."""
    n, most, most_elements = 2**16, triton_fused.MAX_POSITIONS, triton_fused.MAX_ELEMENTS
    largest = fake(1, most_elements // n - configs.LARGEST_WIDTH, 1, n)
    too_large = f"it takes at most {most_elements - 1} elements per image, not {most_elements}"
    for good, bad, message in (
        (fake(1, 1, 2, most // 2), fake(1, 1, 1, most + 1), f"it takes at most {most} positions, not {most + 1}"),
        (largest, fake(1, most_elements // n, 1, n), too_large),
    ):
        assert triton_fused.refusal(good, good, "fp32") is None
        assert triton_fused.refusal(bad, bad, "fp32") == message
        assert triton_fused.refusal(bad, bad, None) is None


@pytest.fixture
def trial(monkeypatch):
    """Stands for the trial of a device that has not been tried yet: what it raises is its `side_effect`."""
    trial = Mock()
    monkeypatch.setattr(triton_fused, "_REFUSALS", {})
    monkeypatch.setattr(triton_fused, "cosine_distance", trial)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # it needs a driver
    return trial


CPU = torch.device("cpu")


def test_a_device_is_tried_once_but_not_while_a_graph_is_captured(monkeypatch, trial):
    """Compiling would end the capture: it is found out at the next call."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert triton_fused._device_refusal(CPU) is None
    assert trial.call_count == 0
    assert [triton_fused._device_refusal(CPU) for _ in range(3)] == [None] * 3
    assert [x.device for x in trial.call_args.args[:2]] == [CPU] * 2
    assert trial.call_count == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("  PTXAS error: sm_30 is not known\nsecond line"), "PTXAS error: sm_30 is not known"),
        (KeyError(), "KeyError"),
        (FileNotFoundError(2, "No such file", "gcc"), "[Errno 2] No such file: 'gcc'"),
    ],
)
def test_a_device_that_fails_is_refused_from_then_on(trial, error, reason):
    """It is a slower backend's turn then, of which the user is told once."""
    trial.side_effect = error, None
    expected = f"a trial on cpu failed: {reason}"
    with pytest.warns(UserWarning, match=re.escape(expected)):
        assert triton_fused._device_refusal(CPU) == expected
    with warnings.catch_warnings(action="error"):
        assert triton_fused._device_refusal(CPU) == expected
    assert trial.call_count == 1


def test_a_trial_for_which_there_was_no_memory_says_nothing_about_the_device(trial):
    trial.side_effect = torch.OutOfMemoryError("full"), None
    with pytest.raises(torch.OutOfMemoryError):
        triton_fused._device_refusal(CPU)
    assert triton_fused._device_refusal(CPU) is None
    assert trial.call_count == 2
