"""The operators that start the kernels. torch.compile sees through them (`triton_op`).

Arguments are those of `torch.ops.lutgemm.bcq_linear` and `codebook_linear`, contiguous and checked by the caller, then
the algorithm and its `Config`; "dequantize" has none. x is `[M, K]` with M >= 1, group_size at most K; results are of
x's dtype. Nothing is written that is not returned, and no kernel uses atomics.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import triton_op

from ..autograd import bcq_backward, bcq_setup, codebook_backward, codebook_setup
from ..formats.bcq import SCALE_KINDS
from .biqgemm import biqgemm_kernel
from .codegemm import codegemm_kernel, psumbook_kernel
from .config import WORD, Config, Task, bcq_task, codebook_task, num_steps, power_of_two, split_evenly
from .dequant_gemm import bcq_dequant_gemm_kernel, codebook_dequant_gemm_kernel
from .dequantize import bcq_dequantize_kernel, codebook_dequantize_kernel
from .lut_gemm import lut_gemm_kernel
from .start import (
    LANES_ALONG_FIRST,
    PSUMBOOK_TILE,
    by_panels,
    dequantize_tile,
    new_out,
    sum_parts,
    without_ratios,
    wrap_triton,
)

PSUMBOOK_BYTES = 64 << 20
WORKSPACE_BYTES = 256 << 20
"""Most bytes of a Psumbook, and of parts of y, at a time: further tokens wait for those before them."""


def tokens_at_once(task: Task, config: list[int]) -> int | None:
    """For how many tokens a workspace is made at a time; None where their number does not matter."""
    if task.algorithm == "biqgemm":
        return max(1, WORKSPACE_BYTES // (4 * num_steps(task, Config(*config)) * task.N))
    if task.algorithm == "codegemm":
        return max(1, PSUMBOOK_BYTES // (4 * task.planes * task.units * task.entries))
    return None


def slabs(x: Tensor, tokens: int | None) -> Sequence[Tensor]:
    """x cut by tokens."""
    return [x] if tokens is None or x.shape[0] <= tokens else x.split(tokens)


def _bcq_rows(
    w: Tensor,
    row_begin: int,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    group_size: int,
    scale_kind: str,
) -> None:
    """Fills w `[rows, K]` with W's rows from row_begin on."""
    (rows, k), (bits, n, words) = w.shape, codes.shape
    block_n, block_u = dequantize_tile(w, WORD, words)
    wrap_triton(bcq_dequantize_kernel)[(-(-rows // block_n), -(-words // block_u))](
        codes, scales, scales if offsets is None else offsets, scales if zeros is None else zeros, w,
        n, k, words, scales.shape[-1], row_begin, row_begin + rows,
        BITS=bits, KIND=SCALE_KINDS.index(scale_kind), HAS_OFFSETS=offsets is not None,
        GROUP_UNITS=-(-group_size // WORD), BLOCK_N=block_n, BLOCK_U=block_u, num_warps=4,
    )  # fmt: skip


def _bcq_slab(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    ratios: Tensor | None,
    bias: Tensor | None,
    scale_kind: str,
    task: Task,
    cut: Config,
) -> Tensor:
    """`bcq_linear` of so many tokens that the workspace fits."""
    (m, k), (bits, n, words) = x.shape, codes.shape
    steps = num_steps(task, cut)
    parts, steps_per_split = split_evenly(steps, cut.splits)
    m_blocks, n_blocks = -(-m // cut.block_m), -(-n // cut.block_n)
    out = new_out(x, n, steps if task.algorithm == "biqgemm" else parts)
    # An absent tensor is never read; any other stands in for its address.
    record = (codes, scales, scales if offsets is None else offsets, scales if zeros is None else zeros)
    ratio, added = scales if ratios is None else ratios, scales if bias is None else bias
    sizes = (m, n, k, words, scales.shape[-1])
    kind = {
        "BITS": bits, "KIND": SCALE_KINDS.index(scale_kind), "HAS_OFFSETS": offsets is not None,
        "HAS_BIAS": bias is not None, "PARTIAL": out.ndim == 3, "GROUP_UNITS": task.group_units,
    }  # fmt: skip
    tile = {"BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "STAGES": cut.num_stages, "num_warps": cut.num_warps}
    if task.algorithm == "lut_gemm":
        wrap_triton(lut_gemm_kernel)[(m_blocks * n_blocks, parts)](
            x, *record, ratio, added, out, *sizes, steps, steps_per_split,
            **kind, **tile, CHUNK=cut.chunk, CHUNKS=cut.chunks,
        )  # fmt: skip
    elif task.algorithm == "biqgemm":
        row_parts, blocks_per_program = split_evenly(n_blocks, cut.splits)
        wrap_triton(biqgemm_kernel)[(m_blocks * row_parts, steps)](
            x, *record, ratio, added, out, *sizes, n_blocks, blocks_per_program,
            **kind, **tile, CHUNK=cut.chunk, CHUNKS=cut.chunks,
        )  # fmt: skip
    else:
        wrap_triton(bcq_dequant_gemm_kernel)[(m_blocks * n_blocks, parts)](
            x, *record, added, out, *sizes, steps, steps_per_split, **kind, **tile, BLOCK_U=cut.chunk,
        )  # fmt: skip
    return sum_parts(x, out, bias)


@triton_op("lutgemm::_triton_bcq_linear", mutates_args=())
def bcq_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    ratios: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    scale_kind: str,
    algorithm: str,
    config: list[int],
) -> Tensor:
    """`lut_gemm`, `biqgemm`, `dequant_gemm` or `dequantize` of a BCQ weight."""
    (m, k), (bits, n, _) = x.shape, codes.shape
    if algorithm.startswith("dequant"):
        scales, offsets, scale_kind = without_ratios(scales, offsets, ratios, scale_kind)
    if algorithm == "dequantize":
        record = (codes, scales, offsets, zeros, group_size, scale_kind)
        return by_panels(x, n, bias, lambda w, row_begin: _bcq_rows(w, row_begin, *record))
    task, cut = bcq_task(algorithm, m, n, k, bits, group_size, x.element_size()), Config(*config)
    tensors = (codes, scales, offsets, zeros, ratios, bias)
    ys = [_bcq_slab(slab, *tensors, scale_kind, task, cut) for slab in slabs(x, tokens_at_once(task, config))]
    return ys[0] if len(ys) == 1 else torch.cat(ys)


def _codebook_rows(
    w: Tensor, row_begin: int, codes: Tensor, codebooks: Tensor, scales: Tensor, group_size: int
) -> None:
    """Fills w `[rows, K]` with W's rows from row_begin on."""
    (rows, k), (_, n, vectors), (books, entries, vec_len) = w.shape, codes.shape, codebooks.shape
    block_n, block_u = dequantize_tile(w, vec_len, vectors)
    wrap_triton(codebook_dequantize_kernel)[(-(-rows // block_n), -(-vectors // block_u))](
        codes, codebooks, scales, w, n, k, vectors, scales.shape[-1], row_begin, row_begin + rows,
        BOOKS=books, ENTRIES=entries, VEC_LEN=vec_len, GROUP_UNITS=-(-group_size // vec_len),
        BLOCK_N=block_n, BLOCK_U=block_u, num_warps=4,
    )  # fmt: skip


def _psumbook(x: Tensor, codebooks: Tensor, vectors: int, block_m: int) -> Tensor:
    """x times every centroid: `[M, books, vectors, entries]`."""
    (m, k), (books, entries, vec_len) = x.shape, codebooks.shape
    block_e = min(entries, 256)
    block_j = min(PSUMBOOK_TILE // block_e, power_of_two(vectors))
    block_m = min(max(1, PSUMBOOK_TILE // (block_e * block_j)), block_m)
    psums = x.new_empty(m, books, vectors, entries, dtype=torch.float32)
    wrap_triton(psumbook_kernel)[(-(-vectors // block_j), books, -(-m // block_m) * (entries // block_e))](
        x, codebooks, psums, m, k, vectors, entries // block_e,
        BOOKS=books, ENTRIES=entries, VEC_LEN=vec_len, BLOCK_M=block_m, BLOCK_J=block_j, BLOCK_E=block_e,
        num_warps=4,
    )  # fmt: skip
    return psums


def codebook_slab(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    task: Task,
    cut: Config,
    ends: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """`codebook_linear` of so many tokens that their Psumbook fits; of siblings: see `siblings.py`."""
    (m, k), (books, n, vectors), (all_books, entries, vec_len) = x.shape, codes.shape, codebooks.shape
    steps = num_steps(task, cut)
    parts, steps_per_split = split_evenly(steps, cut.splits)
    grid = (-(-m // cut.block_m) * -(-n // cut.block_n), parts)
    out, added = new_out(x, n, parts), scales if bias is None else bias
    sizes = (vectors, scales.shape[-1], steps, steps_per_split, *ends)
    common = {
        "BOOKS": books, "ENTRIES": entries, "HAS_BIAS": bias is not None, "PARTIAL": out.ndim == 3,
        "GROUP_UNITS": task.group_units, "SIBLINGS": all_books // books, "BLOCK_M": cut.block_m,
        "BLOCK_N": cut.block_n, "STAGES": cut.num_stages, "num_warps": cut.num_warps,
    }  # fmt: skip
    if task.algorithm == "codegemm":
        psums = _psumbook(x, codebooks, vectors, cut.block_m)
        wrap_triton(codegemm_kernel)[grid](
            psums, codes, scales, added, out, m, n, *sizes,
            **common, CHUNK=cut.chunk, CHUNKS=cut.chunks, REVERSED=LANES_ALONG_FIRST,
        )  # fmt: skip
    else:
        wrap_triton(codebook_dequant_gemm_kernel)[grid](
            x, codes, codebooks, scales, added, out, m, n, k, *sizes, **common, VEC_LEN=vec_len, BLOCK_U=cut.chunk,
        )  # fmt: skip
    return sum_parts(x, out, bias)


@triton_op("lutgemm::_triton_codebook_linear", mutates_args=())
def codebook_linear(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    algorithm: str,
    config: list[int],
) -> Tensor:
    """`codegemm`, `dequant_gemm` or `dequantize` of a codebook weight."""
    (m, k), (_, n, _) = x.shape, codes.shape
    if algorithm == "dequantize":
        record = (codes, codebooks, scales, group_size)
        return by_panels(x, n, bias, lambda w, row_begin: _codebook_rows(w, row_begin, *record))
    books, entries, vec_len = codebooks.shape
    task = codebook_task(algorithm, m, n, k, (books, entries, vec_len), group_size, x.element_size())
    tensors, cut = (codes, codebooks, scales, bias), Config(*config)
    ys = [codebook_slab(slab, *tensors, task, cut) for slab in slabs(x, tokens_at_once(task, config))]
    return ys[0] if len(ys) == 1 else torch.cat(ys)


# Shapes are all that tracing needs before it looks inside.
bcq_linear.register_fake(lambda x, codes, *_: x.new_empty(x.shape[0], codes.shape[1]))
codebook_linear.register_fake(lambda x, codes, *_: x.new_empty(x.shape[0], codes.shape[1]))
bcq_linear.register_autograd(bcq_backward, setup_context=bcq_setup)
codebook_linear.register_autograd(codebook_backward, setup_context=codebook_setup)
