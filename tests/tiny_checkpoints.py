"""Tiny random Hugging Face checkpoints for the tests of conversion."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lutgemm.cli import main

SMALL = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

CONFIGS = {
    "llama": lambda **kw: transformers.LlamaConfig(**(SMALL | kw)),
    "qwen2": lambda **kw: transformers.Qwen2Config(**(SMALL | kw)),
    "qwen3": lambda **kw: transformers.Qwen3Config(**(SMALL | {"head_dim": 32} | kw)),
    "mistral": lambda **kw: transformers.MistralConfig(**(SMALL | {"sliding_window": 16} | kw)),
    "gemma": lambda **kw: transformers.GemmaConfig(**(SMALL | {"head_dim": 32} | kw)),
    "phi": lambda **kw: transformers.PhiConfig(**(SMALL | kw)),
    "mixtral": lambda **kw: transformers.MixtralConfig(**(SMALL | {"num_local_experts": 3} | kw)),
    "gpt2": lambda **kw: transformers.GPT2Config(
        **({"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 48, "n_positions": 64} | kw)
    ),
    "opt": lambda **kw: transformers.OPTConfig(
        **(
            {"vocab_size": 48, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
            | {"max_position_embeddings": 64, "word_embed_proj_dim": 64}
            | kw
        )
    ),
}


def make(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, sharded: bool = False, **config
) -> Path:
    """A checkpoint of `kind` written by transformers, biases and norms random so that a mix-up shows."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](**config))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1:
                param.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": "60KB"} if sharded else {}))
    return folder


def linear_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Module name -> weight [N, K] of every linear layer of the model that transformers loads, the head included."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    conv1d = transformers.pytorch_utils.Conv1D
    return {
        name: module.weight.detach().T if isinstance(module, conv1d) else module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, conv1d))
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a single-file checkpoint: `change(dict)` in place."""
    state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def digests(folder: Path, skip: tuple[str, ...] = ("report.json", "report.md")) -> dict[str, str]:
    """File name -> sha256 of everything in a folder, its subfolders included, but `skip` (they state times)."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skip
    }


def edit_json(path: Path, change) -> None:
    """Change the JSON object in `path`: `change(dict)` in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(capsys, *arguments) -> str:
    """The one line that `lutgemm arguments` fails with."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("lutgemm: error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr
    assert len(stderr) < 1500, "a hostile value is not repeated at length"
    return stderr
