"""Baselines of `lutgemm bench` on the CPU: right by their own measure, absent or refused with a reason."""

import json
import re
import sys

import pytest
import torch
from bench_runs import TINY, few_copies

from lutgemm import _native
from lutgemm.bench import layer, peers
from lutgemm.bench.baselines import BASELINES, ON_CUDA_ONLY, Baseline, rounding
from lutgemm.cli import main
from lutgemm.errors import BackendError
from lutgemm.testing.cases import OpCase

small_memory = pytest.fixture(autouse=True)(few_copies)

PACKAGES = {"ort_4bit": "onnxruntime", "ort_2bit": "onnxruntime", "bnb_nf4": "bitsandbytes"}
"""Baselines of the extra bench-peers."""
HOST, NO_HOST = _native.host()


@pytest.mark.parametrize(("k", "outliers"), [(256, False), (192, True)])
@pytest.mark.parametrize("name", [name for name in BASELINES if name not in ON_CUDA_ONLY])
def test_a_baseline_is_right_by_its_own_measure(name, k, outliers):
    """Against fp64 on its own weight: within its bound, and not by a bound that lets anything pass."""
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    x = OpCase(M=1, N=64, K=k, outliers=outliers).inputs().x
    prepared = BASELINES[name].prepare(layer.Request(64, k, cold=True, threads=1))
    calls = prepared.bind(x)
    assert len(calls) == 3
    truth = x.double() @ prepared.dense().double().T
    bound = BASELINES[name].bound(x)
    assert bound < (0.5 if outliers else 0.05)
    for call in calls:
        y = torch.as_tensor(call()).double()
        assert y.shape == (1, 64)
        assert (y - truth).norm() / truth.norm() <= bound
    bits = 8 * prepared.nbytes / (64 * k)
    assert {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4, "4bit": 4, "2bit": 2, "nf4": 4}[
        name.split("_")[1]
    ] == int(bits)


def test_rounding_of_blocks():
    x = torch.tensor([[0.0, 1.0, -1.0, 10.0, 0.0, 0.0]])
    step = torch.tensor([2 / 100, 10 / 100]).square().div(12).mean().sqrt()
    assert rounding(x, 100, 3) == pytest.approx(float(step / x.square().mean().sqrt()))
    assert rounding(x, 100) == pytest.approx(11 / 100 / 12**0.5 / float(x.square().mean().sqrt()))


@pytest.mark.parametrize("name", ["onnxruntime", "onnx", "bitsandbytes"])
def test_an_absent_package_is_reported_with_the_remedy(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    peers._nf4.cache_clear()
    wanted = {"onnxruntime": "ort_2bit", "onnx": "ort_2bit", "bitsandbytes": "bnb_nf4"}[name]
    if wanted == "ort_2bit" and name == "onnx":
        pytest.importorskip("onnxruntime")
    assert main([*TINY, "--op", "codebook_linear", "--hot", "--baselines", f"torch_bf16,{wanted}"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^absent: {wanted}: {name} cannot be imported .*lutgemm\[bench-peers\]", out, re.MULTILINE)
    assert re.search(r"torch_bf16 .*yes$", out, re.MULTILINE)
    assert len(re.findall(rf"^absent: {wanted}", out, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("name", "request_", "m", "message"),
    [
        (
            "torch_int4",
            layer.Request(64, 100, False, 1),
            1,
            "torch_int4 takes K a multiple of one of .128, 64, 32. here, got K=100",
        ),
        ("torch_int4", layer.Request(60, 128, False, 1), 1, "torch_int4 takes N a multiple of 16, got N=60"),
        ("torch_int4", layer.Request(64, 192, False, 1, "cuda"), 1, "K a multiple of 128 on cuda, got K=192"),
        ("torch_int8", layer.Request(64, 128, False, 1, "cuda"), 1, "torch_int8 runs on cpu"),
        ("gemv_bf16", layer.Request(64, 128, False, 2), 1, "dense GEMV has one thread"),
        ("gemv_fp32", layer.Request(64, 128, False, 1), 2, "dense GEMV takes one token, got M=2"),
    ],
)
def test_a_baseline_says_what_it_cannot_take(name, request_, m, message):
    with pytest.raises(BackendError, match=message):
        BASELINES[name].prepare(request_).bind(torch.randn(m, request_.K))


def test_peers_say_what_they_cannot_take():
    for package, prepare, message in (
        (
            "onnxruntime",
            lambda r: peers.onnxruntime_layer(r, 4),
            r"ONNX Runtime takes K a multiple of one of \[128, 64, 32\] here, got K=100",
        ),
        ("bitsandbytes", peers.bitsandbytes_layer, "N a multiple of 32 and K of 64 here"),
    ):
        pytest.importorskip(package)
        with pytest.raises(BackendError, match=message):
            prepare(layer.Request(65, 100, False, 1))


def test_a_wrong_baseline_is_reported_and_not_timed(monkeypatch, capsys):
    good = BASELINES["torch_bf16"]

    def prepare(request):
        made = good.prepare(request)
        return layer.Layer(made.dense, made.nbytes, lambda x: [lambda: 1.5 * made.bind(x)[0]()])

    monkeypatch.setitem(BASELINES, "torch_bf16", Baseline(good.label, prepare, good.bound))
    assert main([*TINY, "--op", "codebook_linear", "--hot", "--json", "-"]) == 0
    saved = json.loads(capsys.readouterr().out)
    assert {b["name"]: b["correct"] for b in saved["baselines"]} == {"torch_fp32": True, "torch_bf16": False}
    assert saved["baselines"][1]["median_us"] is None
    assert "is above its bound" in saved["baselines"][1]["message"]
    assert all(r["speedup"].keys() == {"torch_fp32"} for r in saved["records"])


def test_a_baseline_that_raises_is_absent_with_the_reason(monkeypatch, capsys):
    """Packages of others raise all kinds of errors; none may end the run."""

    def prepare(request):
        raise ZeroDivisionError("of another package")

    good = BASELINES["torch_bf16"]
    monkeypatch.setitem(BASELINES, "torch_bf16", Baseline(good.label, prepare, good.bound))
    assert main([*TINY, "--op", "codebook_linear", "--hot"]) == 0
    assert "absent: torch_bf16: torch_bf16 failed: ZeroDivisionError: of another package" in capsys.readouterr().out

    def fails_later(request):
        return layer.Layer(good.prepare(request).dense, 1, lambda x: [lambda: 1 / 0])

    monkeypatch.setitem(BASELINES, "torch_bf16", Baseline(good.label, fails_later, good.bound))
    assert main([*TINY, "--op", "codebook_linear", "--hot"]) == 0
    assert "torch_bf16 failed: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.skipif(HOST is None, reason=str(NO_HOST))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", [0, 1, 2, 3])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 63), (5, 64), (7, 65), (4, 1000), (2, 0), (0, 8)])
def test_dense_gemv_on_every_instruction_set(dtype, isa, n, k):
    from lutgemm.backends import cpu

    if isa >= max(1, len(cpu.available_isas())):
        pytest.skip("this CPU has not that instruction set")
    weight, x, y = torch.randint(-4, 5, (n, k)).to(dtype), torch.randint(-4, 5, (k,)).float(), torch.full((n,), 9.0)
    name = str(dtype).removeprefix("torch.")
    HOST.dense_gemv(weight.data_ptr(), x.data_ptr(), y.data_ptr(), n, k, name, isa)
    assert torch.equal(y, weight.float() @ x), "small integers: sums are exact in any order"


@pytest.mark.skipif(HOST is None, reason=str(NO_HOST))
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"isa": 9}, "isa=9: this CPU has 0 to"),
        ({"isa": -2}, "isa=-2"),
        ({"N": -1}, "N=-1, K=2: must be >= 0"),
        ({"dtype": "float16"}, "dtype=float16: use float32 or bfloat16"),
        ({"x": 0}, "an address is 0"),
    ],
)
def test_dense_gemv_refuses(changes, message):
    x = torch.zeros(4)
    arguments = {"weight": x.data_ptr(), "x": x.data_ptr(), "y": x.data_ptr(), "N": 2, "K": 2, "dtype": "float32"}
    with pytest.raises(ValueError, match=message):
        HOST.dense_gemv(**(arguments | changes))
