"""What every backend has to satisfy, on every device it runs on."""

import contextlib
import functools
import importlib
import math
import shutil

import numpy as np
import pytest
import torch

from dskd_fast import reference

# numpy, which the interpreter computes with, warns of infinities and NaN; on a GPU nothing does.
pytestmark = pytest.mark.filterwarnings(r"ignore::RuntimeWarning:triton\.runtime\.interpreter")

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
# Kernels change form at 1/32 and at 4.
TEMPERATURES = (0.01, 0.02, 1 / 32, 0.05, 0.1, 1, 4, 100)
HALVES_AND_FLOAT = (torch.bfloat16, torch.float16, torch.float32)


def crossing(count, *factors):
    """`count` cases in which every value of a factor comes up equally often, met by the others' values at random."""
    random = np.random.default_rng(0)
    return list(zip(*([values[i % len(values)] for i in random.permutation(count)] for values in factors), strict=True))


def relative_error(got, true):
    return np.linalg.norm(got.detach().double().numpy() - true) / np.linalg.norm(true)


def test_all_backends_that_belong_on_this_machine_run_here(all_backends):
    """So that a backend that has stopped being tested is seen, not skipped in silence."""
    reasons = {name: backend for name, backend in all_backends.items() if isinstance(backend, str)}
    expected = {"torch-cpu"}
    if torch.cuda.is_available():
        expected |= {"torch-cuda", "triton-cuda"} | ({"cuda-cuda"} if shutil.which("nvcc") else set())
    elif importlib.import_module("dskd_fast.backends.triton").interpreter_refusal() is None:
        expected.add("triton-interpreter")
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        expected.add("cpu-cpu")
    assert all_backends.keys() - reasons.keys() == expected, reasons


N = (1, 2, 15, 17, 63, 65, 127, 129)
C = (1, 3, 48, 65, 130, 256, 300, 1024)
CASES = crossing(
    32,
    # One half of C for every other N: 129 x 1024 alone would take seconds.
    [(n, c) for k, n in enumerate(N) for c in C[1 - k % 2 :: 2]],
    [(t, p) for t in TEMPERATURES for p in range(4)],
    (30, 1, 0.1, 0.01, 0.001),
    ("rectified", "normal", "clustered"),
)


@pytest.mark.parametrize(
    ("size", "form", "noise", "kind"),
    [
        *CASES[:16],
        ((300, 17), (0.0999, 2), 0.1, "rectified"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[16:]),
    ],
)
def test_error_is_no_more_than_rounding_makes_it(backend, check_affinity, make_features, size, form, noise, kind):
    temperature, k = form
    check_affinity(backend, *make_features(*size, noise, kind), temperature, PRECISIONS[k])


# Promised relative errors of the KL map and of the gradient.
PROMISED = {"fp32": (2e-5, 1e-4), "tf32": (3e-4, 1e-3), "fp16": (3e-4, 1e-3), "bf16": (2e-3, 5e-3)}


@pytest.mark.parametrize(
    ("kind", "temperature", "noise", "precision"),
    [
        ("rectified", 1, 1, "tf32"),
        ("rectified", 1, 0.001, "fp32"),
        ("rectified", 0.1, 1, "bf16"),
        ("clustered", 1, 1, "fp16"),
    ],
)
def test_errors_at_a_real_size(backend, truth, make_features, request, kind, temperature, noise, precision):
    if backend.is_interpreted:  # all rows at once; sums over the keys still have as many parts as in the table
        request.getfixturevalue("set_tiles")(512, 64)
    student, teacher = make_features(500, 256, noise, kind)
    result = backend.affinity(student, teacher, temperature, precision, image=(20, 25))
    exact = truth(student, teacher, temperature)
    for got, true, promised in zip(result, exact, PROMISED[precision], strict=True):
        assert relative_error(got, true) <= promised


@pytest.mark.parametrize("k", range(4))
def test_inputs_of_any_types(backend, check_affinity, make_features, k):
    """Half-precision inputs are not rounded again, nor subtracted in half precision."""
    student, teacher = make_features(33, 20, 0.01)
    student, teacher = student.to(HALVES_AND_FLOAT[k % 3]), teacher.to(HALVES_AND_FLOAT[(k + 1 + k // 3) % 3])
    for precision in backend.some(PRECISIONS, k):
        result = check_affinity(backend, student, teacher, 0.1, precision)
        assert [x.dtype for x in result] == [torch.float32] * 2
    result = backend.cosine(student, teacher)
    assert [x.dtype for x in result] == [torch.float32] * 2
    exact = reference.cosine_distance(student.double(), teacher.double())
    torch.testing.assert_close(result[0].double(), exact, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["torch-cpu", "cpu-cpu"])
@pytest.mark.parametrize("temperature", [1, 0.05, 0.01])
@pytest.mark.parametrize(("n", "c"), [(33, 20), (150, 3)])
def test_float64_inputs_are_worked_on_in_float64(one_of, check_affinity, make_features, name, temperature, n, c):
    backend = one_of(name)
    student, teacher = (x.double() for x in make_features(n, c, 0.1, batch=2))
    student[0, :5] *= -1
    for precision in PRECISIONS:
        result = check_affinity(backend, student, teacher, temperature, precision)
        assert [x.dtype for x in result] == [torch.float64 if precision == "fp32" else torch.float32] * 2
    assert backend.affinity(student, teacher.float(), temperature)[0].dtype == torch.float64
    assert backend.cosine(student, teacher)[1].dtype == torch.float64


# 0.01 as float32 has it, a little below; most kinds of kernels have something to do below 1/32.
@pytest.mark.parametrize(
    ("k", "temperature"),
    [*enumerate((torch.tensor(0.01).item(), 0.02, math.nextafter(1 / 32, 0), 1 / 32, 0.1, 1, 4, 100)), (3, 0.01)],
)
def test_students_that_are_far_off(backend, check_affinity, make_features, k, temperature):
    """Opposite, unrelated, zero and close vectors in one image: exp(d) over- and underflows at the low temperatures.

    In the device's memory a temperature is not known to the host, which launches all kinds of kernels then.
    """
    student, teacher = make_features(65, 16, 0.01, "normal")
    student[:, 10:20] = -teacher[:, 10:20]
    student[:, 20:40] = make_features(65, 16, 0.01, "normal", seed=1)[0][:, 20:40]
    student[:, 40:45] = 0
    student[:, 45:50] = teacher[:, 46:51]
    in_memory = torch.tensor(temperature, dtype=torch.float64, device=backend.device)
    for precision in backend.some(PRECISIONS, k):
        check_affinity(backend, student, teacher, temperature, precision)
        if backend.name != "cpu-cpu":  # whose memory is the host's: the operator has read the temperature
            check_affinity(backend, student, teacher, in_memory, precision)


@pytest.mark.parametrize(("k", "temperature"), list(enumerate((0.0099, 100.1, math.nan))))
def test_a_temperature_in_memory_that_is_out_of_range_gives_nan(backend, make_features, k, temperature):
    if backend.name == "cpu-cpu":
        pytest.skip("a CPU's memory is the host's: the operator has read and refused the temperature")
    student, teacher = make_features(70, 5, 0.1)
    student[:, :3] = teacher[:, :3]
    for precision in backend.some(PRECISIONS, k):
        for x in backend.affinity(student, teacher, torch.tensor(temperature, device=backend.device), precision):
            assert x.isnan().all()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_large_common_shift_of_the_student_keeps_the_digits(backend, check_affinity, precision):
    """Within one material all d_ij are nearly the same; their common part must not drown the KL."""
    random = torch.Generator().manual_seed(0)
    material = torch.randn(8, 64, generator=random)[torch.arange(96) % 8]
    teacher = (material + 0.02 * torch.randn(96, 64, generator=random))[None]
    student = teacher - 0.3 * material
    student = student + 0.3 * torch.randn(1, 1, 64, generator=random)
    check_affinity(backend, student, teacher, 0.1, precision)


@pytest.mark.parametrize(("k", "temperature"), list(enumerate((0.01, 0.1, 1, 100))))
def test_student_equal_to_teacher_gives_exactly_zero(backend, make_features, k, temperature):
    _, teacher = make_features(63, 48, 0.0)
    teacher[0, :3] = 0
    # Of powers of two, the directions are equal to the last bit.
    students, teachers = torch.cat((teacher, 4 * teacher, teacher / 1024)), teacher.expand(3, -1, -1)
    results = [backend.affinity(students, teachers, temperature, p) for p in backend.some(PRECISIONS, k)]
    for result in (*results, backend.cosine(students[:, 3:], teachers[:, 3:])):
        assert not any(x.count_nonzero() for x in result)


@pytest.mark.parametrize(("k", "temperature"), [(0, 0.05), (1, 0.01), (2, 1), (3, 100)])
def test_zero_vectors(backend, check_affinity, make_features, k, temperature):
    student, teacher = make_features(17, 9, 0.1)
    student[:, [0, 5, 16]] = 0
    teacher[:, [0, 6]] = 0
    for precision in backend.some(PRECISIONS, k):
        _, gradient = check_affinity(backend, student, teacher, temperature, precision)
        assert (gradient[:, [0, 5, 16]] == 0).all()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_only_directions_count(backend, make_features, precision):
    """Powers of two move no digit, so a student of any magnitude gives the same bits, and gradients in proportion."""
    student, teacher = make_features(33, 12, 0.1)
    kl, gradient = backend.affinity(student, teacher, 0.1, precision)
    for exponent in (-90, 90):
        scaled_kl, scaled_gradient = backend.affinity(student * 2.0**exponent, teacher * 2.0**-exponent, 0.1, precision)
        assert torch.equal(scaled_kl, kl)
        assert torch.equal(scaled_gradient * 2.0**exponent, gradient)


@pytest.mark.parametrize(
    ("k", "temperature", "bad"), [(0, 0.02, math.nan), (1, 0.05, math.inf), (2, 1, math.nan), (3, 4, math.inf)]
)
def test_a_student_that_is_not_finite_spoils_its_own_position_alone(backend, truth, make_features, k, temperature, bad):
    student, teacher = make_features(17, 9, 0.1, batch=2)
    exact = truth(student, teacher, temperature)
    limits = {precision: truth.limits(student, teacher, temperature, precision) for precision in PRECISIONS}
    student[1, 4, 2] = bad
    spoiled = torch.zeros(2, 17, dtype=torch.bool)
    spoiled[1, 4] = True
    for precision in backend.some(PRECISIONS, k):
        kl, gradient = backend.affinity(student, teacher, temperature, precision)
        assert torch.equal(kl.isnan(), spoiled)
        assert torch.equal(gradient.isnan().any(-1), spoiled)
        kl[1, 4], gradient[1, 4] = (torch.as_tensor(x[1, 4]) for x in exact)
        truth.check((kl, gradient), exact, limits[precision])


@pytest.mark.parametrize(
    ("k", "temperature", "n", "bad"),
    [(0, 0.5, 17, math.inf), (1, 0.02, 17, math.nan), (2, 4, 17, math.nan), (3, 0.02, 300, math.inf)],
)
def test_a_teacher_that_is_not_finite_spoils_its_own_image_alone(backend, make_features, k, temperature, n, bad):
    """Its vector is a key of every position there, be it one of those that are averaged for the centre or not."""
    student, teacher = make_features(n, 9, 0.1, batch=3)
    teacher[1, n // 2, 2] = teacher[2, n // 2 + 1, 2] = bad
    for precision in backend.some(PRECISIONS, k):
        for result in backend.affinity(student, teacher, temperature, precision):
            assert torch.isfinite(result[0]).all()
            assert result[1:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 0, 3)])
def test_nothing_to_compare(backend, shape):
    empty = torch.zeros(shape)
    results = [backend.affinity(empty, empty, 1.0, precision) for precision in PRECISIONS]
    for values, gradient in (*results, backend.cosine(empty, empty)):
        assert (values.shape, gradient.shape) == (shape[:2], shape)


def test_a_large_batch(backend, truth, make_features):
    """More images than fit into one dimension of a grid, where that does not take minutes."""
    repeats = 2 if backend.is_slow else 22_000
    student, teacher = make_features(2, 3, 0.1, batch=3)
    exact, limits = truth(student, teacher, 0.1), truth.limits(student, teacher, 0.1, "bf16")
    result = backend.affinity(student.repeat(repeats, 1, 1), teacher.repeat(repeats, 1, 1), 0.1, "bf16")
    exact, limits = ([np.tile(x, (repeats, *(1 for _ in x.shape[1:]))) for x in pair] for pair in (exact, limits))
    truth.check(result, exact, limits)


def test_any_strides(backend, truth, make_features, layouts):
    for shape in backend.some(((2, 5, 4, 6), (2, 3, 1, 7), (2, 4, 7, 1)), 0):
        b, c, h, w = shape
        maps = [x.to(backend.device).mT.reshape(shape) for x in make_features(h * w, c, 0.1, batch=b)]
        student, teacher = (layout(x) for layout, x in zip(layouts, maps, strict=True))
        assert student.shape == teacher.shape == shape
        check_maps(backend, truth, student, teacher)


def as_rows(x):
    return x.flatten(2).mT.cpu()


def exact_cosine(student, teacher):
    """The distances and their gradients in the student, float64, from rows (B, N, C)."""
    leaf = student.double().requires_grad_()
    exact = reference.cosine_distance(leaf, teacher.double())
    exact.sum().backward()
    return exact.detach(), leaf.grad


def check_maps(backend, truth, student, teacher):
    s, t = as_rows(student), as_rows(teacher)
    kl, gradient = backend.affinity_of_maps(student, teacher, 0.1)
    truth.check((kl.flatten(1).cpu(), as_rows(gradient)), truth(s, t, 0.1), truth.limits(s, t, 0.1, "fp32"))
    distance, cosine_gradient = backend.cosine_of_maps(student, teacher)
    exact, exact_gradient = exact_cosine(s, t)
    torch.testing.assert_close(distance.flatten(1).cpu().double(), exact, rtol=1e-6, atol=1e-12)
    atol = 1e-6 * exact_gradient.abs().max().item()
    torch.testing.assert_close(as_rows(cosine_gradient).double(), exact_gradient, rtol=1e-6, atol=atol)
    for values, of_student in ((kl, gradient), (distance, cosine_gradient)):
        assert values.shape == (len(student), *student.shape[2:])
        assert values.is_contiguous()
        assert of_student.stride() == torch.empty_like(student).stride()
        assert values.dtype == of_student.dtype == torch.float32


@pytest.fixture(scope="module")
def huge_storage():
    """2^31 elements and a few more; only the pages that are written to are ever there."""
    return functools.cache(lambda device: torch.empty(2**31 + 48, dtype=torch.float16, device=device))


@pytest.mark.parametrize("dimension", range(4))
def test_offsets_beyond_32_bits(backend, truth, make_features, huge_storage, dimension):
    """Two steps of 2^30 along one dimension: the stride still is a 32-bit number, the offsets are not."""
    shape = b, c, h, w = tuple(3 if d == dimension else 2 for d in range(4))
    maps = [x.half().mT.reshape(shape) for x in make_features(h * w, c, 0.1, batch=b)]
    strides = list(maps[0].stride())
    strides[dimension] = 2**30
    storage = huge_storage(backend.device)
    maps = [storage[24 * k :].as_strided(shape, strides).copy_(x) for k, x in enumerate(maps)]
    check_maps(backend, truth, *maps)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New tensors are full of NaN while it is on: `with poisoned_memory():`"""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)

    @contextlib.contextmanager
    def poison():
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert torch.empty(9).isnan().all()
        yield
        torch.use_deterministic_algorithms(False)

    return poison


@pytest.mark.parametrize(("precision", "temperature"), [*zip(PRECISIONS, (0.02, 0.1, 1, 4), strict=True)])
def test_the_same_bits_again_whatever_was_in_memory(backend, make_features, poisoned_memory, precision, temperature):
    """Inputs are left alone, too; without a gradient, a map is the same; autocast does not round a backend's operands.

    In the emulation, threads run in another order each time.
    """
    student, teacher = make_features(65, 20, 0.1)
    student[0, :7] *= -1
    before = student.clone(), teacher.clone()

    def call(**options):
        affinity = backend.affinity(student, teacher, temperature, precision, **options)
        return *affinity, *backend.cosine(student, teacher, **options)

    first = call()
    with poisoned_memory(), torch.autocast(backend.device, dtype=torch.bfloat16):
        assert all(map(torch.equal, first, call()))
    kl, no_gradient, distance, none = call(with_gradient=False)
    assert no_gradient is none is None
    assert all(map(torch.equal, (kl, distance, student, teacher), (first[0], first[2], *before)))


@pytest.mark.parametrize(
    ("n", "c", "noise"), [(65, 48, 0.001), (65, 48, 1), (1, 5000, 0.1), (127, 3, 0.001), (33, 300, 1)]
)
def test_cosine_distance_keeps_its_digits(backend, make_features, n, c, noise):
    """1 - cos is 1e-6 at 0.1 % noise, of which float32 knows one digit if 1 is subtracted."""
    student, teacher = make_features(n, c, noise, batch=2)
    exact, exact_gradient = exact_cosine(student, teacher)
    distance, gradient = backend.cosine(student, teacher)
    assert distance.dtype == gradient.dtype == torch.float32
    # In float64, subtracting from 1 leaves eps of the cosine; and both sides do.
    torch.testing.assert_close(distance.double(), exact, rtol=1e-6 + 1e-15 / noise**2, atol=1e-15)
    atol = 1e-6 * exact_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-6, atol=atol)
    if noise == 0.001 and n == 65:
        assert relative_error(reference.cosine_distance(student, teacher), exact.numpy()) > 0.01


def test_cosine_distance_of_special_pairs(backend):
    student = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [2.0, 0.0]]])
    teacher = torch.tensor([[[-1.0, -2.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 5.0], [1.0, 0.0]]])
    distance, gradient = backend.cosine(student, teacher)
    torch.testing.assert_close(distance, torch.tensor([[2.0, 1, 1, 1, 1, 0]]))
    # d(1 - cos)/ds = (cos s/|s| - t/|t|) / |s|; a vector without direction neither gets nor gives a gradient.
    torch.testing.assert_close(gradient[0, 4], torch.tensor([0.0, -1.0]))
    assert (gradient[0, [0, 1, 2, 3, 5]].abs() < 1e-15).all()
    # Beside a vector without direction, too.
    student[0, [3, 5], 0], teacher[0, [1, 4], 1] = math.nan, math.inf
    for x in backend.cosine(student, teacher):
        assert x.isnan().view(6, -1).any(1).tolist() == [False, True, False, True, True, True]
