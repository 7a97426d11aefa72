import pytest
import torch

from dskd_fast.ops.dispatch import AMBIENT, BACKENDS, PRECISIONS, ambient_precision, resolve_backend, resolve_precision


def of(dtype):
    return torch.zeros(1, 2, 3, dtype=dtype)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_auto_is_a_backend_that_is_there():
    assert resolve_backend("auto") in BACKENDS


def test_every_backend_is_found_by_its_name():
    assert "torch" in BACKENDS
    assert [resolve_backend(name) for name in BACKENDS] == list(BACKENDS)


@pytest.mark.parametrize("backend", ["Torch", "torch ", "cpu", "", None, 0])
def test_a_backend_that_is_not_there_is_an_error_never_another_backend(backend):
    with pytest.raises(ValueError, match="is not known: use one of 'auto', 'torch'") as raised:
        resolve_backend(backend)
    assert str(raised.value).startswith(f"backend={backend!r} ")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_forced_precision_holds_whatever_the_inputs(precision, dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert resolve_precision(precision, of(dtype), of(dtype)) == precision
    assert resolve_precision(precision, of(dtype), of(dtype)) == precision


@pytest.mark.parametrize("precision", ["fp32", "BF16", "", AMBIENT, torch.float16, 16])
def test_an_unknown_precision_is_an_error(precision):
    with pytest.raises(ValueError, match="is not known: use None or one of 'ieee', 'tf32', 'bf16', 'fp16'") as raised:
        resolve_precision(precision, of(torch.float32), of(torch.float32))
    assert str(raised.value).startswith(f"precision={precision!r} ")


@pytest.mark.parametrize("student", FLOATS)
@pytest.mark.parametrize("teacher", FLOATS)
def test_precision_of_a_pair(student, teacher):
    if torch.float64 in (student, teacher):
        expected = "ieee"
    elif student == teacher and student != torch.float32:
        expected = {torch.float16: "fp16", torch.bfloat16: "bf16"}[student]
    else:
        expected = AMBIENT
    assert resolve_precision(None, of(student), of(teacher)) == expected


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_autocast_counts_before_the_inputs_but_not_before_float64(dtype, expected):
    with torch.autocast("cpu", dtype=dtype):
        for student in (torch.float16, torch.bfloat16, torch.float32):
            assert resolve_precision(None, of(student), of(student)) == expected
        assert resolve_precision(None, of(torch.float64), of(torch.float32)) == "ieee"
        with torch.autocast("cpu", enabled=False):
            assert resolve_precision(None, of(torch.float32), of(torch.float32)) == AMBIENT


@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_cuda"),
    [("highest", "ieee", "ieee"), ("high", "ieee", "tf32"), ("medium", "bf16", "bf16")],
)
def test_ambient_precision(setting, on_cpu, on_cuda):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        assert (ambient_precision("cpu"), ambient_precision("cuda")) == (on_cpu, on_cuda)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_cuda"), [("ieee", "ieee", "ieee"), ("tf32", "ieee", "tf32"), ("none", "ieee", "ieee")]
)
def test_ambient_precision_by_the_newer_settings(setting, on_cpu, on_cuda):
    backends = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = setting
        assert (ambient_precision("cpu"), ambient_precision("cuda")) == (on_cpu, on_cuda)
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
    torch.get_float32_matmul_precision()  # would raise if a setting had been left behind
