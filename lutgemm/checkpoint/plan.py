"""What becomes what: which linear layers are quantized and to which configuration, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import BCQConfig, CodebookConfig, config_from_dict
from ..errors import ArgumentError, CheckpointError
from ..formats import BCQLayout, CodebookLayout, Layout
from ..formats.base import resolve_group_size
from ..formats.bcq import GROUP_MULTIPLE
from .discover import Linear, discover
from .reader import CheckpointFolder
from .safetensors_file import FLOATS

Config = BCQConfig | CodebookConfig

ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")
"""Modules that choose experts: tiny, and a wrong choice costs more than their weights save."""


def parse_config(fields: Mapping[str, Any], where: str) -> Config:
    """The configuration of JSON values that a user wrote. Raises `ArgumentError` that begins with `where`."""
    try:
        return config_from_dict(fields)
    except (ArgumentError, TypeError) as error:
        raise ArgumentError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    config: of every layer. modules: (regex, fields) in order, later ones win; fields override `config`, or replace it
    when they name another format. include, exclude: regexes on module names (`re.search`); an empty include means all.
    lm_head: quantize the output layer too, unless it is tied. device: where the quantizer runs.
    """

    config: Config
    modules: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    lm_head: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        named = {"include": self.include, "exclude": self.exclude, "modules": [name for name, _ in self.modules]}
        for argument, patterns in named.items():
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except (re.error, TypeError) as error:
                    raise ArgumentError(f"{argument}: {pattern!r} is not a regular expression: {error}") from None
        for pattern, fields in self.modules:
            if not isinstance(fields, Mapping):
                raise ArgumentError(f"modules: {pattern!r} must map to an object of configuration fields")
            self._override(self.config, pattern, fields)

    @staticmethod
    def _override(config: Config, pattern: str, fields: Mapping[str, Any]) -> Config:
        same = fields.get("format", config.format) == config.format
        return parse_config((config.to_dict() if same else {}) | dict(fields), f"modules: {pattern!r}")

    def config_for(self, module: str) -> Config:
        """The configuration of one module: the common one, then every matching override in order."""
        config = self.config
        for pattern, fields in self.modules:
            if re.search(pattern, module):
                config = self._override(config, pattern, fields)
        return config

    def all_configs(self) -> list[Config]:
        """The common configuration, and what each override makes of it on its own."""
        return [self.config, *(self._override(self.config, pattern, fields) for pattern, fields in self.modules)]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; all of it decides the bytes that are written."""
        return {
            "config": self.config.to_dict(),
            "modules": [[pattern, dict(fields)] for pattern, fields in self.modules],
            "include": list(self.include),
            "exclude": list(self.exclude),
            "lm_head": self.lm_head,
            "device": self.device,
        }


@dataclass(frozen=True)
class LayerPlan:
    """One layer to quantize: its module, the tensor on disk (and whether that is [K, N]), N, K and configuration."""

    module: str
    tensor: str
    shard: str
    out_features: int
    in_features: int
    transposed: bool
    config: Config

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class LeftAlone:
    """Linear weights that stay as they are, and why. `kind`: "linear", "head" or "experts"; tied ones do not count."""

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str
    counts: bool = True

    @property
    def num_weights(self) -> int:
        total = 1
        for n in self.shape:
            total *= n
        return total


@dataclass
class Plan:
    """The layers to quantize, what is left alone, how layers were found, and biases that take their module's name."""

    layers: list[LayerPlan]
    left_alone: list[LeftAlone]
    how: str
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def quantized_weights(self) -> int:
        return sum(layer.num_weights for layer in self.layers)

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers and experts, an output layer that is tied to the embedding left out."""
        return self.quantized_weights + sum(item.num_weights for item in self.left_alone if item.counts)

    @property
    def coverage(self) -> float:
        """Percent of the linear weights that are quantized."""
        return 100 * self.quantized_weights / max(1, self.linear_weights)

    @property
    def experts_left(self) -> list[LeftAlone]:
        return [item for item in self.left_alone if item.kind == "experts"]


def make_plan(source: CheckpointFolder, options: Options) -> Plan:
    """Decide every linear layer of `source`. Raises `CheckpointError` when none is left to quantize."""
    found = discover(source.config, source.shapes)
    plan = Plan([], [], found.how)
    _check_patterns(options, [linear.module for linear in found.linears])
    for linear in found.linears:
        reason = _reason_to_leave(linear, found.param_of, source, options)
        if reason is not None:
            kind = "head" if linear.is_head else "linear"
            shape = (linear.out_features, linear.in_features)
            counts = not (linear.is_head and linear.tied_to)
            plan.left_alone.append(LeftAlone(linear.module, kind, shape, reason, counts))
            continue
        assert linear.tensor is not None
        config = options.config_for(linear.module)
        n, k = linear.out_features, linear.in_features
        shard = source.where[linear.tensor]
        plan.layers.append(LayerPlan(linear.module, linear.tensor, shard, n, k, linear.transposed, config))
    fused = "experts are one fused parameter in the loaded model, for which lutgemm has no module yet"
    plan.left_alone += [LeftAlone(item.name, "experts", item.shape, fused) for item in found.experts]
    if not plan.layers:
        why = sorted({item.reason for item in plan.left_alone}) or ["it has no linear layers"]
        raise CheckpointError(f"{source.folder}: nothing to quantize ({'; '.join(why)}); check --include and --exclude")
    quantized = {layer.module for layer in plan.layers}
    for tensor, param in found.param_of.items():
        if param.endswith(".bias") and param.removesuffix(".bias") in quantized and tensor != param:
            plan.renamed[tensor] = param
    _check_names_free(source, plan)
    return plan


def _check_patterns(options: Options, names: Sequence[str]) -> None:
    """Raise `ArgumentError` for a pattern that finds no linear layer: a slip in it would cost a whole conversion."""
    overrides = [pattern for pattern, _ in options.modules]
    given = {"--module": overrides, "--include": options.include, "--exclude": options.exclude}
    for option, patterns in given.items():
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in names):
                example = f"; names look like {names[0]!r}" if names else ""
                raise ArgumentError(f"{option} {pattern!r} matches no linear layer of this model{example}")


def _reason_to_leave(
    linear: Linear, param_of: Mapping[str, str], source: CheckpointFolder, options: Options
) -> str | None:
    """Why `linear` stays as it is, or None when it is quantized. Raises on a weight that cannot be one."""
    name = linear.module
    if linear.tied_to is not None:
        return f"tied to {linear.tied_to}"
    if linear.is_head and not options.lm_head:
        return "output layer, left alone unless --lm-head is given"
    if any(re.search(pattern, name) for pattern in options.exclude):
        return "excluded by --exclude"
    if options.include and not any(re.search(pattern, name) for pattern in options.include):
        return "not matched by --include"
    if linear.tensor is None:
        return "put together from other tensors on loading"
    if ROUTER.search(name) and not options.include:
        return "router of experts, left alone unless --include matches it"
    dtype = source.entry(linear.tensor).dtype
    if dtype not in FLOATS:
        raise CheckpointError(
            f"{source.file_of(linear.tensor).path}: tensor {linear.tensor!r} has dtype {dtype}, a linear weight must "
            f"be one of {list(FLOATS)}; give the original checkpoint, or leave the layer out with --exclude"
        )
    return None


def _check_names_free(source: CheckpointFolder, plan: Plan) -> None:
    """Records must not collide with tensors that are copied (a module that already has a tensor called `codes`)."""
    kept = source.where.keys() - {layer.tensor for layer in plan.layers}
    for layer in plan.layers:
        for name in ("header", "codes", "scales", "offsets", "zeros", "ratios", "codebooks"):
            if f"{layer.module}.{name}" in kept:
                raise CheckpointError(
                    f"{source.folder}: holds a tensor {layer.module}.{name} already; leave the layer out with --exclude"
                )


def largest_layout(config: Config, out_features: int, in_features: int) -> Layout:
    """The largest layout that the quantizer may choose for N x K (scale_kind "auto" is decided by the weights)."""
    if isinstance(config, CodebookConfig):
        return CodebookLayout(
            out_features=out_features,
            in_features=in_features,
            num_codebooks=config.num_codebooks,
            vec_len=config.vec_len,
            codebook_bits=config.codebook_bits,
            group_size=resolve_group_size(config.group_size, in_features, config.vec_len),
            scale_dtype=config.scale_dtype,
        )
    kinds: Sequence[str] = ("free", "uniform") if config.scale_kind == "auto" else (config.scale_kind,)
    layouts = [
        BCQLayout(
            out_features=out_features,
            in_features=in_features,
            bits=config.bits,
            group_size=resolve_group_size(config.group_size, in_features, GROUP_MULTIPLE),
            scale_kind=kind,
            has_offsets=config.offsets and kind == "free",
            scale_dtype=config.scale_dtype,
            zeros_dtype=config.scale_dtype if kind == "uniform" else "uint8",
            nested_bits=tuple(config.nested_bits) if kind == "free" else (),
        )
        for kind in kinds
    ]
    return max(layouts, key=lambda layout: layout.nbytes)


def check_device(device: str) -> str:
    """`device` when torch has it; otherwise `ArgumentError`."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ArgumentError(
            f"device={device!r} is not available: {first}; use 'cpu', or a device that torch lists"
        ) from None
    return device
