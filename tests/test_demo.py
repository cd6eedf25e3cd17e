"""The demo's parts without network: reuse, the model's rescaling, the table and the plots; then a small run."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from test_eval import char_tokenizer, tiny_llama

from lutgemm import BCQConfig
from lutgemm.cli import main
from lutgemm.demo import files, measure, model, plot, run, table, text, variants
from lutgemm.errors import CheckpointError


def test_replacing_leaves_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text("new" * (1 // 0))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError, match="cannot be written"), files.replacing(path / "below"):
        pass


def test_results_are_reused_by_settings(tmp_path):
    results = files.Results(tmp_path / "steps")
    calls = []
    get = lambda settings, needs=None: results.get("a step", settings, lambda: calls.append(1) or len(calls), needs)  # noqa: E731
    assert get({"x": 1}) == get({"x": 1}) == 1
    assert get({"x": 2}) == 2
    assert get({"x": 2}, tmp_path / "gone") == 3
    (tmp_path / "steps" / "a step.json").write_text("{damaged")
    assert get({"x": 2}) == 4
    assert files.Results(tmp_path / "steps").get("a step", {"x": 2}, list) == 4
    assert (results.computed, results.reused) == (["a step"] * 4, ["a step"])


def test_a_failed_step_leaves_no_result(tmp_path):
    results = files.Results(tmp_path)
    results.get("a", 1, lambda: "old")
    with pytest.raises(ZeroDivisionError):
        results.get("a", 2, lambda: 1 // 0)
    assert results.get("a", 1, lambda: "again") == "again"


def test_code_digest_depends_on_the_files():
    one, two = files.code_digest("demo/*.py"), files.code_digest("config.py")
    assert one != two
    assert files.code_digest("demo/*.py") == one


def test_degrid_keeps_the_function_and_leaves_the_grid():
    plain = tiny_llama(num_hidden_layers=2)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_((module.weight * 10).round().clamp(-8, 7) / 10)
    moved = copy.deepcopy(plain)
    model.degrid(moved, seed=0)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        want, got = plain(input_ids=ids).logits, moved(input_ids=ids).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    for name, module in moved.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            own = plain.get_submodule(name).weight
            assert own.unique().numel() <= 16 < module.weight.unique().numel()
            ratio = (module.weight / own)[own != 0]
            assert ratio.min() >= 0.8 * 0.8 - 1e-6, name
            assert ratio.max() <= 1.25 * 1.25 + 1e-6, name


def test_rtn_rival_has_the_nearest_bits():
    shapes = [(64, 576), (32, 1536)]
    assert variants.average_bits(variants.rtn_config(4, 64), shapes) == 4 + 24 / 64
    rival = variants.rtn_rival("ours", 4.375, shapes)
    assert (rival.config.bits, rival.config.group_size, rival.config.method) == (4, 64, "rtn")
    assert rival.rival == "ours"
    assert rival.name == "RTN 4-bit g64"
    near = variants.rtn_rival("ours", 4.0, shapes)
    assert abs(variants.average_bits(near.config, shapes) - 4.0) <= 0.1
    assert variants.Variant.from_dict(json.loads(json.dumps(rival.to_dict()))) == rival
    assert rival.slug == "rtn-4-bit-g64"


def test_text_slice_is_the_end_of_the_file(tmp_path):
    path = tmp_path / "text"
    path.write_text("abc" * 50, encoding="utf-8")
    tokenizer = char_tokenizer()
    assert tokenizer.decode(text.evaluation_ids(path, tokenizer, 4)).replace(" ", "") == "cabc"
    assert len(text.evaluation_ids(path, tokenizer, 1000)) == 150
    assert text.until_end(tokenizer, [*tokenizer("ab").input_ids, 2, *tokenizer("c").input_ids]).split() == ["a", "b"]


def row(name: str, kind: str, size: int, perplexity: float, speed: float, rival: str | None = None, dtype="float32"):
    return {
        "name": name,
        "kind": kind,
        "dtype": dtype,
        "rival": rival,
        "bits_per_weight": 4.375,
        "file_bytes": size * 10**6,
        "perplexity": {"perplexity": perplexity, "tokens": 90},
        "speed": {
            "tokens_per_s": speed,
            "low": speed * 0.9,
            "high": speed * 1.1,
            "samples": [speed] * 3,
            "new_tokens": 8,
            "prompt_tokens": 4,
        },
        "text": f"the answer of {name}\n",
    }


ROWS = [
    row("torch fp32", "torch", 538, 19.13, 20.0),
    row("torch bf16", "torch", 269, 19.2, 30.0, dtype="bfloat16"),
    row("BCQ 4-bit", "lutgemm", 171, 22.456, 50.0),
    row("RTN 4-bit g64", "rtn", 171, 25.9, 51.0, rival="BCQ 4-bit"),
    row("codebook 2-bit", "lutgemm", 144, 123456.0, 60.0),
]
RECORD = {
    "rows": ROWS,
    "model": "a model",
    "text": "the last 100 tokens of a text",
    "context": 16,
    "stride": 16,
    "bos": "no BOS added",
    "prompt": "why?",
    "machine": "a CPU, 2 threads",
}


def test_table_shows_every_number():
    lines = table.render(RECORD).splitlines()
    assert lines[0].split() == ["variant", "file", "MB", "bits/weight", "perplexity", "tokens/s", "vs", "fp32"]
    assert lines[4].split() == ["BCQ", "4-bit", "171.0", "4.375", "22.46", "50.0", "2.50x"]
    assert lines[5].startswith("  RTN 4-bit g64")
    assert "1.2e+05" in lines[6]
    assert len({len(line) for line in lines[:7]}) == 1
    notes = " ".join(" ".join(lines[8:]).split())
    for stated in ("the last 100 tokens of a text; 90 scored, context 16, stride 16; no BOS", "a CPU, 2 threads"):
        assert stated in notes
    markdown = table.render_markdown(RECORD).splitlines()
    assert markdown[4] == "| BCQ 4-bit | 171.0 | 4.375 | 22.46 | 50.0 | 2.50x |"
    assert len({line.count("|") for line in markdown}) == 1


def test_texts_show_every_row():
    shown = table.render_texts(RECORD)
    assert "Prompt: why?" in shown
    assert all(f"the answer of {r['name']}" in shown for r in ROWS)


@pytest.mark.parametrize("draw", [plot.plot_perplexity, plot.plot_speed])
def test_plots_are_pictures(tmp_path, draw):
    from matplotlib import image

    path = tmp_path / "plot.png"
    draw(ROWS, path, "some text")
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 300
    colors = {tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in plot.COLORS.values()}
    seen = {tuple(p) for p in (pixels[..., :3] * 255).round().astype(int).reshape(-1, 3).tolist()}
    assert colors <= seen
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_demo(tmp_path, monkeypatch) -> Path:
    """The demo with a tiny model in place of the GGUF file, a short text, and nothing to download."""
    downloads = tmp_path / "out" / "downloads"
    downloads.mkdir(parents=True)
    for wheel_file, data in ((model.GGUF, b"gguf"), (text.TEXT, b"the quick brown fox. " * 20)):
        (downloads / wheel_file.file_name).write_bytes(data)
    monkeypatch.setattr(run, "fetch", lambda wheel_file, folder: folder / wheel_file.file_name)

    def convert(gguf, folder, seed):
        tiny_llama(hidden_size=128, intermediate_size=192, num_hidden_layers=1).save_pretrained(folder)
        char_tokenizer().save_pretrained(folder)

    monkeypatch.setattr(run, "gguf_to_checkpoint", convert)
    monkeypatch.setattr(measure, "CONTEXT", 64)
    monkeypatch.setattr(measure, "NEW_TOKENS", 4)
    monkeypatch.setattr(text, "PROMPT", "hello")
    few = {"BCQ 4-bit": BCQConfig(bits=4, group_size=64), "codebook": variants.OURS["codebook 2-bit"]}
    monkeypatch.setattr(run, "OURS", few)
    monkeypatch.setattr(run, "code_digest", lambda *patterns: "the same")
    return tmp_path / "out"


def test_demo_end_to_end_and_again(small_demo, capsys, monkeypatch):
    arguments = ["demo", "--out", str(small_demo), "--tokens", "200", "--seconds", "1"]
    monkeypatch.setattr(measure, "decode_speed", lambda *a, seconds, **k: _fast_speed(*a, **k))
    assert main(arguments) == 0
    out = capsys.readouterr().out
    names = ["torch fp32", "torch bf16", "BCQ 4-bit", "RTN 4-bit g64", "codebook"]
    assert [name for name in names if f"\n{name} " in out or f"\n  {name} " in out] == names
    assert "last 200 tokens of c4.utf8" in out
    assert {"results.json", "perplexity.png", "speed.png"} <= {p.name for p in small_demo.iterdir()}
    record = json.loads((small_demo / "results.json").read_text())
    by_name = {r["name"]: r for r in record["rows"]}
    assert by_name["torch fp32"]["bits_per_weight"] == 32
    assert by_name["BCQ 4-bit"]["bits_per_weight"] == 4.375 == by_name["RTN 4-bit g64"]["bits_per_weight"]
    on_disk = sum(p.stat().st_size for p in (small_demo / "models" / "bcq-4-bit").glob("*.safetensors"))
    assert by_name["BCQ 4-bit"]["file_bytes"] == on_disk
    assert by_name["BCQ 4-bit"]["weight_error"] <= by_name["RTN 4-bit g64"]["weight_error"]
    assert record["steps_reused"] == []
    assert len(record["step_seconds"]) == 2 + 4 + 6 + 1

    def never(*_, **__):
        raise AssertionError("a finished step ran again")

    for name in ("gguf_to_checkpoint", "save_in_dtype"):
        monkeypatch.setattr(run, name, never)
    monkeypatch.setattr(measure, "load_variant", never)
    assert main([*arguments, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rows"] == record["rows"]
    assert len(again["steps_reused"]) == len(record["step_seconds"])


def _fast_speed(models, prompt, new_tokens):
    from lutgemm.evaluation import decode_speed

    return decode_speed(models, prompt, new_tokens, repeats=1, progress=False)


def test_demo_names_missing_packages(tmp_path, monkeypatch, capsys):
    found = run.importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "the demo needs gguf; run `pip install 'lutgemm[demo]'`" in capsys.readouterr().err


def test_gguf_to_checkpoint(tmp_path):
    """A small Llama written as a GGUF file in Q4_1 comes back as a plain checkpoint that computes the same."""
    source = write_gguf(tmp_path / "tiny.gguf")
    model.gguf_to_checkpoint(source, tmp_path / "fp32", seed=0)
    assert "quantization_config" not in json.loads((tmp_path / "fp32" / "config.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp32")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        want, got = plain(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert loaded.dtype == torch.float32
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert not torch.equal(loaded.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)
    model.save_in_dtype(tmp_path / "fp32", tmp_path / "bf16", torch.bfloat16)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    assert half.dtype == torch.bfloat16


def write_gguf(path: Path) -> Path:
    import gguf
    import numpy as np

    hidden, mlp, heads, kv_heads, vocab = 64, 96, 4, 2, 32
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*"abcdefghijklmnopqrstuvwxyz", "<s>", "</s>", "Ġ", ".", ",", "ab"])
    writer.add_token_types([1] * 26 + [3, 3] + [1] * 4)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(26)
    writer.add_eos_token_id(27)
    half = hidden // heads * kv_heads
    shapes = {"attn_q": (hidden, hidden), "attn_k": (half, hidden), "attn_v": (half, hidden)}
    shapes |= {"attn_output": (hidden, hidden), "ffn_gate": (mlp, hidden), "ffn_up": (mlp, hidden)}
    shapes |= {"ffn_down": (hidden, mlp)}
    for name, shape in shapes.items():
        weight = generator.normal(0, 0.2, shape).astype(np.float32)
        data = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", generator.uniform(0.5, 1.5, hidden).astype(np.float32))
    writer.add_tensor("token_embd.weight", generator.normal(0, 1, (vocab, hidden)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
