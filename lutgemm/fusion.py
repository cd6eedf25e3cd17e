"""One kernel call for sibling layers that read the same activations: the q, k and v of an attention, gate and up.

Siblings keep their tensors, names and modules. The first of them that is called computes the rows of all and hands the
others their part when they are called with the same activations, so that results are the same bits as apart. It is done
where nothing can go wrong unseen: eager calls of the compiled CPU kernels without gradients. Under `torch.compile`, in
training, under autocast and under any mode or transform each layer computes its own, as it does when the activations
turn out to be others.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from . import ops
from .backends import cpu
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
"""Times in a row that the others did not ask for their part after which a group is given up: its siblings do not read
the same activations (the query of a cross-attention and its key, say)."""


class _Pending:
    """Parts of a result that siblings have not asked for yet, and the activations that they belong to."""

    __slots__ = ("kept", "parts", "version", "x")

    def __init__(self, x: Tensor, parts: dict[int, Tensor]) -> None:
        self.x = weakref.ref(x)
        self.parts = parts
        self.kept = x.clone() if x.is_inference() else None
        self.version = x._version if self.kept is None else 0

    def belongs_to(self, x: Tensor) -> bool:
        """Whether x is those activations, unchanged. Inference tensors do not count their changes: values decide."""
        if self.x() is not x:
            return False
        return x._version == self.version if self.kept is None else torch.equal(x, self.kept)


class FusedGroup:
    """Sibling layers whose calls are answered together."""

    def __init__(self, layers: Sequence[BCQLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._rows = [layer.out_features for layer in layers]
        self._local = threading.local()
        self._misses = 0

    def part(self, place: int, x: Tensor) -> Tensor | None:
        """What the layer at `place` returns for x, or None when it has to compute that itself."""
        pending: _Pending | None = getattr(self._local, "pending", None)
        if pending is not None:
            if place in pending.parts and pending.belongs_to(x):
                y = pending.parts.pop(place)
                if not pending.parts:
                    self._local.pending, self._misses = None, 0
                return y
            self._local.pending = None
            self._misses += 1
        if self._misses >= MISSES:
            return None
        parts = self._compute(x)
        if parts is None:
            return None
        y = parts.pop(place)
        self._local.pending = _Pending(x, parts)
        return y

    def _compute(self, x: Tensor) -> dict[int, Tensor] | None:
        """y of every layer by its place, or None when they have to be computed apart."""
        layers = [layer for reference in self._layers if (layer := reference()) is not None]
        if len(layers) < len(self._layers):
            return None
        weights = [cast(BCQWeight, layer.weight_record) for layer in layers]
        biases = [layer._parameters["bias"] for layer in layers]
        k, shape, accuracy = weights[0].shape[1], x.shape, layers[0].accuracy
        fits = len(shape) and shape[-1] == k and x.dtype in ops.ACTIVATION_DTYPES and weights[0].device == x.device
        if not fits or not ops.direct(x, weights[0], biases[0]):
            return None
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            if layer.accuracy != accuracy or (bias is not None and bias.dtype != x.dtype):
                return None
            if torch.is_grad_enabled() and not ops.direct(x, weight, bias):
                return None
        flat = x.reshape(-1, k)
        choice, *others = [ops.bcq_choice(flat, weight, accuracy=accuracy) for weight in weights]
        kernel, algorithm, level = choice
        if others.count(choice) < len(others) or kernel is not cpu.BACKEND.bcq_linear or algorithm == "dequantize":
            return None
        y = cpu.bcq_linear_stacked(flat, weights, biases, algorithm, level)
        parts = y.view(*shape[:-1], y.shape[1]).split(self._rows, -1)
        return dict(enumerate(parts if len(flat) == 1 else [part.contiguous() for part in parts]))


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
