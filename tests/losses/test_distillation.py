import copy
import pickle

import pytest
import torch

from dskd_fast import ContextualAffinityLoss, CosineDistanceLoss, reference


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def levels(seed, batch=3):
    return [random(batch, 4, 6, 5, seed=seed), random(batch, 7, 3, 2, seed=seed + 10)]


def textbook_maps(name, student, teacher):
    """The levels' maps, (B, N), float64."""
    pairs = [(x.flatten(2).mT.double() for x in pair) for pair in zip(student, teacher, strict=True)]
    if name == "affinity":
        return [reference.contextual_affinity(s, t, 0.5) for s, t in pairs]
    if name == "flattened":
        pairs = [(x.mT.flatten(1)[:, None] for x in pair) for pair in pairs]
    return [reference.cosine_distance(s, t) for s, t in pairs]


def make(name, **options):
    if name == "affinity":
        return ContextualAffinityLoss(0.5, **options)
    return CosineDistanceLoss(flatten=name == "flattened", **options)


NAMES = ["affinity", "cosine", "flattened"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_images_and_positions_are_reduced_and_levels_added(name, reduction):
    teacher = levels(2)
    leaves, double_leaves = ([x.to(d).requires_grad_() for x in levels(1)] for d in (torch.float32, torch.float64))
    loss = make(name, reduction=reduction)(leaves, tuple(teacher))
    maps = textbook_maps(name, double_leaves, teacher)
    if reduction == "none":  # a map per level; with a weight of its own for every position
        sizes = [(3, 1), (3, 1)] if name == "flattened" else [(3, 6, 5), (3, 3, 2)]
        assert [tuple(m.shape) for m in loss] == sizes
        weights = [random(*m.shape, seed=5) for m in loss]
        loss = sum((w * m).sum() for w, m in zip(weights, loss, strict=True))
        expected = sum((w.double().flatten(1) * m).sum() for w, m in zip(weights, maps, strict=True))
    else:
        expected = sum(getattr(m, reduction)() for m in maps)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    loss.backward()
    expected.backward()
    for a, b in zip(leaves, double_leaves, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-6)
    # A single tensor is a single level.
    alone, listed = (make(name, reduction=reduction)(*pair) for pair in ((a, teacher[-1]), ([a], [teacher[-1]])))
    assert torch.equal(alone, listed[0] if reduction == "none" else listed)


def test_a_tensor_as_temperature_is_kept_as_it_is():
    """As is its value where the module is moved or rounded; it is no state of the module either."""
    temperature = torch.tensor(0.3, dtype=torch.float64)
    loss, student, teacher = ContextualAffinityLoss(temperature), levels(1), levels(2)
    for module in (loss, copy.deepcopy(loss).half(), pickle.loads(pickle.dumps(loss)).to("meta")):
        assert torch.equal(module(student, teacher), ContextualAffinityLoss(0.3)(student, teacher))
        assert "temperature=0.3," in repr(module)
        assert list(module.state_dict()) == list(module.parameters()) == []
    temperature.fill_(0.5)
    assert torch.equal(loss(student, teacher), ContextualAffinityLoss(0.5)(student, teacher))
    with pytest.raises(ValueError, match="temperature requires grad"):
        ContextualAffinityLoss(torch.nn.Parameter(temperature))


@pytest.mark.parametrize("name", NAMES)
def test_the_backend_is_passed_on(name):
    with pytest.raises(ValueError, match="backend='abacus' is not known"):
        make(name, backend="abacus")(levels(1), levels(2))


S, T = levels(1), levels(2)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (S, T[:1], ValueError, r"student has 2 levels and teacher 1: .*same number"),
        ([], [], ValueError, r"student has 0 levels and teacher 0: .*at least one"),
        (S[0], T, TypeError, "both be tensors or both be lists"),
        (S, T[0], TypeError, "both be tensors or both be lists"),
        (dict(enumerate(S)), T, TypeError, "lists of levels, not student a dict and teacher a list"),
        (S, T[::-1], ValueError, "must be the same"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_levels_that_do_not_match(name, student, teacher, error, message):
    with pytest.raises(error, match=message):
        make(name)(student, teacher)


def test_defaults_are_the_papers():
    assert repr(ContextualAffinityLoss()) == (
        "ContextualAffinityLoss(temperature=1.0, reduction='mean', precision=None, backend='auto')"
    )
    assert repr(CosineDistanceLoss()) == "CosineDistanceLoss(reduction='mean', flatten=False, backend='auto')"


@pytest.mark.parametrize("kind", [ContextualAffinityLoss, CosineDistanceLoss])
def test_unknown_reductions(kind):
    for reduction in ("batchmean", "", None):
        with pytest.raises(ValueError, match=f"reduction={reduction!r} .*use one of 'none', 'mean', 'sum'"):
            kind(reduction=reduction)
