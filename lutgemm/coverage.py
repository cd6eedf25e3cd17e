"""What of a model was quantized, what was not and why: the report of `replace_linear`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer. relative_error: ||W - W_quantized|| / ||W|| (Frobenius)."""

    name: str
    out_features: int
    in_features: int
    bits_per_weight: float
    relative_error: float

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class SkippedReport:
    """One parameter that multiplies activations and was left as it is, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class CoverageReport:
    """Every linear parameter of a model: the quantized layers and the skipped rest. `str()` is a table."""

    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedReport, ...]

    @property
    def quantized_parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def linear_parameters(self) -> int:
        return self.quantized_parameters + sum(entry.parameters for entry in self.skipped)

    @property
    def percent(self) -> float:
        """Quantized share of the linear parameters, in percent; 0 for a model without any."""
        return 100 * self.quantized_parameters / max(1, self.linear_parameters)

    @property
    def bits_per_weight(self) -> float:
        """Average over the quantized layers, by parameters; 0 when there is none."""
        total = sum(layer.bits_per_weight * layer.parameters for layer in self.layers)
        return total / max(1, self.quantized_parameters)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: `layers`, `skipped` and the totals."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": [asdict(entry) | {"shape": list(entry.shape)} for entry in self.skipped],
            "quantized_parameters": self.quantized_parameters,
            "linear_parameters": self.linear_parameters,
            "percent": self.percent,
            "bits_per_weight": self.bits_per_weight,
        }

    def __str__(self) -> str:
        names = [layer.name for layer in self.layers] + [entry.name for entry in self.skipped]
        width = max(map(len, ["layer", *names]))
        lines = [f"{'layer':<{width}}  {'N x K':>15}  {'bits':>6}  {'error':>7}"]
        for layer in self.layers:
            shape = f"{layer.out_features} x {layer.in_features}"
            lines.append(
                f"{layer.name:<{width}}  {shape:>15}  {layer.bits_per_weight:6.2f}  {layer.relative_error:7.2%}"
            )
        for entry in self.skipped:
            shape = " x ".join(map(str, entry.shape))
            lines.append(f"{entry.name:<{width}}  {shape:>15}  left as it is: {entry.reason}")
        lines.append(
            f"{len(self.layers)} layers quantized: {self.percent:.1f}% of {self.linear_parameters:,} linear parameters,"
            f" {self.bits_per_weight:.2f} bits per weight"
        )
        return "\n".join(lines)
