import decimal
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dskd_fast import reference
from dskd_fast.backends import torch_tiled

PRECISIONS = ("ieee", "tf32", "bf16", "fp16")


def affinity(student, teacher, temperature, precision="ieee"):
    return torch_tiled.contextual_affinity(student, teacher, temperature, precision, True)


def always_general(a, d, with_gradient):
    """What a GPU runs, and a CPU too once a student is far off: no row takes the series for small differences."""
    teacher = a.exp()
    z = teacher.sum(-1, keepdim=True)
    d.sub_((teacher * d).sum(-1, keepdim=True) / z)
    return torch_tiled._rows_general(teacher, z, a + d, d, with_gradient)


@pytest.fixture(params=["as on a CPU", "as elsewhere"])
def either_path(request, monkeypatch):
    if request.param == "as elsewhere":
        monkeypatch.setattr(torch_tiled, "_rows", always_general)


# The truth itself


@pytest.mark.parametrize(("noise", "temperature"), [("1e-6", "0.05"), ("1e-6", "1"), ("0.3", "0.05"), ("1e-3", "0.01")])
def test_truth_agrees_with_the_textbook_in_120_digits(truth, noise, temperature):
    random = np.random.default_rng(0)
    teacher = random.standard_normal((4, 3))
    student = teacher + float(noise) * random.standard_normal((4, 3))

    with decimal.localcontext(prec=120):
        s, t = ([[decimal.Decimal(float(x)) for x in row] for row in rows] for rows in (student, teacher))
        s, t = ([[x / sum(x * x for x in row).sqrt() for x in row] for row in rows] for rows in (s, t))
        scale = 1 / decimal.Decimal(temperature)

        def log_softmax(vector):
            logits = [sum(x * y for x, y in zip(vector, key, strict=True)) * scale for key in t]
            total = sum(logit.exp() for logit in logits).ln()
            return [logit - total for logit in logits]

        exact = []
        for student_row, teacher_row in zip(s, t, strict=True):
            pairs = zip(log_softmax(teacher_row), log_softmax(student_row), strict=True)
            exact.append(float(sum(p.exp() * (p - q) for p, q in pairs) / scale**2))

    kl, _ = truth(torch.from_numpy(student)[None], torch.from_numpy(teacher)[None], float(temperature))
    # s - t is exact to float64's roundoff, which is this much of the difference.
    np.testing.assert_allclose(kl[0], exact, rtol=1e-12 + 1e-14 / float(noise))


@pytest.mark.parametrize("temperature", [100, 1, 0.1])
def test_truth_agrees_with_the_textbook_in_float64(truth, make_features, temperature):
    student, teacher = make_features(n=40, c=24, noise=1.0, batch=2)
    leaf = student.double().requires_grad_()
    kl = reference.contextual_affinity(leaf, teacher.double(), temperature)
    kl.sum().backward()
    expected = truth(student, teacher, temperature)
    lost = temperature**2 * 2.0**-52 * (math.log(40) + 2 / temperature)
    np.testing.assert_allclose(kl.detach(), expected[0], rtol=1e-12, atol=10 * lost)
    np.testing.assert_allclose(leaf.grad, expected[1], rtol=1e-9, atol=10 * lost)


# Accuracy


def crossing():
    """Every value meets several of every other, without all 6,000 combinations."""
    n = (129, 2, 15, 1, 63, 65, 127, 17)
    c = (130, 1024, 3, 48, 1, 65)
    temperatures = (1, 0.1, 0.05, 0.02, 0.01, 100, 0.0999)
    noises = (1, 0.1, 0.01, 0.001)
    kinds = ("rectified", "normal", "clustered")
    return [(n[k % 8], c[k % 6], temperatures[k % 7], noises[(k + k // 4) % 4], kinds[k % 3]) for k in range(24)]


@pytest.mark.parametrize(("n", "c", "temperature", "noise", "kind"), crossing())
def test_error_is_no_more_than_rounding_makes_it(monkeypatch, truth, make_features, n, c, temperature, noise, kind):
    student, teacher = make_features(n, c, noise, kind)
    limits = {
        precision: truth.limits(student, teacher, temperature, precision) for precision in ("ieee", "tf32", "bf16")
    }
    limits["fp16"] = limits["tf32"]  # the same roundoff, and nothing here is out of fp16's range once scaled
    exact = truth(student, teacher, temperature)
    for rows in (torch_tiled._rows, always_general):
        monkeypatch.setattr(torch_tiled, "_rows", rows)
        for precision in PRECISIONS:
            truth.check(affinity(student, teacher, temperature, precision), exact, limits[precision])


@pytest.mark.parametrize(
    ("kind", "temperature", "noise"),
    [
        ("rectified", 1, 0.01),
        ("rectified", 0.1, 1),
        ("normal", 0.1, 0.01),
        ("clustered", 1, 1),
        ("clustered", 0.1, 0.01),
    ],
)
def test_relative_errors_at_a_real_size(truth, make_features, kind, temperature, noise):
    """The figures that the design promises at N about 1000 and C = 256, whatever the conditioning."""
    promised = {"ieee": (2e-5, 1e-4), "tf32": (3e-4, 1e-3), "fp16": (3e-4, 1e-3), "bf16": (2e-3, 5e-3)}
    student, teacher = make_features(1000, 256, noise, kind)
    exact = truth(student, teacher, temperature)
    for precision in PRECISIONS:
        result = affinity(student, teacher, temperature, precision)
        for got, true, limit in zip(result, exact, promised[precision], strict=True):
            assert relative_error(got, true) < limit, precision


def relative_error(got, true):
    return np.linalg.norm(got.double().numpy() - true) / np.linalg.norm(true)


@pytest.mark.parametrize("noise", [1, 0.1, 0.01, 0.001])
def test_error_is_below_that_of_the_textbook_in_float32(truth, make_features, noise):
    student, teacher = make_features(256, 64, noise)
    kl, _ = truth(student, teacher, 1.0)
    eager = relative_error(reference.contextual_affinity(student, teacher), kl)
    assert relative_error(affinity(student, teacher, 1.0)[0], kl) < eager
    if noise <= 0.01:
        # The reason for the whole form: here the textbook has no digit left, and rounding to bf16 costs next to none.
        assert eager > (1 if noise == 0.001 else 0.05)
        assert relative_error(affinity(student, teacher, 1.0, "bf16")[0], kl) < 5e-3


@pytest.mark.parametrize("temperature", [1, 0.05])
def test_float64_inputs_are_worked_on_in_float64(truth, make_features, either_path, temperature):
    student, teacher = (x.double() for x in make_features(33, 20, 0.1, batch=2))
    result = affinity(student, teacher, temperature)
    assert [x.dtype for x in result] == [torch.float64] * 2
    truth.check(result, truth(student, teacher, temperature), truth.limits(student, teacher, temperature, "ieee"))
    assert affinity(student, teacher.float(), temperature)[0].dtype == torch.float64
    assert affinity(student, teacher, temperature, "bf16")[0].dtype == torch.float32


# Hostile values


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.1, 1, 100])
def test_students_that_are_far_off(truth, make_features, either_path, temperature, precision):
    """Opposite, unrelated, zero and close vectors in one image: exp(d) over- and underflows at the low temperatures."""
    close, teacher = make_features(65, 16, 0.01, "normal")
    unrelated, _ = make_features(65, 16, 0.01, "normal", seed=1)
    student = close.clone()
    student[:, 10:20] = -teacher[:, 10:20]
    student[:, 20:40] = unrelated[:, 20:40]
    student[:, 40:45] = 0
    student[:, 45:50] = teacher[:, 46:51]
    kl, gradient = affinity(student, teacher, temperature, precision)
    assert torch.isfinite(kl).all()
    assert torch.isfinite(gradient).all()
    exact, limits = truth(student, teacher, temperature), truth.limits(student, teacher, temperature, precision)
    truth.check((kl, gradient), exact, limits)


def test_positions_far_off_but_still_alike_keep_their_digits(truth, make_features, either_path):
    """T = 0.01 and 100 % noise: differences of over 30 in the exponent, and yet most KL are 1e-18 and less."""
    student, teacher = make_features(129, 65, 1.0, "normal")
    exact = truth(student, teacher, 0.01)
    assert np.median(exact[0]) < 1e-18
    truth.check(affinity(student, teacher, 0.01), exact, truth.limits(student, teacher, 0.01, "ieee"))


def test_a_large_common_shift_of_the_student_keeps_the_digits(truth, make_features, either_path):
    """Within one material all d_ij are nearly the same; their common part must not drown the KL."""
    random = torch.Generator().manual_seed(0)
    material = torch.randn(8, 64, generator=random)[torch.arange(96) % 8]
    teacher = (material + 0.02 * torch.randn(96, 64, generator=random))[None]
    student = teacher - 0.3 * material
    student = student + 0.3 * torch.randn(1, 1, 64, generator=random)
    truth.check(
        affinity(student, teacher, 0.1), truth(student, teacher, 0.1), truth.limits(student, teacher, 0.1, "ieee")
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1, 100])
def test_student_equal_to_teacher_gives_exactly_zero(make_features, either_path, temperature, precision):
    _, teacher = make_features(63, 48, 0.0, batch=2)
    teacher[0, :3] = 0
    for student in (teacher, 4 * teacher, teacher / 1024):  # powers of two: the directions are equal to the last bit
        kl, gradient = affinity(student, teacher, temperature, precision)
        assert torch.equal(kl, torch.zeros_like(kl))
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("temperature", [0.05, 1])
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_zero_vectors(truth, make_features, either_path, who, temperature):
    student, teacher = make_features(17, 9, 0.1)
    if who != "teacher":
        student[:, [0, 5, 16]] = 0
    if who != "student":
        teacher[:, [0, 6]] = 0
    result = affinity(student, teacher, temperature)
    truth.check(result, truth(student, teacher, temperature), truth.limits(student, teacher, temperature, "ieee"))
    assert (result[1][:, (student == 0).all(-1)[0]] == 0).all()
    textbook = reference.contextual_affinity(student.double(), teacher.double(), temperature)
    torch.testing.assert_close(result[0].double(), textbook, rtol=1e-4, atol=1e-12)


def test_all_vectors_zero(either_path):
    zeros = torch.zeros(2, 5, 3)
    for precision in PRECISIONS:
        kl, gradient = affinity(zeros, zeros, 0.5, precision)
        assert torch.equal(kl, torch.zeros(2, 5))
        assert torch.equal(gradient, zeros)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_directions_count(make_features, precision):
    """Powers of two move no digit, so a student of any magnitude gives the same bits, and gradients in proportion."""
    student, teacher = make_features(33, 12, 0.1)
    kl, gradient = affinity(student, teacher, 0.1, precision)
    for exponent in (-90, 90):
        scaled_kl, scaled_gradient = affinity(student * 2.0**exponent, teacher * 2.0**-exponent, 0.1, precision)
        assert torch.equal(scaled_kl, kl)
        assert torch.equal(scaled_gradient * 2.0**exponent, gradient)


def test_subnormal_features(make_features):
    student, teacher = make_features(9, 4, 0.5, "normal")
    tiny = teacher * 1e-40
    kl, gradient = affinity(tiny, tiny, 1.0)
    assert torch.equal(kl, torch.zeros(1, 9))
    assert torch.equal(gradient, torch.zeros(1, 9, 4))
    assert torch.isfinite(affinity(student, tiny, 1.0)[0]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("temperature", [0.05, 1])
def test_a_student_that_is_not_finite_spoils_its_own_position_alone(
    truth, make_features, either_path, temperature, precision, bad
):
    student, teacher = make_features(17, 9, 0.1, batch=2)
    exact, limits = truth(student, teacher, temperature), truth.limits(student, teacher, temperature, precision)
    student[1, 4, 2] = bad
    kl, gradient = affinity(student, teacher, temperature, precision)
    spoiled = torch.zeros(2, 17, dtype=torch.bool)
    spoiled[1, 4] = True
    assert torch.equal(kl.isnan(), spoiled)
    assert torch.equal(gradient.isnan().any(-1), spoiled)
    kl[1, 4], gradient[1, 4] = (torch.as_tensor(x[1, 4]) for x in exact)
    truth.check((kl, gradient), exact, limits)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_teacher_that_is_not_finite_spoils_its_own_image_alone(make_features, either_path, precision):
    """Its vector is a key of every position there."""
    student, teacher = make_features(17, 9, 0.1, batch=3)
    teacher[1, 4, 2] = math.nan
    for result in affinity(student, teacher, 0.5, precision):
        assert result[1].isnan().all()
        assert torch.isfinite(result[[0, 2]]).all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 0, 3)])
def test_nothing_to_compare(shape):
    empty = torch.zeros(shape)
    for precision in PRECISIONS:
        kl, gradient = affinity(empty, empty, 1.0, precision)
        assert kl.shape == shape[:2]
        assert gradient.shape == shape
    assert torch_tiled.cosine_distance(empty, empty, True)[0].shape == shape[:2]


# How the work is cut up


@pytest.mark.parametrize("temperature", [0.05, 1])
@pytest.mark.parametrize("slab", [1, 37, 5 * 37, 36 * 37, 2 * 37 * 37, 10**6])
def test_results_do_not_depend_on_the_slab(monkeypatch, truth, make_features, slab, temperature):
    """From one row at a time, over rows that do not divide N, to several images at once (3 = 2 + 1)."""
    student, teacher = make_features(37, 21, 0.1, batch=3)
    monkeypatch.setitem(torch_tiled._SLAB_ELEMENTS, "cpu", slab)
    for precision in ("ieee", "bf16"):
        exact, limits = truth(student, teacher, temperature), truth.limits(student, teacher, temperature, precision)
        truth.check(affinity(student, teacher, temperature, precision), exact, limits)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_repeating_gives_the_same_bits(make_features, precision):
    student, teacher = make_features(129, 48, 0.1, batch=2)
    first, second = (affinity(student, teacher, 0.1, precision) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_matrix_of_all_pairs_is_stored(make_features, precision):
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
        affinity(student, teacher, 1.0, precision)
    assert 0 < largest.elements <= n * n / 32


def test_inputs_are_left_alone(make_features):
    student, teacher = make_features(33, 12, 0.1, batch=2)
    before = student.clone(), teacher.clone()
    for precision in PRECISIONS:
        affinity(student, teacher, 0.05, precision)
    torch_tiled.cosine_distance(student, teacher, True)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_without_a_gradient_none_is_made(make_features):
    student, teacher = make_features(33, 12, 0.1)
    kl, gradient = torch_tiled.contextual_affinity(student, teacher, 0.5, "ieee", False)
    assert gradient is None
    assert torch.equal(kl, affinity(student, teacher, 0.5)[0])
    assert torch_tiled.cosine_distance(student, teacher, False)[1] is None


# Process-wide settings


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
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_settings_neither_change_the_result_nor_are_changed(truth, make_features, global_precision, precision):
    student, teacher = make_features(129, 65, 0.1)
    exact, limits = truth(student, teacher, 0.1), truth.limits(student, teacher, 0.1, precision)
    settings = matmul_settings()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = affinity(student, teacher, 0.1, precision)
        assert torch.is_autocast_enabled("cpu")
    truth.check(result, exact, limits)
    assert matmul_settings() == settings


def test_settings_survive_calls_from_several_threads(make_features, global_precision):
    student, teacher = make_features(65, 17, 0.1)
    alone = {precision: affinity(student, teacher, 0.1, precision) for precision in PRECISIONS}
    settings = matmul_settings()
    start = threading.Barrier(len(PRECISIONS))

    def call(precision):
        start.wait()
        return [affinity(student, teacher, 0.1, precision) for _ in range(20)]

    with ThreadPoolExecutor(len(PRECISIONS)) as pool:
        for precision, results in zip(PRECISIONS, pool.map(call, PRECISIONS), strict=True):
            for result in results:
                assert all(map(torch.equal, result, alone[precision]))
    assert matmul_settings() == settings


def test_settings_are_restored_after_an_error(monkeypatch, make_features, global_precision):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch_tiled, "_rows", fail)
    settings = matmul_settings()
    for precision in PRECISIONS:
        with pytest.raises(RuntimeError, match="out of memory"):
            affinity(*make_features(9, 4, 0.1), 1.0, precision)
        assert matmul_settings() == settings


def test_tf32_operands_are_rounded_to_nearest():
    x = torch.tensor([1 + 2.0**-10, 1 + 2.0**-12, 1 + 3 * 2.0**-12, -1 - 3 * 2.0**-12, 0, -0.0, math.inf, math.nan])
    expected = [1 + 2.0**-10, 1, 1 + 2.0**-10, -1 - 2.0**-10, 0, -0.0, math.inf, math.nan]
    torch.testing.assert_close(torch_tiled._round_to_tf32(x), torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


# Cosine distance


@pytest.mark.parametrize("noise", [1, 0.1, 0.001])
def test_cosine_distance_keeps_its_digits(make_features, noise):
    """1 - cos is 1e-6 at 0.1 % noise, of which float32 knows one digit if 1 is subtracted."""
    student, teacher = make_features(65, 48, noise, batch=2)
    leaf = student.double().requires_grad_()
    exact = reference.cosine_distance(leaf, teacher.double())
    exact.sum().backward()
    distance, gradient = torch_tiled.cosine_distance(student, teacher, True)
    assert distance.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(distance.double(), exact.detach(), rtol=1e-6 + 1e-15 / noise**2, atol=0)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-6, atol=1e-6 * leaf.grad.abs().max().item())
    if noise == 0.001:
        assert relative_error(reference.cosine_distance(student, teacher), exact.detach().numpy()) > 0.01


@pytest.mark.parametrize("angle", [1e-3, 1e-6, 1e-9])
def test_cosine_distance_of_a_small_angle(angle):
    """1 - cos x = 2 sin^2(x/2), which is below float64's roundoff for the last."""
    student = torch.tensor([[[math.cos(angle), math.sin(angle)]]], dtype=torch.float64)
    teacher = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    distance, gradient = torch_tiled.cosine_distance(student, teacher, True)
    assert distance.item() == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=1e-9, abs=0)
    expected = torch.tensor([-(math.sin(angle) ** 2), math.sin(angle) * math.cos(angle)], dtype=torch.float64)
    torch.testing.assert_close(gradient[0, 0], expected, rtol=1e-9, atol=1e-24)


def test_cosine_distance_of_special_pairs():
    student = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [2.0, 0.0]]])
    teacher = torch.tensor([[[-1.0, -2.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 5.0], [1.0, 0.0]]])
    distance, gradient = torch_tiled.cosine_distance(student, teacher, True)
    torch.testing.assert_close(distance, torch.tensor([[2.0, 1, 1, 1, 1, 0]]))
    # d(1 - cos)/ds = (cos s/|s| - t/|t|) / |s|; a vector without direction neither gets nor gives a gradient.
    torch.testing.assert_close(gradient[0, 4], torch.tensor([0.0, -1.0]))
    assert (gradient[0, [0, 1, 2, 3, 5]].abs() < 1e-15).all()


def test_cosine_distance_with_nan():
    student, teacher = torch.ones(1, 3, 2), torch.ones(1, 3, 2)
    student[0, 0, 0] = teacher[0, 1, 0] = math.nan
    distance, gradient = torch_tiled.cosine_distance(student, teacher, True)
    assert distance.isnan().tolist() == [[True, True, False]]
    assert gradient.isnan().any(-1).tolist() == [[True, True, False]]
