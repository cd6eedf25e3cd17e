"""One kernel call for sibling layers that read the same activations: the q, k and v of an attention, gate and up.

Siblings keep their tensors, names and modules. The first of them that is called computes the rows of all and hands the
others their part when they are called with the same activations, so that results are the same bits as apart. It is done
where nothing can go wrong unseen: eager calls of the compiled CPU kernels without gradients. Under `torch.compile`, in
training, under autocast and under any mode or transform each layer computes its own, as it does when the activations,
its tensors or the settings are not those that its part was made from.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import ops
from .backends import cpu, generation, prepared
from .errors import ArgumentError
from .formats import BCQWeight

if TYPE_CHECKING:
    from .nn import BCQLinear

FUSED_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
)
"""Names of children of one module that read the same activations, in the families of models that have them."""

MISSES = 2
"""Times in a row that the others did not ask for their part after which a group rests: its siblings do not read the
same activations (the query of a cross-attention and its key, say)."""

REST = 200
"""Calls that a resting group leaves to its layers before it tries again, so that a model which was called in another
way for a while is fused again; a vain try costs the rows of all siblings, once."""

_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class _Part(NamedTuple):
    """What a layer returns, and what that was made from; held, so that no later tensor is taken for one of these."""

    y: Tensor
    weight: BCQWeight
    bias: Tensor | None
    state: list[tuple[int, int]]


def _state(weight: BCQWeight, bias: Tensor | None) -> list[tuple[int, int]]:
    """Version and address of each tensor: what changes when one of them is changed."""
    state = [(tensor._version, tensor.data_ptr()) for tensor in weight.tensors.values()]
    if bias is not None:
        state.append((bias._version, bias.data_ptr()))
    return state


class _Pending:
    """Parts that siblings have not asked for yet, and the activations and settings that they belong to."""

    __slots__ = ("kept", "parts", "settings", "version", "x")

    def __init__(self, x: Tensor, parts: dict[int, _Part], settings: tuple[Any, ...]) -> None:
        self.x = weakref.ref(x)
        self.parts = parts
        self.settings = settings
        self.kept = x.view(_BITS[x.dtype]).clone() if x.is_inference() else None
        self.version = x._version if self.kept is None else 0

    def belongs_to(self, x: Tensor) -> bool:
        """Whether x is those activations, unchanged. Inference tensors do not count their changes: bits decide."""
        if self.x() is not x:
            return False
        if self.kept is None:
            return x._version == self.version
        return torch.equal(x.view(self.kept.dtype), self.kept)


def _settings(layer: BCQLinear) -> tuple[Any, ...]:
    """What a result depends on, or what kind of tensor it is, beside tensors and what `ops.direct` looks at."""
    return layer.accuracy, cpu._isa(), torch.is_inference_mode_enabled(), generation[0]


class FusedGroup:
    """Sibling layers whose calls are answered together."""

    def __init__(self, layers: Sequence[BCQLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._rows = [layer.out_features for layer in layers]
        self._local = threading.local()
        self._misses = 0
        self._rest = 0
        self._alone_forgotten = False

    def part(self, place: int, x: Tensor) -> Tensor | None:
        """What the layer at `place` returns for x, or None when it has to compute that itself."""
        pending: _Pending | None = getattr(self._local, "pending", None)
        if pending is not None:
            part = pending.parts.pop(place, None)
            if part is not None and pending.belongs_to(x):
                if not pending.parts:
                    self._local.pending, self._misses = None, 0
                return part.y if self._holds(place, x, part, pending.settings) else None
            self._local.pending = None
            self._misses += 1
            if self._misses >= MISSES:
                self._rest = REST
        if self._rest:
            self._rest -= 1
            return None
        parts = self._compute(x)
        if parts is None:
            return None
        y = parts.pop(place).y
        self._local.pending = _Pending(x, parts, _settings(cast("BCQLinear", self._layers[place]())))
        return y

    def _holds(self, place: int, x: Tensor, part: _Part, settings: tuple[Any, ...]) -> bool:
        """Whether the layer at `place`, called now, would return that part."""
        layer = self._layers[place]()
        if layer is None or settings != _settings(layer):
            return False
        weight, bias = cast(BCQWeight, layer.weight_record), layer._parameters["bias"]
        same = weight is part.weight and bias is part.bias and _state(weight, bias) == part.state
        return same and ops.direct(x, weight, bias)

    def _compute(self, x: Tensor) -> dict[int, _Part] | None:
        """The part of every layer by its place, or None when they have to be computed apart."""
        layers = [layer for reference in self._layers if (layer := reference()) is not None]
        if len(layers) < len(self._layers):
            return None
        weights = [cast(BCQWeight, layer.weight_record) for layer in layers]
        biases = [layer._parameters["bias"] for layer in layers]
        k, shape, accuracy = weights[0].shape[1], x.shape, layers[0].accuracy
        fits = len(shape) and shape[-1] == k and x.dtype in ops.ACTIVATION_DTYPES
        if not fits or not ops.direct(x, weights[0], biases[0]):
            return None
        recording = torch.is_grad_enabled()
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            if layer.accuracy != accuracy or not all([tensor.is_cpu for tensor in weight.tensors.values()]):  # noqa: C419
                return None
            if recording and not ops.direct(x, weight, bias):
                return None
            if (bias is None) != (biases[0] is None) or not _fits(bias, weight, x):
                return None
        flat = x if len(shape) == 2 else x.reshape(-1, k)
        choice, *others = [ops.bcq_choice(flat, weight, accuracy=accuracy) for weight in weights]
        kernel, algorithm, level = choice
        if others.count(choice) < len(others) or kernel is not cpu.BACKEND.bcq_linear or algorithm == "dequantize":
            return None
        try:
            states = [_state(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        except RuntimeError:  # a tensor made in inference mode, whose changes torch does not count
            return None
        y = cpu.bcq_linear_stacked(flat, weights, biases, algorithm, level).view(*shape[:-1], sum(self._rows))
        ys: Sequence[Tensor] = torch.split_with_sizes_copy(y, self._rows, -1)  # type: ignore[func-returns-value, assignment]
        parts = [_Part(*made) for made in zip(ys, weights, biases, states, strict=True)]
        if not self._alone_forgotten:
            self._alone_forgotten = True
            for weight in weights:
                prepared.forget_alone(weight.tensors.values())
        return dict(enumerate(parts))


def _fits(bias: Tensor | None, weight: BCQWeight, x: Tensor) -> bool:
    return bias is None or (bias.dtype == x.dtype and bias.is_cpu and bias.shape == weight.shape[:1])


def _kind(layer: BCQLinear) -> tuple[Any, ...]:
    """What siblings must have in common."""
    layout = layer.layout.to_dict()
    layout.pop("nested_bits", None)
    return layer.in_features, layer.bias is None, tuple(sorted(layout.items()))


def _fusible(layers: Sequence[BCQLinear]) -> bool:
    free = all(layer._fused is None and layer.layout.to_dict()["scale_kind"] != "ratio" for layer in layers)
    return free and len(set(map(id, layers))) == len(layers) and len(set(map(_kind, layers))) == 1


def fuse(model: nn.Module, groups: Iterable[Sequence[str]] = FUSED_GROUPS) -> int:
    """Compute sibling layers that read the same activations in one kernel call; returns how many groups there are.

    groups: each the names of children of one module. A group is made of `BCQLinear` layers of the same K and layout
    that all have a bias or all have none; codebook weights have codebooks of their own, and weights with `ratios` have
    those, so these stay apart. Names, tensors and results stay what they are, bit for bit. What was fused before is
    undone first: `fuse(model, ())` only undoes. Copies and pickles of a model are not fused.

    Only decoding in eager mode gains: without gradients (`torch.no_grad`, `torch.inference_mode`), on the CPU, where a
    table algorithm is chosen. Everything else is computed layer by layer.

    Raises `ArgumentError` when `groups` is not of that form.
    """
    from .nn import BCQLinear, QuantizedLinear

    wanted = [_names(group) for group in groups]
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module._fused = None
    made = 0
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in wanted:
            layers = [child for name in names if isinstance(child := children.get(name), BCQLinear)]
            if len(layers) == len(names) and _fusible(layers):
                group = FusedGroup(layers)
                for place, layer in enumerate(layers):
                    layer._fused = (group, place)
                made += 1
    return made


def _names(group: Sequence[str]) -> tuple[str, ...]:
    if isinstance(group, str) or not all(isinstance(name, str) for name in group) or len(set(group)) < 2:
        raise ArgumentError(f"groups: got {group!r}; each is two names or more, such as {FUSED_GROUPS[1]}")
    return tuple(group)
