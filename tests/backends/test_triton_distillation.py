"""What the Triton backend alone has of the distillation against any keys: launches, splits, buffers, fp16's range."""

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from dskd_fast.backends import triton as triton_fused
from dskd_fast.backends.common import DISTILLATION_TEMPERATURE_LIMITS
from dskd_fast.kernels import distillation, prepare, prepare_distillation

pytestmark = pytest.mark.filterwarnings(r"ignore::RuntimeWarning:triton\.runtime\.interpreter")

T = {"student_temperature": 0.1, "teacher_temperature": 0.05}


@pytest.fixture(autouse=True)
def tiles(triton_backend, set_tiles):
    if triton_backend.is_interpreted:
        set_tiles(64, 64)


@pytest.fixture
def inputs(make_features):
    """Student and teacher (2, 70, 20), keys (1, 300, 20)."""
    return *make_features(70, 20, 0.3, "normal", batch=2), make_features(300, 20, 0, "normal", seed=1)[1]


def test_the_host_only_allocates_and_launches(triton_backend, inputs, watch):
    """With keys that are prepared; but for two temperatures, which are filled in. No mask is copied either."""
    assert (prepare_distillation.LOWEST.value, prepare.HIGHEST.value) == DISTILLATION_TEMPERATURE_LIMITS
    student, teacher, keys = inputs
    keys = triton_backend.prepared(keys)
    modules = {distillation: ("forward", "merge", "gradient"), prepare_distillation: ("bias", "rows", "sum", "project")}
    kernels = {name: getattr(module, f"{name}_kernel") for module, names in modules.items() for name in names}
    masks = {"key_mask": torch.ones(2, 300, dtype=torch.bool), "row_mask": torch.ones(2, 70, dtype=torch.bool)}
    with watch(kernels, launches=False) as found:
        for options in ({}, masks):
            triton_backend.distillation(student, teacher, keys, **T, **options)
    assert found.launches == dict.fromkeys(kernels, 2)
    views = "detach view transpose unsqueeze flatten _unsafe_view select as_strided alias expand split _to_copy"
    assert found.operations.keys() <= {"empty", "empty_like", "full", *views.split()}
    assert found.operations["full"] == 4


def test_splits_fill_the_device_and_no_more(monkeypatch):
    """Few rows and many keys: two to four blocks a multiprocessor; the sums of all splits stay below a bound."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    for rows, keys in itertools.product((128, 256, 4096, 65_536), (128, 1024, 65_536, 1 << 20)):
        splits = triton_fused._splits(torch.device("cuda"), rows, keys)
        assert 1 <= splits <= max(1, keys // triton_fused.FEWEST_SPLIT_KEYS)
        assert splits == 1 or splits * rows <= 4 * 132 * 64
        if keys == 1 << 20 and rows <= 4096:
            assert splits * rows >= 2 * 132 * 64


@pytest.mark.parametrize(
    ("splits", "precision", "tiles"),
    [
        (1, "fp32", ((64, 32, 64), (32, 128, 16), 64)),
        (3, "fp16", ((32, 64, 32), (64, 64, 64), 32)),
        (7, "tf32", ((128, 128, 64), (64, 32, 64), 64)),
    ],
)
def test_results_do_not_depend_on_splits_and_tiles(
    triton_backend, check_distillation, inputs, monkeypatch, use_tiles, splits, precision, tiles
):
    """More splits than there are tiles with keys; one mask leaves two splits without any."""
    use_tiles(*tiles)
    monkeypatch.setattr(triton_fused, "_splits", lambda *_: splits)
    key_mask = torch.ones(2, 300, dtype=torch.bool)
    key_mask[1, :260] = False
    check_distillation(triton_backend, *inputs, precision=precision, key_mask=key_mask, **T)


def test_nothing_is_written_outside_of_the_buffers(triton_backend, inputs, guarded):
    expected = triton_backend.distillation(*inputs, **T)
    with guarded():
        keys = triton_backend.prepared(inputs[2])
        triton_backend.module.update_keys(keys.packed, inputs[2][:, -9:].to(triton_backend.device), 291, True, "fp32")
        result = triton_backend.distillation(*inputs[:2], keys, **T)
    assert all(map(torch.equal, result, expected))


def test_keys_may_be_replaced_by_others_of_any_length_in_fp16(triton_backend, keys_truth, inputs):
    """Not normalised, 100 times as long as those that the scale was made for, and a tenth as long."""
    student, teacher, keys = inputs
    options = {**T, "normalize": False}
    student, teacher = (x / 40 for x in (student, teacher))
    for factor in (100, 0.1):
        queue = triton_backend.prepared(keys / factor, "fp16", normalize=False)
        triton_backend.module.update_keys(queue.packed, keys.to(triton_backend.device), 0, False, "fp16")
        result = triton_backend.distillation(student, teacher, queue, precision="fp16", **options)
        exact = keys_truth(student, teacher, keys, **options)
        keys_truth.check(result, exact, keys_truth.limits(student, teacher, keys, precision="fp16", **options))


def test_float64_and_too_many_elements_are_refused(triton_backend):
    one = torch.ones(1, 2, 1, 1)
    reason = triton_fused.distillation_refusal(one, one, torch.ones(1, 3, 2, dtype=torch.float64), "fp32")
    assert reason == "it does not take float64"
    wide = torch.ones(1, 1, 1, 1).expand(1, 1 << 15, 1 << 8, 1 << 8)
    assert "elements per image" in triton_fused.distillation_refusal(wide, wide, torch.ones(1, 3, 1 << 15), "fp32")
