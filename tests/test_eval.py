"""Perplexity against a direct computation, decode speed, and the verbs `eval` and `generate`."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import lutgemm
from lutgemm import evaluation
from lutgemm.checkpoint import quantize_checkpoint
from lutgemm.cli import main
from lutgemm.errors import ArgumentError, LutgemmError

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,"
SPECIALS = ("<unk>", "<s>", "</s>")
VOCAB = len(ALPHABET) + len(SPECIALS)
TEXT = "the quick brown fox jumps over the lazy dog, then sleeps. " * 3
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}. {% endif %}"


def tiny_llama(**config) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 256, "bos_token_id": 1}
    settings |= {"eos_token_id": 2, "initializer_range": 0.3}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | config))).eval()


def char_tokenizer(chat: bool = True, adds_bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate([*SPECIALS, *ALPHABET])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


@pytest.fixture(scope="module")
def model() -> transformers.LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(path)
    char_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def random_ids(count: int) -> torch.Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(1))


def direct_nll(model, ids: torch.Tensor, context: int, stride: int, bos: int | None = None) -> list[float]:
    """-log p of every scored token, each from a pass of its own over exactly the tokens that it may see."""
    room = context - (bos is not None)
    stride = min(stride, room)
    result = []
    for t in range(len(ids)):
        window = 0 if t < room else -(-(t - room + 1) // stride)
        seen = ids[window * stride : t]
        if bos is not None:
            seen = torch.cat([torch.tensor([bos]), seen])
        if len(seen):
            with torch.no_grad():
                logits = model(input_ids=seen[None]).logits[0, -1].double()
            result.append(float(logits.logsumexp(0) - logits[ids[t]]))
    return result


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(
    ("tokens", "context", "stride"), [(50, 16, 16), (50, 16, 5), (49, 16, 16), (16, 16, 1), (7, 16, 3)]
)
def test_perplexity_equals_a_direct_computation(model, tokens, context, stride, bos):
    ids = random_ids(tokens)
    got = evaluation.perplexity(model, ids, context, stride, bos_token_id=bos, progress=False)
    want = direct_nll(model, ids, context, stride, bos)
    assert got["tokens"] == len(want)
    assert got["tokens_given"] == tokens
    assert got["nll"] == pytest.approx(sum(want) / len(want), rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(got["nll"]), rel=1e-12)
    assert ("no BOS" in got["bos"]) == (bos is None)


def test_without_overlap_each_window_leaves_out_its_first_token(model):
    got = evaluation.perplexity(model, random_ids(64), context=16, progress=False)
    assert (got["windows"], got["tokens"], got["stride"]) == (4, 60, 16)


def test_one_window_is_the_models_own_loss(model):
    ids = random_ids(40)
    with torch.no_grad():
        loss = model(input_ids=ids[None], labels=ids[None]).loss
    assert evaluation.perplexity(model, ids.tolist(), 64, progress=False)["nll"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(("tokens", "context", "stride"), [(10, 4, 4), (11, 4, 2), (3, 8, 8), (9, 4, 1)])
def test_windows_score_every_token_once(tokens, context, stride):
    scored = [t for begin, end, first in evaluation.windows(tokens, context, stride) for t in range(first, end)]
    assert scored == list(range(tokens))
    assert all(0 < end - begin <= context for begin, end, _ in evaluation.windows(tokens, context, stride))


def test_training_flag_is_restored(model):
    other = tiny_llama().train()
    evaluation.perplexity(other, random_ids(8), 8, progress=False)
    assert other.training


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([1], {}, "token_ids: got 1 tokens, at least 2"),
        ([], {"bos_token_id": 1}, "at least 1"),
        ([1, VOCAB], {}, f"token id {VOCAB} is outside"),
        ([1, -2], {}, "token id -2"),
        ([1, 2, 3], {"context": 1}, "context=1"),
        ([1, 2, 3], {"context": 8, "stride": 9}, "stride=9"),
        ([1, 2, 3], {"stride": 0}, "stride=0"),
        ([1, 2, 3], {"context": 512}, "256 positions"),
    ],
)
def test_perplexity_refuses(model, ids, options, message):
    with pytest.raises(ArgumentError, match=message):
        evaluation.perplexity(model, ids, **({"context": 16, "progress": False} | options))


def test_nan_logits_are_named():
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(LutgemmError, match="NaN or infinities"):
        evaluation.perplexity(broken, random_ids(8), 8, progress=False)


def test_greedy_decode_is_what_generate_gives(model):
    prompt = random_ids(5)
    ids, seconds = evaluation.greedy_decode(model, prompt, 12)
    want = model.generate(prompt[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ids.tolist() == want[0, 5:].tolist()
    assert seconds > 0


def test_decode_speed_takes_models_in_turns(model, monkeypatch):
    order = []
    plain = evaluation.greedy_decode
    monkeypatch.setattr(
        evaluation, "greedy_decode", lambda m, *rest: (order.append("ab"[m is not model]), plain(m, *rest))[1]
    )
    got = evaluation.decode_speed({"a": model, "b": tiny_llama()}, [3, 4], 4, repeats=2, progress=False)
    assert "".join(order) == "ababab"
    for result in got.values():
        assert len(result["samples"]) == 2
        assert result["low"] <= result["tokens_per_s"] <= result["high"]
        assert (result["new_tokens"], result["prompt_tokens"], len(result["ids"])) == (4, 2, 4)
    assert got["a"]["ids"] == got["b"]["ids"]


def test_decode_speed_spends_about_the_seconds_given(model):
    few = evaluation.decode_speed({"a": model}, [3], 2, seconds=1e-9, progress=False)["a"]["samples"]
    many = evaluation.decode_speed({"a": model}, [3], 2, seconds=0.3, progress=False)["a"]["samples"]
    assert len(few) == 3 < len(many)


def test_decode_speed_refuses(model):
    with pytest.raises(ArgumentError, match="models"):
        evaluation.decode_speed({}, [1], 4)
    with pytest.raises(ArgumentError, match="new_tokens=1"):
        evaluation.decode_speed({"a": model}, [1], 1)
    with pytest.raises(ArgumentError, match="prompt_ids"):
        evaluation.decode_speed({"a": model}, [], 4)


def run_json(capsys, *arguments) -> dict:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_eval_states_what_its_number_depends_on(folder, model, text_file, capsys):
    got = run_json(capsys, "eval", folder, "--text", text_file, "--context", 32, "--stride", 8, "--limit-tokens", 100)
    ids = char_tokenizer()(TEXT).input_ids[:100]
    assert got["nll"] == pytest.approx(evaluation.perplexity(model, ids, 32, 8, progress=False)["nll"], rel=1e-5)
    assert (got["context"], got["stride"], got["tokens_given"], got["tokens"]) == (32, 8, 100, 99)
    assert (got["dtype"], got["device"], got["threads"]) == ("float32", "cpu", torch.get_num_threads())
    assert main(["eval", str(folder), "--text", str(text_file), "--limit-tokens", "100"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("perplexity ")
    assert "context 256, stride 256; no BOS" in out


def test_eval_of_a_quantized_checkpoint(folder, text_file, tmp_path, capsys):
    config = lutgemm.BCQConfig(bits=4, group_size=32)
    quantize_checkpoint(folder, tmp_path / "q", config, progress=False)
    plain = run_json(capsys, "eval", folder, "--text", text_file)
    quantized = run_json(capsys, "eval", tmp_path / "q", "--text", text_file)
    ids = char_tokenizer()(TEXT).input_ids
    own = evaluation.perplexity(lutgemm.load(tmp_path / "q"), ids, 256, progress=False)
    assert quantized["nll"] == pytest.approx(own["nll"], rel=1e-6)
    assert quantized["nll"] != plain["nll"]


def test_eval_bos(folder, model, text_file, capsys, tmp_path):
    assert "no BOS" in run_json(capsys, "eval", folder, "--text", text_file, "--bos", "auto")["bos"]
    with_bos = run_json(capsys, "eval", folder, "--text", text_file, "--bos", "yes", "--context", 32)
    assert with_bos["bos"].startswith("BOS in front")
    assert (with_bos["tokens"], with_bos["stride"]) == (len(TEXT), 31)
    model.save_pretrained(tmp_path / "adds")
    char_tokenizer(adds_bos=True).save_pretrained(tmp_path / "adds")
    by_itself = run_json(capsys, "eval", tmp_path / "adds", "--text", text_file, "--context", 32)
    assert by_itself["nll"] == with_bos["nll"]


def test_eval_in_bfloat16(folder, text_file, capsys):
    got = run_json(capsys, "eval", folder, "--text", text_file, "--dtype", "bfloat16")
    assert got["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"abc\xff\xfe", "not UTF-8: byte 0xff at offset 3"),
        (b"a", "gives 1 tokens"),
        (None, "cannot be read"),
    ],
)
def test_eval_refuses_bad_text(folder, tmp_path, capsys, data, message):
    path = tmp_path / "bad.txt"
    if data is not None:
        path.write_bytes(data)
    assert main(["eval", str(folder), "--text", str(path)]) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("lutgemm: error: ")
    assert message in err
    assert str(path) in err


def test_eval_refuses_a_bad_model(tmp_path, text_file, capsys):
    assert main(["eval", str(tmp_path), "--text", str(text_file)]) == 1
    assert "no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    assert main(["eval", str(tmp_path), "--text", str(text_file)]) == 1
    assert f"cannot load {tmp_path}" in capsys.readouterr().err


def test_eval_refuses_bad_options(folder, text_file, capsys):
    arguments = ["eval", str(folder), "--text", str(text_file)]
    assert main([*arguments, "--device", "nonsense"]) == 1
    assert "--device 'nonsense'" in capsys.readouterr().err
    assert main([*arguments, "--context", "300"]) == 1
    assert "256 positions" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main([*arguments, "--context", "0"])
    assert usage.value.code == 2


def test_generate_is_greedy_by_default(folder, model, capsys):
    got = run_json(capsys, "generate", folder, "--prompt", "the quick", "--max-new-tokens", 6)
    ids = char_tokenizer()("the quick").input_ids
    want = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=2)[0, len(ids) :]
    assert got["ids"] == want.tolist()
    assert (got["prompt_tokens"], got["new_tokens"], got["temperature"]) == (9, len(got["ids"]), 0.0)
    assert main(["generate", str(folder), "--prompt", "the quick", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == f"the quick{got['text']}\n"


def test_generate_samples_by_seed(folder, capsys):
    arguments = ["generate", folder, "--prompt", "the", "--max-new-tokens", 12, "--temperature", 2.0]
    first = run_json(capsys, *arguments, "--seed", 1)["ids"]
    assert first == run_json(capsys, *arguments, "--seed", 1)["ids"]
    assert first != run_json(capsys, *arguments, "--seed", 2)["ids"]


def test_generate_chat(folder, capsys, tmp_path, model):
    got = run_json(capsys, "generate", folder, "--prompt", "hello", "--chat", "--max-new-tokens", 3)
    assert got["prompt_tokens"] == len("hello. ")
    model.save_pretrained(tmp_path)
    char_tokenizer(chat=False).save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "hello", "--chat"]) == 1
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--prompt", ""], "gives no tokens"), (["--prompt", "abc", "--max-new-tokens", "254"], "use at most 253")],
)
def test_generate_refuses(folder, capsys, arguments, message):
    assert main(["generate", str(folder), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "warm"])
def test_generate_refuses_a_temperature(folder, value):
    with pytest.raises(SystemExit) as usage:
        main(["generate", str(folder), "--prompt", "a", f"--temperature={value}"])
    assert usage.value.code == 2
