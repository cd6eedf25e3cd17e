"""Siblings with Triton's kernels, in its interpreter, on CPU tensors: run by test_fusion_triton.py in a process of its
own.

Alone: `TRITON_INTERPRET=1 pytest tests/triton_fusion_checks.py`.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sibling_models import BCQ, CODEBOOK, RATIO, UNIFORM, close, siblings
from torch import nn

from lutgemm.backends import gpu_siblings, prepared, triton_siblings
from lutgemm.backends import triton as backend
from lutgemm.fusion import fuse

backends = importlib.import_module("lutgemm.backends")

assert backend.INTERPRETED, "set TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def only_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend that "auto" takes."""
    chosen = {"triton": backend.BACKEND, **backends._registry()}
    monkeypatch.setattr(backends, "_registry", lambda: chosen)
    backends.registry.cache_clear()
    backends.forget_choices()
    yield
    monkeypatch.undo()
    backends.registry.cache_clear()
    backends.forget_choices()


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call for siblings."""
    calls: list[int] = []

    def run(x: torch.Tensor, call: Any) -> torch.Tensor:
        y = triton_siblings._run(x, call)
        calls.append(y.shape[-1])
        return y

    replace_engine(monkeypatch, run=run)
    return calls


def replace_engine(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    for kernel in triton_siblings.ENGINES:
        engine = gpu_siblings.engines()[kernel]
        monkeypatch.setitem(gpu_siblings.engines(), kernel, engine._replace(**functions))


ALL = 70 + 20 + 33


def is_right(y: torch.Tensor, model: nn.Module, x: torch.Tensor, *names: str) -> bool:
    """Whether y is what these layers, all by default, give for x."""
    layers = [getattr(model, name) for name in names] or list(model.children())
    weights = [layer.weight_record.dequantize() for layer in layers]
    biases = [torch.zeros(len(w)) if n.bias is None else n.bias.float() for n, w in zip(layers, weights, strict=True)]
    expected = torch.nn.functional.linear(x.float(), torch.cat(weights), torch.cat(biases))
    return y.shape == expected.shape and close(y, expected.to(y.dtype))


@pytest.mark.parametrize(("config", "bias"), [(BCQ, True), (UNIFORM, False), (RATIO, True)])
def test_stacked_rows_give_what_layers_give(config: Any, bias: bool, rows: list[int]):
    fused = siblings(config, bias)[1]
    with torch.no_grad():
        for shape in ((1, 1, 96), (2, 3, 96), (96,), (0, 96)):
            x = torch.randn(shape)
            assert is_right(fused(x), fused, x)
        x = torch.randn(20, 96).half()
        assert is_right(fused.half()(x), fused, x)  # dequant_gemm
    assert rows == [ALL] * 5


def test_a_change_of_one_is_seen_and_weights_go_with_any_sibling(rows: list[int]):
    fused = siblings(BCQ, True)[1]
    x = torch.randn(1, 96)
    with torch.no_grad():
        for name in ("scales", "bias"):
            before = fused.q_proj(x), fused.k_proj(x), fused.v_proj(x)
            assert all(is_right(y, fused, x, f"{of}_proj") for y, of in zip(before, "qkv", strict=True))
            assert is_right(fused.q_proj(x), fused, x, "q_proj")
            getattr(fused.v_proj, name).mul_(2)
            assert is_right(fused.v_proj(x), fused, x, "v_proj")
            assert not close(fused.v_proj(x), before[2])
        kept = prepared.kept(fused.q_proj.codes)
        assert {kind.split(" ")[1] for kind in kept} == {"siblings"}
        del kept, fused.v_proj
        assert not prepared.kept(fused.q_proj.codes)
    assert set(rows) == {ALL}


def test_parts_stay_in_their_stream_and_capture(rows: list[int], monkeypatch: pytest.MonkeyPatch):
    place: list[int | None] = [7]
    replace_engine(monkeypatch, place_of=lambda x: place[0])
    fused = siblings()[1]
    x = torch.randn(1, 96)
    with torch.no_grad():
        for elsewhere in (-1, None):  # a capture, and one that cannot be told from others
            place[0] = 7
            assert is_right(fused.q_proj(x), fused, x, "q_proj")
            place[0] = elsewhere
            assert is_right(fused.k_proj(x), fused, x, "k_proj")
        assert rows == [ALL] * 2
        assert is_right(fused(x), fused, x)
        assert rows == [ALL] * 2


@pytest.mark.parametrize("shared", [False, True])
def test_codebooks(shared: bool, rows: list[int]):
    fused = siblings(CODEBOOK, True, shared)[1]
    with torch.no_grad():
        for shape in ((1, 96), (2, 2, 96)):
            x = torch.randn(shape)
            assert is_right(fused(x), fused, x)
        x = torch.randn(20, 96).half()
        assert is_right(fused.half()(x), fused, x)
    assert rows == [ALL] * 3


def test_what_cannot_be_stacked_runs_apart(rows: list[int]):
    apart, fused = siblings(RATIO)
    for model in (apart, fused):
        model.k_proj.ratios.mul_(2)
    x = torch.randn(1, 96)
    with torch.no_grad():
        assert torch.equal(fused(x), apart(x))
    assert not rows


def test_groups_of_codebooks_need_a_gpu_backend():
    model = nn.Sequential(siblings(CODEBOOK)[0])
    assert fuse(model) == 1
