"""What the backends are compared with is itself right."""

import decimal
import math

import numpy as np
import pytest
import torch

from dskd_fast import reference


@pytest.mark.parametrize(("noise", "temperature"), [("1e-6", "0.05"), ("1e-6", "1"), ("0.3", "0.05"), ("1e-3", "0.01")])
def test_it_agrees_with_the_textbook_in_120_digits(truth, noise, temperature):
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


def test_gradients_and_vectors_without_a_direction_are_the_textbooks(truth):
    student, teacher = torch.randn(2, 1, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student[0, [0, 5]] = teacher[0, [0, 6]] = 0
    student.requires_grad_()
    expected = reference.contextual_affinity(student, teacher, 0.5)
    expected.sum().backward()
    kl, gradient = truth(student, teacher, 0.5)
    np.testing.assert_allclose(kl, expected.detach(), rtol=1e-12, atol=1e-15)
    has_direction = np.array([i not in (0, 5) for i in range(9)])  # the textbook's gradient at 0 is another
    np.testing.assert_allclose(gradient[0, has_direction], student.grad[0, has_direction], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("quantity", [0, 1])
@pytest.mark.parametrize("everywhere", [True, False])
def test_the_check_sees_errors_of_a_few_times_what_rounding_makes(truth, make_features, quantity, everywhere):
    """In all positions together, or in a single one."""
    student, teacher = make_features(40, 24, 0.1)
    exact, limits = truth(student, teacher, 1.0), truth.limits(student, teacher, 1.0, "bf16")
    truth.check(map(torch.from_numpy, exact), exact, limits)
    where = (0, slice(None) if everywhere else slice(7, 8))
    for size in (3 if everywhere else 13, math.nan):
        off = [torch.from_numpy(x.copy()) for x in exact]
        off[quantity][(*where, 0)[: off[quantity].dim()]] += size * torch.from_numpy(limits[quantity][where])
        with pytest.raises(AssertionError):
            truth.check(off, exact, limits)
