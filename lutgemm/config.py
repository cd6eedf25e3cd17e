"""What to quantize to, and how: `BCQConfig` and `CodebookConfig`, frozen and JSON in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

from .errors import ArgumentError
from .formats.base import ROW_GROUP, check_bool, check_int, parse_scale_dtype, resolve_group_size
from .formats.bcq import GROUP_MULTIPLE, MAX_BITS
from .formats.codebook import MAX_CODEBOOK_BITS, MAX_CODEBOOKS, VEC_LENS

BCQ_METHODS = ("best", "rtn", "rtn_clip", "greedy", "refined", "alternating")
BCQ_SCALE_KINDS = ("auto", "free", "uniform")

C = TypeVar("C", bound="QuantizeConfig")


@dataclass(frozen=True)
class QuantizeConfig:
    """Common part of both configurations: JSON in and out."""

    format: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, `format` included; `config_from_dict` takes it back."""
        return {"format": self.format} | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls: type[C], entry: Mapping[str, Any]) -> C:
        """The configuration of `to_dict`. Raises `ArgumentError` on an unknown field or a bad value."""
        fields = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.items() if key != "format"}
        if unknown := fields.keys() - cls.__dataclass_fields__.keys():
            known = sorted(cls.__dataclass_fields__)
            raise ArgumentError(f"{cls.format} configuration: unknown fields {sorted(unknown)}; known are {known}")
        return cls(**fields)


def _check_group_size(group_size: Any, multiple: int) -> None:
    """A number must be a positive multiple of `multiple`: a configuration serves layers of any K."""
    if group_size != ROW_GROUP:
        resolve_group_size(group_size, -1, multiple)


@dataclass(frozen=True)
class BCQConfig(QuantizeConfig):
    """How to quantize to BCQ (`quantize_bcq`).

    bits: planes, 1..8. group_size: a multiple of 32, or "row" (one group a row).
    scale_kind: "free", "uniform" (integer grid), or "auto": per layer the one of lower error at the lower size.
    method: "best" (never above round-to-nearest), or by name "rtn", "rtn_clip", "greedy", "refined", "alternating".
    offsets: store an additive offset per group (free kind). scale_dtype: "float16", "bfloat16", "float32".
    iters: alternating rounds. nested_bits: lower precisions that get scales of their own (free kind).
    """

    bits: int = 4
    group_size: int | str = 128
    scale_kind: str = "auto"
    method: str = "best"
    offsets: bool = True
    scale_dtype: str = "float16"
    iters: int = 15
    nested_bits: tuple[int, ...] = ()

    format = "bcq"

    def __post_init__(self) -> None:
        check_int("bits", self.bits, 1, MAX_BITS)
        _check_group_size(self.group_size, GROUP_MULTIPLE)
        if self.scale_kind not in BCQ_SCALE_KINDS:
            raise ArgumentError(f"scale_kind={self.scale_kind!r} is not supported; use one of {list(BCQ_SCALE_KINDS)}")
        if self.method not in BCQ_METHODS:
            raise ArgumentError(f"method={self.method!r} is not supported; use one of {list(BCQ_METHODS)}")
        check_bool("offsets", self.offsets)
        parse_scale_dtype(self.scale_dtype)
        check_int("iters", self.iters, 0, 1000)
        for p in self.nested_bits:
            check_int("nested_bits", p, 1, self.bits - 1)


@dataclass(frozen=True)
class CodebookConfig(QuantizeConfig):
    """How to quantize to codebooks (`quantize_codebook`).

    num_codebooks: summed centroids per vector, 1..4. vec_len: weights per code, 2, 4, 8 or 16.
    codebook_bits: log2 of the centroids of a codebook, 1..12 (fast kernels at 8).
    group_size: a multiple of vec_len, or "row". iters: Lloyd rounds a codebook. seed: of the k-means start.
    """

    num_codebooks: int = 1
    vec_len: int = 4
    codebook_bits: int = 8
    group_size: int | str = 128
    scale_dtype: str = "float16"
    iters: int = 20
    seed: int = 0

    format = "codebook"

    def __post_init__(self) -> None:
        check_int("num_codebooks", self.num_codebooks, 1, MAX_CODEBOOKS)
        if isinstance(self.vec_len, bool) or self.vec_len not in VEC_LENS:
            raise ArgumentError(f"vec_len={self.vec_len!r} is not supported; use one of {list(VEC_LENS)}")
        check_int("codebook_bits", self.codebook_bits, 1, MAX_CODEBOOK_BITS)
        _check_group_size(self.group_size, self.vec_len)
        parse_scale_dtype(self.scale_dtype)
        check_int("iters", self.iters, 1, 1000)
        check_int("seed", self.seed, 0, 2**31 - 1)


CONFIGS: dict[str, type[BCQConfig] | type[CodebookConfig]] = {"bcq": BCQConfig, "codebook": CodebookConfig}


def config_from_dict(entry: Mapping[str, Any]) -> BCQConfig | CodebookConfig:
    """The configuration that `to_dict` wrote. Raises `ArgumentError` naming what is wrong."""
    name = entry.get("format")
    if not isinstance(name, str) or name not in CONFIGS:
        raise ArgumentError(f"format={name!r} is unknown; use one of {sorted(CONFIGS)}")
    return CONFIGS[name].from_dict(entry)
