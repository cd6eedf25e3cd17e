"""`lutgemm.load`: a checkpoint from a folder or the Hub, nothing in it trusted, every refusal a `LutgemmError`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..checkpoint.discover import config_errors
from ..checkpoint.reader import CheckpointFolder
from ..errors import ArgumentError, CheckpointError, LutgemmError
from .quantization_config import QUANT_METHOD, REMEDY, parse

COUNTS = re.compile(r"^(num|n)_(\w+_)?(layers?|blocks|experts|labels)$|_layers$")
"""Fields of config.json by which transformers repeats something in memory, on the meta device too."""

USUAL_LAYERS = 1000
"""More than any model has, and few enough to build."""

MAX_COUNT = 1_000_000
"""Largest accepted count; real ones stay below 22 000 (labels of ImageNet-21k)."""


def load(
    path_or_hub_id: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> Any:
    """The model of a lutgemm checkpoint, in eval mode: a folder (no network is used) or a Hub model id.

    dtype: of what is not quantized; None takes the checkpoint's. device: where to put the model; None is the CPU.
    Raises `CheckpointError` when it is not a lutgemm checkpoint, its files are missing, damaged, contradictory or
    outside of it, a tensor of the model is missing, or a weight holds NaN or Inf; `ArgumentError` for a dtype or device
    that does not exist here.
    """
    asked, target = _dtype(dtype), _device(device)
    source = str(path_or_hub_id)
    folder = Path(path_or_hub_id)
    num_tensors: int | None = None
    config: Mapping[str, Any]
    if folder.is_dir():
        checkpoint = CheckpointFolder(folder)
        config, num_tensors = checkpoint.config, len(checkpoint.where)
    elif folder.exists():
        raise CheckpointError(f"{folder} is a file; name the checkpoint's folder")
    else:
        config = _config_of_hub_id(source)
    entry = config.get("quantization_config")
    if not isinstance(entry, dict) or entry.get("quant_method") != QUANT_METHOD:
        found = entry.get("quant_method") if isinstance(entry, dict) else None
        raise CheckpointError(
            f"{source} is not a lutgemm checkpoint (quant_method: {found!r}); make one with: lutgemm quantize SRC DST"
        )
    expected: tuple[type[Exception], ...] = (OSError, MemoryError, RecursionError, SafetensorError, *config_errors())
    try:
        parse(entry)
        _check_counts(config, num_tensors)
        model, info = _model_class(config).from_pretrained(
            source,
            dtype=asked or "auto",
            local_files_only=folder.is_dir(),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except LutgemmError as error:
        if source in str(error):
            raise
        raise type(error)(f"{source}: {error}") from None
    except expected as error:
        raise CheckpointError(
            f"{source}: transformers {transformers.__version__} cannot build the model from its config.json and files: "
            f"{_short(error)}; check config.json, or download the checkpoint or quantize the model again"
        ) from error
    if mismatched := sorted(str(entry[0]) for entry in info["mismatched_keys"]):
        raise CheckpointError(f"{source}: tensor {mismatched[0]!r} has another shape than config.json says; {REMEDY}")
    return (model if target is None else model.to(target)).eval()


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _config_of_hub_id(source: str) -> Mapping[str, Any]:
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source}: neither a folder nor a model that the Hub gives: {_short(error)}; "
            "check the name and the network, or give a folder"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}: its config.json holds no object; download it again")
    return config


def _check_counts(config: Mapping[str, Any], num_tensors: int | None) -> None:
    """Refuse a configuration whose model, or whose mere parsing, would take all memory.

    num_tensors: of the files, if known; a model has at least one tensor per layer. Some counts with "layer" in their
    name are of something else, so up to `USUAL_LAYERS` any will do.
    """
    sections: list[Any] = [config]
    while sections:
        section = sections.pop()
        if isinstance(section, list):
            sections += section
        elif isinstance(section, dict):
            sections += section.values()
            for name, value in section.items():
                if not COUNTS.search(name) or not isinstance(value, int):
                    continue
                limit = max(num_tensors, USUAL_LAYERS) if num_tensors is not None and "layer" in name else MAX_COUNT
                if not 0 <= value <= limit:
                    raise CheckpointError(
                        f"config.json: {name}={value}, accepted here are 0 to {limit}; "
                        "the configuration does not belong to these weights, download both again"
                    )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype named, None for the checkpoint's own. Raises `ArgumentError`."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == "auto":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArgumentError(
            f"dtype={dtype!r} is not a floating dtype; use torch.float32, torch.bfloat16 or torch.float16"
        )
    return found


def _device(device: torch.device | str | None) -> torch.device | None:
    """The device named, which must be there. Raises `ArgumentError`."""
    if device is None:
        return None
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ArgumentError(f"device={device!r} cannot be used here ({_short(error)}); use 'cpu'") from None
    return target


def _model_class(config: Mapping[str, Any]) -> Any:
    """The class that wrote the checkpoint, else the auto class for causal language models.

    Raises `CheckpointError` when the class and `model_type` contradict each other.
    """
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    known = getattr(transformers, first, None) if isinstance(first, str) else None
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        return transformers.AutoModelForCausalLM
    model_type = config.get("model_type")
    own = CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else None
    if own is None or known.config_class is None or not issubclass(own, known.config_class):
        raise CheckpointError(
            f"config.json: model_type={str(model_type)[:80]!r} does not belong to architectures[0]={first!r}; "
            f"transformers {transformers.__version__} would load another model, download config.json again"
        )
    return known
