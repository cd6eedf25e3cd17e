"""Sibling layers in graphs of torch.compile: calls that read the same activations become one over their rows, stacked.

    x ─┬─► bcq_linear(x, Wq)                x ──► bcq_linear_siblings(x, [Wq, Wk, Wv]) ─┬─► columns of q
       ├─► bcq_linear(x, Wk)       ──►                                                  ├─► columns of k
       └─► bcq_linear(x, Wv)                                                            └─► columns of v

    torch.compile(model, options=lutgemm.fusion.compile_options())

What reads the same activations is plain to see in a graph, where nothing is changed in place: no groups are named, and
it does not matter whether `fuse` was called. Calls are joined on a GPU, for a number of tokens that the graph is
compiled for (a symbolic one may go to any algorithm), where one algorithm was chosen for all, not "dequantize".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from .backends import gpu_siblings
from .backends.gpu_layouts import BcqRecord, CodebookRecord
from .backends.gpu_siblings import Sibling
from .choices import Choice, new_bcq_choice, new_codebook_choice
from .errors import LutgemmError

_library = torch.library.Library("lutgemm", "FRAGMENT")
_library.define(
    "bcq_linear_siblings(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] offsets, Tensor[] zeros, "
    "Tensor[] ratios, Tensor[] biases, int group_size, str scale_kind, str backend, str algorithm, str accuracy) "
    "-> Tensor"
)
_library.define(
    "codebook_linear_siblings(Tensor x, Tensor[] codes, Tensor[] codebooks, Tensor[] scales, Tensor[] biases, "
    "int group_size, str backend, str algorithm, str accuracy) -> Tensor"
)

Tensors = Sequence[Tensor]
"""One of each sibling, or none where they have none."""


def _each(lists: Sequence[Tensors], count: int) -> list[tuple[Any, ...]]:
    """The tensors of each sibling, None for what they do not have."""
    none: Any = [None] * count
    return list(zip(*(tensors or none for tensors in lists), strict=True))


def _record(kind: Callable[..., Any], *fields: Any) -> Any:
    return kind(*fields)


def _together(x: Tensor, siblings: list[Sibling], choices: list[Choice], own: Callable[[int], Tensor]) -> Tensor:
    """`[M, N1 + N2 + ..]`; own(i): what the i-th returns alone."""
    first, y = choices[0], None
    if _one_choice(choices):
        y = gpu_siblings.run(siblings, x, first.kernel, first.algorithm, first.accuracy)
    return torch.cat([own(i) for i in range(len(siblings))], 1) if y is None else y


def _one_choice(choices: Sequence[Choice]) -> bool:
    """Whether they can be one call, as far as choices say."""
    what = {(choice.kernel, choice.algorithm, choice.accuracy) for choice in choices}
    return len(what) == 1 and choices[0].kernel in gpu_siblings.engines() and choices[0].algorithm != "dequantize"


def _bcq_run(
    x: Tensor,
    codes: Tensors,
    scales: Tensors,
    offsets: Tensors,
    zeros: Tensors,
    ratios: Tensors,
    biases: Tensors,
    group_size: int,
    scale_kind: str,
    backend: str,
    algorithm: str,
    accuracy: str,
) -> Tensor:
    each = _each((codes, scales, offsets, zeros, ratios, biases), len(codes))
    k, kind, names = x.shape[1], (group_size, scale_kind), (backend, algorithm, accuracy)
    siblings = [Sibling(_record(BcqRecord, *tensors[:-1], k, *kind), tensors[-1]) for tensors in each]
    choices = [new_bcq_choice(x, own, *kind, *names) for own in codes]

    def own(i: int) -> Tensor:
        return choices[i].kernel(x, *each[i], *kind, choices[i].algorithm, choices[i].accuracy)

    return _together(x, siblings, choices, own)


def _codebook_run(
    x: Tensor,
    codes: Tensors,
    codebooks: Tensors,
    scales: Tensors,
    biases: Tensors,
    group_size: int,
    backend: str,
    algorithm: str,
    accuracy: str,
) -> Tensor:
    each = _each((codes, codebooks, scales, biases), len(codes))
    k, names = x.shape[1], (backend, algorithm, accuracy)
    siblings = [Sibling(_record(CodebookRecord, *tensors[:-1], k, group_size), tensors[-1]) for tensors in each]
    choices = [new_codebook_choice(x, own, books, group_size, *names) for own, books, *_ in each]

    def own(i: int) -> Tensor:
        return choices[i].kernel(x, *each[i], group_size, choices[i].algorithm, choices[i].accuracy)

    return _together(x, siblings, choices, own)


def _fake(x: Tensor, codes: Tensors, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], sum(own.shape[1] for own in codes))


for _name, _run in (("bcq_linear_siblings", _bcq_run), ("codebook_linear_siblings", _codebook_run)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lutgemm::{_name}", _fake, lib=_library)


class _Op(NamedTuple):
    """How calls of an operator are joined."""

    siblings: Callable[[], Any]
    """the operator that computes them together"""
    tensors: int
    """of a layer, its bias the last: the arguments behind x"""
    choice: Callable[..., Choice]
    described_by: int
    """how many of them a choice looks at"""


_OPS = {
    "bcq_linear": _Op(lambda: torch.ops.lutgemm.bcq_linear_siblings.default, 6, new_bcq_choice, 1),
    "codebook_linear": _Op(lambda: torch.ops.lutgemm.codebook_linear_siblings.default, 4, new_codebook_choice, 2),
}
_VIEWS = ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze")


def _value(argument: Any) -> Any:
    """What names the value of a node: nodes of the same views of the same value are equal."""
    if not isinstance(argument, fx.Node):
        return tuple(map(_value, argument)) if isinstance(argument, (list, tuple)) else argument
    target = argument.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" and not argument.kwargs:
        name = target._schema.name.removeprefix("aten::")
        if name in _VIEWS:
            return (str(target), *map(_value, argument.args))
    return argument


def _example(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _kind(node: fx.Node, op: _Op) -> tuple[Any, ...]:
    """What calls must have in common to be computed together."""
    x, tensors, rest = node.args[0], node.args[1 : 1 + op.tensors], node.args[1 + op.tensors :]
    described = []
    for tensor in tensors:
        val = _example(tensor)
        described.append(None if val is None else (val.dtype, val.device, val.dim()))
    return node.target, _value(x), tuple(described), rest


def _choice(node: fx.Node, op: _Op) -> Choice | None:
    """Who would run that call; None for a symbolic number of tokens."""
    tensors, rest = node.args[1 : 1 + op.tensors], node.args[1 + op.tensors :]
    x, described = _example(node.args[0]), [_example(t) for t in tensors[: op.described_by]]
    if not isinstance(x.shape[0], int) or not x.shape[0]:
        return None
    try:
        return op.choice(x, *described, *rest)
    except LutgemmError:  # the call says so when it runs
        return None


def join(graph: fx.Graph) -> int:
    """Join the calls of siblings in a graph of ATen operators without changes in place; returns how many groups."""
    calls: dict[tuple[Any, ...], list[fx.Node]] = {}
    place = {node: at for at, node in enumerate(graph.nodes)}
    for node in place:
        op = _op_of(node)
        if op is not None and not node.kwargs:
            calls.setdefault(_kind(node, op), []).append(node)
    made = 0
    for group in calls.values():
        op = cast(_Op, _op_of(group[0]))
        begin = place[group[0]]
        group = [node for node in group if all(place[given] < begin for given in node.all_input_nodes[1:])]
        if len(group) > 1 and _joinable(group, op):
            _join(graph, group, op)
            made += 1
    return made


def _joinable(group: Sequence[fx.Node], op: _Op) -> bool:
    choices = [choice for node in group if (choice := _choice(node, op)) is not None]
    if len(choices) < len(group) or not _one_choice(choices):
        return False
    sizes = [_example(node).shape[1] for node in group]
    engine = gpu_siblings.engines()[choices[0].kernel]
    return op.described_by == 1 or engine.takes_own_codebooks(choices[0].algorithm, sizes)


def _op_of(node: fx.Node) -> _Op | None:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "lutgemm":
        return None
    return _OPS.get(target._schema.name.removeprefix("lutgemm::"))


def _join(graph: fx.Graph, group: list[fx.Node], op: _Op) -> None:
    """One call before the first of the group, and the columns of each in its place."""
    x, rest = group[0].args[0], group[0].args[1 + op.tensors :]
    tensors = [
        [t for t in of_all if t is not None]
        for of_all in zip(*(n.args[1 : 1 + op.tensors] for n in group), strict=True)
    ]

    def call(target: Any, *arguments: Any) -> fx.Node:
        node = graph.call_function(target, arguments)
        examples = fx.map_arg(arguments, _example)
        with mode:
            node.meta["val"] = target(*examples)
        return node

    mode = _example(group[0]).fake_mode
    aten, begin = torch.ops.aten, 0
    with graph.inserting_before(group[0]):
        y = call(op.siblings(), x, *tensors, *rest)
        for node in group:
            end = begin + _example(node).shape[1]
            part = call(aten.slice.Tensor, y, 1, begin, end)
            if _example(node).shape[0] != 1:  # as contiguous as it was; what reads it by elements takes that over
                part = graph.call_function(aten.clone.default, (part,), {"memory_format": torch.contiguous_format})
                part.meta["val"] = _example(node)
            node.replace_all_uses_with(part)
            begin = end
    for node in group:
        graph.erase_node(node)


class Pass(torch._inductor.custom_graph_pass.CustomGraphPass):
    """`join` for Inductor's option `post_grad_custom_pre_pass`."""

    def __call__(self, graph: fx.Graph) -> None:
        join(graph)

    def uuid(self) -> bytes:
        return torch._inductor.custom_graph_pass.get_hash_for_files((__file__,))


def options(mode: str = "default") -> dict[str, Any]:
    """Options of `torch.compile` under which siblings are computed together.

    mode: as `torch.compile` has it, which takes either a mode or options.
    """
    from torch._inductor import list_mode_options

    return {**list_mode_options(mode), "post_grad_custom_pre_pass": Pass()}
