"""What the CUDA kernels read: one module for each kernel, with the layout it keeps of a weight and how it is called.

A module has `ALGORITHMS`, a tuple of `Algorithm`; `MODULES` lists the modules. Layouts are made by torch operations, on
the device of the weight, and kept beside its tensors (`kept_layout`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import BackendError
from ...formats.bcq import uniform_center, uniform_plane_weights
from .. import Problem, Reason, prepared

MODULES = ("lut", "bit_planes", "sign_planes", "dequantize", "codebook")
"""In the order in which their algorithms are listed."""

Ops = Callable[[str], Callable[..., Tensor]]
"""Name of an operator of `csrc/bind_cuda*.cpp`, such as "_bcq_lut_gemm_cuda" -> the operator."""


class BcqRecord(NamedTuple):
    """A BCQ weight as SPEC.md stores it, on the device of x."""

    codes: Tensor
    """int32 [bits, N, ceil(K/32)]"""
    scales: Tensor
    """[bits, N, G], or [1, N, G] for the kinds uniform and ratio"""
    offsets: Tensor | None
    """[N, G]"""
    zeros: Tensor | None
    """[N, G], uniform only"""
    ratios: Tensor | None
    """[bits], ratio only"""
    in_features: int
    group_size: int
    scale_kind: str

    @property
    def bits(self) -> int:
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        return self.codes.shape[1]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a layout is made from."""
        return self[:5]

    @property
    def parameters(self) -> tuple[Any, ...]:
        """What else a layout depends on."""
        return (self.in_features, self.group_size, self.scale_kind, self.offsets is None)

    def plane_scales(self) -> Tensor:
        """[bits, N, G]: each plane's scale in the free form, as stored or fp32 (SPEC.md, sections 2.2 and 2.3)."""
        if self.scale_kind == "free":
            return self.scales
        if self.ratios is not None:
            return self.scales.to(torch.float32) * self.ratios[:, None, None]
        place = torch.tensor(uniform_plane_weights(self.bits), dtype=torch.float32, device=self.scales.device)
        return self.scales.to(torch.float32) * place[:, None, None]

    def plane_offsets(self) -> Tensor | None:
        """[N, G]: the offsets in the free form, as stored or fp32 (ratio, uniform), or None."""
        if self.zeros is not None:
            return self.scales[0].to(torch.float32) * uniform_center(self.zeros, self.bits)
        return self.offsets if self.offsets is None or self.ratios is None else self.offsets.to(torch.float32)


class CodebookRecord(NamedTuple):
    """A codebook weight as SPEC.md stores it, on the device of x."""

    codes: Tensor
    """uint8 or int16 [num_codebooks, N, J]"""
    codebooks: Tensor
    """[num_codebooks, 2**codebook_bits, vec_len]"""
    scales: Tensor
    """[N, G]"""
    in_features: int
    group_size: int

    @property
    def out_features(self) -> int:
        return self.codes.shape[1]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a layout is made from."""
        return self[:3]

    @property
    def parameters(self) -> tuple[Any, ...]:
        """What else a layout depends on."""
        return self[3:]


Record = Any
"""`BcqRecord` or `CodebookRecord`, by the algorithm's op."""


@dataclass(frozen=True)
class Algorithm:
    """One algorithm of one op."""

    op: str
    """"bcq_linear" or "codebook_linear"."""
    name: str
    run: Callable[[Ops, Tensor, Record, Tensor | None, int], Tensor]
    """run(ops, x, record, bias, accuracy) -> y [M, N]. x [M, K]: its columns are adjacent, its rows may be a stride
    apart, it starts at a multiple of 16 bytes; M may be 0. bias [N] of x's dtype. accuracy as in `Problem`."""
    unsupported: Callable[[Problem], Reason | None] = lambda problem: None
    """Why it cannot take the problem, or None."""


@lru_cache(maxsize=1)
def algorithms() -> dict[tuple[str, str], Algorithm]:
    """(op, name) -> algorithm, of all modules."""
    modules = [import_module(f"{__name__}.{name}") for name in MODULES]
    return {(each.op, each.name): each for module in modules for each in module.ALGORITHMS}


Layout = tuple[Tensor, ...]

ALIGNMENT = 16
"""Bytes that kernels load at once."""


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it, contiguous and at an aligned address."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _on_a_thread_of_its_own(make: Callable[[], Layout], device: torch.device) -> Layout:
    """make() on the default stream of a CUDA device, finished before this returns.

    What is kept must not come from the memory pool of a CUDA graph, into which torch directs what the capturing or
    warming-up thread allocates; and whichever stream finds it later must find it complete.
    """
    torch.cuda.current_stream(device).synchronize()
    made: list[Layout] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.device(device), torch.no_grad():
                made.append(make())
                torch.cuda.current_stream(device).synchronize()
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=work, name="lutgemm-layout")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return made[0]


def kept_layout(record: Record, kind: str, make: Callable[[], Layout]) -> Layout:
    """The tensors that make() returns, made once for the tensors of `record` as they are now (`prepared`).

    kind: unique to the layout, such as "cuda lut_gemm". make() must not keep a reference to the record's tensors.

    Raises `BackendError` where a CUDA graph is being captured and there is no layout yet: what is made in a capture has
    no values before the graph is replayed.
    """
    tensors, parameters = record.tensors, record.parameters
    found: Any = prepared.find(tensors, parameters, kind)
    if found is not None:
        return found
    state = prepared.state_of(tensors)
    if not record.codes.is_cuda:
        with torch.no_grad():
            layout = make()
    else:
        if torch.cuda.is_current_stream_capturing():
            raise BackendError(
                f"a weight's layout {kind!r} would be made while a CUDA graph is being captured; "
                "call the layer once with as many tokens before the capture"
            )
        layout = _on_a_thread_of_its_own(make, record.codes.device)
    kept: Any = layout
    prepared.keep(tensors, parameters, state, kind, kept)
    return layout
