"""BCQ: binary-coded weights. Byte-level definition in SPEC.md, section 2.

W[n, k] = offsets[n, g] + sum over b of scales[b, n, g] * sign(b, n, k),   sign = 2 * bit - 1,   g = k // group_size
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
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
    check_bool,
    check_int,
    dtype_name,
    expand_groups,
    parse_scale_dtype,
    read_header,
    resolve_group_size,
)

FORMAT_ID = 1
MAX_BITS = 8
GROUP_MULTIPLE = 32
SCALE_KINDS = ("free", "uniform", "ratio")
"""Order is the number stored in the header."""
ZEROS_DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class BCQLayout(Layout):
    """Shape and kind of a BCQ weight; see SPEC.md, section 2."""

    out_features: int
    in_features: int
    bits: int
    group_size: int
    scale_kind: str = "free"
    has_offsets: bool = True
    scale_dtype: str = "float16"
    zeros_dtype: str = "uint8"
    nested_bits: tuple[int, ...] = ()

    format = "bcq"

    def __post_init__(self) -> None:
        check_int("out_features", self.out_features, 1, MAX_FEATURES)
        check_int("in_features", self.in_features, 1, MAX_FEATURES)
        check_int("bits", self.bits, 1, MAX_BITS)
        check_bool("has_offsets", self.has_offsets)
        resolve_group_size(self.group_size, self.in_features, GROUP_MULTIPLE)
        if self.scale_kind not in SCALE_KINDS:
            raise ArgumentError(f"scale_kind={self.scale_kind!r} is not supported; use one of {list(SCALE_KINDS)}")
        parse_scale_dtype(self.scale_dtype)
        if self.zeros_dtype not in ZEROS_DTYPES:
            raise ArgumentError(f"zeros_dtype={self.zeros_dtype!r} is not supported; use one of {list(ZEROS_DTYPES)}")
        if self.scale_kind == "uniform" and self.has_offsets:
            raise ArgumentError("has_offsets=True does not go with scale_kind='uniform', whose zeros take that place")
        if self.nested_bits:
            if self.scale_kind != "free":
                raise ArgumentError(f"nested_bits={self.nested_bits} needs scale_kind='free', got {self.scale_kind!r}")
            for p in self.nested_bits:
                check_int("nested_bits", p, 1, self.bits - 1)
            if list(self.nested_bits) != sorted(set(self.nested_bits)):
                raise ArgumentError(f"nested_bits={self.nested_bits} must be increasing, without repeats")

    def specs(self) -> dict[str, TensorSpec]:
        n, g = self.out_features, self.num_groups
        scale_dtype = parse_scale_dtype(self.scale_dtype)
        specs = {
            "header": TensorSpec(torch.int32, (8,)),
            "codes": TensorSpec(torch.int32, (self.bits, n, -(-self.in_features // 32))),
            "scales": TensorSpec(scale_dtype, (self.bits if self.scale_kind == "free" else 1, n, g)),
        }
        if self.has_offsets:
            specs["offsets"] = TensorSpec(scale_dtype, (n, g))
        if self.scale_kind == "uniform":
            specs["zeros"] = TensorSpec(ZEROS_DTYPES[self.zeros_dtype], (n, g))
        if self.scale_kind == "ratio":
            specs["ratios"] = TensorSpec(torch.float32, (self.bits,))
        for p in self.nested_bits:
            specs[f"scales_{p}"] = TensorSpec(scale_dtype, (p, n, g))
            if self.has_offsets:
                specs[f"offsets_{p}"] = TensorSpec(scale_dtype, (n, g))
        return specs

    def header(self) -> Tensor:
        kind = SCALE_KINDS.index(self.scale_kind)
        words = [FORMAT_VERSION, FORMAT_ID, self.out_features, self.in_features, self.group_size, self.bits, kind, 0]
        return torch.tensor(words, dtype=torch.int32)

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "format": self.format,
            "bits": self.bits,
            "group_size": self.group_size,
            "scale_kind": self.scale_kind,
            "has_offsets": self.has_offsets,
            "scale_dtype": self.scale_dtype,
        }
        if self.scale_kind == "uniform":
            entry["zeros_dtype"] = self.zeros_dtype
        if self.nested_bits:
            entry["nested_bits"] = list(self.nested_bits)
        return entry


def pack_bits(bits: Tensor) -> Tensor:
    """Bits `[..., K]` (bool or 0/1) -> int32 words `[..., ceil(K/32)]`; bit k % 32 of word k // 32, LSB first."""
    k = bits.shape[-1]
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -k % 32))
    place = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=bits.device)
    packed = (padded.unflatten(-1, (-1, 8)) * place).sum(-1, dtype=torch.uint8)
    return packed.contiguous().view(torch.int32)


def unpack_bits(codes: Tensor, in_features: int) -> Tensor:
    """int32 words `[..., ceil(K/32)]` -> bits `[..., K]` uint8 in {0, 1}. Inverse of `pack_bits`."""
    shift = torch.arange(8, dtype=torch.uint8, device=codes.device)
    octets = codes.contiguous().view(torch.uint8)
    return ((octets.unsqueeze(-1) >> shift) & 1).flatten(-2)[..., :in_features]


def unpack_signs(codes: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """int32 words `[..., ceil(K/32)]` -> signs `[..., K]` in {-1, +1}."""
    return unpack_bits(codes, in_features).to(dtype).mul_(2).sub_(1)


def uniform_plane_weights(bits: int) -> list[float]:
    """`2**(bits - 2 - b)`: what plane b of an integer grid weighs, times its sign and s; plane 0 is the leading bit."""
    return [2.0 ** (bits - 2 - b) for b in range(bits)]


def uniform_center(zeros: Tensor, bits: int) -> Tensor:
    """`(2**bits - 1) / 2 - zeros` in fp32: what is added to the weighted signs so that the sum is `integer - zero`."""
    return (2**bits - 1) / 2 - zeros.to(torch.float32)


class BCQWeight(QuantizedWeight):
    """A BCQ weight. Tensors (SPEC.md, section 2), G = ceil(K / group_size):

    - `codes` int32 `[bits, N, ceil(K/32)]`; plane 0 weighs most
    - `scales` `[bits, N, G]` (free) or `[1, N, G]` (uniform, ratio)
    - `offsets` `[N, G]` (optional; free and ratio), `zeros` `[N, G]` (uniform), `ratios` fp32 `[bits]` (ratio)
    - `scales_p` `[p, N, G]` and `offsets_p` `[N, G]` for each p of `nested_bits`
    """

    format = "bcq"
    layout: BCQLayout

    @classmethod
    def build(
        cls,
        codes: Tensor,
        scales: Tensor,
        *,
        in_features: int,
        group_size: int,
        scale_kind: str = "free",
        offsets: Tensor | None = None,
        zeros: Tensor | None = None,
        ratios: Tensor | None = None,
        nested: Mapping[int, tuple[Tensor, Tensor | None]] | None = None,
    ) -> BCQWeight:
        """A weight from its tensors; the layout is read off them. `nested` maps p to its (scales, offsets).

        Raises `FormatError` or `ArgumentError` when they do not fit together.
        """
        if codes.ndim != 3:
            raise FormatError(f"codes: got shape {list(codes.shape)}, expected [bits, N, ceil(K/32)]")
        nested = dict(sorted((nested or {}).items()))
        layout = BCQLayout(
            out_features=codes.shape[1],
            in_features=in_features,
            bits=codes.shape[0],
            group_size=group_size,
            scale_kind=scale_kind,
            has_offsets=offsets is not None,
            scale_dtype=dtype_name(scales.dtype),
            zeros_dtype=dtype_name(zeros.dtype) if zeros is not None else "uint8",
            nested_bits=tuple(nested),
        )
        tensors = {"header": layout.header().to(codes.device), "codes": codes, "scales": scales}
        optional = {"offsets": offsets, "zeros": zeros, "ratios": ratios}
        for p, (own_scales, own_offsets) in nested.items():
            optional |= {f"scales_{p}": own_scales, f"offsets_{p}": own_offsets}
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        return cls(layout, tensors)

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def scale_kind(self) -> str:
        return self.layout.scale_kind

    @property
    def offsets(self) -> Tensor | None:
        return self.tensors.get("offsets")

    @property
    def zeros(self) -> Tensor | None:
        return self.tensors.get("zeros")

    @property
    def ratios(self) -> Tensor | None:
        return self.tensors.get("ratios")

    @classmethod
    def layout_from_state(cls, state: Mapping[str, Tensor]) -> BCQLayout:
        words = read_header(state, cls.format, FORMAT_ID)
        if not 0 <= words[6] < len(SCALE_KINDS) or words[7] != 0:
            raise FormatError(f"bcq weight: header words {words[6:]} (scale kind, reserved) are unknown to version 1")
        if "scales" not in state:
            raise FormatError("bcq weight: missing tensor 'scales'")
        try:
            return BCQLayout(
                out_features=words[2],
                in_features=words[3],
                bits=words[5],
                group_size=words[4],
                scale_kind=SCALE_KINDS[words[6]],
                has_offsets="offsets" in state,
                scale_dtype=dtype_name(state["scales"].dtype),
                zeros_dtype=dtype_name(state["zeros"].dtype) if "zeros" in state else "uint8",
                nested_bits=tuple(p for p in range(1, MAX_BITS) if f"scales_{p}" in state),
            )
        except ArgumentError as error:
            raise FormatError(f"bcq weight: header {words}: {error}") from None

    def _check_codes(self) -> None:
        if tail := self.layout.in_features % 32:
            last = self.codes[..., -1].to(torch.int64) & 0xFFFFFFFF
            if (last >> tail).any():
                raise FormatError(f"bcq weight: codes have bits set beyond in_features={self.layout.in_features}")

    def at(self, bits: int) -> BCQWeight:
        """The first `bits` planes as a weight of its own: views, no copy of codes (nested precision, SPEC.md §2.4).

        Free scales: the scales and offsets stored for that precision (`nested_bits`), or else the first scales as they
        are. Uniform: the integer's leading bits, its grid re-centred on the dropped ones.
        Raises `ArgumentError` when `bits` is not 1 .. `self.bits`.
        """
        check_int("bits", bits, 1, self.bits)
        if bits == self.bits:
            return self
        codes, n = self.codes[:bits], self.layout
        build = partial(
            BCQWeight.build, codes, in_features=n.in_features, group_size=n.group_size, scale_kind=n.scale_kind
        )
        if n.scale_kind == "uniform":
            assert self.zeros is not None
            step = 2.0 ** (self.bits - bits)
            zeros = (self.zeros.to(torch.float32) - (step - 1) / 2) / step
            scales = self.scales.to(torch.float32) * step
            return build(scales, zeros=zeros)
        if n.scale_kind == "ratio":
            assert self.ratios is not None
            return build(self.scales, offsets=self.offsets, ratios=self.ratios[:bits])
        lower = {p: (self.tensors[f"scales_{p}"], self.tensors.get(f"offsets_{p}")) for p in n.nested_bits if p < bits}
        if bits in n.nested_bits:
            scales, offsets = self.tensors[f"scales_{bits}"], self.tensors.get(f"offsets_{bits}")
        else:
            scales, offsets = self.scales[:bits], self.offsets
        return build(scales, offsets=offsets, nested=lower)

    def _dequantize_rows(self, rows: slice) -> Tensor:
        k, group_size = self.shape[1], self.group_size

        def expand(per_group: Tensor) -> Tensor:
            return expand_groups(per_group[rows].to(torch.float32), k, group_size)

        def signs(b: int) -> Tensor:
            return unpack_signs(self.codes[b, rows], k)

        if self.scale_kind == "uniform":
            assert self.zeros is not None
            value = expand(uniform_center(self.zeros, self.bits))
            for b, weight in enumerate(uniform_plane_weights(self.bits)):
                value = value + weight * signs(b)
            return expand(self.scales[0]) * value
        plane_scales = self.plane_scales()
        value = (
            torch.zeros((), dtype=torch.float32, device=self.device) if self.offsets is None else expand(self.offsets)
        )
        for b in range(self.bits):
            value = value + expand(plane_scales[b]) * signs(b)
        return value

    def plane_scales(self) -> Tensor:
        """`[bits, N, G]`: each plane's scale in the free form: as stored, or fp32 (SPEC.md, sections 2.2 and 2.3)."""
        if self.scale_kind == "free":
            return self.scales
        if self.scale_kind == "ratio":
            assert self.ratios is not None
            return self.scales.to(torch.float32) * self.ratios[:, None, None]
        place = torch.tensor(uniform_plane_weights(self.bits), dtype=torch.float32, device=self.device)
        return self.scales.to(torch.float32) * place[:, None, None]

    def plane_offsets(self) -> Tensor | None:
        """`[N, G]`: the offsets in the free form: as stored, or fp32 `s * (center - zero)` (uniform), or None."""
        if self.scale_kind == "uniform":
            assert self.zeros is not None
            return self.scales[0].to(torch.float32) * uniform_center(self.zeros, self.bits)
        return self.offsets
