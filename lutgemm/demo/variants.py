"""The rows of the demo's table: torch's own precisions, our formats, and round-to-nearest of equal total bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..config import BCQConfig, CodebookConfig, config_from_dict
from ..formats.base import resolve_group_size
from ..formats.bcq import BCQLayout

GROUP_SIZE = 64
"""The largest power of two that divides this model's K (576 and 1536)."""

OURS: dict[str, BCQConfig | CodebookConfig] = {
    "BCQ 4-bit": BCQConfig(bits=4, group_size=GROUP_SIZE),
    "BCQ 3-bit": BCQConfig(bits=3, group_size=GROUP_SIZE),
    "codebook 2-bit": CodebookConfig(num_codebooks=1, vec_len=4, codebook_bits=8, group_size=GROUP_SIZE),
}

RTN_GROUP_SIZES: tuple[int | str, ...] = (32, 64, 96, 128, 192, 288, 576, "row")


@dataclass(frozen=True)
class Variant:
    """One row: its name, its kind ("torch", "lutgemm" or "rtn"), and how to make it from the fp32 checkpoint.

    torch rows have a `dtype`, the others a `config`. `rival` is, for an RTN row, the row it stands beside.
    """

    name: str
    kind: str
    dtype: str = "float32"
    config: BCQConfig | CodebookConfig | None = None
    rival: str | None = None

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return "".join(c if c.isalnum() else "-" for c in self.name.lower()).strip("-")

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "config": self.config.to_dict() if self.config else None,
            "rival": self.rival,
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Variant:
        config = config_from_dict(entry["config"]) if entry["config"] else None
        return cls(**(entry | {"config": config}))


TORCH = (Variant("torch fp32", "torch", "float32"), Variant("torch bf16", "torch", "bfloat16"))


def rtn_config(bits: int, group_size: int | str) -> BCQConfig:
    """Plain min/max asymmetric round-to-nearest: an fp16 scale and an 8-bit zero a group."""
    return BCQConfig(bits=bits, group_size=group_size, scale_kind="uniform", method="rtn")


def average_bits(config: BCQConfig, shapes: Iterable[tuple[int, int]]) -> float:
    """Stored bits per weight of uniform BCQ `config` over layers of these (N, K), scales and zeros counted."""
    stored = weights = 0
    for n, k in shapes:
        group_size = resolve_group_size(config.group_size, k, 32)
        layout = BCQLayout(
            n, k, config.bits, group_size, scale_kind="uniform", has_offsets=False, scale_dtype=config.scale_dtype
        )
        stored, weights = stored + 8 * layout.nbytes, weights + n * k
    return stored / weights


def rtn_rival(name: str, bits_per_weight: float, shapes: Iterable[tuple[int, int]]) -> Variant:
    """Round-to-nearest whose total bits over the same layers are nearest to `bits_per_weight` (a tie: the larger)."""
    shapes = list(shapes)
    choices = [rtn_config(bits, group) for bits in range(1, 9) for group in RTN_GROUP_SIZES]
    sizes = {config: average_bits(config, shapes) for config in choices}
    best = min(choices, key=lambda config: (round(abs(sizes[config] - bits_per_weight), 9), -sizes[config]))
    return Variant(f"RTN {best.bits}-bit g{best.group_size}", "rtn", config=best, rival=name)
