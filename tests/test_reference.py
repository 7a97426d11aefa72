import math

import pytest
import torch

from dskd_fast import reference


@pytest.mark.parametrize("temperature", [0.05, 0.3, 20])
def test_affinity_sums_over_all_positions_one_by_one(temperature):
    student, teacher = torch.randn(2, 2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def softmax(x, keys):
        weights = [math.exp((x @ key / (x.norm() * key.norm())).item() / temperature) for key in keys]
        return [weight / sum(weights) for weight in weights]

    kl = reference.contextual_affinity(student, teacher, temperature)
    for b in range(2):
        for i in range(7):
            pairs = zip(softmax(teacher[b, i], teacher[b]), softmax(student[b, i], teacher[b]), strict=True)
            expected = temperature**2 * sum(p * math.log(p / q) for p, q in pairs)
            assert kl[b, i].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_cosine_distance_by_hand():
    student = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [0.0, 0.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[5.0, 0.0], [1.0, 0.0], [0.0, -1.0], [1.0, 0.0]]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 1 - math.sqrt(0.5), 2.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(reference.cosine_distance(student, teacher), expected)
