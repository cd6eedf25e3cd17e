"""Quantized checkpoints whose records, configuration or report are damaged: `inspect` and `verify` say where."""

from __future__ import annotations

import pytest
import tiny_checkpoints as tiny
import torch
from tiny_checkpoints import refused

from lutgemm import BCQConfig, CodebookConfig
from lutgemm.checkpoint import quantize_checkpoint
from lutgemm.cli import main

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def src(tmp_path):
    return tiny.make(tmp_path / "src")


@pytest.fixture(params=["bcq", "codebook"])
def quantized(request, src, tmp_path):
    """A quantized checkpoint in one file."""
    config = {
        "bcq": BCQConfig(bits=2, group_size=32, method="rtn"),
        "codebook": CodebookConfig(vec_len=4, codebook_bits=3, group_size=32, iters=1),
    }[request.param]
    quantize_checkpoint(src, tmp_path / "q", config, progress=False)
    return tmp_path / "q", request.param


def _spoil_header_version(state, module):
    state[f"{module}.header"][0] = 2


def _spoil_header_shape(state, module):
    state[f"{module}.header"][2] = 2**31 - 1


def _spoil_scales_dtype(state, module):
    state[f"{module}.scales"] = state[f"{module}.scales"].float()


def _spoil_codes_shape(state, module):
    state[f"{module}.codes"] = state[f"{module}.codes"][:, :-1].contiguous()


def _drop_scales(state, module):
    del state[f"{module}.scales"]


def _drop_header(state, module):
    del state[f"{module}.header"]


def _swap_codes(state, module):
    other = module.replace("up_proj", "down_proj")
    state[f"{module}.codes"], state[f"{other}.codes"] = state[f"{other}.codes"], state[f"{module}.codes"]


def _extra_tensor(state, module):
    state[f"{module}.ratios"] = torch.ones(2)


@pytest.mark.parametrize(
    "spoil",
    [
        _spoil_header_version,
        _spoil_header_shape,
        _spoil_scales_dtype,
        _spoil_codes_shape,
        _drop_scales,
        _drop_header,
        _swap_codes,
        _extra_tensor,
    ],
)
def test_records_that_contradict_themselves(spoil, quantized, src, capsys):
    dst, _ = quantized
    tiny.rewrite(dst, lambda state: spoil(state, WEIGHT.removesuffix(".weight")))
    for message in (refused(capsys, "inspect", dst), refused(capsys, "verify", dst, src, "-q")):
        assert WEIGHT.removesuffix(".weight") in message
        assert "quantize" in message


def test_values_out_of_range(quantized, src, capsys):
    """Codes beyond the codebook; a NaN scale. Headers look right, reading the values shows it."""
    dst, kind = quantized
    module = WEIGHT.removesuffix(".weight")

    def spoil(state):
        if kind == "codebook":
            state[f"{module}.codes"].view(-1)[5] = 8
        else:
            state[f"{module}.scales"].view(-1)[0] = float("nan")

    tiny.rewrite(dst, spoil)
    assert main(["inspect", str(dst)]) == 0
    message = refused(capsys, "inspect", dst, "--values")
    assert module in message
    assert ("codes from 0 to 8" if kind == "codebook" else "NaN") in message
    assert module in refused(capsys, "verify", dst, src, "-q")


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.update(format_version=99),
        lambda q: q.update(format_version="1"),
        lambda q: q.update(layers={}),
        lambda q: q["layers"][0].update(modules=[1]),
        lambda q: q["layers"][0]["layout"].update(format="gguf"),
        lambda q: q["layers"][0]["layout"].update(group_size=-32),
        lambda q: q["layers"][0]["layout"].update(group_size=10**30),
        lambda q: q["layers"][0]["layout"].update(bits=9, codebook_bits=40),
        lambda q: q["layers"][0]["modules"].append("model.layers.9.mlp.up_proj"),
        lambda q: q["layers"][0]["modules"].append(q["layers"][0]["modules"][0]),
        lambda q: q.update(config=[]),
    ],
)
def test_hostile_quantization_config(change, quantized, src, capsys):
    dst, _ = quantized
    tiny.edit_json(dst / "config.json", lambda config: change(config["quantization_config"]))
    refused(capsys, "inspect", dst)
    refused(capsys, "verify", dst, src, "-q")


def test_damaged_report(quantized, src, capsys):
    dst, _ = quantized
    (dst / "report.json").write_bytes(b"[" * 10_000)
    assert "report.json" in refused(capsys, "inspect", dst)
    assert "report.json" in refused(capsys, "verify", dst, src, "-q")


def test_verify_of_what_is_not_quantized(src, capsys):
    assert "was not quantized by lutgemm" in refused(capsys, "verify", src, src, "-q")
