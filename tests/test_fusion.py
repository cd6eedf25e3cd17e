"""Sibling layers in one kernel call: the same bits, names and files, and nothing shared that is not the same."""

import copy
import threading

import pytest
import torch
import transformers
from torch import nn

import lutgemm
from lutgemm.backends import cpu, prepared
from lutgemm.errors import ArgumentError
from lutgemm.fusion import FUSED_GROUPS, fuse
from lutgemm.nn import replace_linear, set_accuracy

pytestmark = pytest.mark.skipif(
    cpu.BACKEND.unavailable() is not None, reason=f"backend cpu: {cpu.BACKEND.unavailable()}"
)

BCQ = lutgemm.BCQConfig(bits=3, group_size=32, scale_kind="free", iters=1)
UNIFORM = lutgemm.BCQConfig(bits=4, group_size=32, scale_kind="uniform")
CODEBOOK = lutgemm.CodebookConfig(codebook_bits=4, group_size=32, iters=1)


class Attention(nn.Module):
    """Projections of one input, N not multiples of what kernels take at a time; the query may have its own."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(96, n, bias=bias) for n in (70, 20, 33))

    def forward(self, x: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        first = self.q_proj(x if query is None else query)
        return torch.cat([first, self.k_proj(x), self.v_proj(x)], -1)


def pair(config=BCQ, bias: bool = False) -> tuple[nn.Module, nn.Module]:
    """The same quantized layers, apart and fused."""
    model = Attention(bias)
    replace_linear(model, config)
    twin = copy.deepcopy(model)
    assert fuse(model) == (0 if config is CODEBOOK else 1)
    return twin.requires_grad_(False), model.requires_grad_(False)


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each fused call."""
    calls, real = [], cpu.bcq_linear_stacked
    monkeypatch.setattr(cpu, "bcq_linear_stacked", lambda x, w, *rest: calls.append(len(w)) or real(x, w, *rest))
    return calls


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, stacked):
    apart, fused = (model.to(dtype) for model in pair(BCQ, True))
    x = torch.randn(2, 96, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(fused(x), apart(x))
    assert stacked == [3]


def test_siblings_of_other_activations_give_up(stacked):
    apart, fused = pair()
    with torch.no_grad():
        for _ in range(6):
            x, query = torch.randn(2, 96), torch.randn(2, 96)
            assert torch.equal(fused(x, query), apart(x, query))
    assert len(stacked) <= 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_activations_changed_between_siblings_are_seen(mode, stacked):
    apart, fused = pair()
    with mode():
        x = torch.randn(2, 96)
        assert torch.equal(fused.q_proj(x), apart.q_proj(x))
        x.mul_(2)
        assert torch.equal(fused.k_proj(x), apart.k_proj(x))
        assert torch.equal(fused.v_proj(x), apart.v_proj(x))
        assert torch.equal(fused.k_proj(x), apart.k_proj(x))
    assert len(stacked) >= 2


def test_changes_of_one_sibling_are_seen(stacked):
    apart, fused = pair(BCQ, True)
    x = torch.randn(2, 96)
    with torch.no_grad():
        for name in ("scales", "offsets", "bias", "codes"):
            for model in (apart, fused):
                model.v_proj.get_buffer(name).zero_() if name == "codes" else getattr(model.v_proj, name).mul_(2)
            assert torch.equal(fused(x), apart(x))
        for model in (apart, fused):
            model.k_proj.scales.data.mul_(2)
            model.k_proj.weight_record.repack()
        assert torch.equal(fused(x), apart(x))
        for model in (apart, fused):
            model.k_proj.scales = nn.Parameter(model.k_proj.scales * 3, requires_grad=False)
        assert torch.equal(fused(x), apart(x))
        fused.k_proj.accuracy = apart.k_proj.accuracy = "exact"
        assert torch.equal(fused(x), apart(x))
    assert len(stacked) == 6


def test_one_layout_for_all(stacked):
    _, fused = pair()
    with torch.no_grad():
        fused(torch.randn(1, 96))
    for layer in fused.children():
        (layout,) = prepared.kept(layer.codes).values()
        assert layout is next(iter(prepared.kept(fused.q_proj.codes).values()))
    kept = len(prepared._entries)
    del layer, fused.v_proj
    assert len(prepared._entries) == kept - 1


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
    replace_linear(model, UNIFORM)
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
