"""The demo from beginning to end. A step whose result is there, made with the same settings, is skipped."""

from __future__ import annotations

import importlib.util
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import LutgemmError
from . import measure, text
from .files import Results, code_digest, discard, write_json
from .model import DEGRID_RANGE, GGUF, gguf_to_checkpoint, save_in_dtype
from .plot import plot_perplexity, plot_speed
from .table import render, render_texts
from .variants import OURS, TORCH, Variant, rtn_rival
from .wheels import fetch

SEED = 0
MODEL_CODE = ("demo/model.py",)
QUANTIZER_CODE = ("config.py", "quantize/*.py", "formats/*.py", "checkpoint/*.py")
RUNNING_CODE = ("*.so", "ops.py", "nn.py", "evaluation.py", "backends/*.py", "formats/*.py", "integrations/*.py")
"""What a result depends on, as `code_digest` takes it."""


@dataclass(frozen=True)
class Settings:
    """`lutgemm demo`'s options. tokens: of the text that is scored. seconds: of decoding, each row."""

    out: Path
    tokens: int
    seconds: float


class Demo:
    """One run. `rows` collects a record per variant; `seconds` the time of each step that was not reused."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.results = Results(settings.out / "steps")
        self.models = settings.out / "models"
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """All steps; returns what `results.json` holds."""
        out = self.settings.out
        require_packages()
        gguf, passage = fetch(GGUF, out / "downloads"), fetch(text.TEXT, out / "downloads")
        self.prepare_torch_rows(gguf)
        for name, config in OURS.items():
            report = self.quantize(Variant(name, "lutgemm", config=config))
            shapes = [tuple(layer["shape"]) for layer in report["layers"]]
            self.quantize(rtn_rival(name, report["totals"]["bits_per_quantized_weight"], shapes))
        self.measure(passage)
        record = self.record()
        write_json(out / "results.json", record)
        plot_perplexity(record["rows"], out / "perplexity.png", record["text"])
        plot_speed(record["rows"], out / "speed.png", record["machine"])
        return record

    def _step(self, name: str, settings: Any, compute: Callable[[], Any], needs: Path | None = None) -> Any:
        def timed() -> Any:
            print(f"demo: {name}", file=sys.stderr)
            started = time.perf_counter()
            value = compute()
            self.seconds[name] = round(time.perf_counter() - started, 2)
            return value

        return self.results.get(name, settings, timed, needs)

    def folder(self, variant: Variant) -> Path:
        return self.models / variant.slug

    def prepare_torch_rows(self, gguf: Path) -> None:
        """The fp32 checkpoint from the GGUF file, the same in bf16, and their rows."""
        full, half = TORCH
        settings = {"gguf": GGUF.sha256, "seed": SEED, "range": DEGRID_RANGE, "code": code_digest(*MODEL_CODE)}
        self._step(
            "fp32 checkpoint",
            settings,
            lambda: gguf_to_checkpoint(gguf, self.folder(full), seed=SEED),
            self.folder(full) / "config.json",
        )
        self._step(
            "bf16 checkpoint",
            settings,
            lambda: save_in_dtype(self.folder(full), self.folder(half), torch.bfloat16),
            self.folder(half) / "config.json",
        )
        for variant, bits in ((full, 32.0), (half, 16.0)):
            self.add_row(variant, bits)

    def quantize(self, variant: Variant) -> dict[str, Any]:
        """Quantize the fp32 checkpoint to `variant` and add its row; returns the conversion's report."""
        from ..checkpoint import quantize_checkpoint

        full, folder, config = self.folder(TORCH[0]), self.folder(variant), variant.config
        assert config is not None

        def convert() -> dict[str, Any]:
            discard(folder)
            return quantize_checkpoint(full, folder, config, base_model="SmolLM2-135M-Instruct, rescaled")

        settings = {
            "config": config.to_dict(),
            "model": [GGUF.sha256, SEED, DEGRID_RANGE, code_digest(*MODEL_CODE)],
            "code": code_digest(*QUANTIZER_CODE),
        }
        report = self._step(f"quantize {variant.name}", settings, convert, folder / "config.json")
        totals = report["totals"]
        self.add_row(variant, totals["bits_per_quantized_weight"], weight_error=totals["relative_error"])
        return report

    def add_row(self, variant: Variant, bits: float, **more: Any) -> None:
        files = self.folder(variant).glob("*.safetensors")
        size = sum(file.stat().st_size for file in files)
        self.rows.append(variant.to_dict() | {"bits_per_weight": bits, "file_bytes": size} | more)

    def measure(self, passage: Path) -> None:
        """Perplexity, decode speed and text of every row."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder(TORCH[0]))
        ids = text.evaluation_ids(passage, tokenizer, self.settings.tokens)
        prompt = text.prompt_ids(tokenizer)
        common = {
            "code": code_digest(*RUNNING_CODE, *QUANTIZER_CODE, *MODEL_CODE, "demo/measure.py"),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": machine(),
        }
        variants = [Variant.from_dict({k: row[k] for k in Variant.__dataclass_fields__}) for row in self.rows]
        for variant, row in zip(variants, self.rows, strict=True):
            settings = common | {"variant": variant.to_dict(), "text": text.TEXT.sha256, "tokens": len(ids)}
            score = partial(measure.measure_perplexity, variant, self.folder(variant), ids)
            row["perplexity"] = self._step(f"perplexity {variant.name}", settings | {"context": measure.CONTEXT}, score)
        speeds = self._step(
            "decode speed",
            common
            | {"variants": [v.to_dict() for v in variants], "prompt": prompt, "seconds": self.settings.seconds}
            | {"new_tokens": measure.NEW_TOKENS},
            lambda: measure.measure_speed(variants, [self.folder(v) for v in variants], prompt, self.settings.seconds),
        )
        for row in self.rows:
            speed = speeds[row["name"]]
            row["speed"] = {key: value for key, value in speed.items() if key != "ids"}
            row["text"] = text.until_end(tokenizer, speed["ids"])

    def record(self) -> dict[str, Any]:
        scored = self.rows[0]["perplexity"]
        return {
            "lutgemm": __version__,
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "model": f"SmolLM2-135M-Instruct ({GGUF.requirement}, {GGUF.file_name}), channels rescaled",
            "text": text.slice_name(scored["tokens_given"]),
            "context": scored["context"],
            "stride": scored["stride"],
            "bos": scored["bos"],
            "prompt": text.PROMPT,
            "rows": self.rows,
            "step_seconds": self.seconds,
            "steps_reused": self.results.reused,
        }


def machine() -> str:
    """The CPU's name and how many threads this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    count = torch.get_num_threads()
    return f"{name}, {count} thread{'s' * (count != 1)}"


def require_packages() -> None:
    """Raise `LutgemmError` naming what of the demo's packages is missing."""
    needed = ("transformers", "accelerate", "gguf", "matplotlib")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise LutgemmError(f"the demo needs {', '.join(missing)}; run `pip install 'lutgemm[demo]'`")


def run_demo(settings: Settings, quiet: bool = False) -> dict[str, Any]:
    """Run the demo and, unless `quiet`, print its table and texts to stdout; returns what results.json holds.

    Raises `LutgemmError` saying what is missing.
    """
    started = time.perf_counter()
    record = Demo(settings).run()
    out = settings.out
    if not quiet:
        print(render(record))
        print(render_texts(record))
        print(f"saved: {out / 'results.json'}, {out / 'perplexity.png'}, {out / 'speed.png'}")
    reused = len(record["steps_reused"])
    print(f"demo: {time.perf_counter() - started:.0f} s, {reused} steps reused", file=sys.stderr)
    return record
