"""torch.compile, torch.export, opcheck and autograd of the ops and layers."""

import copy
import sys

import pytest
import torch
from torch import nn

import lutgemm
from lutgemm.backends import cpu, prepared
from lutgemm.backends import reference as reference_backend
from lutgemm.errors import ArgumentError
from lutgemm.formats import BCQWeight
from lutgemm.formats.bcq import pack_bits, unpack_signs
from lutgemm.nn import QuantizedLinear, replace_linear
from lutgemm.ops import linear

K, N, GROUP = 70, 24, 32
CONFIGS = {
    "free": lutgemm.BCQConfig(bits=3, group_size=GROUP, scale_kind="free", scale_dtype="float32", iters=2),
    "uniform": lutgemm.BCQConfig(bits=4, group_size=GROUP, scale_kind="uniform", scale_dtype="float32"),
    "codebook": lutgemm.CodebookConfig(
        num_codebooks=2, codebook_bits=5, group_size=GROUP, scale_dtype="float32", iters=2
    ),
}
TRAINABLE = {"free": ["scales", "offsets"], "uniform": ["scales"], "codebook": ["scales", "codebooks"]}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def preparations(monkeypatch):
    """A list that grows by one for each weight that is prepared for a kernel."""
    if not cpu.available_isas():
        pytest.skip("only the compiled kernels prepare weights")
    made, keep = [], prepared.keep
    monkeypatch.setattr(prepared, "keep", lambda *arguments: made.append(1) or keep(*arguments))
    return made


@pytest.fixture
def only_reference(monkeypatch):
    """Everything runs on the reference backend, which prepares nothing."""
    backend = reference_backend.BACKEND
    module = sys.modules["lutgemm.backends"]
    monkeypatch.setattr(module, "registry", lambda: {backend.name: backend})
    module.select.cache_clear()
    monkeypatch.setattr(module, "select", module.select.__wrapped__)
    monkeypatch.setattr("lutgemm.choices.select", module.select)


def layer_of(kind: str, bias: bool = True) -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(K, N, bias=bias), CONFIGS[kind])


@pytest.mark.parametrize("kind", CONFIGS)
def test_layer_compiles_to_one_graph(kind):
    layer, x = layer_of(kind), torch.randn(5, K)
    y = layer(x)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), y)
    layer.load_state_dict({**layer.state_dict(), "bias": torch.zeros(N)})
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", CONFIGS)
def test_layer_that_never_ran_compiles_and_prepares_once(kind, preparations):
    layer, x = layer_of(kind), torch.randn(5, K)
    twin = copy.deepcopy(layer)
    assert twin._record is None
    compiled = torch.compile(twin, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(x), layer(x))
    assert len(preparations) == 2  # one of each layer


@pytest.mark.parametrize("kind", CONFIGS)
def test_changes_between_calls_of_a_compiled_layer_are_seen(kind, preparations):
    layer, x = layer_of(kind), torch.randn(5, K)
    layer.requires_grad_(False)
    layer.accuracy = "exact"
    compiled = torch.compile(layer, fullgraph=True)
    for expected_preparations in (1, 2, 3):
        y = compiled(x)
        dense = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(y, dense, rtol=1e-3, atol=1e-3)
        assert torch.equal(y, layer(x))
        assert len(preparations) == expected_preparations
        with torch.inference_mode() if expected_preparations == 2 else torch.no_grad():
            layer.scales.mul_(3)


def test_a_graph_that_changes_scales_computes_with_the_new_ones():
    layer, x = layer_of("free"), torch.randn(5, K)
    layer.requires_grad_(False)
    layer.accuracy = "exact"
    twin = copy.deepcopy(layer)

    @torch.compile(fullgraph=True)
    def step(x: torch.Tensor) -> torch.Tensor:
        layer.scales.mul_(0.5)
        return layer(x)

    for _ in range(3):
        twin.scales.mul_(0.5)
        assert torch.equal(step(x), twin(x))
        assert torch.equal(layer(x), twin(x))
    assert torch.equal(layer.scales, twin.scales)


def test_a_compiled_optimizer_step_is_seen():
    layer, x = layer_of("free"), torch.randn(5, K)
    layer.scales.requires_grad_(True)
    layer.accuracy = "exact"
    optimizer = torch.optim.SGD([layer.scales], lr=0.1, foreach=True)
    step = torch.compile(optimizer.step)
    for _ in range(2):
        layer(x).square().sum().backward()
        step()
        optimizer.zero_grad()
        y = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", CONFIGS)
@torch._inductor.config.patch(freezing=True)
def test_frozen_weights_are_prepared_once(kind, preparations):
    layer, x = layer_of(kind).requires_grad_(False), torch.randn(5, K)
    with torch.no_grad():
        y = layer(x)
        compiled = torch.compile(layer, fullgraph=True)
        for _ in range(3):
            assert torch.equal(compiled(x), y)
    assert len(preparations) <= 2


def test_accuracy_can_change_after_compiling():
    layer, x = layer_of("free"), torch.randn(5, K)
    compiled = torch.compile(layer, fullgraph=True)
    for accuracy in ("fast", "exact", "auto"):
        assert lutgemm.set_accuracy(layer, accuracy) == 1
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("kind", ["free", "codebook"])
def test_mlp_compiles_to_one_graph_and_trains(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, 64), nn.GELU(), nn.Linear(64, 8))
    replace_linear(model, CONFIGS[kind])
    x = torch.randn(6, K, requires_grad=True)
    y = model(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    z = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(torch.autograd.grad(z.square().sum(), x)[0], expected)


def test_compiled_layer_takes_any_number_of_tokens():
    layer = layer_of("free")
    layer(torch.randn(1, K))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (2, 3, 9):
        x = torch.randn(m, K)
        torch.testing.assert_close(compiled(x), layer(x))


def test_autocast_inside_a_compiled_layer():
    layer, x = layer_of("free"), torch.randn(5, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        z = torch.compile(layer, fullgraph=True)(x)
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z, y)


@pytest.mark.parametrize("kind", CONFIGS)
def test_layer_exports(kind, preparations):
    layer, x = layer_of(kind), torch.randn(5, K)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2)},))
    module = program.module()
    for m in (5, 3):
        x = torch.randn(m, K)
        torch.testing.assert_close(module(x), layer(x), rtol=1e-4, atol=1e-5)
    assert len(preparations) <= 2


def dense_from(kind: str, layer: QuantizedLinear, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """W as SPEC.md writes it, from fp64 tensors that carry gradients, with nothing of lutgemm's own arithmetic."""
    group = torch.arange(K) // GROUP
    if kind == "codebook":
        codes, codebooks = layer.codes.long(), given["codebooks"]
        value = sum(codebooks[c][codes[c]] for c in range(len(codes))).flatten(1)[:, :K]
        return given["scales"][:, group] * value
    words = layer.codes.numpy().astype("<u4")
    bits = torch.tensor([[[(int(row[k // 32]) >> (k % 32)) & 1 for k in range(K)] for row in plane] for plane in words])
    if kind == "free":
        return given["offsets"][:, group] + (given["scales"][:, :, group] * (2 * bits - 1)).sum(0)
    place = torch.tensor([2 ** (len(bits) - 1 - b) for b in range(len(bits))])
    integer = (bits * place[:, None, None]).sum(0)
    return given["scales"][0][:, group] * (integer - layer.zeros.double()[:, group])


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_are_those_of_the_dense_layer(kind):
    layer = layer_of(kind)
    names = TRAINABLE[kind]
    for name in names:
        getattr(layer, name).requires_grad_(True)
    x = torch.randn(7, K, requires_grad=True)
    grad_y = torch.randn(7, N)
    layer(x).backward(grad_y)

    given = {name: getattr(layer, name).detach().double().requires_grad_(True) for name in names}
    exact_x, bias = x.detach().double().requires_grad_(True), layer.bias.detach().double().requires_grad_(True)
    (exact_x @ dense_from(kind, layer, given).T + bias).backward(grad_y.double())
    for ours, exact in [(x, exact_x), (layer.bias, bias), *((getattr(layer, n), given[n]) for n in names)]:
        scale = exact.grad.abs().max()
        assert ((ours.grad.double() - exact.grad).abs().max() / scale) < 1e-5


@pytest.mark.parametrize("kind", ["uniform", "ratio"])
def test_gradients_of_hand_made_weights(kind):
    """Float zeros of an integer grid, and scales that share their plane ratios."""
    torch.manual_seed(0)
    codes, groups = pack_bits(torch.rand(3, N, K) < 0.5), -(-K // GROUP)
    scales = torch.rand(1, N, groups, requires_grad=True)
    other = {"zeros": torch.rand(N, groups) * 7} if kind == "uniform" else {"ratios": torch.tensor([1.0, 0.6, 0.2])}
    weight = BCQWeight.build(codes, scales, in_features=K, group_size=GROUP, scale_kind=kind, **other)
    x, grad_y = torch.randn(5, K), torch.randn(5, N)
    if kind == "uniform":
        other["zeros"].requires_grad_(True)
    linear(x, weight).backward(grad_y)

    group, signs = torch.arange(K) // GROUP, torch.stack([unpack_signs(plane, K) for plane in codes]).double()
    exact = {"scales": scales, **other}
    exact = {name: tensor.detach().double().requires_grad_(True) for name, tensor in exact.items()}
    if kind == "uniform":
        integer = sum(2.0 ** (2 - b) * (signs[b] + 1) / 2 for b in range(3))
        dense = exact["scales"][0][:, group] * (integer - exact["zeros"][:, group])
    else:
        dense = exact["scales"][0][:, group] * (exact["ratios"][:, None, None] * signs).sum(0)
    (x.double() @ dense.T).backward(grad_y.double())
    torch.testing.assert_close(scales.grad.double(), exact["scales"].grad, rtol=1e-5, atol=1e-5)
    if kind == "uniform":
        torch.testing.assert_close(other["zeros"].grad.double(), exact["zeros"].grad, rtol=1e-5, atol=1e-5)
        return
    other["ratios"].requires_grad_(True)
    with pytest.raises(ArgumentError, match="ratios do not take a gradient"):
        linear(x, weight).sum().backward()


def test_training_scales_lowers_the_loss():
    """AlphaTuning: codes are frozen, scales and offsets learn."""
    layer, target = layer_of("free"), torch.randn(16, N)
    layer.requires_grad_(False)
    layer.scales.requires_grad_(True)
    layer.offsets.requires_grad_(True)
    codes, x = layer.codes.clone(), torch.randn(16, K)
    optimizer = torch.optim.SGD([layer.scales, layer.offsets], lr=1e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert torch.equal(layer.codes, codes)
    layer.requires_grad_(False)
    torch.testing.assert_close(layer(x), linear(x, layer.weight_record, layer.bias))
    layer.accuracy = "exact"
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)


def op_arguments(kind: str, requires_grad: bool):
    layer = layer_of(kind)
    record, x = layer.weight_record, torch.randn(3, K, requires_grad=requires_grad)
    t, bias = record.tensors, layer.bias.detach()
    if kind == "codebook":
        head = (x, t["codes"], t["codebooks"], t["scales"], bias, GROUP)
        return torch.ops.lutgemm.codebook_linear.default, (*head, "auto", "auto", "auto")
    head = (x, t["codes"], t["scales"], t.get("offsets"), t.get("zeros"), t.get("ratios"), bias, GROUP)
    return torch.ops.lutgemm.bcq_linear.default, (*head, record.scale_kind, "auto", "auto", "auto")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(kind, requires_grad):
    op, arguments = op_arguments(kind, requires_grad)
    torch.library.opcheck(op, arguments)


def test_opcheck_of_the_reference(only_reference):
    torch.library.opcheck(*op_arguments("free", True))
    torch.library.opcheck(*op_arguments("codebook", True))
