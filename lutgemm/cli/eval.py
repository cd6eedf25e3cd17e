"""`lutgemm eval`: perplexity of a model on a text file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..evaluation import model_context, perplexity
from ._model import add_model_arguments, load_model, positive_int, use_threads

NAME = "eval"
HELP = "perplexity of a model on a text file"
DEFAULT_CONTEXT = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help=f"tokens the model sees at once (default: {DEFAULT_CONTEXT}, or all that a shorter model has)",
    )
    parser.add_argument(
        "--stride", type=positive_int, metavar="N", help="tokens between windows (default: the context, no overlap)"
    )
    parser.add_argument("--limit-tokens", type=positive_int, metavar="N", help="score only the first N tokens")
    parser.add_argument(
        "--bos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="begin-of-sequence token in front of every window (auto: if the tokenizer adds one by itself)",
    )


def run(args: argparse.Namespace) -> int:
    text = read_text(args.text)
    threads = use_threads(args.threads)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[: args.limit_tokens]
    bos = bos_token(tokenizer, args.bos)
    if len(ids) + (bos is not None) < 2:
        raise ArgumentError(f"--text {args.text} gives {len(ids)} tokens, at least 2 are needed; use a longer text")
    context = args.context or min(DEFAULT_CONTEXT, model_context(model) or DEFAULT_CONTEXT)
    result = {"model": args.model, "text": str(args.text), "dtype": str(model.dtype).removeprefix("torch.")}
    result |= perplexity(model, ids, context, args.stride, bos_token_id=bos)
    result |= {"device": args.device, "threads": threads}
    print(json.dumps(result) if args.json else describe(result))
    return 0


def read_text(path: Path) -> str:
    """The text of a file. Raises `ArgumentError` when it cannot be read, is empty or is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArgumentError(f"--text {path} cannot be read ({error.strerror}); give a UTF-8 text file") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"--text {path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it, for example with `iconv -t UTF-8`"
        ) from None
    if not text.strip():
        raise ArgumentError(f"--text {path} is empty; give a text of at least 2 tokens")
    return text


def bos_token(tokenizer: Any, policy: str) -> int | None:
    """The id to put in front of every window under --bos `policy`, or None."""
    bos: int | None = tokenizer.bos_token_id
    if policy == "yes" and bos is None:
        raise ArgumentError("--bos yes: this tokenizer has no begin-of-sequence token; use --bos no")
    if policy == "auto" and bos is not None:
        return bos if tokenizer("a").input_ids[:1] == [bos] else None
    return bos if policy == "yes" else None


def describe(result: dict[str, Any]) -> str:
    """The result in three lines, everything stated that the number depends on."""
    return (
        f"perplexity {result['perplexity']:.4f}  (mean negative log-likelihood {result['nll']:.6f} nats)\n"
        f"{result['tokens']} of {result['tokens_given']} tokens of {result['text']} scored, in {result['windows']} "
        f"windows of context {result['context']}, stride {result['stride']}; {result['bos']}\n"
        f"{result['model']} in {result['dtype']}, {result['device']}, {result['threads']} threads, "
        f"{result['seconds']:.1f} s"
    )
