"""Linear layers, quantized or not, and models that hold them in awkward ways."""

import torch
from torch import nn

import lutgemm
from lutgemm.nn import QuantizedLinear

FREE = lutgemm.BCQConfig(bits=3, group_size=32, scale_kind="free", iters=2)
UNIFORM = lutgemm.BCQConfig(bits=4, group_size=32, scale_kind="uniform")
CODEBOOK = lutgemm.CodebookConfig(codebook_bits=6, group_size=32, iters=2)
CONFIGS = [FREE, UNIFORM, CODEBOOK]


def random_linear(n: int = 24, k: int = 70, bias: bool = True) -> nn.Linear:
    torch.manual_seed(n * 1000 + k)
    return nn.Linear(k, n, bias=bias)


def quantized(config=FREE, bias: bool = True) -> QuantizedLinear:
    return QuantizedLinear.from_linear(random_linear(bias=bias), config)


class Conv1D(nn.Module):
    """As transformers has it for GPT-2: the weight is `[K, N]`."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.lm_head = nn.Embedding(40, 64), nn.Linear(64, 64), nn.Linear(64, 40, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.body(self.embed(ids)))
