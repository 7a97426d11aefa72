import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dskd_fast import ContextualAffinityLoss, CosineDistanceLoss, functional
from dskd_fast.ops.dispatch import AMBIENT, BACKENDS, PRECISIONS

affinity = torch.ops.dskd_fast.contextual_affinity
cosine = torch.ops.dskd_fast.cosine_distance


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


PAIRS = {
    "rows": lambda: (random(2, 9, 5, seed=1), random(2, 9, 5, seed=2)),
    "maps": lambda: (random(2, 5, 9, seed=1).mT, random(2, 5, 9, seed=2).mT),
    "expanded": lambda: (random(1, 9, 5, seed=1).expand(2, 9, 5), random(2, 9, 5, seed=2)),
    "one position": lambda: (random(2, 1, 5, seed=1), random(2, 1, 5, seed=2)),
    "empty": lambda: (random(0, 9, 5), random(0, 9, 5)),
    "mixed types": lambda: (random(2, 9, 5, seed=1, dtype=torch.bfloat16), random(2, 5, 9, seed=2).mT),
    "float64": lambda: (random(2, 9, 5, seed=1, dtype=torch.float64), random(2, 9, 5, seed=2)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(pair, backend):
    """Schema, autograd, fake tensors and tracing, against what the operator really does."""
    student, teacher = PAIRS[pair]()
    for leaf, with_gradient in ((student.detach().requires_grad_(), True), (student, False)):
        torch.library.opcheck(affinity, (leaf, teacher, 0.5, "ieee", backend, with_gradient))
        torch.library.opcheck(cosine, (leaf, teacher, backend, with_gradient))


@pytest.mark.parametrize("precision", [*PRECISIONS, AMBIENT])
def test_registration_at_every_precision(precision):
    student, teacher = PAIRS["maps"]()
    torch.library.opcheck(affinity, (student.requires_grad_(), teacher, 0.05, precision, "torch", True))


@pytest.mark.parametrize("function", [functional.contextual_affinity, functional.cosine_distance])
def test_shapes_without_data(function):
    student, teacher = (x.to("meta") for x in (random(2, 5, 3, 4), random(2, 5, 3, 4)))
    if function is functional.contextual_affinity:
        kl, gradient = affinity(student.flatten(2).mT, teacher.flatten(2).mT, 1.0, "bf16", "torch", True)
        assert kl.shape == (2, 12)
        assert gradient.shape == (2, 12, 5)
        assert kl.dtype == gradient.dtype == torch.float32
    else:
        assert function(student, teacher).shape == (2, 3, 4)


LOSSES = {
    "affinity": lambda: ContextualAffinityLoss(0.5),
    "affinity, bf16": lambda: ContextualAffinityLoss(0.05, reduction="sum", precision="bf16"),
    "cosine": CosineDistanceLoss,
    "flattened cosine": lambda: CosineDistanceLoss(flatten=True),
}


def levels(seed):
    return [random(2, 5, 6, 6, seed=seed), random(2, 7, 3, 3, seed=seed + 10)]


def loss_and_gradients(function, student, teacher):
    student = [x.clone().requires_grad_() for x in student]
    loss = function(student, teacher)
    loss.backward()
    return [loss.detach(), *(x.grad for x in student)]


@pytest.mark.parametrize("loss", LOSSES)
def test_compiling_changes_nothing(loss):
    torch.compiler.reset()
    module = LOSSES[loss]()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for a, b in zip(
            loss_and_gradients(compiled, levels(1), levels(2)),
            loss_and_gradients(module, levels(1), levels(2)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_compiled_code_follows_autocast_and_settings():
    torch.compiler.reset()
    student, teacher = random(1, 64, 32, seed=1), random(1, 64, 32, seed=2)
    compiled = torch.compile(functional.contextual_affinity, fullgraph=True, backend="aot_eager")
    exact, rounded = (functional.contextual_affinity(student, teacher, precision=p) for p in ("ieee", "bf16"))
    assert not torch.equal(exact, rounded)
    assert torch.equal(compiled(student, teacher), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(student, teacher), rounded)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(compiled(student, teacher), rounded)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(compiled(student, teacher), exact)


@pytest.mark.parametrize("loss", LOSSES)
def test_checkpointing_changes_nothing(loss):
    module = LOSSES[loss]()

    def checkpointed(student, teacher):
        return checkpoint(module, student, teacher, use_reentrant=False)

    for a, b in zip(
        loss_and_gradients(checkpointed, levels(1), levels(2)),
        loss_and_gradients(module, levels(1), levels(2)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_losses_can_be_copied(loss, duplicate):
    module = LOSSES[loss]()
    twin = duplicate(module)
    assert twin is not module
    assert repr(twin) == repr(module)
    assert torch.equal(twin(levels(1), levels(2)), module(levels(1), levels(2)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_are_refused_or_right():
    """torch cannot differentiate a custom operator by its function transforms; vmap it can."""
    student, teacher = random(3, 2, 6, 4, seed=1), random(3, 2, 6, 4, seed=2)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: functional.contextual_affinity(x, teacher[0]).sum())(student[0])
    mapped = torch.func.vmap(functional.contextual_affinity)(student, teacher)
    for values, s, t in zip(mapped, student, teacher, strict=True):
        torch.testing.assert_close(values, functional.contextual_affinity(s, t))


@pytest.mark.parametrize("with_gradient", [False, True])
def test_the_operators_return_the_map_and_the_gradient_or_nothing(with_gradient):
    student, teacher = PAIRS["rows"]()
    for values, gradient in (
        affinity(student, teacher, 1.0, "ieee", "torch", with_gradient),
        cosine(student, teacher, "torch", with_gradient),
    ):
        assert values.shape == (2, 9)
        assert gradient.shape == ((2, 9, 5) if with_gradient else (0,))


def test_only_the_student_gets_a_gradient():
    student, teacher = PAIRS["rows"]()
    leaf, other = student.requires_grad_(), teacher.requires_grad_()
    values, gradient = affinity(leaf, other, 1.0, "ieee", "torch", True)
    assert not gradient.requires_grad
    values.sum().backward()
    assert leaf.grad is not None
    assert other.grad is None
