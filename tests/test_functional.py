import itertools
import math

import numpy as np
import pytest
import torch

from dskd_fast import reference
from dskd_fast.backends import torch as torch_tiled
from dskd_fast.functional import contextual_affinity, cosine_distance
from dskd_fast.ops import dispatch

FUNCTIONS = [contextual_affinity, cosine_distance]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def spy(monkeypatch):
    """Records every call of the "torch" backend, which takes them all: (precision or None, with_gradient, dtype)."""
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "torch")
    calls = []
    affinity, cosine = torch_tiled.contextual_affinity, torch_tiled.cosine_distance

    def spy_affinity(student, teacher, temperature, precision, with_gradient):
        calls.append((precision, with_gradient, student.dtype))
        return affinity(student, teacher, temperature, precision, with_gradient)

    def spy_cosine(student, teacher, weights):
        calls.append((None, weights is not None, student.dtype))
        return cosine(student, teacher, weights)

    monkeypatch.setattr(torch_tiled, "contextual_affinity", spy_affinity)
    monkeypatch.setattr(torch_tiled, "cosine_distance", spy_cosine)
    return calls


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("image", [None, (3, 5)])
def test_rows_and_maps_in_reading_order_agree_with_the_textbook(function, image):
    rows = random(2, 15, 7, seed=1), random(2, 15, 7, seed=2)
    student, teacher = (x.mT.unflatten(2, image) if image else x.clone() for x in rows)
    values = function(student.requires_grad_(), teacher)
    assert values.shape == (2, *(image or (15,)))
    assert values.dtype == torch.float32
    values.sum().backward()
    gradient = student.grad.flatten(2).mT if image else student.grad
    leaf = rows[0].double().requires_grad_()
    exact = getattr(reference, function.__name__)(leaf, rows[1].double())
    exact.sum().backward()
    torch.testing.assert_close(values.double().flatten(1), exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes_may_differ(function):
    """What the backends make of them is tested there; the gradient has the student's."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for of_student, of_teacher in itertools.product(dtypes, repeat=2):
        student = random(2, 9, 5, seed=1, dtype=of_student).requires_grad_()
        values = function(student, random(2, 9, 5, seed=2, dtype=of_teacher))
        assert values.dtype == (torch.float64 if torch.float64 in (of_student, of_teacher) else torch.float32)
        values.sum().backward()
        assert student.grad.dtype == of_student


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("is_close", [False, True])
def test_gradient_is_that_of_finite_differences(function, is_close):
    student, teacher = (random(2, 4, 3, 2, seed=seed, dtype=torch.float64) for seed in (1, 2))
    if is_close:  # where the map takes its series
        student = teacher + 1e-2 * student
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, teacher), student, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_gradient_is_made_only_where_it_is_wanted(spy, function):
    student, teacher = random(1, 5, 3, seed=1), random(1, 5, 3, seed=2)
    assert not function(student, teacher).requires_grad
    with torch.inference_mode():
        function(student, teacher)
    student.requires_grad_()
    with torch.no_grad():
        assert not function(student, teacher).requires_grad
    values = function(student, teacher)
    is_saved = function is contextual_affinity
    assert [call[1] for call in spy] == [False] * 3 + [is_saved]
    values.sum().backward()
    # The backward runs a backend where nothing was saved.
    assert [call[1] for call in spy][4:] == [True] * (not is_saved)


def test_the_precision_that_is_resolved_reaches_the_backend_and_autocast_rounds_no_input(spy):
    student, teacher = random(1, 4, 3), random(1, 4, 3, seed=1)
    for function in FUNCTIONS:
        with torch.autocast("cpu", dtype=torch.float16):
            assert function(student, teacher).dtype == torch.float32
    contextual_affinity(student, teacher, precision="tf32")
    contextual_affinity(student.bfloat16(), teacher.bfloat16())
    contextual_affinity(student, teacher)
    assert [call[0] for call in spy] == ["fp16", None, "tf32", "bf16", "fp32"]
    assert [call[2] for call in spy] == [torch.bfloat16 if call[0] == "bf16" else torch.float32 for call in spy]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        ([1.0], random(1, 4, 3), TypeError, "student is a list: pass a floating-point tensor"),
        (random(1, 4, 3), np.zeros((1, 4, 3)), TypeError, "teacher is a ndarray: pass a floating-point tensor"),
        (torch.ones(1, 4, 3).long(), random(1, 4, 3), TypeError, "student has dtype torch.int64: .*floating"),
        (random(1, 4, 3).cfloat(), random(1, 4, 3), TypeError, "student has dtype torch.complex64: .*floating"),
        (random(4, 3), random(4, 3), ValueError, r"student has shape \(4, 3\): pass \(B, C, H, W\) or \(B, N, C\)"),
        (random(1, 4, 0), random(1, 4, 0), ValueError, r"student has shape \(1, 4, 0\): .*at least one channel"),
        (random(1, 4, 3), random(1, 5, 3), ValueError, r"\(1, 5, 3\) and student \(1, 4, 3\): .*cut off class and"),
        (random(1, 4, 3), random(1, 4, 2), ValueError, r"\(1, 4, 2\) and student \(1, 4, 3\): .*nn.Linear"),
        (random(1, 4, 3), random(1, 4, 3, 1), ValueError, "must be the same"),
        (random(1, 4, 3, 2), random(1, 4, 2, 3), ValueError, "must be the same"),  # with as many entries
        (random(1, 4, 3).to_sparse(), random(1, 4, 3), TypeError, r"student has layout torch.sparse_coo: .*dense"),
        (random(1, 4, 3), random(1, 4, 3).to("meta"), ValueError, "teacher is on meta and student on cpu: .*same"),
        (random(1, 4, 3), random(1, 4, 3).requires_grad_(), ValueError, r"teacher requires grad.*teacher\.detach\(\)"),
    ],
)
def test_unsuitable_tensors(function, student, teacher, error, message):
    with pytest.raises(error, match=message):
        function(student, teacher)


@pytest.mark.parametrize("temperature", [0, -1, 0.00999, 100.001, math.nan, math.inf, "1", None, True, 1j])
def test_unsuitable_temperatures(temperature):
    x = random(1, 4, 3)
    # On a CPU the value of a tensor is known, too.
    tensors = [torch.tensor(float(temperature)).double()] if type(temperature) in (int, float) else []
    for given in (temperature, *tensors):
        with pytest.raises(ValueError, match=r"temperature=.* use a number from 0.01 to 100") as raised:
            contextual_affinity(x, x, given)
        assert repr(given.item() if isinstance(given, torch.Tensor) else given) in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.01, 0.3, 100])
def test_a_temperature_may_be_a_tensor(dtype, value):
    """The ends of the range as the type has them included, the lower one of which float32 has a little below."""
    student, teacher = random(2, 7, 3, seed=1).requires_grad_(), random(2, 7, 3, seed=2)
    temperature = torch.tensor(value, dtype=dtype)
    of_tensor, of_number = (contextual_affinity(student, teacher, t) for t in (temperature, temperature.item()))
    assert torch.equal(of_tensor, of_number)
    assert torch.equal(*(torch.autograd.grad(kl.sum(), student)[0] for kl in (of_tensor, of_number)))
    assert torch.equal(temperature, torch.tensor(value, dtype=dtype))
