"""The examples of dskd_fast/losses/README.md run, and are what the papers print."""

import pytest
import torch

from .conftest import blocks, dense, kl, unit

BLOCKS = blocks("Published losses as arguments")


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(maps):
    return maps.flatten(2).mT.flatten(0, 1)


def dskd(given):
    """Eq. 3-6."""
    return dense(given["student_map"], given["teacher_map"], 0.5)


def queue(student_temperature, teacher_temperature, names=("student", "teacher"), enqueued=False):
    """Similarities with a queue: SEED's (less the teacher's entropy), CompRess's, ReSSL's."""

    def loss(given):
        s, t, keys = unit(given[names[0]], given[names[1]], given["memory"])
        if enqueued:
            keys = torch.cat((t, keys[len(t) :]))
        return kl(t @ keys.T / teacher_temperature, s @ keys.T / student_temperature).mean()

    return loss


def cirkd(given):
    """Pixel to memory, of labelled pixels alone, which are gathered."""
    labelled = given["labels"].flatten() != 255
    s, t, keys = unit(rows(given["student_map"])[labelled], rows(given["teacher_map"])[labelled], given["memory"])
    return kl(t @ keys.T / 0.1, s @ keys.T / 0.1).mean()


def tokens(given):
    found = []
    for s, t, n in zip(given["tokens_student"], given["tokens_teacher"], given["lengths"], strict=True):
        s, t = unit(s[:n], t[:n])
        found.append(kl(t @ t.T / 0.1, s @ t.T / 0.1))
    return torch.cat(found).mean()


FORMULAS = {
    "DSKD": dskd,
    "SEED": queue(0.2, 0.01, enqueued=True),
    "CompRess": queue(0.04, 0.04),
    "ReSSL": queue(0.1, 0.04, ("strong_view", "weak_view_of_the_teacher")),
    "CIRKD": cirkd,
    "Tokens of a ViT": tokens,
}


@pytest.mark.parametrize("paper", FORMULAS)
def test_an_example_is_the_papers_formula(paper):
    shapes = {"student": (6, 16), "student_map": (2, 16, 3, 4), "tokens_student": (3, 9, 16)}
    leaves = {name: random(*shape, seed=1).requires_grad_() for name, shape in shapes.items()}
    teachers = {name.replace("student", "teacher"): random(*shape, seed=2) for name, shape in shapes.items()}
    given = {
        **leaves,
        **teachers,
        "strong_view": leaves["student"],
        "weak_view_of_the_teacher": teachers["teacher"],
        "memory": random(50, 16, seed=3),
        "labels": torch.tensor([0, 255, 1, 255, 2, 3]).repeat(4).reshape(2, 3, 4),
        "lengths": torch.tensor([9, 4, 1]),
    }
    exact = FORMULAS[paper](given)
    scope = {"torch": torch, **given}
    exec(BLOCKS[paper], scope)
    torch.testing.assert_close(scope["loss"].double(), exact, rtol=2e-5, atol=0)
    gradients = (torch.autograd.grad(x, [*leaves.values()], allow_unused=True) for x in (scope["loss"], exact))
    for got, expected in zip(*gradients, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_every_example_is_compared():
    assert {*BLOCKS} == {*FORMULAS}
