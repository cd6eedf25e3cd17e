"""`BCQLinear`, `CodebookLinear`: linear layers over quantized weights; `replace_linear` swaps them into any model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from tqdm import tqdm

from . import fusion, ops
from ._plain import any_autocast
from .accuracy import AUTO, resolve_accuracy
from .backends import prepared
from .config import BCQConfig, CodebookConfig
from .coverage import CoverageReport, LayerReport, SkippedReport
from .errors import ArgumentError, FormatError, LutgemmError
from .formats import FORMATS, Layout, QuantizedWeight
from .fusion import FusedGroup
from .normal_tensors import as_parameter, normal
from .quantize import quantize, weight_error
from .selection import Selection

Q = TypeVar("Q", bound="QuantizedLinear")


class QuantizedLinear(nn.Module):
    """`x @ W.T + bias` with W in one of the formats of SPEC.md; the base of `BCQLinear` and `CodebookLinear`.

    The record's tensors are registered under their names in a checkpoint: integer ones as buffers, floating ones
    (scales, offsets, zeros, codebooks, ratios) as parameters without gradient; `layer.scales.requires_grad_(True)`
    makes one trainable. Their dtypes are part of the format: `.to(dtype)`, `.half()` and the like cast the bias only.

    x: `[..., K]`, fp32, fp16 or bf16; y is of x's dtype. A bias must have x's dtype, as in `nn.Linear`; under autocast
    x and bias are cast to autocast's dtype, as in `nn.Linear`.

    Kernels prepare a layout of their own at the first call and keep it while the tensors live. Changes of the tensors
    in place are noticed, also under `torch.compile`; after a change through `.data` (`layer.scales.data.mul_(2)`),
    which torch does not count, call `layer.weight_record.repack()`.
    """

    format: ClassVar[str]
    op: ClassVar[Callable[..., Tensor]]
    run: ClassVar[Callable[..., Tensor]]
    """What `op` does, of a layer."""
    bias: Tensor | None
    accuracy: str = AUTO
    """The least accuracy of `forward`, as `lutgemm.bcq_linear` takes it; see `set_accuracy`."""
    _fused: tuple[FusedGroup, int] | None = None
    """The group that answers calls of this layer together with its siblings', and the place in it; see `fuse`."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if weight.format != self.format:
            raise ArgumentError(f"{type(self).__name__} holds {self.format} weights, got a {type(weight).__name__}")
        if bias is not None and tuple(bias.shape) != weight.shape[:1]:
            raise ArgumentError(f"bias: got shape {list(bias.shape)}, expected [{weight.shape[0]}]")
        self.layout = weight.layout
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        """What `.to(dtype)` was last asked for: the dtype of `bias` and of `weight`."""
        for name, tensor in weight.tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, as_parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, normal(tensor))
        self.register_parameter("bias", None if bias is None else as_parameter(bias, bias.requires_grad))
        self._record: QuantizedWeight | None = None

    @classmethod
    def from_weight(
        cls: type[Q], weight: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Q:
        """A layer over `weight`, whose tensors it aliases. On `QuantizedLinear` itself the format picks the class."""
        own = cls if cls is not QuantizedLinear else LINEAR_CLASSES[weight.format]
        return own(weight, bias, dtype)  # type: ignore[return-value]

    @classmethod
    def from_linear(cls: type[Q], linear: nn.Module, config: BCQConfig | CodebookConfig) -> Q:
        """Quantize the weight of an `nn.Linear` (or GPT-2's `Conv1D`, weight `[K, N]`); its bias is shared, not copied.

        Raises `ArgumentError` when `config` is of the other format, or the weight holds NaN or Inf.
        """
        if cls is not QuantizedLinear and config.format != cls.format:
            raise ArgumentError(f"config: got a {type(config).__name__}, {cls.__name__} takes a {cls.format} one")
        weight = dense_weight(linear)
        own = cls if cls is not QuantizedLinear else LINEAR_CLASSES[config.format]
        layer = own(quantize(weight, config), linear.bias, weight.dtype)  # type: ignore[arg-type]
        return layer.train(linear.training)  # type: ignore[return-value]

    @classmethod
    def empty(
        cls: type[Q],
        layout: Layout,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Q:
        """A layer of `layout`, to load a checkpoint into: only `header` is filled. The meta device is allowed."""
        tensors = {n: torch.empty(s.shape, dtype=s.dtype, device=device) for n, s in layout.specs().items()}
        tensors["header"] = layout.header().to(device)
        own = cls if cls is not QuantizedLinear else LINEAR_CLASSES[layout.format]
        empty_bias = torch.empty(layout.out_features, dtype=dtype, device=device) if bias else None
        return own(FORMATS[layout.format](layout, tensors), empty_bias, dtype)  # type: ignore[return-value]

    @property
    def weight_record(self) -> QuantizedWeight:
        """The weight; its tensors are the module's own. A tensor that was replaced is picked up."""
        record = self._record
        if record is None or not self._aliases(record):
            if not is_compiling():
                self._leave_inference_mode()
            record = FORMATS[self.format](self.layout, self._record_tensors())
            self._record = record
        return record

    @property
    def weight(self) -> Tensor:
        """W `[N, K]`, dequantized to `dtype` at every read: for code that looks at `.weight.dtype` or `.weight.device`
        (T5 does) or takes the weight out. Not a parameter, and writing to it changes nothing."""
        return self.weight_record.dequantize(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = self._parameters["bias"]
        if is_compiling() or any_autocast():
            x, bias = _autocast(x, bias)
            return self.op(x, self.weight_record, bias, accuracy=self.accuracy)
        if self._fused is not None:
            group, place = self._fused
            y = group.part(self, place, x)
            if y is not None:
                return y
        record = self._record or self.weight_record
        return self.run(x, record, self._parameters, self._buffers, self, bias, AUTO, AUTO, self.accuracy)

    def extra_repr(self) -> str:
        bits = self.layout.bits_per_weight
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {bits:.2f} bits per weight"

    def _record_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.layout.specs()}

    def _aliases(self, record: QuantizedWeight) -> bool:
        buffers, parameters = self._buffers, self._parameters
        for name, tensor in record.tensors.items():
            if tensor is not (buffers[name] if name in buffers else parameters[name]):
                return False
        return True

    def _leave_inference_mode(self) -> None:
        """Replace tensors made in inference mode, whose changes torch does not count, by normal copies."""
        for held in (self._parameters, self._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_inference():
                    held[name] = normal(tensor)  # type: ignore[assignment]

    def _forget(self) -> None:
        """Before tensors are replaced. `torch.utils.swap_tensors`, which may do that, refuses tensors that are watched
        by weak references, as those of a prepared layout are."""
        self._record = None
        prepared.forget(*(t for held in (self._parameters, self._buffers) for t in held.values() if t is not None))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the record and the group out; the copy builds its own record."""
        return self.__dict__ | {"_record": None, "_fused": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        bias = self.bias
        cast = (bias, None if bias is None else bias.grad)

        def move_record(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keep = moved.dtype == tensor.dtype or any(tensor is c for c in cast)
            return moved if keep else tensor.to(moved.device)

        self._forget()
        with torch.inference_mode(False):
            self._leave_inference_mode()
            super()._apply(move_record, recurse)
        asked = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.dtype = asked if asked.is_floating_point else self.dtype
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        """Raises `FormatError` naming the module, before anything is copied, for a tensor `layout` does not allow."""
        given = {n: state_dict[prefix + n] for n in self.layout.specs() if prefix + n in state_dict}
        if given:
            try:
                record = FORMATS[self.format](self.layout, self._record_tensors() | given)
                record.check_values({name for name, tensor in given.items() if not tensor.is_meta})
            except FormatError as error:
                raise FormatError(f"{prefix.removesuffix('.')}: {error}") from None
        self._forget()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._leave_inference_mode()


class BCQLinear(QuantizedLinear):
    """A linear layer over a `BCQWeight`: LUT-GEMM, BiQGEMM or dequantize-and-matmul, as `lutgemm.bcq_linear` picks."""

    format = "bcq"
    op = staticmethod(ops.bcq_linear)
    run = staticmethod(ops.run_bcq)


class CodebookLinear(QuantizedLinear):
    """A linear layer over a `CodebookWeight`: CodeGEMM or dequantize-and-matmul, as `lutgemm.codebook_linear` picks."""

    format = "codebook"
    op = staticmethod(ops.codebook_linear)
    run = staticmethod(ops.run_codebook)


LINEAR_CLASSES: dict[str, type[QuantizedLinear]] = {"bcq": BCQLinear, "codebook": CodebookLinear}


def _autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and bias in the dtype that autocast asks for on their device, if it is on."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype not in ops.ACTIVATION_DTYPES:
        return x, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), None if bias is None else bias.to(dtype)


def set_accuracy(model: nn.Module, accuracy: str) -> int:
    """Ask every quantized layer of `model` for that accuracy (as `lutgemm.bcq_linear` takes it); returns how many.

    Raises `ArgumentError` for an unknown name.
    """
    resolve_accuracy(accuracy)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer.accuracy = accuracy
    return len(layers)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is GPT-2's `Conv1D`: a linear layer whose weight is stored `[K, N]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def dense_weight(linear: nn.Module) -> Tensor:
    """W `[N, K]` of an `nn.Linear` or a `Conv1D`, detached. Raises `ArgumentError` for another module."""
    if is_conv1d(linear):
        return linear.weight.detach().T  # type: ignore[operator]
    if isinstance(linear, nn.Linear):
        return linear.weight.detach()
    raise ArgumentError(f"linear: got a {type(linear).__name__}, expected torch.nn.Linear or transformers' Conv1D")


def _own_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Linear.forward or "forward" in vars(module)


def reason_unfit(module: nn.Module) -> str | None:
    """Why a linear module cannot be swapped without changing what the model computes, or None when it can."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its owner reads the weight itself (nn.MultiheadAttention)"
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if not is_conv1d(module) and _own_forward(module):
        return f"{type(module).__name__} has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which a swap would drop"
    return None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    return (id(tensor),) if tensor.is_meta else (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape)


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Name of every parameter that is held under more than one name (tied embeddings) -> another one of its names."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(_storage_key(parameter), []).append(name)
    shared = [group for group in names.values() if len(group) > 1]
    return {name: group[1] if name == group[0] else group[0] for group in shared for name in group}


FUSED = "fused 3-D parameter"
"""Start of the reason given for a mixture of experts held in one tensor."""


def unreached_parameters(model: nn.Module) -> Iterator[SkippedReport]:
    """Parameters that multiply activations but are held by no linear module: fused 3-D experts, bare 2-D weights."""
    for prefix, module in model.named_modules():
        if _is_linear(module) or isinstance(module, (QuantizedLinear, nn.Embedding, nn.EmbeddingBag)):
            continue
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for own_name, parameter in module.named_parameters(prefix, recurse=False):
            shape = tuple(parameter.shape)
            if len(shape) == 3 and shape[0] > 1:
                yield SkippedReport(own_name, shape, f"{FUSED} of {type(module).__name__}")
            elif len(shape) == 2 and "weight" in own_name.rpartition(".")[2]:
                yield SkippedReport(own_name, shape, f"bare parameter of {type(module).__name__}")


def linear_modules(model: nn.Module, selection: Selection) -> tuple[dict[str, nn.Module], list[SkippedReport]]:
    """The linear modules of `model` that `selection` takes and a swap keeps right, and the rest with their reasons."""
    shared = shared_weights(model)
    chosen: dict[str, nn.Module] = {}
    skipped: list[SkippedReport] = []
    for name, module in model.named_modules():
        if not _is_linear(module):
            continue
        weight = f"{name}.weight"
        tied = f"its weight is shared with {shared[weight]}" if weight in shared else None
        if reason := tied or selection.reason_to_skip(name) or reason_unfit(module):
            skipped.append(SkippedReport(name, tuple(module.weight.shape), reason))
        else:
            chosen[name] = module
    return chosen, skipped + list(unreached_parameters(model))


def _call_linears_of_encoders(model: nn.Module) -> None:
    """In eval mode `nn.TransformerEncoderLayer` hands `.weight` of its linear layers to a fused dense kernel of torch
    instead of calling them. Take that way from those with quantized layers; results are the same but for rounding."""
    encoders = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
    for module in model.modules():
        if isinstance(module, encoders) and any(isinstance(inner, QuantizedLinear) for inner in module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0


def replace_linear(
    model: nn.Module,
    config: BCQConfig | CodebookConfig,
    skip: Iterable[str] = ("lm_head",),
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    fuse: bool = False,
) -> CoverageReport:
    """Quantize the linear layers of any model in place; returns what was quantized and what was not, with reasons.

    skip, include, exclude: see `Selection`. Left alone and named in the report: layers whose weight is shared (tied
    embeddings), that have hooks, a parametrization or a forward of their own, and parameters that no linear module
    holds (fused experts). Everything is quantized before anything is swapped: on an error the model is unchanged.
    fuse: `lutgemm.fuse` the model afterwards.

    Raises `ArgumentError` naming the layer when its weight holds NaN or Inf or is on the meta device.
    """
    if _is_linear(model):
        raise ArgumentError(
            f"model: a {type(model).__name__} cannot be replaced in place; "
            "use lutgemm.BCQLinear.from_linear or lutgemm.CodebookLinear.from_linear"
        )
    chosen, skipped = linear_modules(model, Selection.of(skip, include, exclude))
    for name, linear in chosen.items():
        weight = dense_weight(linear)
        if weight.is_meta or not torch.isfinite(weight).all():
            what = "is on the meta device; load the model first" if weight.is_meta else "holds NaN or Inf"
            raise ArgumentError(f"{name}: its weight {what}; nothing was replaced")

    made: dict[str, QuantizedLinear] = {}
    layers: list[LayerReport] = []
    for name, linear in tqdm(chosen.items(), desc="quantizing", unit="layer", file=sys.stderr, disable=None):
        try:
            layer = QuantizedLinear.from_linear(linear, config)
            error, total = weight_error(dense_weight(linear), layer.weight_record)
        except LutgemmError as problem:
            raise type(problem)(f"{name}: {problem}") from None
        made[name] = layer
        relative = (error / total) ** 0.5 if total else 0.0
        layers.append(LayerReport(name, *layer.layout.shape, layer.layout.bits_per_weight, relative))
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)

    _call_linears_of_encoders(model)
    if fuse:
        fusion.fuse(model)
    if made and hasattr(model, "save_pretrained") and "transformers" in sys.modules:
        from .integrations.transformers import mark_quantized

        mark_quantized(model, config)
    return CoverageReport(tuple(layers), tuple(skipped))
