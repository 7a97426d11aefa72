import math

import pytest
import torch

from dskd_fast import reference


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 20])
def test_affinity_sums_over_all_positions_one_by_one(temperature):
    student, teacher = random(2, 7, 5, seed=1), random(2, 7, 5, seed=2)

    def softmax(logits):
        total = sum(math.exp(x) for x in logits)
        return [math.exp(x) / total for x in logits]

    def cosine(x, y):
        return (x @ y / (x.norm() * y.norm())).item()

    kl = reference.contextual_affinity(student, teacher, temperature)
    for b in range(2):
        for i in range(7):
            p = softmax([cosine(teacher[b, i], key) / temperature for key in teacher[b]])
            q = softmax([cosine(student[b, i], key) / temperature for key in teacher[b]])
            expected = temperature**2 * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
            assert kl[b, i].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.01, 1, 100])
def test_a_student_equal_to_the_teacher_has_no_loss(temperature):
    teacher = random(2, 9, 4)
    assert torch.equal(reference.contextual_affinity(teacher, teacher, temperature), torch.zeros(2, 9))
    assert reference.cosine_distance(teacher, teacher).abs().max() < 1e-15


def test_cosine_distance_by_hand():
    student = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [0.0, 0.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[5.0, 0.0], [1.0, 0.0], [0.0, -1.0], [1.0, 0.0]]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 1 - math.sqrt(0.5), 2.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(reference.cosine_distance(student, teacher), expected)


def test_gradients_are_those_of_finite_differences():
    student, teacher = random(2, 5, 3, seed=1).requires_grad_(), random(2, 5, 3, seed=2)
    for temperature in (0.2, 1.0):
        assert torch.autograd.gradcheck(lambda x, t=temperature: reference.contextual_affinity(x, teacher, t), student)
    assert torch.autograd.gradcheck(lambda x: reference.cosine_distance(x, teacher), student)
