"""Codebook weights of sibling layers, each with codebooks of its own, in one call over their rows, stacked.

rows of W    | sibling 0     | sibling 1   | ..      ends: the row behind the last of each, 2 to 4 of them
codebooks    | C of 0        | C of 1      | ..      C = num_codebooks; a Psumbook has those of all
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.library import triton_op

from .config import Config, codebook_task
from .launch import codebook_linear, codebook_slab, slabs, tokens_at_once

MOST_SIBLINGS = 4
MOST_INDICES = 2**31
"""Entries of a token's Psumbook that codegemm's kernel can tell apart."""


@triton_op("lutgemm::_triton_codebook_siblings", mutates_args=())
def codebook_siblings(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    algorithm: str,
    config: list[int],
    ends: list[int],
) -> Tensor:
    """y `[M, N]` by `codegemm` or `dequant_gemm`. codes: `[C, N, J]`, codebooks: `[len(ends) * C, E, vec_len]`, scales:
    `[N, G]`."""
    (m, k), (books, n, vectors), (all_books, entries, vec_len) = x.shape, codes.shape, codebooks.shape
    if algorithm == "codegemm" and all_books * vectors * entries >= MOST_INDICES:
        alone = []
        for i, (begin, end) in enumerate(pairwise([0, *ends])):
            own = (codes[:, begin:end].contiguous(), codebooks[i * books : (i + 1) * books], scales[begin:end])
            own_bias = None if bias is None else bias[begin:end]
            alone.append(codebook_linear(x, *own, own_bias, group_size, algorithm, config))
        return torch.cat(alone, 1)
    task = codebook_task(algorithm, m, n, k, (books, entries, vec_len), group_size, x.element_size())
    inner = (*ends[:-1], n, n, n)[: MOST_SIBLINGS - 1]
    tensors, cut = (codes, codebooks, scales, bias), Config(*config)
    at_once = tokens_at_once(task._replace(planes=all_books), config)
    ys = [codebook_slab(slab, *tensors, task, cut, inner) for slab in slabs(x, at_once)]
    return ys[0] if len(ys) == 1 else torch.cat(ys)


codebook_siblings.register_fake(lambda x, codes, *_: x.new_empty(x.shape[0], codes.shape[1]))
