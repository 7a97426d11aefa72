"""What the cpu backend alone has in the distillation against any keys: panels, splits, float64, its own exponents."""

import math

import numpy as np
import pytest
import torch

from dskd_fast.backends.common import PreparedKeys

T = {"student_temperature": 0.1, "teacher_temperature": 0.05}


@pytest.fixture
def many_keys(make_features):
    """Several panels, in several splits where a panel has 1,024 keys: the first split's are far from all rows."""
    student, teacher = make_features(70, 24, 0.3, "clustered")
    keys = make_features(9000, 24, 0, "clustered", seed=1)[1]
    keys[:, :4500] -= 2 * teacher.mean(1, keepdim=True)
    return student, teacher, keys


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_panels_and_splits_are_as_good_as_one(cpu, keys_truth, many_keys, precision):
    result = cpu.distillation(*many_keys, precision=precision, **T)
    keys_truth.check(result, keys_truth(*many_keys, **T), keys_truth.limits(*many_keys, precision=precision, **T))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_neither_threads_nor_the_gradient_change_a_bit(cpu, many_keys, threads, precision):
    expected = cpu.distillation(*many_keys, precision=precision, **T)
    threads(3 if torch.get_num_threads() < 3 else 1)
    again = cpu.distillation(*many_keys, precision=precision, **T)
    assert all(map(torch.equal, expected, again))
    assert torch.equal(expected[0], cpu.distillation(*many_keys, precision=precision, with_gradient=False, **T)[0])


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_keys_replaced_in_parts_are_the_same_bits(cpu, make_features, precision):
    """The parts begin and end within pairs, tiles and blocks, and one of them covers several."""
    keys, others = (make_features(300, 20, 0, batch=2, seed=seed)[1] for seed in (1, 2))
    whole = cpu.module.prepare_keys(keys, True, precision)
    parts = cpu.module.prepare_keys(others, True, precision, whole[-1])
    for start, end in ((0, 3), (3, 64), (64, 255), (255, 300)):
        cpu.module.update_keys(parts, keys[:, start:end], start, True, precision)
    assert all(map(torch.equal, whole, parts))


@pytest.mark.parametrize("t", [(1, 1), (0.07, 0.01), (0.005, 0.005)])
def test_float64_inputs_are_worked_on_in_float64(cpu, keys_truth, make_features, t):
    student, teacher = (x.double() for x in make_features(33, 20, 0.1, batch=2))
    student[0, :5] *= -1
    call = student, teacher, make_features(150, 20, 0, batch=2, seed=1)[1].double()
    options = dict(zip(T, t, strict=True))
    result = cpu.distillation(*call, **options)
    assert [x.dtype for x in result] == [torch.float64] * 2
    keys_truth.check(result, keys_truth(*call, **options), keys_truth.limits(*call, precision="fp32", **options))
    assert [x.dtype for x in cpu.distillation(*call, precision="tf32", **options)] == [torch.float32] * 2


def test_logits_of_thousands(cpu, make_features):
    """exp() of their differences is beyond float64's range, too; where one key has all weight, a difference is left."""
    student, teacher = make_features(40, 24, 1, "normal")
    keys = make_features(3000, 24, 0, "normal", seed=1)[1]
    student, teacher, keys = (40 * x.double() for x in (student, teacher, keys))
    a, b = teacher @ keys.mT, student @ keys.mT
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    raw = (log_q.exp() - log_p.exp()) @ keys
    assert exact.max() > 2000
    options = {"student_temperature": 1.0, "teacher_temperature": 1.0, "normalize": False}
    for dtype, limit in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        kl, gradient = cpu.distillation(*(x.to(dtype) for x in (student, teacher, keys)), **options)
        assert (kl - exact).norm() <= limit * exact.norm()
        assert (gradient - raw).norm() <= 10 * limit * raw.norm()


def test_a_nan_stays_in_its_row_and_in_keys_that_are_left_out(cpu, make_features):
    student, teacher = make_features(70, 20, 0.1)
    keys = make_features(200, 20, 0, seed=1)[1]
    expected = cpu.distillation(student, teacher, keys[:, 1:], **T)
    student[0, 3, 5], teacher[0, 66, 0], keys[0, 0, 2] = math.nan, math.inf, math.nan
    mask = torch.arange(200)[None] > 0
    packed = cpu.module.prepare_keys(keys, True, "fp32")
    for some in (keys, PreparedKeys(packed, tuple(keys.shape), True, "fp32", "cpu")):
        result = cpu.distillation(student, teacher, some, key_mask=mask, **T)
        for got, x in zip(result, expected, strict=True):
            finite = torch.arange(70)
            finite = finite[(finite != 3) & (finite != 66)]
            assert got[0, [3, 66]].isnan().all()
            np.testing.assert_allclose(got[0, finite], x[0, finite], rtol=1e-4, atol=1e-6)
        assert all(x.isnan().all() for x in cpu.distillation(student, teacher, some, **T))
