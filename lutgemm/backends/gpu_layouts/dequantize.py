"""`dequantize`: dense rows of W by `csrc/cuda/dequantize.cu`, straight from the stored tensors, then torch's matmul.

Panels of rows bound the memory that a call takes. fp32 activations are multiplied in fp32; whether torch may use TF32
for that is the user's to say (`torch.backends.cuda.matmul.allow_tf32`, off by default).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import Algorithm, BcqRecord, CodebookRecord, Ops, aligned, kept_layout

PANEL_BYTES = 64 << 20
"""Most bytes of dequantized weight at a time: enough rows for a matmul to fill any GPU."""
PANEL_ROWS = 256
"""Panels are a multiple of this: whole tiles of a matmul."""

Rows = Callable[[int, int], Tensor]
"""rows(begin, end) -> W[begin:end] in x's dtype."""


def panel_rows(in_features: int, element_size: int) -> int:
    """Rows of W in a panel."""
    rows = PANEL_BYTES // (in_features * element_size)
    return rows // PANEL_ROWS * PANEL_ROWS or max(1, rows)


def _matmul(x: Tensor, out_features: int, bias: Tensor | None, rows: Rows) -> Tensor:
    panel = panel_rows(x.shape[1], x.element_size())
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        if out_features <= panel:
            return torch.nn.functional.linear(x, rows(0, out_features), bias)
        y = x.new_empty(x.shape[0], out_features)
        for begin in range(0, out_features, panel):
            end = min(out_features, begin + panel)
            w, part = rows(begin, end).T, y[:, begin:end]
            torch.mm(x, w, out=part) if bias is None else torch.addmm(bias[begin:end], x, w, out=part)
    return y


def free_form(record: BcqRecord) -> tuple[Tensor, ...]:
    """The ratio kind's scales and offsets as the free kind has them, fp32."""
    offsets = record.plane_offsets()
    return (record.plane_scales(),) if offsets is None else (record.plane_scales(), offsets.clone())


def _bcq(ops: Ops, x: Tensor, record: BcqRecord, bias: Tensor | None, accuracy: int) -> Tensor:
    scales, offsets = record.scales, record.offsets
    if record.ratios is not None:
        scales, *rest = kept_layout(record, "cuda free form", lambda: free_form(record))
        offsets = rest[0] if rest else None
    tensors = [None if t is None else aligned(t) for t in (record.codes, scales, offsets, record.zeros)]
    uniform = record.scale_kind == "uniform"

    def rows(begin: int, end: int) -> Tensor:
        shape = (record.in_features, record.group_size)
        return ops("_bcq_dequantize_cuda")(*tensors, *shape, uniform, begin, end, x.dtype)

    return _matmul(x, record.out_features, bias, rows)


def _codebook(ops: Ops, x: Tensor, record: CodebookRecord, bias: Tensor | None, accuracy: int) -> Tensor:
    tensors = [aligned(t) for t in (record.codes, record.codebooks, record.scales)]

    def rows(begin: int, end: int) -> Tensor:
        shape = (record.in_features, record.group_size)
        return ops("_codebook_dequantize_cuda")(*tensors, *shape, begin, end, x.dtype)

    return _matmul(x, record.out_features, bias, rows)


ALGORITHMS = (
    Algorithm("bcq_linear", "dequantize", _bcq),
    Algorithm("codebook_linear", "dequantize", _codebook),
)
