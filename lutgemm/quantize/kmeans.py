"""k-means over short vectors: assignment by matmul, weighted Lloyd rounds, a seeded start. Vectors are fp32 `[n, v]`.

Every vector carries weights `[n, v]`: the distance of x to centroid c is `sum over i of weights[i] * (x[i] - c[i])**2`.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 19
"""Distances held at a time: 2 MB."""

START_VECTORS = 1 << 14
"""Vectors among which the first centroids are drawn (more for larger codebooks)."""


def assign(vectors: Tensor, weights: Tensor | None, book: Tensor) -> Tensor:
    """int64 `[n]`: the nearest centroid of `book` `[E, v]`, E a power of two. weights None: all 1.

    The distances are one matmul. Their bits, read as integers, sort as they do; the centroid's number replaces the
    lowest log2(E) bits of each, and one integer minimum then finds both (an argmin takes three times as long). So
    distances closer than one part in 2**(23 - log2(E)) count as equal, and the lowest number wins.
    """
    entries = len(book)
    # A share of |x|^2 is added so that rounding cannot make a distance negative.
    if weights is None:
        ones = torch.ones_like(vectors[:, :1])
        left = torch.cat((vectors, ones, vectors.square().sum(-1, keepdim=True) * 1.0001 + 1e-30), -1)
        right = torch.cat((-2 * book.T, book.square().sum(-1)[None], torch.ones_like(book[:, 0])[None]))
    else:
        weighted = vectors * weights
        left = torch.cat((weighted, weights, (weighted * vectors).sum(-1, keepdim=True) * 1.0001 + 1e-30), -1)
        right = torch.cat((-2 * book.T, book.square().T, torch.ones_like(book[:, 0])[None]))
    number = torch.arange(entries, dtype=torch.int32, device=book.device)
    nearest = torch.empty(len(vectors), dtype=torch.int64, device=book.device)
    step = max(1, CHUNK_ELEMENTS // entries)
    room = torch.empty(min(step, len(vectors)), entries, dtype=left.dtype, device=left.device)
    for start in range(0, len(vectors), step):
        part = left[start : start + step]
        keys = torch.mm(part, right, out=room[: len(part)]).view(torch.int32)
        keys.bitwise_and_(-entries).bitwise_or_(number)
        nearest[start : start + step] = keys.amin(-1) & (entries - 1)
    return nearest


def cluster_sums(vectors: Tensor, weights: Tensor, codes: Tensor, entries: int) -> Tensor:
    """fp64 `[E, 2 * v]`: the sums of weights * vectors, and of weights, over the vectors of each centroid, in a fixed
    order and a part of the vectors at a time."""
    total = torch.zeros(entries, 2 * vectors.shape[1], dtype=torch.float64, device=vectors.device)
    on_cpu = vectors.device.type == "cpu"
    step = max(1, CHUNK_ELEMENTS // (8 * vectors.shape[1] if on_cpu else entries))
    for start in range(0, len(vectors), step):
        part = slice(start, start + step)
        values = torch.cat((vectors[part] * weights[part], weights[part]), -1).to(torch.float64)
        if on_cpu:
            total.index_add_(0, codes[part], values)
        else:  # Atomic additions of a GPU would make the sums depend on the run.
            member = codes[part, None] == torch.arange(entries, device=codes.device)
            total += member.to(torch.float64).T @ values
    return total


def centroids(vectors: Tensor, weights: Tensor, codes: Tensor, book: Tensor) -> Tensor:
    """The weighted mean `[E, v]` of the vectors of each centroid; a centroid without any stays as it is."""
    moment, mass = cluster_sums(vectors, weights, codes, len(book)).chunk(2, -1)
    return torch.where(mass > 0, moment / mass.clamp(min=1e-300), book.to(torch.float64)).to(torch.float32)


def distances(vectors: Tensor, weights: Tensor, centers: Tensor) -> Tensor:
    """`[n]`: the weighted squared distance of each vector to its center `[n, v]`."""
    return ((vectors - centers).square() * weights).sum(-1)


def start_book(vectors: Tensor, weights: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007) on an evenly spread part of the vectors.

    With fewer distinct vectors than entries the rest of the codebook repeats the first centroid.
    """
    count = min(len(vectors), max(START_VECTORS, 4 * entries))
    pick = torch.arange(count, device=vectors.device) * len(vectors) // count
    vectors, weights = vectors[pick], weights[pick]
    draws = torch.rand(entries, generator=generator, dtype=torch.float64).to(vectors.device)
    book = vectors[:1].repeat(entries, 1)
    chance = weights.mean(-1)
    for entry in range(entries):
        ladder = chance.cumsum(0, dtype=torch.float64)
        if not ladder[-1] > 0:
            break
        drawn = torch.searchsorted(ladder, draws[entry] * ladder[-1], right=True).clamp(max=count - 1)
        book[entry] = vectors[drawn]
        distance = distances(vectors, weights, book[entry])
        chance = distance if entry == 0 else torch.minimum(chance, distance)
    return book


def reseed(vectors: Tensor, weights: Tensor, codes: Tensor, book: Tensor) -> Tensor:
    """`book` with the centroids that no vector uses moved onto the vectors that are farthest from theirs."""
    used = torch.zeros(len(book), dtype=torch.bool, device=book.device)
    used[codes] = True
    empty = (~used).nonzero()[:, 0]
    if not len(empty):
        return book
    distance = distances(vectors, weights, book[codes])
    far = distance.sort(descending=True, stable=True).indices[: len(empty)]
    far = far[distance[far] > 0]
    book = book.clone()
    book[empty[: len(far)]] = vectors[far]
    return book


def lloyd(vectors: Tensor, weights: Tensor, entries: int, iters: int, generator: torch.Generator) -> Tensor:
    """The codebook `[E, v]` of least weighted error that `iters` rounds from `start_book` meet."""
    same = bool((weights == weights[:, :1]).all())
    book = start_book(vectors, weights, entries, generator)
    best, best_error = book, torch.inf
    for _ in range(iters + 1):
        codes = assign(vectors, None if same else weights, book)
        error = float(distances(vectors, weights, book[codes]).sum(dtype=torch.float64))
        if not error < best_error:
            break
        stop = error > best_error * (1 - 1e-4)
        best, best_error = book, error
        if stop or error == 0:
            break
        book = reseed(vectors, weights, codes, centroids(vectors, weights, codes, book))
    return best
