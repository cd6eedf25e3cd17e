"""Which tensors of a checkpoint are the weights of linear layers, and what their modules are called once loaded.

The model is built by transformers on the meta device (shapes only, no memory). Where transformers does not know the
architecture, a rule on names and shapes takes over; `ModelMap.how` says which of the two was used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
"""Configuration fields that multiply the modules of a model; a checkpoint has at least one tensor per layer."""

CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Architectures whose linear weights lie transposed on disk, which names and shapes cannot show."""

NOT_LINEAR = re.compile(r"(embed|norm|ln_|lm_head|wte|wpe|conv|rotary|position|classifier|score)", re.IGNORECASE)
EXPERT = re.compile(r"(^|\.)experts?(\.|$)")


@dataclass(frozen=True)
class Linear:
    """A linear layer of the loaded model. `tensor` is its weight's name on disk, None when no single tensor holds it.

    `transposed`: the weight lies as [K, N] on disk (Conv1D). `tied_to`: another parameter that shares the weight.
    """

    module: str
    tensor: str | None
    out_features: int
    in_features: int
    transposed: bool = False
    is_head: bool = False
    tied_to: str | None = None


@dataclass(frozen=True)
class Experts:
    """Expert weights that the loaded model holds as one fused parameter, or that are expert matrices by name."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelMap:
    """What `discover` found. `param_of` maps tensor names on disk to parameter names of the loaded model."""

    linears: list[Linear]
    experts: list[Experts]
    how: str
    param_of: dict[str, str] = field(default_factory=dict)


def _check_layer_counts(config: Mapping[str, Any], num_tensors: int) -> None:
    """Refuse a configuration that asks for more layers than there are tensors: building it could take all memory."""
    for section in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for name in LAYER_COUNTS:
            count = section.get(name)
            if isinstance(count, int) and not 0 <= count <= num_tensors:
                raise CheckpointError(
                    f"config.json: {name}={count}, but the checkpoint has {num_tensors} tensors; "
                    "the configuration does not belong to these weights, download both again"
                )


def discover(config: Mapping[str, Any], shapes: Shapes) -> ModelMap:
    """The linear layers of the checkpoint that holds `config` and tensors of `shapes`.

    Raises `CheckpointError` when tensors are missing or have other shapes than the architecture says.
    """
    _check_layer_counts(config, len(shapes))
    try:
        import transformers  # noqa: F401
    except ImportError:
        return _by_names(config, shapes, "names and shapes (transformers is not installed)")
    model_type = config.get("model_type")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return _by_names(config, shapes, f"names and shapes (transformers does not know model_type={model_type!r})")
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return _by_names(config, shapes, f"names and shapes (model_type={model_type!r} has no causal language model)")
    return _from_model(_meta_model(config, config_class), shapes)


def _meta_model(config: Mapping[str, Any], config_class: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        parsed = config_class.from_dict(dict(config))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(parsed, trust_remote_code=False)
    except config_errors() as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"config.json: transformers cannot build a {config_class.model_type!r} model from it: {first[:300]}; "
            "the configuration is damaged, download it again"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def config_errors() -> tuple[type[Exception], ...]:
    """What transformers raises on a configuration that makes no sense; its own class is not a `ValueError`."""
    errors: list[type[Exception]] = [ValueError, TypeError, LookupError, ArithmeticError, AttributeError]
    errors += [RuntimeError, ImportError, AssertionError]
    try:
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:
        return tuple(errors)
    return (*errors, StrictDataclassError)


def _from_model(model: Any, shapes: Shapes) -> ModelMap:
    from transformers.pytorch_utils import Conv1D

    params = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = _tied_names(model)
    param_of, converted = _parameter_names(model, shapes)
    on_disk = {param: name for name, param in param_of.items() if param in params}
    _check_against_model(params, tied, on_disk, converted, shapes)
    head = model.get_output_embeddings()
    linears, experts = [], []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            weight, transposed = f"{name}.weight", isinstance(module, Conv1D)
            rows, columns = module.weight.shape
            out_features, in_features = (columns, rows) if transposed else (rows, columns)
            linears.append(
                Linear(
                    module=name,
                    tensor=on_disk.get(weight),
                    out_features=out_features,
                    in_features=in_features,
                    transposed=transposed,
                    is_head=module is head,
                    tied_to=tied.get(weight),
                )
            )
        elif not isinstance(module, nn.modules.conv._ConvNd):
            fused = {key: tuple(p.shape) for key, p in module.named_parameters(name, recurse=False) if p.ndim == 3}
            experts += [Experts(key, shape) for key, shape in fused.items() if shape[0] > 1]
    return ModelMap(linears, experts, f"transformers ({type(model).__name__})", param_of)


def _tied_names(model: Any) -> dict[str, str]:
    """Parameter name -> a parameter that shares its memory, both ways round."""
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    first: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(param), name)
        if other != name:
            pairs.setdefault(name, other)
    return pairs | {other: name for name, other in pairs.items() if other not in pairs}


def _parameter_names(model: Any, shapes: Shapes) -> tuple[dict[str, str], bool]:
    """Name on disk -> parameter of the loaded model, for tensors that are loaded as they are, by transformers' rules.

    The flag says whether other tensors are merged or split on loading (per-expert matrices, for one).
    """
    prefix = model.base_model_prefix
    state = model.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return {name: _with_prefix(name, prefix, state) for name in shapes}, False
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    direct, converted = {}, False
    for name in sorted(shapes):
        param, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if pattern is None:
            direct[name] = param
        else:
            converted = True
    return direct, converted


def _with_prefix(name: str, prefix: str, state: Mapping[str, Any]) -> str:
    """`name` with the base model's prefix added or taken away, whichever the loaded model knows."""
    if name not in state and f"{prefix}.{name}" in state:
        return f"{prefix}.{name}"
    bare = name.removeprefix(f"{prefix}.")
    return bare if name not in state and bare in state else name


def _check_against_model(
    params: Shapes, tied: Mapping[str, str], on_disk: Mapping[str, str], converted: bool, shapes: Shapes
) -> None:
    """Every parameter is on disk with the model's shape. Raises `CheckpointError` naming the tensor."""
    for param, tensor in on_disk.items():
        if shapes[tensor] != params[param]:
            raise CheckpointError(
                f"tensor {tensor!r} has shape {list(shapes[tensor])}, config.json asks for {list(params[param])}; "
                "the tensor or the configuration belongs to another model, download both again"
            )
    missing = [name for name in params if name not in on_disk and tied.get(name) not in on_disk]
    if missing and not converted:
        raise CheckpointError(
            f"tensor {missing[0]!r} is missing ({len(missing)} in all); a shard is missing or config.json belongs to "
            "another model, download the checkpoint again"
        )


def _by_names(config: Mapping[str, Any], shapes: Shapes, how: str) -> ModelMap:
    """Without a model: a linear layer is a 2-D `*.weight` that is not named like an embedding, norm, head or router.

    Expert matrices (`.experts.`, 2-D or 3-D) are named and left alone: the loaded model may fuse them.
    """
    if config.get("model_type") in CONV1D_TYPES:
        raise CheckpointError(
            f"config.json: model_type={config['model_type']!r} stores its weights transposed, which is known only to "
            'transformers: pip install "lutgemm[hf]"'
        )
    linears, experts = [], []
    for name, shape in shapes.items():
        if EXPERT.search(name) and len(shape) in (2, 3):
            experts.append(Experts(name, shape))
        elif name.endswith(".weight") and len(shape) == 2 and min(shape) > 0:
            module = name.removesuffix(".weight")
            is_head = module.split(".")[-1] == "lm_head"
            if is_head or not NOT_LINEAR.search(module):
                linears.append(Linear(module, name, shape[0], shape[1], is_head=is_head))
    return ModelMap(linears, experts, how, {name: name for name in shapes})
