"""What the cpu backend alone has in the distillation against any keys: panels, splits, float64, its own exponents."""

import math

import numpy as np
import pytest
import torch

T = {"student_temperature": 0.1, "teacher_temperature": 0.05}


@pytest.fixture
def many_keys(make_features):
    """Several panels, in several splits where a panel has 1,024 keys: the first split's are far from all rows."""
    student, teacher = make_features(70, 24, 0.3, "clustered")
    keys = make_features(9000, 24, 0, "clustered", seed=1)[1]
    keys[:, :4500] -= 2 * teacher.mean(1, keepdim=True)
    return student, teacher, keys


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_panels_and_splits_are_as_good_as_one_whatever_the_threads(
    cpu, check_distillation, many_keys, threads, precision
):
    expected = check_distillation(cpu, *many_keys, precision=precision, **T)
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
def test_float64_inputs_are_worked_on_in_float64(cpu, check_distillation, make_features, t):
    student, teacher = (x.double() for x in make_features(33, 20, 0.1, batch=2))
    student[0, :5] *= -1
    call = student, teacher, make_features(150, 20, 0, batch=2, seed=1)[1].double()
    for precision, dtype in (("fp32", torch.float64), ("tf32", torch.float32)):
        result = check_distillation(cpu, *call, precision=precision, **dict(zip(T, t, strict=True)))
        assert [x.dtype for x in result] == [dtype] * 2


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
    mask, bad = torch.arange(200)[None] > 0, torch.tensor([n in (3, 66) for n in range(70)])
    for some in (keys, cpu.prepared(keys)):
        for got, x in zip(cpu.distillation(student, teacher, some, key_mask=mask, **T), expected, strict=True):
            assert got[0, bad].isnan().all()
            np.testing.assert_allclose(got[0, ~bad], x[0, ~bad], rtol=1e-4, atol=1e-6)
        assert all(x.isnan().all() for x in cpu.distillation(student, teacher, some, **T))
