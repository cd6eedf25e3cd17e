"""`lutgemm generate`: text from a prompt."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from ..errors import ArgumentError
from ..evaluation import model_context
from ._model import add_model_arguments, load_model, positive_int, use_threads

NAME = "generate"
HELP = "text from a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn of the model's chat template")
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="0: greedy (default); above: sampling"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")


def temperature(text: str) -> float:
    """argparse type: a finite number from 0."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return value


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    prompt = encode(tokenizer, args.prompt, args.chat)
    limit = model_context(model)
    if limit is not None and len(prompt) + args.max_new_tokens > limit:
        raise ArgumentError(
            f"--max-new-tokens {args.max_new_tokens} after a prompt of {len(prompt)} tokens passes the {limit} "
            f"positions of {args.model}; use at most {max(0, limit - len(prompt))}"
        )
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    new_ids = generate(model, tokenizer, prompt, args.max_new_tokens, args.temperature)
    seconds = time.perf_counter() - started
    if args.chat:
        text = tokenizer.decode(new_ids, skip_special_tokens=True)
    else:
        text = decode_after(tokenizer, prompt, new_ids)
    if args.json:
        record = {"model": args.model, "prompt": args.prompt, "text": text, "ids": new_ids, "chat": args.chat}
        record |= {"prompt_tokens": len(prompt), "new_tokens": len(new_ids), "temperature": args.temperature}
        print(json.dumps(record | {"seed": args.seed, "seconds": seconds}))
    else:
        print(text if args.chat else args.prompt + text)
        print(f"{len(new_ids)} tokens in {seconds:.1f} s", file=sys.stderr)
    return 0


def decode_after(tokenizer: Any, prompt: list[int], new_ids: list[int]) -> str:
    """The text of `new_ids` as it goes on after the prompt: decoded alone, some tokenizers drop its first space."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *new_ids], skip_special_tokens=True)
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(new_ids, skip_special_tokens=True))


def encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Token ids of the prompt. Raises `ArgumentError` when there are none, or no chat template for `chat`."""
    if not chat:
        ids: list[int] = tokenizer(prompt, verbose=False).input_ids
    elif not getattr(tokenizer, "chat_template", None):
        raise ArgumentError("--chat: this model's tokenizer has no chat template; leave --chat away")
    else:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise ArgumentError(f"--prompt {prompt!r} gives no tokens; write some text")
    return ids


class _Bar:
    """transformers' streamer protocol, moving a progress bar on stderr. The first `put` is the prompt."""

    def __init__(self, total: int) -> None:
        self.bar = tqdm(total=total, desc="generate", unit="tok", leave=False)
        self.prompt_seen = False

    def put(self, ids: torch.Tensor) -> None:
        if self.prompt_seen:
            self.bar.update(ids.numel())
        self.prompt_seen = True

    def end(self) -> None:
        self.bar.close()


def generate(model: Any, tokenizer: Any, prompt: list[int], new_tokens: int, temperature: float) -> list[int]:
    """Up to `new_tokens` ids after the prompt: argmax at temperature 0, else sampled from the whole softmax."""
    ids = torch.tensor([prompt], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    bar = _Bar(new_tokens)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        pad_token_id=pad,
        streamer=bar,
        **sampling,
    )
    new: list[int] = out[0, len(prompt) :].tolist()
    return new
