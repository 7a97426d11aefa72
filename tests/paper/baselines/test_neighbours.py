"""The nearest neighbours against all distances in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dskd_fast.paper.baselines import neighbours
from dskd_fast.paper.baselines.neighbours import nearest


@pytest.mark.parametrize(
    ("n", "m", "channels", "k"),
    [(1, 1, 1, 1), (3, 5, 2, 5), (700, 5000, 7, 1), (513, 4097, 16, 50), (20, 9001, 33, 9), (600, 130, 3, 130)],
)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("has_bf16", [True, False])
def test_they_are_the_nearest(monkeypatch, n, m, channels, k, offset, has_bf16):
    monkeypatch.setattr(neighbours, "has_fast_bf16", lambda device: has_bf16)
    generator = torch.Generator().manual_seed(n)
    queries, keys = (torch.randn(x, channels, generator=generator) + offset for x in (n, m))
    found = nearest(queries, keys, k)
    every = (queries.double()[:, None] - keys.double()).square().sum(2).sqrt()
    # That of the key that is given: differences of float32 numbers are rounded once, and sums of C squares C times.
    torch.testing.assert_close(
        found.distances.double(), every.gather(1, found.indices), rtol=(channels + 4) * 2**-24, atol=0
    )
    # No key is passed over but for the rounding of products, of numbers around their mean.
    spread = (queries - keys.mean(0)).double().norm(dim=1).max() * (keys - keys.mean(0)).double().norm(dim=1).max()
    rounding = 4 * (channels + 4) * 2**-24 * (float(spread) + offset * channels**0.5)
    squares = found.distances.double().square() - every.topk(k, largest=False).values.square()
    assert float(squares.abs().max()) <= rounding
    assert (found.distances.diff(dim=1) >= 0).all()
    assert all(len(row.unique()) == k for row in found.indices[:5])


def test_where_rounding_hides_which_key_is_nearest_it_is_searched_in_float32(monkeypatch):
    """A hundred keys that bf16 cannot tell apart, and whose order float32 knows."""
    monkeypatch.setattr(neighbours, "has_fast_bf16", lambda device: True)
    keys = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    keys[:100] = keys[0] * (1 + 2e-3 * torch.arange(100)[:, None])
    assert nearest(keys[:100], keys).indices.flatten().tolist() == list(range(100))


def test_no_matrix_of_all_distances_is_made():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **kwargs or {})
            sizes = [x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
            self.numbers = max([self.numbers, *sizes])
            return found

    queries, keys = torch.randn(3000, 4), torch.randn(20_000, 4)
    with Largest() as largest:
        nearest(queries, keys, 3)
    assert largest.numbers <= 2**22 + 3 * len(keys)  # a tile; 60 million would be all


@pytest.mark.parametrize(
    ("queries", "keys", "k", "message"),
    [
        ((2, 3), (4, 2), 1, r"must be \(n, C\) and \(m, C\), not \[2, 3\] and \[4, 2\]"),
        ((2, 3), (4, 3), 5, "k must be from 1 to the number of keys, 4, not 5"),
        ((2, 3), (0, 3), 1, "k must be from 1 to the number of keys, 0, not 1"),
    ],
)
def test_what_does_not_fit_is_named(queries, keys, k, message):
    with pytest.raises(ValueError, match=message):
        nearest(torch.zeros(queries), torch.zeros(keys), k)
    with pytest.raises(ValueError, match=r"float32, not torch\.float64"):
        nearest(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3))
