"""One kernel call for sibling layers that read the same activations: the q, k and v of an attention, gate and up.

Siblings keep their tensors, names and modules. The first of them that is called computes all and hands the others their
part when they are called with the same activations. On a CPU that is done from one set of tables, with the kernel
layouts that the layers have anyway and the same bits as apart; on a GPU over stacked rows (`backends.gpu_siblings`). It
is done where nothing can go wrong unseen: eager calls of compiled kernels without
gradients. Under `torch.compile`, in training, under autocast and under any mode or transform each layer computes its
own, as it does when the activations, its tensors or the settings are not those that its part was made from.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn

from ._plain import is_plain
from .accuracy import AUTO
from .backends import cpu, generation, gpu_siblings, registry
from .backends.gpu_siblings import Siblings
from .backends.prepared import Ready
from .choices import Choice, bcq_choice, codebook_choice, held_isa
from .errors import ArgumentError
from .formats import BCQWeight, CodebookLayout, CodebookWeight
from .ops import ACTIVATION_DTYPES

if TYPE_CHECKING:
    from .nn import QuantizedLinear

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

OPERATOR = "_bcq_linear_siblings_cpu"

MOST_PLANS = 64
"""That a group keeps: one for each shape and dtype of activations and each setting."""


Settings = tuple[str, int, int | None, bool]
"""What a result depends on, or what kind of tensor it is, beside tensors and what `ops.direct` looks at."""


class _Plan(NamedTuple):
    """How to compute all layers in one call."""

    layers: list[Ready]
    """The same number as of the group, in its order."""
    stacked: Siblings | None
    """On a GPU; None: by `OPERATOR`."""


APART = _Plan([], None)
"""Kernels that were chosen for the layers cannot compute them together."""


class _Bits:
    """What an inference tensor holds: torch does not count its changes."""

    __slots__ = ("address", "copy", "memory", "shape")

    def __init__(self, x: Tensor) -> None:
        """x: contiguous."""
        self.shape, self.address = x.shape, x.data_ptr()
        self.memory = (ctypes.c_char * x.nbytes).from_address(self.address)
        self.copy = self.memory.raw

    def are_of(self, x: Tensor) -> bool:
        """Whether x, the same tensor, holds them still. Its memory is there while x has that address."""
        there = x.data_ptr() == self.address and x.shape == self.shape and x.is_contiguous()
        return there and self.memory.raw == self.copy


class _Pending:
    """Results that siblings have not asked for yet, and what they were made from."""

    __slots__ = ("bias_states", "biases", "bits", "left", "place", "plan", "settings", "version", "x", "ys")

    def __init__(self, x: Tensor, ys: list[Tensor | None], plan: _Plan, place: int | None, settings: Settings) -> None:
        self.x = weakref.ref(x)
        self.bits = _Bits(x) if x.is_inference() else None
        self.version = x._version if self.bits is None else 0
        self.ys = ys
        self.plan = plan
        self.place = place
        """of `gpu_siblings.Engine`, or 0"""
        self.left = len(ys) - 1
        self.settings = settings
        self.biases: list[Tensor | None] | None = None
        """held, so that no later tensor is taken for one of these"""
        self.bias_states: list[tuple[int, int] | None] = []

    def holds(self, layer: QuantizedLinear, place: int, x: Tensor) -> bool:
        """Whether `layer`, called now, would return what was computed for it."""
        parameters = layer._parameters
        bias, biases = parameters["bias"], self.biases
        if bias is not (None if biases is None else biases[place]):
            return False
        return (
            self.plan.layers[place].layout(parameters, layer._buffers) is not None
            and self.settings == (layer.accuracy, generation[0], held_isa(), is_inference_mode_enabled())
            and is_plain(x)
            and (bias is None or _state(bias) == self.bias_states[place])
            and not (is_grad_enabled() and _requires_grad(x, parameters))
            and self.place == _place(x, self.plan)
        )


def _place(x: Tensor, plan: _Plan) -> int | None:
    return 0 if plan.stacked is None else plan.stacked.engine.place_of(x)


def _state(bias: Tensor | None) -> tuple[int, int] | None:
    """Version and address: what changes when it is changed."""
    return None if bias is None else (bias._version, bias.data_ptr())


def _requires_grad(x: Tensor, parameters: Mapping[str, Tensor | None]) -> bool:
    return x.requires_grad or any([t is not None and t.requires_grad for t in parameters.values()])  # noqa: C419 (faster)


class _Local(threading.local):
    """What a thread has computed and not handed out."""

    pending: _Pending | None = None


class FusedGroup:
    """Sibling layers whose calls are answered together."""

    def __init__(self, layers: Sequence[QuantizedLinear], contiguous: bool = False) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._contiguous = contiguous
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        """How to compute each layer, by what that depends on beside tensors."""
        self._local = _Local()
        self._misses = 0
        self._rest = 0

    def part(self, layer: QuantizedLinear, place: int, x: Tensor) -> Tensor | None:
        """What `layer`, which has that place, returns for x, or None when it has to compute that itself."""
        pending = self._local.pending
        if pending is not None:
            ys = pending.ys
            y, ys[place] = ys[place], None
            unchanged = y is not None and pending.x() is x
            if unchanged and (x._version == pending.version if pending.bits is None else pending.bits.are_of(x)):
                pending.left -= 1
                if not pending.left:
                    self._local.pending, self._misses = None, 0
                return y if pending.holds(layer, place, x) else None
            self._local.pending = None
            self._misses += 1
            if self._misses >= MISSES:
                self._rest = REST
        if self._rest:
            self._rest -= 1
            return None
        if not (is_plain(x) and x.is_contiguous() and (x.is_cpu or (x.is_cuda and not x.is_inference()))):
            return None
        settings = (layer.accuracy, generation[0], held_isa(), is_inference_mode_enabled())
        plan = self._plans.get((x.shape, x.dtype, x.is_cuda, settings))
        if plan is APART:
            return None
        pending = None if plan is None else self._compute(plan, x, settings)
        if pending is None:  # the first call of that kind, or tensors have changed
            plan = self._plan(x, settings)
            pending = None if plan is None else self._compute(plan, x, settings)
        if pending is None:
            return None
        self._local.pending = pending
        y, pending.ys[place] = pending.ys[place], None
        return y

    def _compute(self, plan: _Plan, x: Tensor, settings: Settings) -> _Pending | None:
        """The results of all layers; None when the plan is out of date, or each has to compute its own."""
        accuracy, recording = settings[0], is_grad_enabled()
        ready_layers, stacked = plan
        layouts: list[Tensor] = []
        biases: list[Tensor | None] = []
        biased = False
        for reference, ready in zip(self._layers, ready_layers):  # noqa: B905 (in every call; a plan is as long)
            layer = reference()
            if layer is None or layer.accuracy != accuracy:
                return None
            parameters = layer._parameters
            layout = ready.layout(parameters, layer._buffers)
            if layout is None or (recording and _requires_grad(x, parameters)):
                return None
            layouts.append(layout)
            bias = parameters["bias"]
            biases.append(bias)
            if bias is not None:
                if bias.is_inference():  # torch does not count its changes
                    return None
                biased = True
        states = [_state(bias) for bias in biases] if biased else []
        place: int | None = 0
        ys = cast(Any, None)
        try:
            if stacked is None:
                given = [bias for bias in biases if bias is not None] if biased else []
                ys = cpu._op(OPERATOR)(x, layouts, given, *ready_layers[0].tail[1:])
            elif biased == stacked.biased:  # layouts are of the biases too
                place = stacked.engine.place_of(x)
                ys = None if place is None else stacked.run(x, layouts[0], self._contiguous)
        except RuntimeError:  # for a bias that fits its layer no longer: the layer's own call says so
            return None
        if ys is None:
            return None
        pending = _Pending(x, ys, plan, place, settings)
        if biased:
            pending.biases, pending.bias_states = biases, states
        return pending

    def _plan(self, x: Tensor, settings: Settings) -> _Plan | None:
        """How to compute all layers in one call, kept for the next ones; None when that cannot be."""
        layers: list[QuantizedLinear] = []
        choices: list[Choice] = []
        for reference in self._layers:
            layer = reference()
            alone = layer is None or layer.accuracy != settings[0]
            choice = None if alone else _choice(cast("QuantizedLinear", layer), x, settings[0])
            if choice is None:
                return None
            layers.append(cast("QuantizedLinear", layer))
            choices.append(choice)
        made = _plan_of(layers, choices, x)
        if made is not None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[x.shape, x.dtype, x.is_cuda, settings] = made
        return None if made is APART else made


def _choice(layer: QuantizedLinear, x: Tensor, accuracy: str) -> Choice | None:
    """Who computes `layer` for x; None when its own call has to see to it."""
    weight, bias, shape = layer.weight_record, layer._parameters["bias"], x.shape
    fits = len(shape) and shape[-1] == weight.shape[1] and x.dtype in ACTIVATION_DTYPES
    there = [tensor.device == x.device for name, tensor in weight.tensors.items() if name != "header"]
    if not (fits and all(there)) or (is_grad_enabled() and _requires_grad(x, layer._parameters)):
        return None
    if bias is not None and not (bias.device == x.device and bias.dtype == x.dtype and bias.is_contiguous()):
        return None
    if isinstance(weight, BCQWeight):
        return bcq_choice(x, weight, AUTO, AUTO, accuracy)
    return codebook_choice(x, cast(CodebookWeight, weight), AUTO, AUTO, accuracy)


def _plan_of(layers: Sequence[QuantizedLinear], choices: Sequence[Choice], x: Tensor) -> _Plan | None:
    """How to compute layers for which `choices` were made; `APART`, or None when it cannot be now."""
    first = choices[0]
    if any(choice.kernel is not first.kernel or choice.algorithm == "dequantize" for choice in choices):
        return APART
    if first.kernel is cpu.BACKEND.bcq_linear:
        return _cpu_plan(layers, choices)
    alike = all((choice.algorithm, choice.accuracy) == (first.algorithm, first.accuracy) for choice in choices)
    return _stacked_plan(layers, first, x) if alike and first.kernel in gpu_siblings.engines() else APART


def _cpu_plan(layers: Sequence[QuantizedLinear], choices: Sequence[Choice]) -> _Plan | None:
    """By `OPERATOR`, each layer's layout made if need be."""
    made: list[Ready] = []
    for layer, choice in zip(layers, choices, strict=True):
        weight = cast(BCQWeight, layer.weight_record)
        cpu.prepare_bcq(weight, choice.accuracy)
        choice.ready = ready = choice.get_ready(weight, choice.algorithm, choice.accuracy)
        if ready is None or (made and ready.tail[1:] != made[0].tail[1:]):
            return None
        made.append(ready)
    return _Plan(made, None)


def _stacked_plan(layers: Sequence[QuantizedLinear], choice: Choice, x: Tensor) -> _Plan | None:
    """By the GPU's kernel that was chosen for all, the layout of all rows made if need be."""
    siblings = [gpu_siblings.sibling(layer.weight_record, layer._parameters["bias"]) for layer in layers]
    made = gpu_siblings.plan(siblings, x, choice.kernel, choice.algorithm, choice.accuracy)
    if made is None:
        return APART
    return _Plan(made, made[0].tail[0]) if made else None


def _kind(layer: QuantizedLinear) -> tuple[Any, ...]:
    """What siblings must have in common: tables depend on no more than K and group size, and codebooks."""
    layout = layer.layout
    books = tuple(layout.specs()["codebooks"].shape) if isinstance(layout, CodebookLayout) else ()
    return layer.format, layer.in_features, layout.group_size, books, layer.bias is None


def _fusible(layers: Sequence[QuantizedLinear]) -> bool:
    free = all(layer._fused is None for layer in layers)
    alike = len(set(map(id, layers))) == len(layers) and len(set(map(_kind, layers))) == 1
    return free and alike and (layers[0].format == "bcq" or _any_gpu())


def _any_gpu() -> bool:
    """Whether a backend can run here that computes siblings of codebook weights together."""
    stacking = gpu_siblings.engines()
    return any(b.codebook_linear in stacking and b.unavailable() is None for b in registry().values())


def fuse(model: nn.Module, groups: Iterable[Sequence[str]] = FUSED_GROUPS, *, contiguous: bool = False) -> int:
    """Compute sibling layers that read the same activations in one kernel call; returns how many groups there are.

    groups: each the names of children of one module. A group is made of quantized layers of one format and the same K
    and group size that all have a bias or all have none; where a GPU can be used, of codebook weights too, with equal
    num_codebooks, vec_len and codebook_bits. Names and tensors stay what they are, and on the CPU results do, bit for
    bit. What was fused before is undone first: `fuse(model, ())` only undoes. Copies and pickles of a model are not
    fused.

    Only eager calls gain (for others see `compile_options`): without gradients (`torch.no_grad`,
    `torch.inference_mode`), where another algorithm than "dequantize" is chosen. Everything else is computed layer by
    layer.

    On a GPU siblings must have equal bits, kinds and dtypes of scales, and ratios, too, and activations must not be
    made in inference mode. Results are equal up to the last bits there: a kernel splits its sums by the number of rows,
    which are those of all siblings. What the kernel reads of all is kept beside what layers have that were called on
    their own. Inside the capture of a CUDA graph siblings are fused if a call of that dtype and algorithm came before;
    do not let a replayed graph overwrite activations between the calls of siblings, which torch does not count as a
    change.

    contiguous: results for several tokens lie in one on a GPU, `[..., N1 + N2]`: the rows of each are that far apart,
    as in models whose q, k and v are one layer. True copies each into memory of its own, a launch for each sibling, for
    code that takes the outputs of linear layers for contiguous.

    Raises `ArgumentError` when `groups` is not of that form.
    """
    from .nn import QuantizedLinear

    wanted = [_names(group) for group in groups]
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module._fused = None
    made = 0
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in wanted:
            layers = [child for name in names if isinstance(child := children.get(name), QuantizedLinear)]
            if len(layers) == len(names) and _fusible(layers):
                group = FusedGroup(layers, contiguous)
                for place, layer in enumerate(layers):
                    layer._fused = (group, place)
                made += 1
    return made


def compile_options(mode: str = "default") -> dict[str, Any]:
    """Options of `torch.compile` with which siblings are one call in what it compiles, on a GPU with the CUDA kernels:

        torch.compile(model, options=lutgemm.fusion.compile_options(), dynamic=False)

    `fuse` is not needed for that. Calls are joined for a number of tokens that a graph is compiled for; a symbolic one
    leaves them apart. mode: as `torch.compile` has it, which takes either a mode or options; "reduce-overhead" captures
    CUDA graphs.
    """
    from . import compiled_fusion

    return compiled_fusion.options(mode)


def _names(group: Sequence[str]) -> tuple[str, ...]:
    if isinstance(group, str) or not all(isinstance(name, str) for name in group) or len(set(group)) < 2:
        raise ArgumentError(f"groups: got {group!r}; each is two names or more, such as {FUSED_GROUPS[1]}")
    return tuple(group)
