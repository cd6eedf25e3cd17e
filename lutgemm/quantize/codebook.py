"""`quantize_codebook`: residual k-means over the vectors of a weight, with group scales."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import CodebookConfig
from ..formats import CodebookLayout, CodebookWeight
from ..formats.base import parse_scale_dtype, resolve_group_size
from .kmeans import assign, centroids, lloyd, reseed
from .slabs import (
    Block,
    Stored,
    Weight,
    check_hessian,
    check_stored,
    check_weight,
    column_blocks,
    full_precision,
    group_importance,
    power_of_two,
    read,
    slabs,
)

MIN_TRAINING_VECTORS, MAX_TRAINING_VECTORS = 1 << 12, 1 << 17
TRAINING_VECTORS_PER_CENTROID = 256
"""Codebooks are trained on at most so many vectors, 65,536 for 8 bits. On normal weights half as many cost 1 percent of
error at vec_len 4, a quarter 2.5 percent."""

FIRST_SHARE = 4
"""k-means from the start sees every fourth of these vectors; the joint rounds that follow see all."""

ENCODE_ROUNDS = 3
"""Rounds of scale refit and reassignment of the whole weight."""


def quantize_codebook(
    weight: Weight,
    num_codebooks: int = 1,
    vec_len: int = 4,
    codebook_bits: int = 8,
    group_size: int | str = 128,
    hessian: Tensor | None = None,
    *,
    scale_dtype: str = "float16",
    iters: int = 20,
    seed: int = 0,
) -> CodebookWeight:
    """Quantize `[N, K]`, any floating dtype, any device, to sums of centroids; the meaning of each option is with
    `CodebookConfig`, the method is explained in docs/quantize.md.

    hessian: `[K]`, or `[K, K]` of which the diagonal is used: the weight of each column in the squared error.
    The same seed gives the same result. Working memory is bounded (about 60 MB at 8 bits), whatever N and K.

    Raises `ArgumentError` on NaN or Inf, on a shape or an option that is not supported, and when `scale_dtype`
    overflows.
    """
    config = CodebookConfig(num_codebooks, vec_len, codebook_bits, group_size, scale_dtype, iters, seed)
    n, k = check_weight(weight)
    importance = check_hessian(hessian, weight)
    layout = CodebookLayout(
        out_features=n,
        in_features=k,
        num_codebooks=num_codebooks,
        vec_len=vec_len,
        codebook_bits=codebook_bits,
        group_size=resolve_group_size(group_size, k, vec_len),
        scale_dtype=scale_dtype,
    )
    with full_precision(weight.device):
        return _quantize(weight, importance, layout, config)


def _quantize(
    weight: Weight, importance: Tensor | None, layout: CodebookLayout, config: CodebookConfig
) -> CodebookWeight:
    (n, k), vec_len, scale_dtype = layout.shape, config.vec_len, config.scale_dtype
    dtype = parse_scale_dtype(scale_dtype)
    blocks = column_blocks(k, layout.group_size)
    books = _train(weight, importance, blocks[0], config).to(dtype)
    check_stored("codebooks", books, scale_dtype)
    specs = layout.specs()
    tensors = {name: torch.empty(s.shape, dtype=s.dtype, device=weight.device) for name, s in specs.items()}
    tensors |= {"header": layout.header().to(weight.device), "codebooks": books}
    for rows in slabs(n, k):
        slab = read(weight, rows)
        for block in blocks:
            own = group_importance(importance, block, len(slab))
            groups = _Groups(block.split(slab), own, vec_len, dtype)
            codes, scale = _encode(groups, books.to(torch.float32))
            span = slice(block.start // vec_len, -(-block.stop // vec_len))
            tensors["codes"][:, rows, span] = codes.view(config.num_codebooks, len(slab), -1).to(tensors["codes"].dtype)
            tensors["scales"][rows, block.groups] = groups.stored.expand(scale).view(-1, block.count)
    check_stored("scales", tensors["scales"], scale_dtype)
    return CodebookWeight(layout, tensors)


class _Groups:
    """R groups as vectors `[R, J, v]`, each in units of a power of two; padding of the last vector has weight 0.

    weights `[R, J, v]`, or None where all are 1.
    """

    def __init__(self, groups: Tensor, importance: Tensor | None, vec_len: int, dtype: torch.dtype) -> None:
        self.stored = Stored(dtype, power_of_two(groups))
        surplus = -groups.shape[1] % vec_len
        if importance is None and surplus:
            importance = torch.ones_like(groups)
        pad = torch.nn.functional.pad
        self.vectors = pad(groups / self.stored.unit[:, None], (0, surplus)).unflatten(1, (-1, vec_len))
        self.weights = None if importance is None else pad(importance, (0, surplus)).unflatten(1, (-1, vec_len))

    def rms(self) -> Tensor:
        """`[R]`: the root mean square of each group, as stored: the first scale."""
        scale = self.stored(self.vectors.square().mean((1, 2)).sqrt())
        return torch.where((scale == 0) & (self.vectors != 0).flatten(1).any(-1), self.stored.smallest, scale)

    def scaled(self, scale: Tensor) -> Tensor:
        """Vectors divided by their scale, `[R * J, v]`; those of a zero scale stay as they are (zeros)."""
        return (self.vectors / torch.where(scale == 0, torch.ones_like(scale), scale)[:, None, None]).flatten(0, 1)

    def flat_weights(self) -> Tensor | None:
        return None if self.weights is None else self.weights.flatten(0, 1)

    def _weigh(self, values: Tensor) -> Tensor:
        return values if self.weights is None else values * self.weights

    def refit(self, value: Tensor, scale: Tensor) -> Tensor:
        """The least-squares scale `[R]` as stored for decoded vectors `[R, J, v]`; not positive: `scale`."""
        weighted = self._weigh(value)
        fitted = (weighted * self.vectors).sum((1, 2)) / (weighted * value).sum((1, 2)).clamp(min=1e-30)
        fitted = self.stored(fitted)
        return torch.where((fitted > 0) & torch.isfinite(fitted), fitted, scale)

    def error(self, value: Tensor, scale: Tensor) -> Tensor:
        """`[R]`: the weighted squared error of `scale * value`."""
        return self._weigh((self.vectors - scale[:, None, None] * value).square()).sum((1, 2))


def _decode(books: Tensor, codes: Tensor, like: Tensor) -> Tensor:
    """codes `[m, R * J]` -> sums of centroids `[R, J, v]`."""
    value = books[0][codes[0]]
    for book, own in zip(books[1:], codes[1:], strict=True):
        value = value + book[own]
    return value.view_as(like)


def _first_codes(vectors: Tensor, weights: Tensor | None, books: Tensor) -> Tensor:
    """Codes `[m, n]` of vectors `[n, v]`: each codebook takes the residual of those before it."""
    codes = []
    for book in books:
        codes.append(assign(vectors, weights, book))
        vectors = vectors - book[codes[-1]]
    return torch.stack(codes)


def _recode(vectors: Tensor, weights: Tensor | None, books: Tensor, codes: Tensor) -> Tensor:
    """One sweep of coordinate descent: each codebook's codes again, the others fixed."""
    if len(books) == 1:
        return assign(vectors, weights, books[0])[None]
    codes = codes.clone()
    residual = vectors
    for book, own in zip(books, codes, strict=True):
        residual = residual - book[own]
    for c, book in enumerate(books):
        target = residual + book[codes[c]]
        codes[c] = assign(target, weights, book)
        residual = target - book[codes[c]]
    return codes


def _encode(groups: _Groups, books: Tensor) -> tuple[Tensor, Tensor]:
    """(codes `[m, R * J]`, scale `[R]` as stored, in the unit): per group the best of what the rounds meet."""
    scale = groups.rms()
    weights = groups.flat_weights()
    codes = _first_codes(groups.scaled(scale), weights, books)
    value = _decode(books, codes, groups.vectors)
    best_codes, best_scale, best_error = codes, scale, groups.error(value, scale)
    per_group = groups.vectors.shape[1]

    def keep() -> None:
        nonlocal best_codes, best_scale, best_error
        error = groups.error(value, scale)
        better = error < best_error
        best_codes = torch.where(better.repeat_interleave(per_group), codes, best_codes)
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)

    for last in [False] * (ENCODE_ROUNDS - 1) + [True]:
        scale = groups.refit(value, scale)
        keep()
        if last:
            break
        codes = _recode(groups.scaled(scale), weights, books, codes)
        value = _decode(books, codes, groups.vectors)
    return best_codes, best_scale


def _training_groups(weight: Weight, importance: Tensor | None, block: Block, config: CodebookConfig) -> _Groups:
    """A stratified sample of the groups of a block: one at random from each of equal stretches of the weight."""
    wanted = TRAINING_VECTORS_PER_CENTROID << config.codebook_bits
    wanted = min(max(wanted, MIN_TRAINING_VECTORS), MAX_TRAINING_VECTORS)
    total = weight.shape[0] * block.count
    count = min(total, -(-wanted * config.vec_len // block.length))
    place = torch.arange(count, dtype=torch.float64)
    if count < total:
        generator = torch.Generator().manual_seed(config.seed)
        place = (place + torch.rand(count, generator=generator, dtype=torch.float64)) * (total / count)
    index = place.long().clamp(max=total - 1).to(weight.device)
    columns = torch.arange(block.length, device=weight.device) + block.start
    columns = columns + (index % block.count)[:, None] * block.length
    groups = torch.empty(count, block.length, dtype=torch.float32, device=weight.device)
    for part in slabs(count, weight.shape[1]):
        groups[part] = read(weight, index[part] // block.count).gather(1, columns[part])
    own = group_importance(importance, block, 1)
    own = None if own is None else own[index % block.count]
    return _Groups(groups, own, config.vec_len, parse_scale_dtype(config.scale_dtype))


def _train(weight: Weight, importance: Tensor | None, block: Block, config: CodebookConfig) -> Tensor:
    """Codebooks fp32 `[m, E, v]`: residual k-means, then joint rounds of scales, codes and centroids; the best kept."""
    groups = _training_groups(weight, importance, block, config)
    generator = torch.Generator().manual_seed(config.seed + 1)
    scale = groups.rms()
    weights = groups.flat_weights()
    vectors, emphasis = groups.scaled(scale), _emphasis(groups, scale)
    books = torch.zeros(
        config.num_codebooks, 2**config.codebook_bits, config.vec_len, dtype=torch.float32, device=weight.device
    )
    residual = vectors
    share = slice(None, None, FIRST_SHARE if len(vectors) > MIN_TRAINING_VECTORS * FIRST_SHARE else 1)
    residual, few = vectors[share], None if weights is None else weights[share]
    for c, book in enumerate(books):
        books[c] = lloyd(residual, emphasis[share], len(book), config.iters, generator)
        residual = residual - books[c][assign(residual, few, books[c])]
    codes = _first_codes(vectors, weights, books)
    best, best_error = books.clone(), torch.inf
    unit = groups.stored.unit / groups.stored.unit.max()
    for round_number in range(config.iters // 2 + 1):
        value = _decode(books, codes, groups.vectors)
        scale = groups.refit(value, scale)
        error = float((groups.error(value, scale).to(torch.float64) * unit.square()).sum())
        if not error < best_error:
            break
        stop = error > best_error * (1 - 1e-4)
        best, best_error = books.clone(), error
        if stop or round_number == config.iters // 2:
            break
        vectors, emphasis = groups.scaled(scale), _emphasis(groups, scale)
        residual = vectors - value.flatten(0, 1)
        for c, book in enumerate(books):
            target = residual + book[codes[c]]
            books[c] = reseed(target, emphasis, codes[c], centroids(target, emphasis, codes[c], book))
            codes[c] = assign(target, weights, books[c])
            residual = target - books[c][codes[c]]
    return best


def _emphasis(groups: _Groups, scale: Tensor) -> Tensor:
    """`[R * J, v]`: what a squared error of a scaled vector weighs in the error of W, relative to the largest scale."""
    size = scale * groups.stored.unit
    size = size / size.max().clamp(min=torch.finfo(torch.float32).tiny)
    weights = torch.ones_like(groups.vectors) if groups.weights is None else groups.weights
    return (weights * size.square()[:, None, None]).flatten(0, 1)
