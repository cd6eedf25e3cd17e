"""The tensors of a loaded model: none may be made up in silence, none may hold NaN or Inf.

transformers fills a tensor that the files lack with random numbers and reports it in its log. That is right for a new
head that the user is about to train, and a wrong result for everything else.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.discover import _parameter_names
from ..errors import CheckpointError, FormatError
from ..nn import QuantizedLinear
from .checkpoint_files import StoredTensor
from .quantization_config import REMEDY

SPARE_BYTES = 1 << 30
"""What tensors that are not in the files may take in any case: buffers that are computed, heads that are new."""


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint as the model sees it.

    source: its file, or its folder or Hub id where there are several. params: parameter or buffer of the model -> the
    stored tensor that is loaded into it as it is. converted: whether others are merged or split on loading.
    nbytes: size of all files. shapes: of the model's tensors before loading.
    """

    source: str
    params: Mapping[str, StoredTensor]
    converted: bool
    nbytes: int
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: Any, source: str, stored: Mapping[str, StoredTensor]) -> StoredModel:
        files = {entry.file for entry in stored.values()}
        names, converted = _parameter_names(model, {name: entry.shape for name, entry in stored.items()})
        params = {param: stored[name] for name, param in names.items()}
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if isinstance(t, Tensor)}
        nbytes = sum(Path(file).stat().st_size for file in files)
        return cls(files.pop() if len(files) == 1 else source, params, converted, nbytes, shapes)


def check_shapes(model: Any, checkpoint: StoredModel) -> None:
    """Raise `CheckpointError` when a stored tensor of the base model or of the output embeddings has another shape than
    the model's, or when the model, which is on the meta device, would allocate far more than the files hold.

    Other heads are left to transformers, which refuses another shape unless `ignore_mismatched_sizes` is given.
    """
    made_up: dict[str, int] = {}
    state = model.state_dict(keep_vars=True)
    output = getattr(model.get_output_embeddings(), "weight", None)
    for name, tensor in [*state.items(), *model.named_buffers()]:
        entry = checkpoint.params.get(name)
        if not isinstance(tensor, Tensor) or (entry is not None and entry.shape == tuple(tensor.shape)):
            continue
        if entry is not None and name in state and (tensor is output or _in_base_model(model, name)):
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has shape {list(entry.shape)}, config.json asks for "
                f"{list(tensor.shape)}; they belong to different models, {REMEDY}"
            )
        made_up[name] = tensor.numel() * tensor.element_size()
    if sum(made_up.values()) > 4 * checkpoint.nbytes + SPARE_BYTES:
        name = max(made_up, key=lambda name: made_up[name])
        raise CheckpointError(
            f"{checkpoint.source}: config.json asks for {sum(made_up.values())} bytes of tensors that are not in the "
            f"files ({checkpoint.nbytes} bytes), the largest is {name!r}; they belong to different models, {REMEDY}"
        )


def check_filled(model: Any, checkpoint: StoredModel) -> None:
    """Raise `CheckpointError` when transformers made up a tensor that the checkpoint's own architecture has.

    Or took one of another shape than the model's, which version 5.0 does for quantized models.
    """
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name, tensor in _dense_tensors(model):
        wanted = checkpoint.shapes.get(name, tuple(tensor.shape))
        if wanted != tuple(tensor.shape):
            raise CheckpointError(
                f"{checkpoint.source}: tensor {name!r} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(wanted)}; {REMEDY}"
            )
    missing = [
        name
        for name, tensor in _dense_tensors(model)
        if not _was_loaded(tensor, name, checkpoint)
        and name not in tied
        and not _was_ignored(tensor, checkpoint.params.get(name))
        and not any(pattern.search(name) for pattern in ignored)
    ]
    if missing := _required(model, missing):
        raise CheckpointError(
            f"{checkpoint.source}: tensor {missing[0]!r} is missing ({len(missing)} in all), and random numbers would "
            f"take its place; {REMEDY}"
        )


def check_finite(model: Any, checkpoint: StoredModel) -> None:
    """Raise `CheckpointError` when a dense floating tensor of the loaded model holds NaN or Inf."""
    seen: set[int] = set()
    for name, tensor in _dense_tensors(model):
        if not tensor.is_floating_point() or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        entry = checkpoint.params.get(name)
        if tensor.is_meta and entry is None:
            continue
        value = _read(entry) if tensor.is_meta and entry is not None else tensor
        if not torch.isfinite(value).all():
            cast = "" if entry is None else f" (stored as {entry.dtype}, loaded as {tensor.dtype})"
            raise CheckpointError(
                f"{checkpoint.source if entry is None else entry.file}: {name} holds NaN or Inf{cast}; {REMEDY}, "
                "or load it in a wider dtype if the file is right"
            )


def check_records(model: Any, checkpoint: StoredModel) -> None:
    """Raise `FormatError` naming file and module when a value of a quantized layer is not what SPEC.md allows."""
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        record = module.weight_record
        entries = {tensor: checkpoint.params.get(f"{name}.{tensor}") for tensor in record.tensors}
        try:
            if any(tensor.is_meta for tensor in record.tensors.values()):
                stored = {tensor: _read(entry) for tensor, entry in entries.items() if entry is not None}
                record = type(record)(record.layout, stored)
            record.check_values()
        except FormatError as error:
            codes = entries.get("codes")
            file = checkpoint.source if codes is None else codes.file
            raise FormatError(f"{file}: {name}: {error}; {REMEDY}") from None


def _dense_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers outside of quantized records; biases of quantized layers are among them."""
    records = {
        f"{name}.{tensor}"
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
        for tensor in module.weight_record.tensors
    }
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and name not in records:
            yield name, tensor


def _was_ignored(tensor: Tensor, entry: StoredTensor | None) -> bool:
    """Whether the files hold it in another shape, which transformers accepts with `ignore_mismatched_sizes` only."""
    return entry is not None and entry.shape != tuple(tensor.shape)


def _was_loaded(tensor: Tensor, name: str, checkpoint: StoredModel) -> bool:
    """transformers marks what it loads. accelerate keeps a layer that it offloads elsewhere, without the mark."""
    if tensor.is_meta:
        return checkpoint.converted or name in checkpoint.params
    return bool(getattr(tensor, "_is_hf_initialized", False))


def _read(entry: StoredTensor) -> Tensor:
    """The stored tensor of a parameter that accelerate offloads and that is on the meta device here."""
    with safe_open(entry.file, framework="pt") as handle:
        stored: Tensor = handle.get_tensor(entry.name)
        return stored


def _in_base_model(model: Any, name: str) -> bool:
    prefix = getattr(model, "base_model_prefix", "")
    return not prefix or name.startswith(f"{prefix}.") or not hasattr(model, prefix)


def _required(model: Any, names: list[str]) -> list[str]:
    """Those of `names` that the first of config.json's `architectures` has too; all when transformers does not know it.

    What remains belongs to a head that this checkpoint never had.
    """
    architectures = getattr(model.config, "architectures", None)
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    if not names or first == type(model).__name__ or not isinstance(first, str):
        return names
    own = getattr(transformers, first, None)
    if not (isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)):
        return names
    if own.config_class is None or not isinstance(model.config, own.config_class):
        return names
    with torch.device("meta"):
        known = set(own(copy.deepcopy(model.config)).state_dict())
    return [name for name in names if not known.isdisjoint(_spellings(model, name))]


def _spellings(model: Any, name: str) -> Iterable[str]:
    """The names of a parameter with and without the prefix that a model with a head gives its base model."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return (name, name.removeprefix(prefix), prefix + name)
