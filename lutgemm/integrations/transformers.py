"""Hugging Face transformers: `quant_method: "lutgemm"` for `from_pretrained` and `save_pretrained`, and `lutgemm.load`.

Written for transformers 5.0 and later. Nothing here decides what a weight is: layers come from `lutgemm.nn`,
`quantization_config` from `quantization_config.py`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import nn as lutgemm_nn
from ..config import BCQConfig, CodebookConfig, config_from_dict
from ..errors import ArgumentError, CheckpointError, LutgemmError
from ..nn import QuantizedLinear, Selection
from ..quantize import quantize
from . import checkpoint_files
from .checkpoint_files import StoredTensor
from .loaded_tensors import StoredModel, check_filled, check_finite, check_records, check_shapes
from .loading import load as load
from .quantization_config import (
    QUANT_METHOD,
    REMEDY,
    WHERE,
    describe,
    layers_from_json,
    layers_to_json,
    layout_of,
    parse,
    producer,
)


class LutgemmConfig(QuantizationConfigMixin):
    """`quantization_config` of transformers for lutgemm.

    To quantize while loading: `from_pretrained(path, quantization_config=LutgemmConfig(BCQConfig(bits=3)))`.
    config: a `BCQConfig`, a `CodebookConfig`, or the dict of one. skip, include, exclude: which layers are left
    alone, as in `lutgemm.nn.Selection`; skip=None leaves the output embeddings alone. layers: the layers of a
    checkpoint that is quantized already, as in its config.json.
    """

    def __init__(
        self,
        config: BCQConfig | CodebookConfig | Mapping[str, Any] | None = None,
        *,
        skip: Any = None,
        include: Any = (),
        exclude: Any = (),
        layers: list[dict[str, Any]] | None = None,
        made_by: str | None = None,
    ) -> None:
        if config is not None and not isinstance(config, (BCQConfig, CodebookConfig, Mapping)):
            raise ArgumentError(f"config: got {type(config).__name__}, expected a BCQConfig or a CodebookConfig")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.config = config_from_dict(config) if isinstance(config, Mapping) else config
        self.default_skip = skip is None
        self.selection = Selection.of(skip, include, exclude)
        self.layers = list(layers or [])
        self.producer = made_by or producer()
        layers_from_json(self.layers)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration in a config.json. Raises `CheckpointError` when it is not one that this lutgemm reads."""
        parsed = parse(config_dict)
        layers = copy.deepcopy(config_dict["layers"])
        config = cls(parsed.config, layers=layers, made_by=parsed.producer)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The object that config.json holds (`quantization_config.py`)."""
        return describe(self.config, copy.deepcopy(self.layers), self.producer)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class LutgemmQuantizer(HfQuantizer):
    """Swaps the listed layers before a quantized checkpoint loads, or quantizes each weight as it is read."""

    requires_calibration = False
    quantization_config: LutgemmConfig

    def __init__(self, quantization_config: LutgemmConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pending: set[str] = set()
        """Names of the modules that are still to be quantized on load."""
        self.failure: LutgemmError | None = None
        """The first error of a conversion on load; transformers would print it and raise another."""
        self.checkpoint = StoredModel("the checkpoint", {}, converted=True, nbytes=0, shapes={})
        """What is being loaded; empty when `from_pretrained` was given a state dict."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized and self.quantization_config.config is None:
            raise ArgumentError("quantization_config: LutgemmConfig needs a BCQConfig or a CodebookConfig to quantize")
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ArgumentError("device_map: lutgemm layers cannot be offloaded to disk; use CPU or GPU devices")

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files: list[str] | None = kwargs.get("checkpoint_files")
        source = str(getattr(model.config, "name_or_path", None) or "the checkpoint")
        if files is not None:
            checkpoint_files.check_places(source, files)
        stored = None
        if files is not None and (self.pre_quantized or all(file.endswith(".safetensors") for file in files)):
            stored = checkpoint_files.stored_tensors(files)
        if self.pre_quantized:
            self._place_empty_layers(model, stored)
        else:
            self.pending = set(self._choose(model))
        if stored is not None:
            self.checkpoint = StoredModel.of(model, source, stored)
            check_shapes(model, self.checkpoint)

    def _choose(self, model: Any) -> dict[str, nn.Module]:
        config = self.quantization_config
        kept = get_keys_to_not_convert(model) if config.default_skip else _tied_modules(model)
        in_fp32 = getattr(model, "_keep_in_fp32_modules", None) or ()
        chosen, skipped = lutgemm_nn.linear_modules(model, config.selection)
        if fused := [entry.name for entry in skipped if entry.reason.startswith(lutgemm_nn.FUSED)]:
            names = ", ".join(fused)
            warnings.warn(
                f"lutgemm leaves {len(fused)} fused 3-D parameters (mixture of experts) unquantized: {names}",
                RuntimeWarning,
                stacklevel=2,
            )
        left = Selection.of(in_fp32)
        return {n: module for n, module in chosen.items() if n not in kept and not left.reason_to_skip(n)}

    def _place_empty_layers(self, model: Any, stored: Mapping[str, StoredTensor] | None) -> None:
        entries = layers_from_json(self.quantization_config.layers)
        if stored is not None:
            checkpoint_files.check_unlisted(stored, entries)
        tied = _tied_modules(model)
        for listed, entry in entries.items():
            name = _module_name(model, listed)
            module = model.get_submodule(name)
            if name in tied:
                raise CheckpointError(
                    f"{WHERE}: {name} is listed, but this model ties its weight to another module; {REMEDY}"
                )
            try:
                dense = lutgemm_nn.dense_weight(module)
            except ArgumentError:
                raise CheckpointError(
                    f"{WHERE}: {name} is listed, but it is a {type(module).__name__}, not a linear layer; {REMEDY}"
                ) from None
            bias = module.bias is not None
            try:
                layout = layout_of(name, entry, *dense.shape)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; {REMEDY}") from None
            if stored is not None:
                checkpoint_files.check_layer(stored, listed, layout, bias)
            _swap(model, name, QuantizedLinear.empty(layout, bias, dense.dtype, "meta"))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, _, tensor = param_name.rpartition(".")
        return tensor == "weight" and module in self.pending

    def get_quantize_ops(self) -> Any:
        from transformers.core_model_loading import ConversionOps

        class QuantizeWeight(ConversionOps):
            """Swaps the module of a weight that was just read for its quantized layer."""

            def __init__(self, quantizer: LutgemmQuantizer) -> None:
                self.quantizer = quantizer

            def convert(  # type: ignore[override]
                self,
                input_dict: Mapping[str, Any],
                *_: Any,
                model: Any,
                full_layer_name: str,
                missing_keys: set[str],
                **kwargs: Any,
            ) -> dict[str, list[Tensor]]:
                (value,) = input_dict.values()
                weight = value[0] if isinstance(value, list) else value
                missing_keys.discard(full_layer_name)
                self.quantizer.quantize_module(model, full_layer_name.removesuffix(".weight"), weight)
                return {}

        return QuantizeWeight(self)

    def quantize_module(self, model: Any, name: str, weight: Tensor) -> None:
        """Swap module `name` for a layer of `weight` (as stored: `[N, K]`, Conv1D `[K, N]`), and keep its bias."""
        self.pending.discard(name)
        if self.failure is not None:
            return
        linear = model.get_submodule(name)
        dense = weight.detach().T if lutgemm_nn.is_conv1d(linear) else weight.detach()
        assert self.quantization_config.config is not None
        try:
            record = quantize(dense, self.quantization_config.config)
            _swap(model, name, QuantizedLinear.from_weight(record, linear.bias, weight.dtype))
        except LutgemmError as error:
            self.failure = type(error)(f"{name}: {error}")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        if self.pending:
            names = ", ".join(sorted(self.pending)[:5])
            raise CheckpointError(
                f"the checkpoint holds no weight of {len(self.pending)} linear layers: {names}; download it again"
            )
        for module in _quantized(model).values():
            for tensor in module.weight_record.tensors.values():
                tensor.requires_grad_(False)
        check_records(model, self.checkpoint)
        check_filled(model, self.checkpoint)
        check_finite(model, self.checkpoint)
        self.quantization_config.layers = _layers(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called by `save_pretrained`: what it writes into config.json is what the model holds at this moment."""
        self.quantization_config.layers = _layers(model)
        model.config.quantization_config = self.quantization_config
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Every quantized layer back to the module that the architecture has there, with the dequantized weight."""
        config = copy.deepcopy(model.config)
        del config.quantization_config
        with torch.device("meta"):
            skeleton = type(model)(config)
        for name, layer in _quantized(model).items():
            dense = skeleton.get_submodule(name)
            weight = layer.weight_record.dequantize(dtype or layer.dtype)
            weight = weight.T.contiguous() if lutgemm_nn.is_conv1d(dense) else weight
            dense.weight = nn.Parameter(weight, requires_grad=False)
            dense.bias = layer.bias
            _swap(model, name, dense.train(layer.training))
        return model


def _swap(model: Any, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _quantized(model: Any) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def _layers(model: Any) -> list[dict[str, Any]]:
    return layers_to_json({name: module.layout for name, module in _quantized(model).items()})


def _tied_modules(model: Any) -> set[str]:
    keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {key.removesuffix(".weight") for key in [*keys.keys(), *keys.values()]}


def _module_name(model: Any, listed: str) -> str:
    """The model's name of a listed module: names of a base model lack the prefix that a model with a head adds."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = dict(model.named_modules())
    for name in (listed, listed.removeprefix(prefix), prefix + listed):
        if name in names:
            return name
    raise CheckpointError(
        f"{WHERE}: {listed} is listed, but {type(model).__name__} has no such module; "
        f"config.json and the model's class do not belong together; {REMEDY}"
    )


def mark_quantized(model: Any, config: BCQConfig | CodebookConfig) -> None:
    """Let a `PreTrainedModel` whose layers were swapped save itself as a lutgemm checkpoint."""
    own = isinstance(getattr(model, "hf_quantizer", None), LutgemmQuantizer)
    if not _is_pretrained(model) or (getattr(model, "hf_quantizer", None) and not own):
        return
    quantization = LutgemmConfig(config, layers=_layers(model))
    model.hf_quantizer = LutgemmQuantizer(quantization)
    model.config.quantization_config = quantization
    model.quantization_method = QUANT_METHOD
    model.config._is_quantized = True


def _is_pretrained(model: Any) -> bool:
    return isinstance(model, transformers.PreTrainedModel)


def register() -> None:
    """Enter `quant_method: "lutgemm"` into transformers' tables."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LutgemmConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LutgemmQuantizer


register()
