"""What `eval` and `generate` share: a model and its tokenizer from a folder or hub id, quantized or not."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..checkpoint.discover import config_errors
from ..checkpoint.json_file import read_json
from ..checkpoint.reader import refuse_unfinished
from ..errors import ArgumentError, CheckpointError, LutgemmError

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --dtype, --device, --threads, --json."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a checkpoint, quantized by lutgemm or not")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of activations and unquantized weights")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def positive_int(text: str) -> int:
    """argparse type: an integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def use_threads(threads: int | None) -> int:
    """Set torch's thread count where one is asked for; returns the count in force."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def parse_device(name: str) -> torch.device:
    """The torch device called `name`. Raises `ArgumentError` when it is unknown or absent here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"--device {name!r} cannot be used here ({reason}); use cpu") from None
    return device


def load_model(source: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint folder or hub id, the model in eval mode on `device`.

    Raises `CheckpointError` naming `source` and the reason when it cannot be loaded, `ArgumentError` on a bad device.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise CheckpointError(f"reading {source} needs transformers ({error}); pip install 'lutgemm[hf]'") from None
    from ..integrations.transformers import load

    target = parse_device(device)
    expected: tuple[type[Exception], ...] = (OSError, RecursionError, SafetensorError, *config_errors())
    folder = Path(source)
    refuse_unfinished(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config = read_json(folder / "config.json") if folder.is_dir() else {}
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any
        if _is_lutgemm(config):
            model = load(source, dtype=DTYPES[dtype], device=target)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype] or "auto")
            model = model.to(device=target)
    except LutgemmError:
        raise
    except expected as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise CheckpointError(
            f"cannot load {source}: {type(error).__name__}: {reason[:300]}; "
            "check its config.json, tokenizer and weights, or download it again"
        ) from error
    return model.eval(), tokenizer


def _is_lutgemm(config: Mapping[str, Any]) -> bool:
    """Whether a local checkpoint says that lutgemm quantized it; hub ids take transformers' route, which knows too."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "lutgemm"
