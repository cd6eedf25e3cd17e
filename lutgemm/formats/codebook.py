"""Codebook weights: every vec_len weights are a sum of centroids. Byte-level definition in SPEC.md, section 3.

W[n, v*j : v*j+v] = scales[n, g] * sum over c of codebooks[c, codes[c, n, j], :]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, FormatError
from .base import (
    FORMAT_VERSION,
    MAX_FEATURES,
    Layout,
    QuantizedWeight,
    TensorSpec,
    check_int,
    dtype_name,
    expand_groups,
    parse_scale_dtype,
    read_header,
    resolve_group_size,
)

FORMAT_ID = 2
VEC_LENS = (2, 4, 8, 16)
MAX_CODEBOOKS = 4
MAX_CODEBOOK_BITS = 12


@dataclass(frozen=True)
class CodebookLayout(Layout):
    """Shape and kind of a codebook weight; see SPEC.md, section 3."""

    out_features: int
    in_features: int
    num_codebooks: int
    vec_len: int
    codebook_bits: int
    group_size: int
    scale_dtype: str = "float16"

    format = "codebook"

    def __post_init__(self) -> None:
        check_int("out_features", self.out_features, 1, MAX_FEATURES)
        check_int("in_features", self.in_features, 1, MAX_FEATURES)
        check_int("num_codebooks", self.num_codebooks, 1, MAX_CODEBOOKS)
        check_int("codebook_bits", self.codebook_bits, 1, MAX_CODEBOOK_BITS)
        if isinstance(self.vec_len, bool) or self.vec_len not in VEC_LENS:
            raise ArgumentError(f"vec_len={self.vec_len!r} is not supported; use one of {list(VEC_LENS)}")
        resolve_group_size(self.group_size, self.in_features, self.vec_len)
        parse_scale_dtype(self.scale_dtype)

    @property
    def num_vectors(self) -> int:
        """J = ceil(K / vec_len); the last vector's surplus elements are ignored."""
        return -(-self.in_features // self.vec_len)

    def specs(self) -> dict[str, TensorSpec]:
        scale_dtype = parse_scale_dtype(self.scale_dtype)
        code_dtype = torch.uint8 if self.codebook_bits <= 8 else torch.int16
        return {
            "header": TensorSpec(torch.int32, (8,)),
            "codes": TensorSpec(code_dtype, (self.num_codebooks, self.out_features, self.num_vectors)),
            "codebooks": TensorSpec(scale_dtype, (self.num_codebooks, 2**self.codebook_bits, self.vec_len)),
            "scales": TensorSpec(scale_dtype, (self.out_features, self.num_groups)),
        }

    def header(self) -> Tensor:
        shape = (self.out_features, self.in_features, self.group_size)
        words = [FORMAT_VERSION, FORMAT_ID, *shape, self.num_codebooks, self.vec_len, self.codebook_bits]
        return torch.tensor(words, dtype=torch.int32)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "num_codebooks": self.num_codebooks,
            "vec_len": self.vec_len,
            "codebook_bits": self.codebook_bits,
            "group_size": self.group_size,
            "scale_dtype": self.scale_dtype,
        }


class CodebookWeight(QuantizedWeight):
    """A codebook weight. Tensors (SPEC.md, section 3), J = ceil(K / vec_len), G = ceil(K / group_size):

    - `codes` uint8 (int16 when codebook_bits > 8) `[num_codebooks, N, J]`
    - `codebooks` `[num_codebooks, 2**codebook_bits, vec_len]`
    - `scales` `[N, G]`
    """

    format = "codebook"
    layout: CodebookLayout

    @classmethod
    def build(
        cls, codes: Tensor, codebooks: Tensor, scales: Tensor, *, in_features: int, group_size: int
    ) -> CodebookWeight:
        """A weight from its tensors; the layout is read off them. Raises when they do not fit together."""
        if codes.ndim != 3 or codebooks.ndim != 3:
            raise FormatError(
                f"codes {list(codes.shape)} and codebooks {list(codebooks.shape)}: expected "
                "[num_codebooks, N, ceil(K/vec_len)] and [num_codebooks, 2**codebook_bits, vec_len]"
            )
        entries = codebooks.shape[1]
        if entries < 2 or entries & (entries - 1):
            raise FormatError(f"codebooks: {entries} centroids; their number must be a power of two, 2 or more")
        layout = CodebookLayout(
            out_features=codes.shape[1],
            in_features=in_features,
            num_codebooks=codes.shape[0],
            vec_len=codebooks.shape[2],
            codebook_bits=entries.bit_length() - 1,
            group_size=group_size,
            scale_dtype=dtype_name(scales.dtype),
        )
        header = layout.header().to(codes.device)
        return cls(layout, {"header": header, "codes": codes, "codebooks": codebooks, "scales": scales})

    @property
    def codebooks(self) -> Tensor:
        return self.tensors["codebooks"]

    @property
    def vec_len(self) -> int:
        return self.layout.vec_len

    @classmethod
    def layout_from_state(cls, state: Mapping[str, Tensor]) -> CodebookLayout:
        words = read_header(state, cls.format, FORMAT_ID)
        if "scales" not in state:
            raise FormatError("codebook weight: missing tensor 'scales'")
        try:
            return CodebookLayout(
                out_features=words[2],
                in_features=words[3],
                group_size=words[4],
                num_codebooks=words[5],
                vec_len=words[6],
                codebook_bits=words[7],
                scale_dtype=dtype_name(state["scales"].dtype),
            )
        except ArgumentError as error:
            raise FormatError(f"codebook weight: header {words}: {error}") from None

    def _check_codes(self) -> None:
        low, high, entries = int(self.codes.min()), int(self.codes.max()), 2**self.layout.codebook_bits
        if low < 0 or high >= entries:
            raise FormatError(f"codebook weight: codes from {low} to {high}, but there are {entries} centroids")

    def _dequantize_rows(self, rows: slice) -> Tensor:
        k = self.shape[1]
        codebooks = self.codebooks.to(torch.float32)
        value = codebooks[0][self.codes[0, rows].long()]
        for c in range(1, self.layout.num_codebooks):
            value = value + codebooks[c][self.codes[c, rows].long()]
        return value.flatten(-2)[:, :k] * expand_groups(self.scales[rows].to(torch.float32), k, self.group_size)
