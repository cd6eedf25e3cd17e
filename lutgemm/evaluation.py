"""Perplexity and decode speed of causal language models, as `lutgemm eval` and `lutgemm demo` report them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import ArgumentError, LutgemmError
from .formats.base import check_int

MAX_CONTEXT = 2**20
"""Largest window that `perplexity` accepts, in tokens."""

NLL_ROWS = 64
"""Tokens whose logits are turned to fp64 at a time: 64 x 49,152 vocabulary x 8 bytes = 25 MB."""

BOS_POLICIES = {
    False: "no BOS added; the first token of a window that starts without overlap is context only",
    True: "BOS in front of every window, within its context",
}
"""What `perplexity` says about the beginning of windows, by whether it was given a BOS token."""


@contextmanager
def _evaluating(*models: nn.Module) -> Any:
    """The models in eval mode and without autograd; their training flags restored after."""
    was_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, training in zip(models, was_training, strict=True):
            model.train(training)


def model_context(model: nn.Module) -> int | None:
    """The longest context that the model's config states, or None where it states none."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _model_device(model: nn.Module) -> torch.device:
    tensor = next(iter(model.parameters()), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def _check_token_ids(argument: str, token_ids: Tensor | Sequence[int], model: nn.Module, least: int) -> Tensor:
    """int64 `[T]` on the CPU. Raises `ArgumentError` when T < `least` or an id is outside the model's vocabulary."""
    ids = torch.as_tensor(token_ids, dtype=torch.int64, device="cpu").flatten()
    if len(ids) < least:
        raise ArgumentError(f"{argument}: got {len(ids)} tokens, at least {least} are needed; use a longer text")
    vocab = getattr(getattr(model, "config", None), "vocab_size", None)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (isinstance(vocab, int) and high >= vocab):
        bad = low if low < 0 else high
        raise ArgumentError(
            f"{argument}: token id {bad} is outside the model's vocabulary of {vocab}; "
            "use the tokenizer that belongs to the model"
        )
    return ids


def windows(tokens: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first) of each window over `tokens` tokens: `[begin, end)` is read, `[first, end)` is scored.

    `first` is the end of the window before, so that no token is scored twice. A window that overlaps none has no
    context for its own first token; `perplexity` leaves that token out unless a BOS stands in front of it.
    """
    spans, done = [], 0
    for begin in range(0, tokens, stride):
        end = min(begin + context, tokens)
        spans.append((begin, end, done))
        done = end
        if end == tokens:
            break
    return spans


def _token_nll(logits: Tensor, targets: Tensor) -> float:
    """Sum over t of -log softmax(logits[t])[targets[t]], in fp64. logits `[T, V]`, targets `[T]`."""
    total = 0.0
    for rows, wanted in zip(logits.split(NLL_ROWS), targets.split(NLL_ROWS), strict=True):
        total += float(torch.nn.functional.cross_entropy(rows.double(), wanted, reduction="sum"))
    return total


def perplexity(
    model: nn.Module,
    token_ids: Tensor | Sequence[int],
    context: int = 1024,
    stride: int | None = None,
    *,
    bos_token_id: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity of a causal language model on a text of T tokens: exp of the mean negative log-likelihood.

    token_ids: `[T]`, T >= 2 (T >= 1 with a BOS). context: tokens the model sees at once. stride: tokens from one
    window to the next; None or `context` gives windows that do not overlap. Each token is scored at most once.
    bos_token_id: put in front of every window (it takes one place of the context); None adds nothing, and the first
    token of each window that overlaps none is then not scored, for want of context.

    Returns `perplexity`, `nll` (mean, nats, summed in fp64), `tokens` (scored), `tokens_given`, `windows`, `context`,
    `stride`, `bos` (the policy in words), `seconds`.
    Raises `ArgumentError` on a bad argument, `LutgemmError` when the model gives NaN or infinite likelihoods.
    """
    check_int("context", context, 2, MAX_CONTEXT)
    stride = context if stride is None else check_int("stride", stride, 1, context)
    limit = model_context(model)
    if limit is not None and context > limit:
        raise ArgumentError(f"context={context} is longer than the {limit} positions of this model; use a smaller one")
    ids = _check_token_ids("token_ids", token_ids, model, 2 if bos_token_id is None else 1)
    device = _model_device(model)
    prefix = ids.new_empty(0) if bos_token_id is None else ids.new_tensor([bos_token_id])
    room = context - len(prefix)
    stride = min(stride, room)
    spans = windows(len(ids), room, stride)

    nll, scored, started = 0.0, 0, time.perf_counter()
    with _evaluating(model), tqdm(total=len(ids), desc="perplexity", unit="tok", disable=not progress) as bar:
        for begin, end, done in spans:
            window = torch.cat([prefix, ids[begin:end]]).to(device)
            # window[p] is predicted by logits[p - 1]; position 0 by nothing.
            first = max(1, done - begin + len(prefix))
            if first < len(window):
                logits = model(input_ids=window[None], use_cache=False).logits[0, first - 1 : -1]
                nll += _token_nll(logits, window[first:])
                scored += len(window) - first
                if not math.isfinite(nll):
                    raise LutgemmError(
                        f"the model's log-likelihood is {nll} in tokens {begin} to {end}: its logits hold NaN or "
                        "infinities; check its weights with `lutgemm verify`, or use a wider --dtype"
                    )
                bar.set_postfix_str(f"ppl {_exp(nll / scored):.3f}", refresh=False)
            bar.update(end - done)
    return {
        "perplexity": _exp(nll / scored),
        "nll": nll / scored,
        "tokens": scored,
        "tokens_given": len(ids),
        "windows": len(spans),
        "context": context,
        "stride": stride,
        "bos": BOS_POLICIES[bos_token_id is not None],
        "seconds": time.perf_counter() - started,
    }


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def greedy_decode(model: nn.Module, prompt_ids: Tensor, new_tokens: int) -> tuple[Tensor, float]:
    """`new_tokens` tokens by argmax after the prompt `[T]`, and the seconds they took without the prompt's own pass.

    The prompt's pass gives the first of them, so `new_tokens - 1` steps of M = 1 are timed. No token ends it early.
    """
    with _evaluating(model):
        step = prompt_ids.to(_model_device(model))[None]
        out = model(input_ids=step, use_cache=True)
        picked = [out.logits[:, -1:].argmax(-1)]
        _synchronize(picked[0].device)
        started = time.perf_counter()
        for _ in range(new_tokens - 1):
            out = model(input_ids=picked[-1], past_key_values=out.past_key_values, use_cache=True)
            picked.append(out.logits[:, -1:].argmax(-1))
        _synchronize(picked[0].device)
        seconds = time.perf_counter() - started
    return torch.cat(picked, dim=1)[0].cpu(), seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decode_speed(
    models: Mapping[str, nn.Module],
    prompt_ids: Tensor | Sequence[int],
    new_tokens: int = 32,
    *,
    repeats: int = 5,
    seconds: float | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Greedy decode speed of several models, measured in turns so that a slow spell of the machine hits all alike.

    models: name -> causal language model; all take the same prompt `[T]`. One untimed turn of each comes first.
    Then `repeats` rounds, or with `seconds` as many rounds as that many seconds a model allow (at least 3).
    The prompt's own pass is not timed; batch is 1; the key-value cache is on.

    Returns by name `tokens_per_s` (median over rounds), `low`, `high` (slowest and fastest round), `samples`, and
    `new_tokens`, `prompt_tokens`, `threads`, `ids` (the tokens decoded).
    """
    if not models:
        raise ArgumentError("models={} is empty; give at least one model")
    check_int("new_tokens", new_tokens, 2, MAX_CONTEXT)
    check_int("repeats", repeats, 1, 10_000)
    prompt = _check_token_ids("prompt_ids", prompt_ids, next(iter(models.values())), 1)
    decoded = {}
    for name, model in tqdm(models.items(), desc="decode warm-up", unit="model", disable=not progress):
        decoded[name], _ = greedy_decode(model, prompt, new_tokens)

    samples: dict[str, list[float]] = {name: [] for name in models}
    budget = None if seconds is None else seconds * len(models)
    started, rounds = time.perf_counter(), 0
    with tqdm(
        total=repeats if budget is None else None, desc="decode speed", unit="round", disable=not progress
    ) as bar:
        while rounds < (repeats if budget is None else 3) or (
            budget is not None and (time.perf_counter() - started) * (rounds + 1) / rounds < budget
        ):
            for name, model in models.items():
                _, took = greedy_decode(model, prompt, new_tokens)
                samples[name].append((new_tokens - 1) / took)
            rounds += 1
            bar.update()
    return {
        name: {
            "tokens_per_s": statistics.median(speeds),
            "low": min(speeds),
            "high": max(speeds),
            "samples": speeds,
            "new_tokens": new_tokens,
            "prompt_tokens": len(prompt),
            "threads": torch.get_num_threads(),
            "ids": decoded[name].tolist(),
        }
        for name, speeds in samples.items()
    }
