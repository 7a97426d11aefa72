"""Exact nearest neighbours, tile by tile: the matrix of all distances is never there.

With the mean of the keys taken from both sides, |q - k|^2 = |q|^2 - 2 (q k - |k|^2 / 2), so the nearest key is the one
with the largest q k - |k|^2 / 2: one matrix product for each tile, to which its second term is added. Distances of
those that are found are then computed from differences, since those from products cancel.

Where the processor multiplies bf16, twice as fast, a few more than k candidates are found by products of operands
rounded to it. What rounding can do to a product is bounded, by Cauchy and Schwarz, by the operands' lengths and by
those of what rounding took from them. Where no key but the candidates can be among the k nearest by that bound, these
are the result; the other queries are searched again in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dskd_fast.device import has_fast_bf16

# A tile of products, 16 MiB, and its operands stay in the second- or third-level cache.
_QUERIES, _KEYS = 1024, 4096
# Candidates that are found by rounded products: so many and 3 k.
_SPARE = 16
# The largest of so many products decide which of them are looked at one by one.
_STRIDE = 16
# Numbers in a block of differences.
_BLOCK = 2**21
# Most that rounding to bf16, of 8 bits, takes of a number.
_LOST = 2.0**-9


class Neighbours(NamedTuple):
    """The nearest keys of each query, nearest first.

    Attributes:
        distances: Euclidean, (n, k), float32.
        indices: of the keys, (n, k), int64.
    """

    distances: Tensor
    indices: Tensor


def nearest(queries: Tensor, keys: Tensor, k: int = 1) -> Neighbours:
    """The k nearest keys of each query, by Euclidean distance.

    Extra memory is O((queries + keys) k), whatever their product. Where distances differ by less than the rounding of
    float32 products, a farther key may take the place of a nearer one; the distance is that of the key that is given.

    Args:
        queries: (n, C), float32.
        keys: (m, C), float32, on the same device.
        k: how many, from 1 to m.

    Raises:
        ValueError: shapes, types or `k` that do not fit.

    Example:
        >>> nearest(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])).distances.item()
        1.0
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries and keys must be (n, C) and (m, C), not {[*queries.shape]} and {[*keys.shape]}")
    if queries.dtype != torch.float32 or keys.dtype != torch.float32:
        raise ValueError(f"queries and keys must be float32, not {queries.dtype} and {keys.dtype}")
    if not 1 <= k <= len(keys):
        raise ValueError(f"k must be from 1 to the number of keys, {len(keys)}, not {k}")
    centre = keys.mean(0)
    halves = torch.cat([(block - centre).square().sum(1) / 2 for block in keys.split(_KEYS)])
    distances = queries.new_empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    is_rounded = queries.device.type == "cpu" and has_fast_bf16(queries.device) and len(keys) > 4 * (3 * k + _SPARE)
    for start in range(0, len(queries), _QUERIES):
        rows = queries[start : start + _QUERIES]
        centred = rows - centre
        if is_rounded:
            found, is_sure = _by_rounded(rows, centred, keys, centre, halves, k)
            if not is_sure.all():
                again = _largest(centred[~is_sure], keys, centre, halves, k)[1]
                found[~is_sure] = again
        else:
            found = _largest(centred, keys, centre, halves, k)[1]
        # Rounding of products may have put them in another order.
        exact, order = _distances(rows, keys, found).sort(dim=1, stable=True)
        distances[start : start + len(rows)] = exact
        indices[start : start + len(rows)] = found.gather(1, order)
    return Neighbours(distances, indices)


def _by_rounded(
    rows: Tensor, centred: Tensor, keys: Tensor, centre: Tensor, halves: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Indices (rows, k) of the nearest among the candidates, and whether no other key can be nearer (rows,)."""
    coarse = centred.to(torch.bfloat16)
    values, candidates = _largest(coarse, keys, centre, halves, 3 * k + _SPARE)
    exact, order = _distances(rows, keys, candidates).topk(k, largest=False)
    found = candidates.gather(1, order)
    longest = (2 * halves.max()).sqrt()
    lengths, lost = centred.norm(dim=1), (centred - coarse).norm(dim=1)
    # Of keys at most 2^-9 of their length is lost. The product, the second term and their sum are rounded to 2^-9, too.
    error = lost * longest + _LOST * (2 * lengths * longest + 2 * halves.max() + values.float().abs().amax(1))
    farthest_inside = (centred.square().sum(1) - exact[:, -1].square()) / 2
    return found, values[:, -1].float() + error < farthest_inside


def _largest(rows: Tensor, keys: Tensor, centre: Tensor, halves: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest products of centred rows, in their type, and the indices of the keys, (rows, k) each."""
    tile = rows.new_empty(min(len(rows), _QUERIES), min(len(keys), _KEYS))
    best: Tensor | None = None
    at: Tensor | None = None
    for start in range(0, len(keys), _KEYS):
        block = (keys[start : start + _KEYS] - centre).to(rows.dtype)
        products = tile.flatten()[: len(rows) * len(block)].view(len(rows), len(block))
        torch.addmm(-halves[start : start + _KEYS].to(rows.dtype), rows, block.mT, out=products)
        values, positions = _top(products, min(k, len(block)))
        positions += start
        if best is None or at is None:
            best, at = values, positions
        else:
            best, chosen = torch.cat([best, values], 1).topk(min(k, best.shape[1] + values.shape[1]))
            at = torch.cat([at, positions], 1).gather(1, chosen)
    assert best is not None  # there is at least one key
    assert at is not None
    return best, at


def _top(products: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and positions (rows, k) of the largest of each row.

    Selecting among all of a row takes as long as a product of a hundred channels. The k largest lie in the k groups
    with the largest maxima, so that few are left to select from.
    """
    if k == 1:
        values, positions = products.max(1, keepdim=True)
        return values, positions
    n_groups = products.shape[1] // _STRIDE
    if n_groups < 2 * k:
        values, positions = products.topk(k)
        return values, positions
    whole = products[:, : n_groups * _STRIDE].unflatten(1, (_STRIDE, n_groups))
    groups = whole.amax(1).topk(k).indices
    columns = (groups[:, None] + n_groups * torch.arange(_STRIDE, device=products.device)[:, None]).flatten(1)
    rest = torch.arange(n_groups * _STRIDE, products.shape[1], device=products.device)
    columns = torch.cat([columns, rest.expand(len(products), -1)], 1)
    values, chosen = products.gather(1, columns).topk(k)
    return values, columns.gather(1, chosen)


def _distances(rows: Tensor, keys: Tensor, indices: Tensor) -> Tensor:
    """Distances (rows, k) between rows (rows, C) and the keys at `indices` (rows, k)."""
    n = max(1, _BLOCK // (indices.shape[1] * rows.shape[1]))
    blocks = zip(rows.split(n), indices.split(n), strict=True)
    return torch.cat([(some[:, None] - keys[chosen]).square().sum(2).sqrt() for some, chosen in blocks])
