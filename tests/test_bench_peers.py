"""Layers of other packages on GPUs, as far as they can be tested without one: stand-ins do what they document."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lutgemm.bench import baselines, peers_cuda
from lutgemm.bench.layer import Request
from lutgemm.errors import BackendError
from lutgemm.testing.numerics import relative_error


@pytest.mark.parametrize("name", [*baselines.ON_CUDA_ONLY, "gemv_bf16"])
def test_baselines_say_where_they_run(name, monkeypatch):
    """Packages of peers need not be there for it."""
    monkeypatch.setattr(peers_cuda, "module", lambda package, extra: None)
    device = "cpu" if name in baselines.ON_CUDA_ONLY else "cuda"
    with pytest.raises(BackendError, match=f"the device is {device}"):
        baselines.BASELINES[name].prepare(Request(64, 64, cold=False, threads=1, device=device))


@pytest.mark.parametrize("name", ["gemlite_2bit", "humming_3bit", "torchao_int4", "bnb_nf4_cuda"])
def test_absent_peers_name_their_extra(name, monkeypatch):
    for package in ("gemlite", "humming", "humming.layer", "torchao", "torchao.quantization", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=r"cannot be imported .*lutgemm\[bench-peers-cuda\]"):
        baselines.BASELINES[name].prepare(Request(64, 64, cold=False, threads=1, device="cuda"))


class GemLiteLinear:
    """What `gemlite_layer` relies on, as its documentation describes it."""

    def __init__(self, bits, *, group_size, in_features, out_features, input_dtype, output_dtype):
        self.group_size = group_size

    def pack(self, codes, scales, zeros, bias):
        wide = [t.float().repeat_interleave(self.group_size, 1) for t in (scales, zeros)]
        self.weight = (codes.float() - wide[1]) * wide[0]

    def __call__(self, x):
        return (x.float() @ self.weight.T).half()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gemlites_weight_is_what_is_packed(bits, monkeypatch):
    fake = SimpleNamespace(GemLiteLinear=GemLiteLinear, DType=SimpleNamespace(FP16=0))
    monkeypatch.setattr(peers_cuda, "module", lambda package, extra: fake)
    monkeypatch.setattr(peers_cuda, "_on_cuda", lambda request, name: None)
    layer = peers_cuda.gemlite_layer(Request(64, 256, cold=False, threads=1), bits)
    x = torch.randn(3, 256)
    (call,) = layer.bind(x)
    assert relative_error(call(), x.double() @ layer.dense().double().T) < 1e-3
    assert layer.nbytes == 64 * 256 * bits // 8 + 64 * 2 * 2 * 2


@pytest.fixture
def on_cpu(monkeypatch):
    """Lets layers of CUDA devices be made on the CPU, of the stand-in that the test gives."""
    monkeypatch.setattr(peers_cuda, "_on_cuda", lambda request, name: None)
    return lambda fake: monkeypatch.setattr(peers_cuda, "module", lambda package, extra: fake)


class HummingLayer(torch.nn.Module):
    """Rounds to unsigned integers about their middle, a scale per group; after `transform` the weight is its own."""

    def __init__(self, shape_n, shape_k, weight_config, torch_dtype):
        super().__init__()
        assert torch_dtype == torch.float16
        self.bits = int(weight_config["dtype"].removeprefix("uint"))
        self.group, self.shape, self.ready = weight_config["group_size"], (shape_n, shape_k), False
        self.weight_schema = SimpleNamespace(dequant_tensors=lambda tensors: self.rounded(tensors))

    def rounded(self, tensors):
        return ((tensors["codes"].float() - 2 ** (self.bits - 1)) * tensors["scales"].float()).view(self.shape)

    def load_from_unquantized(self, weight):
        groups = weight.float().view(-1, self.group)
        scales = (groups.abs().amax(1, keepdim=True) / 2 ** (self.bits - 1)).half()
        codes = (groups / scales).round() + 2 ** (self.bits - 1)
        self.register_buffer("codes", codes.clamp(0, 2**self.bits - 1).to(torch.int32))
        self.register_buffer("scales", scales)

    def transform(self):
        self.dense = self.rounded(self.state_dict())
        del self.codes, self.scales

    def forward(self, x):
        return (x.float() @ self.dense.T).half()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_hummings_weight_is_read_before_it_is_transformed(bits, on_cpu):
    on_cpu(SimpleNamespace(HummingLayer=HummingLayer))
    layer = peers_cuda.humming_layer(Request(64, 256, cold=False, threads=1), bits)
    x = torch.randn(3, 256)
    (call,) = layer.bind(x)
    assert relative_error(call(), x.double() @ layer.dense().double().T) < 1e-3
    assert layer.nbytes == 64 * 256 * bits // 8 + 64 * 2 * 2


def quantize_int4(layer, config):
    """Rounds as tinygemm's users do: by each group's least and greatest value; integers 0..15 about 8."""
    assert layer.weight.dtype == torch.bfloat16
    groups = layer.weight.float().view(-1, config["group_size"])
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scales = ((high - low) / 15).bfloat16().float()
    middle = (low + 8 * scales).bfloat16().float()
    codes = ((groups - low) / scales).round().clamp(0, 15)
    layer.weight.copy_(((codes - 8) * scales + middle).view_as(layer.weight))


def test_torchaos_weight_is_kept_by_its_rounding(on_cpu):
    on_cpu(SimpleNamespace(Int4WeightOnlyConfig=lambda **options: options, quantize_=quantize_int4))
    layer = peers_cuda.torchao_layer(Request(64, 1024, cold=False, threads=1))
    x = torch.randn(3, 1024)
    (call,) = layer.bind(x)
    error = relative_error(call(), x.double() @ layer.dense().double().T)
    assert error <= baselines.BASELINES["torchao_int4"].bound(x)
    assert torch.equal(call.func.weight.float(), layer.dense())
    assert layer.nbytes == 64 * 1024 // 2 + 64 * 8 * 4
    with pytest.raises(BackendError, match="torchao takes N a multiple of 16 and K of 1024 here, got N=64, K=128"):
        peers_cuda.torchao_layer(Request(64, 128, cold=False, threads=1))


def test_nf4_is_checked_against_its_own_weight(on_cpu):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    on_cpu(bitsandbytes)
    layer = peers_cuda.nf4_layer(Request(64, 128, cold=False, threads=1))
    x = torch.randn(3, 128)
    (call,) = layer.bind(x)
    error = relative_error(call(), x.double() @ layer.dense().double().T)
    assert error <= baselines.BASELINES["bnb_nf4_cuda"].bound(x)
    assert layer.nbytes == 64 * 128 // 2 + 64 * 2 * 4
