"""The ops: schemas and fakes (opcheck), shapes of x, refusals, torch.compile, and every gradient."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lutgemm
from lutgemm.accuracy import ACCURACIES
from lutgemm.errors import ArgumentError
from lutgemm.formats import BCQWeight, CodebookWeight, QuantizedWeight
from lutgemm.formats.base import expand_groups
from lutgemm.formats.bcq import unpack_signs
from lutgemm.ops import linear
from lutgemm.testing.cases import CASES, Inputs, OpCase
from lutgemm.testing.numerics import RELATIVE_ERROR, assert_within, error_bound, exact_result, rms

ALGORITHMS = {"bcq_linear": ("lut_gemm", "biqgemm", "dequantize"), "codebook_linear": ("codegemm", "dequantize")}
FUNCTIONS = {"bcq_linear": lutgemm.bcq_linear, "codebook_linear": lutgemm.codebook_linear}
EACH = [(op, algorithm) for op, names in ALGORITHMS.items() for algorithm in names]
OPTIONAL = ("offsets", "zeros", "ratios")


def op_arguments(inputs: Inputs, algorithm: str = "auto") -> tuple[torch._ops.OpOverload, tuple]:
    """The torch op of a weight and what the public function passes to it."""
    t, weight = inputs.weight.tensors, inputs.weight
    if isinstance(weight, BCQWeight):
        optional = (t.get(name) for name in OPTIONAL)
        tensors = (inputs.x, t["codes"], t["scales"], *optional, inputs.bias)
        choice = (weight.group_size, weight.scale_kind, "auto", algorithm, "exact")
        return torch.ops.lutgemm.bcq_linear.default, (*tensors, *choice)
    tensors = (inputs.x, t["codes"], t["codebooks"], t["scales"], inputs.bias)
    return torch.ops.lutgemm.codebook_linear.default, (*tensors, weight.group_size, "auto", algorithm, "exact")


CHECKED = [
    OpCase(bias=True),
    OpCase(scale_kind="uniform", dtype="bfloat16"),
    OpCase(scale_kind="ratio", x_layout="transposed"),
    OpCase(offsets=False, x_layout="strided", dtype="float16"),
    OpCase(op="codebook_linear", bias=True),
    OpCase(op="codebook_linear", num_codebooks=2, vec_len=8, x_layout="transposed", dtype="bfloat16"),
]


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_opcheck(case):
    inputs = case.inputs()
    op, arguments = op_arguments(inputs)
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("case", CHECKED[::2], ids=lambda case: case.name)
def test_opcheck_with_gradients(case):
    inputs = replace(case, dtype="float32", scale_dtype="float32").inputs()
    op, arguments = op_arguments(inputs)
    trained = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    if isinstance(inputs.weight, BCQWeight) and inputs.weight.ratios is not None:
        inputs.weight.ratios.requires_grad_(False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(op, tuple(trained), test_utils=checks)


@pytest.mark.parametrize("op", CASES)
def test_a_compiled_training_step_equals_an_eager_one(op):
    """Weights are static, the number of tokens is not."""
    inputs = OpCase(op=op, scale_dtype="float32", bias=True).inputs()
    scales = inputs.weight.scales.requires_grad_()
    torch.compiler.reset()

    def step(x: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[op](x, inputs.weight, inputs.bias).square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for m in (4, 6):
        grads = []
        for function in (step, compiled):
            x = torch.randn(m, 72, generator=torch.Generator().manual_seed(m)).requires_grad_()
            grads.append(torch.autograd.grad(function(x), (x, scales)))
        for eager, traced in zip(*grads, strict=True):
            assert torch.equal(eager, traced)


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize(("op", "algorithm"), EACH)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "unaligned"])
def test_the_fake_has_the_shape_strides_and_dtype_of_the_result(op, algorithm, layout, m):
    for dtype in ("float32", "bfloat16"):
        inputs = OpCase(op=op, M=m, x_layout=layout, dtype=dtype, bias=True).inputs()
        real = FUNCTIONS[op](inputs.x, inputs.weight, inputs.bias, algorithm=algorithm)
        with FakeTensorMode() as mode:
            name, arguments = op_arguments(inputs, algorithm)
            fake = name(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
        assert real.is_contiguous()


@pytest.mark.parametrize(("op", "algorithm"), EACH)
def test_leading_dimensions_of_x(op, algorithm):
    inputs = OpCase(op=op, M=6, bias=True).inputs("exact")
    k, n = inputs.x.shape[1], inputs.weight.shape[0]
    call = partial(FUNCTIONS[op], weight=inputs.weight, bias=inputs.bias, algorithm=algorithm, accuracy="exact")
    flat = call(inputs.x)
    assert torch.equal(flat.double(), exact_result(inputs.x, inputs.weight, inputs.bias))
    for lead in ((2, 3), (1, 6), (2, 1, 3, 1)):
        y = call(inputs.x.view(*lead, k))
        assert torch.equal(y, flat.view(*lead, n))
    assert torch.equal(call(inputs.x[0]), flat[0])
    for lead in ((0,), (0, 4), (3, 0, 2)):
        empty = call(inputs.x.new_empty(*lead, k))
        assert empty.shape == (*lead, n)
    permuted = inputs.x.view(2, 3, k).transpose(0, 1)
    y = call(permuted)
    assert torch.equal(y, flat.view(2, 3, n).transpose(0, 1))


@pytest.mark.parametrize("op", CASES)
def test_linear_takes_the_op_from_the_format(op):
    inputs = OpCase(op=op, bias=True).inputs()
    assert torch.equal(linear(inputs.x, inputs.weight, inputs.bias), FUNCTIONS[op](*vars(inputs).values()))
    with pytest.raises(ArgumentError, match="weight: got Tensor, expected a BCQWeight or a CodebookWeight"):
        linear(inputs.x, inputs.x)


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 71)}, "x: got shape [3, 71], its last dimension must be K=72 (weight is 20x72)"),
        ({"x": torch.zeros(72, 3)}, "x: got shape [72, 3], its last dimension must be K=72"),
        ({"x": torch.zeros(())}, "x: got shape []"),
        ({"x": torch.zeros(3, 72, dtype=torch.float64)}, "x: got dtype torch.float64, use torch.float32"),
        ({"x": torch.zeros(3, 72, dtype=torch.int64)}, "x: got dtype torch.int64"),
        ({"x": torch.zeros(3, 72, dtype=torch.bool)}, "x: got dtype torch.bool"),
        ({"x": torch.zeros(3, 72, dtype=torch.complex64)}, "x: got dtype torch.complex64"),
        ({"x": torch.zeros(3, 72, device="meta")}, "x is on meta, the weight on cpu; move one with .to()"),
        ({"bias": torch.zeros(19)}, "bias: got torch.float32 [19] on cpu, expected torch.float32 [20] on cpu"),
        ({"bias": torch.zeros(1, 20)}, "bias: got torch.float32 [1, 20]"),
        ({"bias": torch.zeros(())}, "bias: got torch.float32 []"),
        ({"bias": torch.zeros(20, dtype=torch.float16)}, "bias: got torch.float16 [20]"),
        ({"bias": torch.zeros(20, dtype=torch.int32)}, "bias: got torch.int32 [20]"),
        ({"bias": torch.zeros(20, device="meta")}, "bias: got torch.float32 [20] on meta"),
        ({"backend": "tpu"}, "backend='tpu' is unknown; use 'auto' or one of ["),
        ({"algorithm": "strassen"}, "algorithm='strassen' is unknown for "),
        ({"accuracy": "high"}, "accuracy='high' is unknown; use one of ['auto', 'fast', 'accurate', 'near-exact', "),
    ],
)
def test_refusals_name_the_argument_and_what_is_accepted(op, change, message):
    arguments = {**vars(OpCase(op=op).inputs()), **change}
    with pytest.raises(ArgumentError, match=re.escape(message)):
        FUNCTIONS[op](**arguments)


@pytest.mark.parametrize("op", CASES)
def test_every_accuracy_runs_and_auto_is_accurate(op):
    inputs = OpCase(op=op, M=3, N=65, K=300, bias=True, outliers=True).inputs()
    truth = exact_result(inputs.x, inputs.weight, inputs.bias)
    results = {}
    for accuracy in ("auto", *ACCURACIES):
        y = results[accuracy] = FUNCTIONS[op](inputs.x, inputs.weight, inputs.bias, accuracy=accuracy)
        allowed = RELATIVE_ERROR.get("accurate" if accuracy == "auto" else accuracy, 1e-6)
        assert rms(y.double() - truth) <= allowed * rms(truth)
        reference = FUNCTIONS[op](inputs.x, inputs.weight, inputs.bias, accuracy=accuracy, backend="reference")
        assert torch.equal(reference, FUNCTIONS[op](*vars(inputs).values(), backend="reference"))
    assert torch.equal(results["auto"], results["accurate"])


def test_a_weight_of_the_other_format_is_refused():
    bcq, codebook = OpCase().inputs(), OpCase(op="codebook_linear").inputs()
    with pytest.raises(ArgumentError, match="weight: got CodebookWeight, bcq_linear takes a BCQWeight"):
        lutgemm.bcq_linear(codebook.x, codebook.weight)
    with pytest.raises(ArgumentError, match="weight: got BCQWeight, codebook_linear takes a CodebookWeight"):
        lutgemm.codebook_linear(bcq.x, bcq.weight)
    with pytest.raises(ArgumentError, match="weight: got Tensor"):
        lutgemm.bcq_linear(bcq.x, bcq.weight.dequantize())
    with pytest.raises(ArgumentError, match="algorithm='codegemm' is unknown for bcq_linear"):
        lutgemm.bcq_linear(bcq.x, bcq.weight, algorithm="codegemm")


@pytest.mark.parametrize(("op", "algorithm"), EACH)
def test_compiled_calls_are_one_graph_and_equal_eager(op, algorithm):
    inputs = OpCase(op=op, bias=True).inputs()
    torch.compiler.reset()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(FUNCTIONS[op](x, inputs.weight, inputs.bias, algorithm=algorithm)) * 2

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (3, 5, 1):
        x = torch.randn(m, 72, generator=torch.Generator().manual_seed(m))
        assert torch.equal(compiled(x), layer(x))


# Gradients, against autograd through a dense fp64 layer built from the same numbers.


def dense_weight(weight: QuantizedWeight, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """W `[N, K]` in fp64 as a differentiable function of `tensors`, straight from SPEC.md."""
    k, group_size = weight.shape[1], weight.group_size

    def spread(t: torch.Tensor) -> torch.Tensor:
        return expand_groups(t, k, group_size)

    if isinstance(weight, CodebookWeight):
        centroids = sum(tensors["codebooks"][c][codes.long()] for c, codes in enumerate(weight.codes))
        return centroids.flatten(-2)[:, :k] * spread(tensors["scales"])
    signs = unpack_signs(weight.codes, k, torch.float64)
    if weight.scale_kind == "uniform":
        integer = sum(2 ** (weight.bits - 1 - b) * (plane + 1) / 2 for b, plane in enumerate(signs))
        return spread(tensors["scales"][0]) * (integer - spread(tensors["zeros"]))
    scales = tensors["scales"]
    if weight.scale_kind == "ratio":
        scales = scales * weight.ratios.double()[:, None, None]
    w = (spread(scales) * signs).sum(0)
    return w + spread(tensors["offsets"]) if "offsets" in tensors else w


TRAINED = [
    OpCase(bits=3, bias=True),
    OpCase(bits=1, offsets=False),
    OpCase(bits=4, N=7, K=100, group_size=64, bias=True),
    OpCase(bits=2, K=33, group_size=0),
    OpCase(scale_kind="uniform", bits=4, zeros_dtype="float32", K=100, bias=True),
    OpCase(scale_kind="uniform", bits=3),
    OpCase(scale_kind="ratio", bits=3, bias=True),
    OpCase(scale_kind="ratio", bits=2, offsets=False),
    OpCase(op="codebook_linear", bias=True),
    OpCase(op="codebook_linear", num_codebooks=3, vec_len=8, codebook_bits=3, K=100, group_size=64),
    OpCase(op="codebook_linear", codebook_bits=9, vec_len=2, group_size=0),
    OpCase(M=1, bias=True),
    OpCase(op="codebook_linear", M=0, bias=True),
]


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_gradients_equal_those_of_the_dense_layer(case):
    case = replace(case, scale_dtype="float32")
    inputs = case.inputs()
    names = ("scales", "offsets", "codebooks", "zeros")
    trained = {name: t for name, t in inputs.weight.tensors.items() if name in names and t.is_floating_point()} | {
        "x": inputs.x
    }
    if inputs.bias is not None:
        trained["bias"] = inputs.bias
    leaves = {name: t.detach().double().requires_grad_() for name, t in trained.items()}
    constants = {name: t.double() for name, t in inputs.weight.tensors.items() if name == "zeros"}
    w = dense_weight(inputs.weight, constants | leaves)
    upstream = torch.randn(case.M, case.N, generator=torch.Generator().manual_seed(9))
    truth = leaves["x"] @ w.T + leaves.get("bias", 0)
    (truth * upstream.double()).sum().backward()

    for t in trained.values():
        t.requires_grad_()
    y = linear(inputs.x, inputs.weight, inputs.bias, accuracy="exact")
    assert_within(y, truth, error_bound(inputs.x.detach(), inputs.weight, inputs.bias, "dequantize"), "forward")
    (y * upstream).sum().backward()

    # An fp32 sum of at most M + N + K products: its rounding is below that many 2**-24 of the product of the norms.
    w = w.detach()
    norms = {
        "grad_w": upstream.norm() * leaves["x"].detach().norm(),
        "grad_x": upstream.norm() * w.norm(),
        "bias": upstream.norm(),
    }
    factor = 1.0
    for name in ("scales", "codebooks", "zeros"):
        if name in inputs.weight.tensors:
            factor *= 1 + float(inputs.weight.tensors[name].detach().abs().max()) * 2**case.bits
    depth = (case.M + case.N + case.K + 16) * 2.0**-24
    for name, t in trained.items():
        norm = {"x": norms["grad_x"], "bias": norms["bias"]}.get(name, norms["grad_w"] * factor)
        assert t.grad.dtype == t.dtype
        assert_within(t.grad, leaves[name].grad, depth * float(norm) + 1e-30, f"gradient of {name}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", CASES)
def test_gradients_keep_half_precision_dtypes(op, dtype):
    inputs = OpCase(op=op, M=8, dtype=dtype, scale_dtype=dtype, bias=True).inputs()
    trained = {"x": inputs.x, "bias": inputs.bias, "scales": inputs.weight.scales}
    for t in trained.values():
        t.requires_grad_()
    linear(inputs.x, inputs.weight, inputs.bias).float().square().sum().backward()
    wide = OpCase(op=op, M=8, dtype=dtype, scale_dtype=dtype, bias=True).inputs()
    x = wide.x.double().requires_grad_()
    truth = x @ wide.weight.dequantize().double().T + wide.bias.double()
    truth.square().sum().backward()
    for name, t in trained.items():
        assert t.grad.dtype == t.dtype == wide.x.dtype, name
        assert torch.isfinite(t.grad).all()
    # Two chained products of N terms, each rounded to dtype.
    u = torch.finfo(wide.x.dtype).eps
    bound = 4 * u * (truth.detach().abs() @ wide.weight.dequantize().double().abs()) * 2 + u
    assert_within(inputs.x.grad, x.grad, bound, "gradient of x")


@pytest.mark.parametrize("case", TRAINED[:2] + TRAINED[4:9], ids=lambda case: case.name)
def test_gradients_do_not_depend_on_autocast_or_the_default_dtype(case):
    grads = []
    for default, autocast in ((torch.float32, False), (torch.float64, False), (torch.float32, True)):
        inputs = replace(case, scale_dtype="float32").inputs()
        trained = [inputs.x, *(t for t in inputs.weight.tensors.values() if t.is_floating_point())]
        trained = [t.requires_grad_() for t in trained if t is not inputs.weight.tensors.get("ratios")]
        torch.set_default_dtype(default)
        try:
            y = linear(inputs.x, inputs.weight, accuracy="exact")
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                grads.append(torch.autograd.grad(y, trained, torch.ones_like(y)))
        finally:
            torch.set_default_dtype(torch.float32)
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_only_what_asks_for_a_gradient_gets_one():
    inputs = OpCase(bias=True).inputs()
    inputs.weight.scales.requires_grad_()
    linear(inputs.x, inputs.weight, inputs.bias).sum().backward()
    assert inputs.weight.scales.grad is not None
    assert inputs.weight.offsets.grad is None
    assert inputs.x.grad is None


def test_ratios_refuse_a_gradient_in_words():
    inputs = OpCase(scale_kind="ratio").inputs()
    inputs.weight.ratios.requires_grad_()
    with pytest.raises(ArgumentError, match="ratios do not take a gradient; train scales and offsets"):
        linear(inputs.x, inputs.weight).sum().backward()


@pytest.mark.filterwarnings("ignore:a quantized weight made under torch.inference_mode")
@pytest.mark.parametrize("op", CASES)
def test_inference_mode_and_no_grad(op):
    inputs = OpCase(op=op).inputs()
    expected = linear(inputs.x, inputs.weight)
    with torch.inference_mode():
        again = OpCase(op=op).inputs()
        assert torch.equal(linear(again.x, again.weight), expected)
    inputs.x.requires_grad_()
    with torch.no_grad():
        assert not linear(inputs.x, inputs.weight).requires_grad


@pytest.mark.parametrize(
    "make", [lambda w: lutgemm.quantize_bcq(w, 2, 32), lambda w: lutgemm.quantize_codebook(w, 1, 4, 2, 32)]
)
def test_forward_mode_is_refused_and_not_dropped(make):
    weight, x = make(torch.randn(8, 64)), torch.randn(2, 64)
    with torch.autograd.forward_ad.dual_level():
        plain = lutgemm.ops.linear(x, weight)
        assert torch.equal(plain, lutgemm.ops.linear(torch.clone(x), weight))
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ArgumentError, match="forward-mode"):
            lutgemm.ops.linear(dual, weight)
