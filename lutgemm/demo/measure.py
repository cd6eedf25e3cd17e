"""Loading the demo's variants and measuring them: perplexity one by one, decode speed all in one run."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluation import decode_speed, perplexity
from .variants import Variant

CONTEXT = 1024
NEW_TOKENS = 48


def load_variant(variant: Variant, folder: Path) -> Any:
    """The model of a row, in eval mode: quantized rows in bf16, as models are served, torch rows in their own dtype."""
    from transformers import AutoModelForCausalLM

    from ..integrations.transformers import load

    if variant.config is not None:
        return load(str(folder), dtype=torch.bfloat16).eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, variant.dtype)).eval()


def measure_perplexity(variant: Variant, folder: Path, ids: Sequence[int]) -> dict[str, Any]:
    """`evaluation.perplexity` of one row over non-overlapping windows of `CONTEXT` tokens, no BOS."""
    model = load_variant(variant, folder)
    result = perplexity(model, ids, CONTEXT)
    del model
    gc.collect()
    return result


def measure_speed(
    variants: Sequence[Variant], folders: Sequence[Path], prompt: Sequence[int], seconds: float
) -> dict[str, dict[str, Any]]:
    """`evaluation.decode_speed` of all rows in turns, `seconds` a row."""
    models = {v.name: load_variant(v, folder) for v, folder in zip(variants, folders, strict=True)}
    result = decode_speed(models, prompt, NEW_TOKENS, seconds=seconds)
    models.clear()
    gc.collect()
    return result
