"""Sibling layers in one kernel call: the same bits, names and files."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import transformers
from sibling_models import BCQ, CODEBOOK, UNIFORM, Attention, count_fused_calls, pair
from torch import nn

import lutgemm
from lutgemm import fusion
from lutgemm.backends import cpu, prepared
from lutgemm.errors import ArgumentError
from lutgemm.fusion import FUSED_GROUPS, fuse
from lutgemm.nn import replace_linear, set_accuracy
from lutgemm.testing.cases import OpCase

pytestmark = pytest.mark.skipif(
    cpu.BACKEND.unavailable() is not None, reason=f"backend cpu: {cpu.BACKEND.unavailable()}"
)


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each fused call."""
    return count_fused_calls(monkeypatch)


@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("config", [BCQ, UNIFORM])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_results_are_the_same_bits(config, bias, isa, stacked):
    apart, fused = pair(config, bias)
    with cpu.use_isa(isa), torch.no_grad():
        for accuracy in ("auto", "fast", "exact"):
            assert set_accuracy(apart, accuracy) == set_accuracy(fused, accuracy) == 3
            for shape in ((1, 96), (1, 1, 96), (7, 96), (2, 3, 96), (96,), (0, 96)):
                x = torch.randn(shape)
                y = fused(x)
                assert torch.equal(y, apart(x))
                assert fused.q_proj(x).is_contiguous()
                fused.k_proj(x), fused.v_proj(x)
    assert len(stacked) == 3 * 6 * 2
    assert set(stacked) == {3}


@pytest.mark.parametrize("isa", cpu.available_isas())
def test_siblings_may_differ_in_bits_and_kind_of_scales(isa, stacked):
    model = Attention()
    replace_linear(model, UNIFORM, include=["q_proj"])
    replace_linear(model, BCQ, include=["k_proj"])
    ratios = OpCase(N=33, K=96, group_size=32, bits=2, scale_kind="ratio")
    model.v_proj = lutgemm.BCQLinear.from_weight(ratios.weight())
    twin = copy.deepcopy(model)
    assert fuse(model) == 1
    with cpu.use_isa(isa), torch.no_grad():
        for accuracy in ("fast", "accurate", "near-exact", "exact"):
            set_accuracy(model, accuracy), set_accuracy(twin, accuracy)
            for m in (1, 5, 17):
                x = torch.randn(m, 96)
                assert torch.equal(model(x), twin(x))
    # With AVX-512 VBMI "fast" multiplies 17 tokens by 3 bits: no tables to share.
    assert stacked == [3] * (12 - (isa == "avx512vbmi"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, stacked):
    apart, fused = (model.to(dtype) for model in pair(BCQ, True))
    x = torch.randn(2, 96, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(fused(x), apart(x))
    assert stacked == [3]


def test_siblings_of_other_activations_rest_and_try_again(stacked, monkeypatch):
    monkeypatch.setattr(fusion, "REST", 30)
    apart, fused = pair()
    x, query = torch.randn(2, 96), torch.randn(2, 96)
    with torch.no_grad():
        for _ in range(40):
            assert torch.equal(fused(x, query), apart(x, query))
        assert 4 <= len(stacked) <= 12
        for _ in range(12):
            fused(x)
        stacked.clear()
        for _ in range(5):
            assert torch.equal(fused(x), apart(x))
    assert stacked == [3] * 5


def test_nan_in_activations_is_no_miss(stacked):
    _, fused = pair()
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.randn(2, 96, dtype=dtype)
            x[0, 0] = float("nan")
            for _ in range(4):
                fused(x)
    assert stacked == [3] * 12


@pytest.mark.parametrize("m", [1, 2])
def test_parts_have_memory_and_versions_of_their_own(m, stacked):
    _, fused = pair()
    x, factor = torch.randn(m, 96), torch.ones(20, requires_grad=True)
    q, k, v = fused.q_proj(x), fused.k_proj(x), fused.v_proj(x)
    assert stacked == [3]
    z = (k * factor).sum()
    q.mul_(2)
    z.backward()
    assert torch.equal(factor.grad, k.sum(0))
    for y in (q, k, v):
        assert y.untyped_storage().nbytes() == y.nbytes
        assert not y._is_view()


def test_a_sibling_on_another_device_or_of_another_bias_is_left_out(stacked):
    x = torch.randn(2, 96)
    for names in (("codes", "scales", "offsets", "bias"), ("scales",), ("bias",)):
        apart, fused = pair(BCQ, True)
        for name in names:
            tensor = getattr(fused.k_proj, name).to("meta")
            setattr(fused.k_proj, name, tensor if name == "codes" else nn.Parameter(tensor, requires_grad=False))
        assert torch.equal(fused.q_proj(x), apart.q_proj(x))
        assert torch.equal(fused.v_proj(x), apart.v_proj(x))
    apart, fused = pair(BCQ, True)
    fused.k_proj.bias = apart.k_proj.bias = None
    assert torch.equal(fused(x), apart(x))
    assert not stacked


def test_fused_layers_read_the_layouts_that_they_read_apart():
    apart, fused = pair()
    x = torch.randn(2, 96)
    fuse(fused, ())
    fused(x)
    y = apart(x)
    kept = [prepared.kept(layer.codes) for layer in fused.children()]
    gc.collect()
    count = len(entries())
    fuse(fused)
    assert torch.equal(fused(x), y)
    assert len(entries()) == count
    for layer, before in zip(fused.children(), kept, strict=True):
        assert all(layout is before[kind] for kind, layout in prepared.kept(layer.codes).items())


def entries() -> list[prepared.Entry]:
    return [entry for held in prepared._entries.values() for entry in held]


def test_a_group_keeps_no_layout_of_a_layer_that_is_gone(stacked):
    _, fused = pair()
    x = torch.randn(1, 96)
    with torch.no_grad():
        fused.q_proj(x)
        fused.k_proj(x)
        assert stacked == [3]
        gone = [weakref.ref(layout) for layout in prepared.kept(fused.v_proj.codes).values()]
        gc.collect()
        kept = len(entries())
        del fused.v_proj
        gc.collect()
        assert len(entries()) == kept - 1
        assert [layout() for layout in gone] == [None]
        assert fused.q_proj(x).shape == (1, 70)
    assert stacked == [3]


def test_what_needs_more_is_computed_apart(stacked):
    apart, fused = pair()
    x = torch.randn(3, 96, requires_grad=True)
    assert torch.equal(torch.autograd.grad(fused(x).sum(), x)[0], torch.autograd.grad(apart(x).sum(), x)[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), apart(x))
    y = torch.compile(fused, fullgraph=True, backend="aot_eager")(x.detach())
    assert torch.equal(y, apart(x))
    fused.v_proj.scales.requires_grad_(True)
    assert fused(x.detach()).requires_grad
    with torch.no_grad():
        large = torch.randn(20000, 96)
        assert torch.equal(fused(large), apart(large))
    assert not [call for call in stacked if call != 3]
    with pytest.raises(ArgumentError, match=r"x: got shape \[3, 95\]"), torch.no_grad():
        fused(x[:, :95])


def test_gradient_checkpoints():
    apart, fused = pair()
    grads = []
    for model in (apart, fused):
        x = torch.ones(3, 96, requires_grad=True)
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_threads_do_not_mix_their_parts():
    apart, fused = pair()
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(50):
                x = torch.randn(1, 96, generator=generator)
                if not torch.equal(fused(x), apart(x)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_groups_are_made_of_equals():
    model = Attention()
    assert fuse(model) == 0
    replace_linear(model, BCQ, skip="v_proj")
    assert fuse(model) == 0
    replace_linear(model, lutgemm.BCQConfig(bits=3, group_size=64))
    assert fuse(model) == 0
    assert fuse(model, [("q_proj", "k_proj")]) == 1
    assert fuse(model, ()) == 0
    assert all(layer._fused is None for layer in model.children())
    assert pair(CODEBOOK)[1].q_proj._fused is None
    copied = copy.deepcopy(pair()[1])
    assert copied.q_proj._fused is None
    assert fuse(copied) == 1
    mixed = Attention(bias=True)
    mixed.v_proj.bias = None
    replace_linear(mixed, BCQ, fuse=True)
    assert mixed.q_proj._fused is None
    for bad in ("q_proj", ("q_proj",), ("q_proj", 3), ("q_proj", "q_proj")):
        with pytest.raises(ArgumentError, match="groups: got"):
            fuse(model, [bad])


def test_a_llama_says_the_same(tmp_path, stacked):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(config).eval()
    apart, fused = copy.deepcopy(dense), dense
    replace_linear(apart, BCQ)
    replace_linear(fused, BCQ, fuse=True)
    ids = torch.randint(0, 128, (2, 9))
    with torch.no_grad():
        assert torch.equal(fused(ids).logits, apart(ids).logits)
        assert stacked == [3, 2] * 2
    assert list(fused.state_dict()) == list(apart.state_dict())
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fused.generate(ids, **options), apart.generate(ids, **options))
    fused.save_pretrained(tmp_path)
    loaded = lutgemm.load(tmp_path)
    assert lutgemm.fuse(loaded, FUSED_GROUPS) == 4
    stacked.clear()
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, apart(ids).logits)
    assert stacked == [3, 2] * 2
    loaded.load_state_dict(apart.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, apart(ids).logits)
