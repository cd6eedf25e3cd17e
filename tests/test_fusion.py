"""Sibling layers in one kernel call: the same bits, names and files, and nothing shared that is not the same."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lutgemm
from lutgemm import fusion
from lutgemm.accuracy import ACCURACIES
from lutgemm.backends import cpu, prepared
from lutgemm.errors import ArgumentError
from lutgemm.fusion import FUSED_GROUPS, fuse
from lutgemm.nn import replace_linear, set_accuracy
from lutgemm.testing.cases import OpCase
from lutgemm.testing.timing import torch_threads

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
    calls, operator = [], cpu._op

    def counting(name: str) -> Callable[..., Any]:
        def call(x: torch.Tensor, layouts: list[torch.Tensor], *rest: Any) -> list[torch.Tensor]:
            ys = operator(name)(x, layouts, *rest)
            calls.append(len(layouts))
            return ys

        return call if name == fusion.OPERATOR else operator(name)

    monkeypatch.setattr(cpu, "_op", counting)
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
    assert stacked == [3] * 12


@pytest.mark.parametrize("algorithm", [False, True])
@pytest.mark.parametrize("isa", range(len(cpu.available_isas())))
def test_the_operator_shares_its_tables_among_any_number_of_weights(algorithm, isa):
    """At any number of threads, for as many tokens as take several passes."""
    layers = [lutgemm.BCQLinear.from_linear(nn.Linear(200, n), UNIFORM) for n in (5, 700, 64, 1)]
    x, biases = torch.randn(2, 19, 200), [layer.bias.detach() for layer in layers]
    for accuracy in range(len(ACCURACIES)):
        with cpu.use_isa(cpu.ISAS[isa]):
            for layer in layers:
                cpu.prepare_bcq(layer.weight_record, accuracy)
        kind = cpu._packed_kind(isa, accuracy)
        layouts = [prepared.kept(layer.codes)[kind] for layer in layers]
        for threads in (1, 2, 5):
            with torch_threads(threads):
                ys = torch.ops.lutgemm._bcq_linear_siblings_cpu(x, layouts, biases, algorithm, isa, accuracy)
                for y, layout, bias in zip(ys, layouts, biases, strict=True):
                    own = torch.ops.lutgemm._bcq_linear_cpu(x, layout, bias, len(bias), algorithm, isa, accuracy)
                    assert torch.equal(y, own)


def test_the_operator_refuses_what_does_not_fit():
    best = len(cpu.available_isas()) - 1
    layers = [lutgemm.BCQLinear.from_linear(nn.Linear(k, 8), BCQ) for k in (64, 64, 96)]
    for layer in layers:
        for accuracy in (1, 3):
            cpu.prepare_bcq(layer.weight_record, accuracy)
    kind = cpu._packed_kind(best, 1)
    a, b, wide = (prepared.kept(layer.codes)[kind] for layer in layers)
    exact, x, bias = prepared.kept(layers[0].codes)["words"], torch.randn(1, 64), torch.zeros(8)

    def call(x=x, layouts=(a, b), biases=(), isa=best, accuracy=1):
        return torch.ops.lutgemm._bcq_linear_siblings_cpu(x, list(layouts), list(biases), False, isa, accuracy)

    assert [y.shape for y in call()] == [(1, 8)] * 2
    for change, message in (
        ({"layouts": []}, "packed: there must be a weight at least"),
        ({"layouts": [a, wide]}, "siblings must have one K and group_size"),
        ({"layouts": [a, exact]}, "siblings must be laid out alike" if kind != "words" else None),
        ({"layouts": [a, b[:40]]}, "packed: "),
        ({"layouts": [a, b.to(torch.int8)]}, "packed: must be uint8"),
        ({"layouts": [a, torch.zeros(400, dtype=torch.uint8)]}, "packed: "),
        ({"biases": [bias]}, "biases: one of each weight, or none at all"),
        ({"biases": [bias, bias[:7]]}, r"bias: got shape \[7\], expected \[8\]"),
        ({"biases": [bias, bias.half()]}, "bias: must have the dtype of x"),
        ({"x": torch.randn(1, 63)}, r"x: got shape \[1, 63\], its last dimension must be K=64"),
        ({"x": torch.randn(64, 2).T}, "x: must be contiguous"),
        ({"isa": 9}, "isa=9"),
        ({"accuracy": 4}, "accuracy=4"),
        ({"accuracy": 3}, "laid out for integer tables" if kind != "words" else None),
    ):
        if message is not None:
            with pytest.raises(RuntimeError, match=message):
                call(**change)


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


class Ops(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def double_scales(model: nn.Module) -> None:
    model.k_proj.scales.mul_(2)


def load_other_scales(model: nn.Module) -> None:
    model.k_proj.load_state_dict({name: t + (name == "scales") for name, t in model.k_proj.state_dict().items()})


def replace_scales(model: nn.Module) -> None:
    """By a tensor that may well get the place in memory, and the id, of the one before it."""
    values = model.k_proj.scales.tolist()
    model.k_proj.scales = None
    model.k_proj.scales = nn.Parameter(torch.tensor(values, dtype=torch.float16) * 2, requires_grad=False)


def replace_data(model: nn.Module) -> None:
    with torch.inference_mode(False):
        model.k_proj.scales.data = model.k_proj.scales.data * 2


def change_bias(model: nn.Module) -> None:
    model.k_proj.bias.add_(1)


def ask_for_exact(model: nn.Module) -> None:
    set_accuracy(model, "exact")


CHANGES = [double_scales, load_other_scales, replace_scales, replace_data, change_bias, ask_for_exact]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_siblings_is_seen(change, mode, stacked):
    apart, fused = pair(BCQ, True)
    with mode():
        x = torch.randn(2, 96)
        before = apart.k_proj(x)
        assert torch.equal(fused.q_proj(x), apart.q_proj(x))
        for model in (apart, fused):
            with torch.no_grad():
                change(model)
        assert torch.equal(fused.k_proj(x), apart.k_proj(x))
        assert not torch.equal(fused.k_proj(x), before)
        assert torch.equal(fused.v_proj(x), apart.v_proj(x))
        assert torch.equal(fused(x), apart(x))
    assert set(stacked) == {3}


def test_an_instruction_set_between_siblings_is_seen():
    for isa in cpu.available_isas():
        apart, fused = pair()
        x = torch.randn(2, 96)
        with torch.no_grad():
            fused.q_proj(x)
            with cpu.use_isa(isa):
                assert torch.equal(fused.k_proj(x), apart.k_proj(x))


def test_gradients_switched_on_between_siblings():
    _, fused = pair()
    x = torch.randn(2, 96)
    with torch.no_grad():
        fused.q_proj(x)
    fused.k_proj.scales.requires_grad_(True)
    assert fused.k_proj(x).requires_grad
    assert not fused.v_proj(x).requires_grad
    with torch.no_grad():
        fused.q_proj(x)
    x.requires_grad_(True)
    assert fused.v_proj(x).requires_grad


def test_inference_mode_between_siblings(stacked):
    _, fused = pair()
    x = torch.randn(2, 96)
    with torch.inference_mode():
        assert fused.q_proj(x).is_inference()
    assert not fused.k_proj(x).is_inference()
    with torch.inference_mode():
        assert fused.v_proj(x).is_inference()
    fused.q_proj(x)
    with torch.inference_mode():
        assert fused.k_proj(x).is_inference()
    assert stacked == [3, 3]


def test_a_mode_around_one_sibling_sees_its_operator():
    _, fused = pair()
    x = torch.randn(2, 96)
    with torch.no_grad():
        fused.q_proj(x)
        with Ops() as seen:
            fused.k_proj(x)
    assert seen.names == ["lutgemm.bcq_linear.default"]


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
    assert stacked == [3] * 6


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
