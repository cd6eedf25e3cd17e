"""Siblings over stacked rows: the CUDA kernels under the emulator, on CPU tensors. Needs g++."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from conftest import REQUIRED
from emulated_backend import NAME
from sibling_models import BCQ, CODEBOOK, RATIO, UNIFORM, close, siblings
from torch import nn

import lutgemm
from lutgemm import fusion
from lutgemm.backends import cuda, gpu_layouts, gpu_siblings, prepared
from lutgemm.fusion import fuse
from lutgemm.nn import replace_linear, set_accuracy
from lutgemm.testing.cases import OpCase

pytest_plugins = ["emulated_siblings"]
pytestmark = pytest.mark.usefixtures("one_multiprocessor")

ALL = 70 + 20 + 33


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", [BCQ, UNIFORM, RATIO])
def test_stacked_rows_give_what_layers_give(config, bias, rows):
    apart, fused = siblings(config, bias)
    with torch.no_grad():
        for accuracy in ("auto", "exact"):  # bit_planes, lut_gemm or biqgemm
            set_accuracy(apart, accuracy), set_accuracy(fused, accuracy)
            for shape in ((1, 96), (1, 1, 96), (5, 96), (2, 3, 96), (96,), (0, 96), (20, 96)):
                x = torch.randn(shape)
                assert close(fused(x), apart(x))
    exact_large = 1  # above 16 tokens "exact" is dequantized, each layer on its own
    assert rows == [ALL] * (2 * 7 - exact_large)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, rows):
    apart, fused = (model.to(dtype) for model in siblings(BCQ, True))
    with torch.no_grad():
        for m in (1, 5):
            x = torch.randn(m, 96, dtype=dtype)
            assert close(fused(x), apart(x))
    assert rows == [ALL] * 2


def test_another_split_changes_no_more_than_the_last_bits(emulated, rows):
    weights = [OpCase(N=n, K=4096, group_size=128, bits=2, seed=n).weight() for n in (40, 8)]
    model = nn.Module()
    model.gate_proj, model.up_proj = (lutgemm.BCQLinear.from_weight(weight) for weight in weights)
    twin = copy.deepcopy(model)
    assert fuse(model) == 1
    emulated.control.set(sm_count=16)
    with torch.no_grad():
        for accuracy in ("auto", "exact"):
            set_accuracy(model, accuracy), set_accuracy(twin, accuracy)
            x = torch.randn(1, 4096)
            assert close(model.gate_proj(x), twin.gate_proj(x))
            assert close(model.up_proj(x), twin.up_proj(x))
    assert rows == [48] * 2


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("m", [1, 5])
def test_parts_count_their_own_changes(m, contiguous, rows):
    apart, fused = siblings()
    fuse(fused, contiguous=contiguous)
    x, factor = torch.randn(m, 96), torch.ones(20, requires_grad=True)
    q, k, v = fused.q_proj(x), fused.k_proj(x), fused.v_proj(x)
    z = (k * factor).sum()
    q.mul_(2)
    z.backward()
    assert torch.equal(factor.grad, k.sum(0))
    assert close(q, 2 * apart.q_proj(x))
    assert close(v, apart.v_proj(x))
    for y in (q, k, v):
        assert y.is_contiguous() == (m == 1 or contiguous)
        assert y.stride(-1) == 1
        assert not y._is_view()
    assert rows == [ALL]


def double_scales(model: nn.Module) -> None:
    model.k_proj.scales.mul_(2)


def clear_codes(model: nn.Module) -> None:
    model.k_proj.codes.zero_()


def change_bias(model: nn.Module) -> None:
    model.k_proj.bias.add_(1)


def replace_scales(model: nn.Module) -> None:
    model.k_proj.scales = nn.Parameter(model.k_proj.scales * 3, requires_grad=False)


def ask_for_exact(model: nn.Module) -> None:
    set_accuracy(model, "exact")


@pytest.mark.parametrize("change", [double_scales, clear_codes, change_bias, replace_scales, ask_for_exact])
def test_a_change_of_one_is_seen(change, rows):
    apart, fused = siblings(BCQ, True)
    x = torch.randn(1, 96)
    with torch.no_grad():
        assert close(fused.q_proj(x), apart.q_proj(x))
        before = apart.k_proj(x)
        change(apart), change(fused)
        assert close(fused.k_proj(x), apart.k_proj(x))
        assert not torch.equal(fused.k_proj(x), before)
        assert close(fused.v_proj(x), apart.v_proj(x))
        assert close(fused(x), apart(x))
        x.mul_(2)
        assert close(fused(x), apart(x))
    assert set(rows) == {ALL}


def without_a_bias(model: nn.Module) -> None:
    model.k_proj.bias = None


def without_offsets(model: nn.Module) -> None:
    model.k_proj = lutgemm.BCQLinear.from_weight(
        OpCase(N=20, K=96, group_size=32, bits=3, offsets=False).weight(), torch.zeros(20)
    )


def of_other_bits(model: nn.Module) -> None:
    model.k_proj = lutgemm.BCQLinear.from_weight(OpCase(N=20, K=96, group_size=32, bits=2).weight(), torch.zeros(20))


def of_other_scales(model: nn.Module) -> None:
    case = OpCase(N=20, K=96, group_size=32, bits=3, scale_dtype="float32")
    model.k_proj = lutgemm.BCQLinear.from_weight(case.weight(), torch.zeros(20))


@pytest.mark.parametrize("change", [without_a_bias, without_offsets, of_other_bits, of_other_scales])
def test_what_cannot_be_stacked_runs_apart(change, rows):
    apart, fused = siblings(BCQ, True)
    change(fused)
    apart.k_proj = copy.deepcopy(fused.k_proj)
    if change is not without_a_bias:
        fuse(fused)
    x = torch.randn(1, 96)
    with torch.no_grad():
        assert close(fused(x), apart(x))
        assert close(fused(x), apart(x))
    assert not rows


def test_a_bias_that_comes_or_goes_between_calls_is_seen(rows):
    for bias in (False, True):
        apart, fused = siblings(BCQ, bias)
        x = torch.randn(1, 96)
        with torch.no_grad():
            fused(x)
            for model in (apart, fused):
                for layer in model.children():
                    layer.bias = None if bias else nn.Parameter(torch.ones(layer.out_features), requires_grad=False)
            assert close(fused(x), apart(x))
    assert rows == [ALL] * 4


def test_other_ratios_and_gradients_run_apart(rows):
    apart, fused = siblings(RATIO)
    for model in (apart, fused):
        model.k_proj.ratios.mul_(2)
    x = torch.randn(1, 96)
    with torch.no_grad():
        assert close(fused(x), apart(x))
    apart, fused = siblings()
    x.requires_grad_(True)
    assert fused(x).requires_grad
    assert not rows


def test_what_is_never_fused_is_asked_once(rows, monkeypatch):
    asked = []
    choose = fusion.bcq_choice
    monkeypatch.setattr(fusion, "bcq_choice", lambda *arguments: asked.append(1) or choose(*arguments))
    dequantized, other_ratios = siblings()[1], siblings(RATIO)[1]
    set_accuracy(dequantized, "exact")
    other_ratios.k_proj.ratios.mul_(2)
    for fused, m in ((dequantized, 20), (other_ratios, 1)):
        asked.clear()
        with torch.no_grad():
            for _ in range(3):
                fused(torch.randn(m, 96))
        assert len(asked) == 3
    assert not rows


def test_a_layout_goes_with_any_sibling_and_no_weight_is_held_twice(rows):
    _, fused = siblings()
    x = torch.randn(1, 96)
    with torch.no_grad():
        fused(x)
        kept = prepared.kept(fused.v_proj.codes)
        (own,) = [kind for kind in kept if kind.split(" ")[1] != "siblings"]
        layouts = [weakref.ref(tensor) for tensor in kept[own]]
        assert kept.keys() == prepared.kept(fused.q_proj.codes).keys()
        del kept, fused.v_proj
        gc.collect()
        assert layouts
        assert not [layout for layout in layouts if layout() is not None]
        assert fused.q_proj(x).shape == (1, 70)
    assert rows == [ALL]


def test_parts_stay_in_their_stream_and_capture(rows, change_engine):
    apart, fused = siblings()
    place = [7]
    change_engine(place_of=lambda x: place[0])
    with torch.no_grad():
        x = torch.randn(1, 96)
        for elsewhere in (-1, -2, 8):  # two captures, another stream
            place[0] = 7
            assert close(fused.q_proj(x), apart.q_proj(x))
            part = fused.k_proj._fused[0]._local.pending.ys[1]
            place[0] = elsewhere
            y = fused.k_proj(x)
            assert part is not None
            assert y.data_ptr() != part.data_ptr()
            assert close(y, apart.k_proj(x))
            assert close(fused.v_proj(x), apart.v_proj(x))
    assert rows == [ALL] * 3


def test_a_capture_makes_no_layout_and_uses_one_that_is_there(rows, change_engine):
    apart, fused = siblings()
    place = [-5]
    change_engine(place_of=lambda x: place[0])
    x = torch.randn(1, 96)
    with torch.no_grad():
        assert close(fused(x), apart(x))
        assert not rows
        place[0] = 7
        fused(x), fused(torch.randn(5, 96))
        place[0] = -5
        change_engine(call=None)
        for m in (1, 5):
            x = torch.randn(m, 96)
            assert close(fused(x), apart(x))
    assert rows == [ALL] * 4


def test_every_algorithm_but_dequantize_is_one_call(emulated):
    kernel = emulated.backend.bcq_linear
    records = [OpCase(N=n, K=96, group_size=32, bits=2).weight() for n in (20, 33)]
    siblings = [
        gpu_siblings.Sibling(
            gpu_layouts.BcqRecord(w.codes, w.scales, w.offsets, w.zeros, w.ratios, 96, 32, "free"), None
        )
        for w in records
    ]
    x = torch.randn(2, 96)
    for op, algorithm in gpu_layouts.algorithms():
        if op != "bcq_linear":
            continue
        plan = gpu_siblings.plan(siblings, x, kernel, algorithm, 1)
        assert (plan is None) == (algorithm == "dequantize")
        if plan is not None:
            tensors = records[0].tensors
            ys = plan[0].tail[0].run(x, plan[0].layout(tensors, tensors), False)
            for y, w in zip(ys, records, strict=True):
                assert close(y, lutgemm.bcq_linear(x, w, backend=NAME, algorithm=algorithm, accuracy="accurate"))
    assert cuda.BACKEND.bcq_linear in gpu_siblings.engines()


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_llama_takes_results_whose_rows_are_apart(contiguous, rows):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    torch.manual_seed(0)
    apart = transformers.LlamaForCausalLM(config).eval()
    replace_linear(apart, BCQ)
    fused = copy.deepcopy(apart)
    assert fuse(fused, contiguous=contiguous) == 2
    ids = torch.randint(0, 64, (2, 4))
    with torch.no_grad():
        assert close(fused(ids).logits, apart(ids).logits)
        options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(fused.generate(ids, **options), apart.generate(ids, **options))
    assert rows == [128, 192] * 3


def test_a_part_may_be_the_input_of_another_layer(rows):
    """Its rows are apart, and may begin anywhere."""
    fused = siblings()[1]
    after = lutgemm.BCQLinear.from_weight(OpCase(N=8, K=20, group_size=32, bits=2).weight())
    with torch.no_grad():
        x = torch.randn(2, 3, 96)
        fused.q_proj(x)
        k = fused.k_proj(x)
        assert not k.is_contiguous()
        assert torch.equal(after(k), after(k.contiguous()))
    assert rows == [ALL]


REASON = cuda.BACKEND.unavailable()


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None and "cuda" not in REQUIRED, reason=f"backend cuda: {REASON}")
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize(("config", "dtype"), [(BCQ, torch.float32), (CODEBOOK, torch.float16)])
def test_graphs_on_a_gpu(config, dtype, m, rows):
    assert REASON is None, f"--require cuda: {REASON}"
    apart, fused = (model.to("cuda", dtype) for model in siblings(config, True, sizes=(64, 32, 33)))
    x, other = torch.randn(2, m, 96, device="cuda", dtype=dtype)
    with torch.no_grad():
        fuse(fused, ())
        fused.k_proj(x)  # has a layout of its own then
        fuse(fused)
        assert close(fused(x), apart(x))
        whole, part = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        fused.q_proj(x)
        with torch.cuda.graph(part):
            k = fused.k_proj(x)
        fused.v_proj(x)
        with torch.cuda.graph(whole):
            y = fused(x)
        x.copy_(other)
        part.replay(), whole.replay()
        assert close(y, apart(x))
        assert close(k, apart.k_proj(x))
    assert rows == [64 + 32 + 33] * 3


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None and "cuda" not in REQUIRED, reason=f"backend cuda: {REASON}")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_on_a_gpu(mode, rows):
    assert REASON is None, f"--require cuda: {REASON}"
    torch._dynamo.reset()
    model = siblings(BCQ, True)[0].to("cuda", torch.float16)
    run = torch.compile(model, options=fusion.compile_options(mode), fullgraph=True, dynamic=False)
    with torch.no_grad():
        for m in (1, 5):
            for _ in range(4):
                x = torch.randn(m, 96, device="cuda", dtype=torch.float16)
                assert close(run(x).clone(), model(x))
    assert set(rows) == {ALL}
