"""sign_planes of csrc/cuda, and what it shares with bit_planes: accuracy, magnitudes, cuts of a problem, arguments.

What every kernel must do is checked by test_cuda_emulated.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import emulated_backend
import pytest
import torch
from conftest import REQUIRED
from emulated_backend import Emulated
from torch import Tensor

from lutgemm.accuracy import resolve_accuracy
from lutgemm.backends.gpu_layouts import BcqRecord, bit_planes
from lutgemm.formats import QuantizedWeight
from lutgemm.testing.cases import OpCase
from lutgemm.testing.numerics import (
    assert_equal,
    assert_within,
    error_bound,
    exact_result,
    relative_error,
    rms,
    torch_allowance,
)

KINDS = ("free", "uniform", "ratio")
LONG = OpCase(M=16, N=40, K=1100, bits=2, group_size=128, dtype="float32")
"""From 128 chunks of 128 columns times tokens on, a kernel of their own prepares the activations: here 9 * 16."""


@pytest.fixture(scope="module")
def emulated() -> Iterator[Emulated]:
    if emulated_backend.compiler() is None:
        if "emulator" in REQUIRED:
            pytest.fail("--require emulator: no g++ is on PATH")
        pytest.skip("no g++ is on PATH")
    built = emulated_backend.emulated()
    built.control.set(sm_count=4, architecture=90)
    yield built
    built.control.set(counts=0, sm_count=4, architecture=90)


def record(w: QuantizedWeight, case: OpCase) -> BcqRecord:
    return BcqRecord(w.codes, w.scales, w.offsets, w.zeros, w.ratios, case.K, w.group_size, case.scale_kind)


def run(
    built: Emulated, case: OpCase, x: Tensor, w: QuantizedWeight, algorithm: str = "sign_planes", bias: object = None
) -> Tensor:
    r = record(w, case)
    weight = (r.codes, r.scales, r.offsets, r.zeros, r.ratios)
    arguments = (bias, r.group_size, r.scale_kind, algorithm, resolve_accuracy(case.accuracy))
    return built.backend.bcq_linear(x, *weight, *arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [torch.float16, torch.bfloat16, torch.float32])
def test_outliers_cost_nothing(kind: str, values: torch.dtype, emulated: Emulated) -> None:
    """A column of 10000 times the others; results in fp32, so that their own rounding hides nothing."""
    for m, group_size in ((1, 128), (5, 64), (9, 0)):
        case = OpCase(M=m, N=70, K=520, bits=3, scale_kind=kind, group_size=group_size, dtype="float32")
        inputs = case.inputs()
        x, w = inputs.x, inputs.weight
        x[:, ::50] *= 1e4
        x = x.to(values).float()
        truth = exact_result(x, w)
        y = run(emulated, case, x, w)
        assert_within(y, truth, error_bound(x, w, None, "sign_planes"), case.name)
        assert rms(y.double() - truth) <= torch_allowance(x, w, None)
        rounded = run(emulated, replace(case, accuracy="accurate"), x, w, "bit_planes")
        assert rms(rounded.double() - truth) > 20 * rms(y.double() - truth), "what the outliers cost by integers"


@pytest.mark.parametrize(("accuracy", "least", "most"), [("accurate", 3e-5, 5e-4), ("near-exact", 0, 1e-6)])
def test_float_activations_are_one_or_two_terms(accuracy: str, least: float, most: float, emulated: Emulated) -> None:
    for kind in KINDS:
        case = OpCase(M=6, N=64, K=300, bits=3, scale_kind=kind, dtype="float32", accuracy=accuracy, outliers=True)
        inputs = case.inputs()
        y = run(emulated, case, inputs.x, inputs.weight)
        assert least <= relative_error(y, exact_result(inputs.x, inputs.weight)) <= most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_power_of_two_goes_through(dtype: str, kind: str, emulated: Emulated) -> None:
    """Activations far outside of fp16, whose steps are powers of two."""
    case = OpCase(M=3, N=40, K=200, bits=3, group_size=64, scale_kind=kind, dtype=dtype)
    inputs = case.inputs()
    y = run(emulated, case, inputs.x, inputs.weight)
    for exponent in (-90, -30, 30, 100):
        scaled = run(emulated, case, inputs.x * 2.0**exponent, inputs.weight)
        assert_equal(scaled.double(), y.double() * 2.0**exponent, f"2**{exponent}")


def test_the_least_and_the_largest_activations(emulated: Emulated) -> None:
    """Subnormal numbers keep what fp32 holds of them; sums that fit in fp32 do not overflow on the way."""
    case = OpCase(M=2, N=20, K=64, bits=2, group_size=0, dtype="float32")
    w = case.weight()
    x = torch.zeros(2, 64)
    x[0, 3], x[1, 40] = 2.0**-140, 2.0**127
    y, truth = run(emulated, case, x, w), exact_result(x, w)
    assert_within(y[0], truth[0], 2.0**-146)
    assert_within(y[1], truth[1], truth[1].abs() * 2.0**-20 + error_bound(x, w, None, "sign_planes")[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["sign_planes", "bit_planes"])
def test_activations_prepared_apart_are_the_same(algorithm: str, kind: str, emulated: Emulated) -> None:
    case = replace(LONG, scale_kind=kind, accuracy="accurate")
    inputs = case.inputs()
    y = run(emulated, case, inputs.x, inputs.weight, algorithm)
    for rows in (slice(0, 8), slice(8, 16)):
        assert_equal(run(emulated, case, inputs.x[rows], inputs.weight, algorithm), y[rows], str(rows))


@pytest.mark.parametrize("algorithm", ["sign_planes", "bit_planes"])
def test_long_rows_and_many_tokens(algorithm: str, emulated: Emulated) -> None:
    """Activations that shared memory does not hold at once, tokens of several passes, any number of multiprocessors."""
    for case in (
        replace(LONG, N=17, K=9000, bits=1, bias=True, accuracy="accurate"),
        replace(LONG, M=35, dtype="bfloat16", bias=True, accuracy="accurate"),
        replace(LONG, M=1, N=33, K=20000, dtype="float16", group_size=32, accuracy="accurate"),
    ):
        inputs = case.inputs()
        truth = exact_result(inputs.x, inputs.weight, inputs.bias)
        results = []
        for sm_count, architecture in ((1, 80), (132, 90)):
            emulated.control.set(sm_count=sm_count, architecture=architecture)
            results.append(run(emulated, case, inputs.x, inputs.weight, algorithm, inputs.bias))
            assert relative_error(results[-1], truth) < (5e-3 if case.dtype == "bfloat16" else 1e-3), case.name
        assert relative_error(*results) < 5e-3
    emulated.control.set(sm_count=4, architecture=90)


def test_one_copy_of_the_weight_serves_all(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[BcqRecord] = []
    plain = bit_planes.layout
    monkeypatch.setattr(bit_planes, "layout", lambda record: made.append(record) or plain(record))
    case = OpCase(M=2, accuracy="accurate")
    inputs = case.inputs("exact")
    for algorithm in ("sign_planes", "bit_planes", "sign_planes"):
        run(emulated, case, inputs.x, inputs.weight, algorithm)
    assert len(made) == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"accuracy": 4}, "accuracy=4: must be from 0 to 3"),
        ({"bits": 9}, "bits=9: must be from 1 to 8"),
        ({"bits": 2}, "packed: got shape"),
        ({"N": 33}, "packed: got shape"),
        ({"wide": True}, "packed: got shape"),
        ({"steps": 3}, "steps=3: must be 1, 2 or 4"),
        ({"merged": True}, "has_offsets: the uniform kind has none"),
        ({"x": torch.zeros(2, 201)}, "x: got shape"),
        ({"bias": torch.zeros(21)}, "bias: got shape"),
    ],
)
def test_the_raw_operator_checks_its_arguments(changes: dict[str, object], text: str, emulated: Emulated) -> None:
    case = OpCase(M=2, N=20, K=200, bits=3, group_size=128)
    w = case.weight()
    packed, _ = bit_planes.layout(record(w, case))
    arguments = {"x": case.inputs().x, "packed": packed, "bias": None, "N": 20, "K": 200, "bits": 3, "merged": False}
    arguments |= {"wide": False, "has_offsets": True, "steps": 1, "accuracy": 3}
    operator = torch.ops.lutgemm_emulated._bcq_sign_planes_cuda
    assert operator(**arguments).shape == (2, 20)
    with pytest.raises(RuntimeError, match=text):
        operator(**(arguments | changes))
