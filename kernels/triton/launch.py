"""The operators that start the kernels. torch.compile sees through them (`triton_op`).

Arguments are those of `torch.ops.lutgemm.bcq_linear` and `codebook_linear`, contiguous and checked by the caller;
config is a `Config`. x is `[M, K]` with M >= 1; results are of x's dtype. Nothing is written that is not returned, and
no kernel uses atomics.
"""

import torch
from torch import Tensor
from torch.library import triton_op

from .biqgemm import biqgemm_kernel
from .codegemm import codegemm_kernel, psumbook_kernel
from .config import Config, Task, num_steps, power_of_two, split_evenly
from .dequant_gemm import bcq_dequant_gemm_kernel, codebook_dequant_gemm_kernel
from .dequantize import bcq_dequantize_kernel, codebook_dequantize_kernel
from .lut_gemm import lut_gemm_kernel
from .start import (
    LANES_ALONG_FIRST,
    PSUMBOOK_TILE,
    WORD,
    dequantize_tile,
    group_units,
    new_out,
    num_groups,
    sum_parts,
    without_ratios,
    wrap_triton,
)

SCALE_KINDS = ("free", "uniform", "ratio")
PSUMBOOK_BYTES = 64 << 20
WORKSPACE_BYTES = 256 << 20
"""Most bytes of a Psumbook, and of parts of y, at a time: further tokens wait for those before them."""


def _slabs(x: Tensor, token_bytes: int, limit: int) -> list[Tensor]:
    """x cut by tokens, so that each part needs at most `limit` bytes, or is one token."""
    tokens = max(1, limit // token_bytes)
    return [x] if x.shape[0] <= tokens else [x[at : at + tokens] for at in range(0, x.shape[0], tokens)]


def _bcq_linear(
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
    """`bcq_linear` of so many tokens that the workspace fits."""
    cut = Config(*config)
    if algorithm == "dequant_gemm":
        scales, offsets, scale_kind = without_ratios(scales, offsets, ratios, scale_kind)
    (m, k), (bits, n, words) = x.shape, codes.shape
    units = group_units(k, group_size, WORD)
    steps = num_steps(Task(algorithm, m, n, k, bits, WORD, units, x.element_size()), cut)
    parts, steps_per_split = split_evenly(steps, cut.splits)
    m_blocks, n_blocks = -(-m // cut.block_m), -(-n // cut.block_n)
    out = new_out(x, n, steps if algorithm == "biqgemm" else parts)
    # An absent tensor is never read; any other stands in for its address.
    record = (codes, scales, scales if offsets is None else offsets, scales if zeros is None else zeros)
    more = (scales if ratios is None else ratios, x if bias is None else bias)
    sizes = (m, n, k, words, num_groups(k, group_size))
    kind = {
        "BITS": bits, "KIND": SCALE_KINDS.index(scale_kind), "HAS_OFFSETS": offsets is not None,
        "HAS_BIAS": bias is not None, "PARTIAL": out.ndim == 3, "GROUP_UNITS": units,
    }  # fmt: skip
    if algorithm == "lut_gemm":
        wrap_triton(lut_gemm_kernel)[(m_blocks * n_blocks, parts)](
            x, *record, *more, out, *sizes, steps, steps_per_split, **kind,
            BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, CHUNK=cut.chunk, CHUNKS=cut.chunks, STAGES=cut.num_stages,
            num_warps=cut.num_warps,
        )  # fmt: skip
    elif algorithm == "biqgemm":
        row_parts, blocks_per_program = split_evenly(n_blocks, cut.splits)
        wrap_triton(biqgemm_kernel)[(m_blocks * row_parts, steps)](
            x, *record, *more, out, *sizes, n_blocks, blocks_per_program, **kind,
            BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, CHUNK=cut.chunk, CHUNKS=cut.chunks, STAGES=cut.num_stages,
            num_warps=cut.num_warps,
        )  # fmt: skip
    else:
        wrap_triton(bcq_dequant_gemm_kernel)[(m_blocks * n_blocks, parts)](
            x, *record, more[1], out, *sizes, steps, steps_per_split, **kind,
            BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_U=cut.chunk, STAGES=cut.num_stages,
            num_warps=cut.num_warps,
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
    """`lut_gemm`, `biqgemm` or `dequant_gemm` of a BCQ weight."""
    record = (codes, scales, offsets, zeros, ratios, bias, group_size, scale_kind, algorithm, config)
    if algorithm != "biqgemm":
        return _bcq_linear(x, *record)
    units = group_units(x.shape[1], group_size, WORD)
    task = Task(algorithm, 1, codes.shape[1], x.shape[1], codes.shape[0], WORD, units, x.element_size())
    token_bytes = 4 * num_steps(task, Config(*config)) * codes.shape[1]
    slabs = [_bcq_linear(slab, *record) for slab in _slabs(x, token_bytes, WORKSPACE_BYTES)]
    return slabs[0] if len(slabs) == 1 else torch.cat(slabs)


def _codegemm(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, cut: Config
) -> Tensor:
    """`codegemm` of so many tokens that their Psumbook fits."""
    (m, k), (books, n, vectors), (_, entries, vec_len) = x.shape, codes.shape, codebooks.shape
    units = group_units(k, group_size, vec_len)
    steps = num_steps(Task("codegemm", m, n, k, books, vec_len, units, x.element_size(), entries), cut)
    parts, steps_per_split = split_evenly(steps, cut.splits)
    block_e = min(entries, 256)
    block_j = min(PSUMBOOK_TILE // block_e, power_of_two(vectors))
    block_m = min(max(1, PSUMBOOK_TILE // (block_e * block_j)), power_of_two(m))
    psums = x.new_empty(m, books, vectors, entries, dtype=torch.float32)
    wrap_triton(psumbook_kernel)[(-(-vectors // block_j), books, -(-m // block_m) * (entries // block_e))](
        x, codebooks, psums, m, k, vectors, entries // block_e,
        BOOKS=books, ENTRIES=entries, VEC_LEN=vec_len, BLOCK_M=block_m, BLOCK_J=block_j, BLOCK_E=block_e,
        num_warps=4,
    )  # fmt: skip
    out = new_out(x, n, parts)
    wrap_triton(codegemm_kernel)[(-(-m // cut.block_m) * -(-n // cut.block_n), parts)](
        psums, codes, scales, x if bias is None else bias, out,
        m, n, vectors, num_groups(k, group_size), steps, steps_per_split,
        BOOKS=books, ENTRIES=entries, HAS_BIAS=bias is not None, PARTIAL=out.ndim == 3, GROUP_UNITS=units,
        BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, CHUNK=cut.chunk, CHUNKS=cut.chunks, STAGES=cut.num_stages,
        REVERSED=LANES_ALONG_FIRST, num_warps=cut.num_warps,
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
    """`codegemm` or `dequant_gemm` of a codebook weight."""
    cut = Config(*config)
    (m, k), (books, n, vectors), (_, entries, vec_len) = x.shape, codes.shape, codebooks.shape
    if algorithm == "codegemm":
        slabs = [
            _codegemm(slab, codes, codebooks, scales, bias, group_size, cut)
            for slab in _slabs(x, 4 * books * vectors * entries, PSUMBOOK_BYTES)
        ]
        return slabs[0] if len(slabs) == 1 else torch.cat(slabs)
    units = group_units(k, group_size, vec_len)
    steps = num_steps(Task(algorithm, m, n, k, books, vec_len, units, x.element_size()), cut)
    parts, steps_per_split = split_evenly(steps, cut.splits)
    out = new_out(x, n, parts)
    wrap_triton(codebook_dequant_gemm_kernel)[(-(-m // cut.block_m) * -(-n // cut.block_n), parts)](
        x, codes, codebooks, scales, x if bias is None else bias, out,
        m, n, k, vectors, num_groups(k, group_size), steps, steps_per_split,
        BOOKS=books, ENTRIES=entries, VEC_LEN=vec_len, HAS_BIAS=bias is not None, PARTIAL=out.ndim == 3,
        GROUP_UNITS=units, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_U=cut.chunk, STAGES=cut.num_stages,
        num_warps=cut.num_warps,
    )  # fmt: skip
    return sum_parts(x, out, bias)


@triton_op("lutgemm::_triton_bcq_dequantize", mutates_args=())
def bcq_dequantize(
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    zeros: Tensor | None,
    ratios: Tensor | None,
    in_features: int,
    group_size: int,
    scale_kind: str,
    row_begin: int,
    row_end: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows row_begin .. row_end of W: `[rows, K]` of dtype."""
    scales, offsets, scale_kind = without_ratios(scales, offsets, ratios, scale_kind)
    bits, n, words = codes.shape
    w = scales.new_empty(row_end - row_begin, in_features, dtype=dtype)
    rows, block_u = dequantize_tile(w, WORD, words)
    wrap_triton(bcq_dequantize_kernel)[(-(-w.shape[0] // rows), -(-words // block_u))](
        codes, scales, scales if offsets is None else offsets, scales if zeros is None else zeros,
        w,
        n, in_features, words, num_groups(in_features, group_size), row_begin, row_end,
        BITS=bits, KIND=SCALE_KINDS.index(scale_kind), HAS_OFFSETS=offsets is not None,
        GROUP_UNITS=group_units(in_features, group_size, WORD), BLOCK_N=rows, BLOCK_U=block_u, num_warps=4,
    )  # fmt: skip
    return w


@triton_op("lutgemm::_triton_codebook_dequantize", mutates_args=())
def codebook_dequantize(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    in_features: int,
    group_size: int,
    row_begin: int,
    row_end: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows row_begin .. row_end of W: `[rows, K]` of dtype."""
    (books, n, vectors), (_, entries, vec_len) = codes.shape, codebooks.shape
    w = scales.new_empty(row_end - row_begin, in_features, dtype=dtype)
    rows, block_u = dequantize_tile(w, vec_len, vectors)
    wrap_triton(codebook_dequantize_kernel)[(-(-w.shape[0] // rows), -(-vectors // block_u))](
        codes, codebooks, scales, w,
        n, in_features, vectors, num_groups(in_features, group_size), row_begin, row_end,
        BOOKS=books, ENTRIES=entries, VEC_LEN=vec_len, GROUP_UNITS=group_units(in_features, group_size, vec_len),
        BLOCK_N=rows, BLOCK_U=block_u, num_warps=4,
    )  # fmt: skip
    return w
