"""The C++ operator for sibling layers."""

import pytest
import torch
from sibling_models import BCQ, UNIFORM
from torch import nn

import lutgemm
from lutgemm.accuracy import ACCURACIES
from lutgemm.backends import cpu, prepared
from lutgemm.testing.timing import torch_threads

pytestmark = pytest.mark.skipif(
    cpu.BACKEND.unavailable() is not None, reason=f"backend cpu: {cpu.BACKEND.unavailable()}"
)


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
