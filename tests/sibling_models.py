"""Models of sibling layers for the tests of `lutgemm.fuse`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lutgemm
from lutgemm import fusion
from lutgemm.backends import cpu
from lutgemm.fusion import fuse
from lutgemm.nn import replace_linear
from lutgemm.testing.cases import OpCase

BCQ = lutgemm.BCQConfig(bits=3, group_size=32, scale_kind="free", iters=1)
UNIFORM = lutgemm.BCQConfig(bits=4, group_size=32, scale_kind="uniform")
CODEBOOK = lutgemm.CodebookConfig(codebook_bits=4, group_size=32, iters=1)
RATIO = "ratio"
"""BCQ with the same ratios."""


class Attention(nn.Module):
    """Projections of one input, N not multiples of what kernels take at a time; the query may have its own."""

    def __init__(self, bias: bool = False, sizes: tuple[int, ...] = (70, 20, 33)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(96, n, bias=bias) for n in sizes)

    def forward(self, x: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        first = self.q_proj(x if query is None else query)
        return torch.cat([first, self.k_proj(x), self.v_proj(x)], -1)


def pair(config=BCQ, bias: bool = False) -> tuple[nn.Module, nn.Module]:
    """The same quantized layers, apart and fused on a CPU."""
    model = Attention(bias)
    replace_linear(model, config)
    twin = copy.deepcopy(model)
    assert fuse(model) == (0 if config is CODEBOOK else 1)
    return twin.requires_grad_(False), model.requires_grad_(False)


def siblings(
    config: Any = BCQ, bias: bool = False, shared: bool = False, sizes: tuple[int, ...] = (70, 20, 33)
) -> tuple[nn.Module, nn.Module]:
    """The same quantized layers, apart and fused, where a backend can stack rows. shared: with equal codebooks."""
    model = Attention(bias, sizes)
    if config is RATIO:
        for name, linear in list(model.named_children()):
            weight = OpCase(N=linear.out_features, K=96, group_size=32, bits=2, scale_kind="ratio").weight()
            weight.tensors["ratios"].copy_(torch.tensor([1.0, 0.375]))
            setattr(model, name, lutgemm.BCQLinear.from_weight(weight, linear.bias))
    else:
        replace_linear(model, config)
    if shared:
        with torch.no_grad():
            model.k_proj.codebooks.copy_(model.q_proj.codebooks)
            model.v_proj.codebooks.copy_(model.q_proj.codebooks)
    twin = copy.deepcopy(model)
    assert fuse(model) == 1
    return twin.requires_grad_(False), model.requires_grad_(False)


def close(y: torch.Tensor, expected: torch.Tensor, most: float | None = None) -> bool:
    """Whether they differ by no more than roundings, or by that share of the root mean square."""
    most = most or {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[y.dtype]
    return y.shape == expected.shape and bool((y - expected).float().norm() <= most * expected.float().norm())


def count_fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of layers of each fused call."""
    calls: list[int] = []
    operator = cpu._op

    def counting(name: str) -> Callable[..., Any]:
        def call(x: torch.Tensor, layouts: list[torch.Tensor], *rest: Any) -> list[torch.Tensor]:
            ys = operator(name)(x, layouts, *rest)
            calls.append(len(layouts))
            return ys

        return call if name == fusion.OPERATOR else operator(name)

    monkeypatch.setattr(cpu, "_op", counting)
    return calls
