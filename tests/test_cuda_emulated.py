"""The CUDA kernels under the emulator: small cases of every algorithm, orders of blocks, devices, bad arguments.

The emulator ends a call at the first access outside of the tensors that were named to it, read of memory that nobody
wrote, or race; results start as NaN. Needs g++; without it the tests are skipped, or fail under `--require emulator`.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import emulated_backend
import pytest
import test_kernels
import torch
from conftest import KernelRun, backend_names
from emulated_backend import NAME, Emulated

from lutgemm.backends import cuda, gpu_layouts
from lutgemm.backends.gpu_heuristics import GPU_THRESHOLDS, GpuThreshold, choose_on_gpu
from lutgemm.backends.gpu_layouts import BcqRecord, dequantize, kept_layout
from lutgemm.errors import BackendError
from lutgemm.ops import linear
from lutgemm.testing.cases import CASES, Inputs, OpCase
from lutgemm.testing.numerics import assert_equal, assert_within, exact_result, rms, rounded_allowance
from lutgemm.testing.targets import Target

backends = importlib.import_module("lutgemm.backends")

SMALL = 1 << 21
"""Most M * N * K * planes of a case: what the emulator runs in a few hundredths of a second."""
BATCH = 12
"""Cases of a test: one test each would take longer than the kernels do."""

ONLY = [name for name in os.environ.get("LUTGEMM_EMULATED_ONLY", "").split(",") if name]
ALGORITHMS = [
    (op, name)
    for (op, name), algorithm in gpu_layouts.algorithms().items()
    if not ONLY or algorithm.run.__module__.rpartition(".")[2] in ONLY
]


def small(case: OpCase) -> bool:
    """Whether the emulator runs the case."""
    planes = case.bits if case.op == "bcq_linear" else case.num_codebooks
    return case.M * case.N * case.K * planes <= SMALL


def taken(op: str, algorithm: str, case: OpCase) -> bool:
    """Whether the algorithm takes the case; for a refusal there must be a reason in words."""
    reason = gpu_layouts.algorithms()[op, algorithm].unsupported(case.problem("cpu"))
    assert reason is None or len(reason) > 10
    return reason is None


def kernel_checks() -> dict[str, tuple[Callable[[KernelRun], None], list[OpCase]]]:
    """The tests of test_kernels.py that take a run, and their cases."""
    found = {}
    for name, function in vars(test_kernels).items():
        for mark in getattr(function, "pytestmark", []):
            if mark.name == "cases":
                found[name] = function, mark.args[0]
    return found


def batches() -> list[pytest.ParameterSet]:
    """(test, algorithm, some of the cases that it takes)."""
    found = []
    for name, (_, every) in kernel_checks().items():
        for op, algorithm in ALGORITHMS:
            cases = [case for case in every if case.op == op and small(case) and taken(op, algorithm, case)]
            for start in range(0, len(cases), BATCH):
                label = f"{op.removesuffix('_linear')}-{algorithm}-{name.removeprefix('test_')}-{start}"
                found.append(pytest.param(name, algorithm, cases[start : start + BATCH], id=label))
    return found


@pytest.fixture(scope="module")
def emulated(request: pytest.FixtureRequest) -> Iterator[Emulated]:
    """The emulated backend, registered under its name."""
    if emulated_backend.compiler() is None:
        if "emulator" in backend_names(request.config, "--require"):
            pytest.fail("--require emulator: no g++ is on PATH")
        pytest.skip("no g++ is on PATH")
    built = emulated_backend.emulated()
    known = dict(backends._registry())
    reference = known.pop("reference")
    chosen = {**known, NAME: built.backend, "reference": reference}
    patch = pytest.MonkeyPatch()
    patch.setattr(backends, "_registry", lambda: chosen)
    backends.registry.cache_clear()
    backends.forget_choices()
    yield built
    patch.undo()
    backends.registry.cache_clear()
    backends.forget_choices()


@pytest.fixture(autouse=True)
def usual_device(emulated: Emulated) -> Iterator[None]:
    """Tests that change the emulated device leave it as it was, and new tensors of torch are filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    emulated.control.set(seed=0, sm_count=4, architecture=90)


def run(inputs: Inputs, algorithm: str, accuracy: str = "exact") -> torch.Tensor:
    return linear(inputs.x, inputs.weight, inputs.bias, backend=NAME, algorithm=algorithm, accuracy=accuracy)


@pytest.mark.parametrize(("test", "algorithm", "cases"), batches())
def test_what_every_kernel_must_do(test: str, algorithm: str, cases: list[OpCase]) -> None:
    for case in cases:
        kernel_checks()[test][0](KernelRun(Target(NAME), algorithm, case))


def check(case: OpCase, algorithm: str, y: torch.Tensor, what: str) -> None:
    """Fail unless y keeps the bounds of a random-tier result."""
    inputs, truth = test_kernels.prepared(case, "random")
    if case.accuracy == "exact":
        bound, allowed = test_kernels.limits(case, algorithm)
    else:
        bound, allowed = float("inf"), rounded_allowance(*vars(inputs).values(), case.accuracy)
    assert_within(y, truth, bound, what)
    assert rms(y.double() - truth) <= allowed, what


STEADY = [
    OpCase(op=op, M=m, N=130, K=600, bits=3, codebook_bits=8, group_size=128, dtype=dtype, bias=True)
    for op in CASES
    for m, dtype in ((1, "float16"), (7, "float32"), (17, "bfloat16"))
]


def steady(op: str, algorithm: str) -> list[OpCase]:
    """Cases that take a kernel's splits and several of its tiles."""
    asked = [replace(case, accuracy=a) for case in STEADY if case.op == op for a in ("accurate", "exact")]
    return [case for case in asked if taken(op, algorithm, case)]


@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_bits_do_not_depend_on_the_order_of_blocks_or_on_the_call(op: str, algorithm: str, emulated: Emulated) -> None:
    for case in steady(op, algorithm):
        inputs = case.inputs()
        first = run(inputs, algorithm, case.accuracy)
        for seed in (0, 1, 2):
            emulated.control.set(seed=seed)
            assert_equal(run(inputs, algorithm, case.accuracy), first, f"{case.name}, seed {seed}")
        emulated.control.set(seed=0)


@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_devices_of_any_size(op: str, algorithm: str, emulated: Emulated) -> None:
    """The number of multiprocessors decides how work is split, and the architecture how much shared memory there is."""
    for sm_count, architecture in ((1, 80), (4, 86), (7, 90), (132, 90)):
        emulated.control.set(sm_count=sm_count, architecture=architecture)
        for case in steady(op, algorithm):
            y = run(case.inputs(), algorithm, case.accuracy)
            check(case, algorithm, y, f"{case.name}, {sm_count} multiprocessors of sm_{architecture}")


@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_rows_of_x_may_be_a_stride_apart(op: str, algorithm: str, emulated: Emulated) -> None:
    for case in steady(op, algorithm):
        inputs = case.inputs()
        wide = torch.full((case.M, case.K + 24), float("nan"), dtype=inputs.x.dtype)
        wide[:, : case.K] = inputs.x
        y = run(Inputs(wide[:, : case.K], inputs.weight, inputs.bias), algorithm, case.accuracy)
        assert_equal(y, run(inputs, algorithm, case.accuracy), case.name)


@pytest.mark.skipif(bool(ONLY), reason="LUTGEMM_EMULATED_ONLY leaves kernels out that auto may choose")
@pytest.mark.parametrize("op", CASES)
def test_auto_runs_with_any_shape_of_x(op: str, emulated: Emulated) -> None:
    inputs = OpCase(op=op, M=6, N=20, K=64).inputs("exact")
    truth = exact_result(inputs.x, inputs.weight).float()
    for shape in ((6,), (2, 3), (1, 6, 1)):
        y = linear(inputs.x.view(*shape, 64), inputs.weight, backend=NAME, accuracy="exact")
        assert_equal(y, truth.view(*shape, 20))
    assert linear(inputs.x[0], inputs.weight, backend=NAME).shape == (20,)
    assert linear(inputs.x[:0], inputs.weight, backend=NAME).shape == (0, 20)


@pytest.mark.parametrize("op", CASES)
def test_dequantize_gives_the_bits_of_the_record(op: str, emulated: Emulated) -> None:
    """By identity activations, in panels."""
    ratio = [OpCase(op=op, N=21, K=96, scale_kind="ratio", scale_dtype="bfloat16")] if op == "bcq_linear" else []
    for case in [case for case in CASES[op]() if case.x_layout == "contiguous" and case.M == 3][::4] + ratio:
        weight = case.weight()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            y = run(Inputs(torch.eye(case.K, dtype=dtype), weight, None), "dequantize")
            assert_equal(y, weight.dequantize(dtype).T, f"{case.name} {dtype}")


@pytest.mark.parametrize("bias", [False, True])
def test_panels_make_one_result(bias: bool, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    case = OpCase(M=5, N=150, K=64, bias=bias)
    inputs = case.inputs("exact")
    truth = exact_result(inputs.x, inputs.weight, inputs.bias)
    monkeypatch.setattr(dequantize, "PANEL_BYTES", 64 * 64 * 4)
    assert dequantize.panel_rows(64, 4) == 64
    assert_equal(run(inputs, "dequantize"), truth.float())


def test_a_panel_has_whole_tiles_and_a_bound() -> None:
    assert dequantize.panel_rows(8192, 2) == 4096
    assert dequantize.panel_rows(100, 2) % dequantize.PANEL_ROWS == 0
    assert dequantize.panel_rows(1 << 24, 4) == 1


def record(case: OpCase) -> dict[str, object]:
    """The arguments of the raw operator that dequantizes."""
    weight = case.weight()
    t = weight.tensors
    shape = {"K": case.K, "group_size": case.group_size, "row_begin": 0, "row_end": case.N, "dtype": torch.float32}
    if case.op == "codebook_linear":
        return {"codes": t["codes"], "codebooks": t["codebooks"], "scales": t["scales"], **shape}
    tensors = {"codes": t["codes"], "scales": t["scales"], "offsets": t.get("offsets"), "zeros": t.get("zeros")}
    return {**tensors, **shape, "uniform": False}


BCQ, CODEBOOK = OpCase(N=70, K=100, bits=3), OpCase(op="codebook_linear", N=70, K=100)


@pytest.mark.parametrize(
    ("case", "changes", "text"),
    [
        (BCQ, {"codes": torch.zeros(3, 70, 3, dtype=torch.int32)}, "codes: got shape"),
        (BCQ, {"codes": torch.zeros(9, 70, 4, dtype=torch.int32)}, "bits=9"),
        (BCQ, {"codes": torch.zeros(3, 70, 4)}, "codes: has another dtype"),
        (BCQ, {"codes": torch.zeros(3, 4, 70, dtype=torch.int32).mT}, "codes: must be contiguous"),
        (BCQ, {"codes": torch.zeros(3 * 70 * 4 + 1, dtype=torch.int32)[1:].view(3, 70, 4)}, "multiple of 16 bytes"),
        (BCQ, {"scales": torch.zeros(2, 70, 4)}, "scales: got shape"),
        (BCQ, {"scales": torch.zeros(3, 70, 4, dtype=torch.int32)}, "scales: must be float32"),
        (BCQ, {"offsets": torch.zeros(70, 4)}, "offsets: must have the dtype of scales"),
        (BCQ, {"zeros": torch.zeros(70, 4)}, "zeros: the uniform kind needs them"),
        (BCQ, {"K": 0}, "K=0: must be from 1"),
        (BCQ, {"group_size": 40}, "group_size=40: must be a multiple of 32"),
        (BCQ, {"row_begin": -1}, "row_begin=-1"),
        (BCQ, {"row_end": 71}, "row_end=71: must be from 0 to 70"),
        (BCQ, {"dtype": torch.float64}, "dtype: must be float32"),
        (CODEBOOK, {"codes": torch.zeros(1, 70, 25, dtype=torch.int16)}, "codes: has another dtype"),
        (CODEBOOK, {"codes": torch.zeros(1, 70, 24, dtype=torch.uint8)}, "codes: got shape"),
        (CODEBOOK, {"codebooks": torch.zeros(1, 60, 4)}, "60 centroids: must be a power of two"),
        (CODEBOOK, {"codebooks": torch.zeros(1, 64, 3)}, "vec_len=3"),
        (CODEBOOK, {"codebooks": torch.zeros(1, 64, 4)}, "codebooks: must have the dtype of scales"),
        (CODEBOOK, {"scales": torch.zeros(70, 3)}, "scales: got shape"),
        (CODEBOOK, {"group_size": 34}, "group_size=34: must be a multiple of vec_len=4"),
    ],
)
def test_the_raw_operator_checks_its_arguments(case: OpCase, changes: dict, text: str, emulated: Emulated) -> None:
    operator = getattr(torch.ops.lutgemm_emulated, f"_{case.op.removesuffix('_linear')}_dequantize_cuda")
    assert operator(**record(case)).shape == (70, 100)
    with pytest.raises(RuntimeError, match=text):
        operator(**(record(case) | changes))


def test_codes_outside_of_the_codebook_read_nothing_outside(emulated: Emulated) -> None:
    arguments = record(CODEBOOK)
    arguments["codes"] = torch.full_like(arguments["codes"], 255)
    assert torch.isfinite(torch.ops.lutgemm_emulated._codebook_dequantize_cuda(**arguments)).all()


def test_no_layout_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = BCQ.weight()
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    there = BcqRecord(weight.codes, weight.scales, weight.offsets, None, None, 100, 32, "free")
    record = SimpleNamespace(tensors=there.tensors, parameters=there.parameters, codes=on_gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match="call the layer once with as many tokens before the capture"):
        kept_layout(record, "test", lambda: (torch.ones(1),))
    monkeypatch.undo()
    made = kept_layout(there, "test", lambda: (torch.ones(1),))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kept_layout(record, "test", lambda: (torch.ones(1),)) is made


def test_a_layout_on_a_gpu_is_made_off_the_callers_thread_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what happens, with torch's streams replaced by a list."""
    happened = []
    caller = threading.get_ident()

    def stream(device: torch.device) -> SimpleNamespace:
        who = "caller's" if threading.get_ident() == caller else "other"
        return SimpleNamespace(synchronize=lambda: happened.append(f"wait for the {who} stream of {device}"))

    def make() -> tuple[torch.Tensor]:
        assert threading.get_ident() != caller
        assert not torch.is_grad_enabled()
        happened.append("make")
        return (torch.ones(1),)

    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    place = torch.device("cuda", 1)
    assert gpu_layouts._on_a_thread_of_its_own(make, place)[0].item() == 1
    assert happened == [
        "wait for the caller's stream of cuda:1",
        "make",
        "wait for the other stream of cuda:1",
    ]

    def fail() -> tuple[torch.Tensor]:
        raise torch.OutOfMemoryError("no room for a layout")

    with pytest.raises(torch.OutOfMemoryError, match="no room for a layout"):
        gpu_layouts._on_a_thread_of_its_own(fail, place)


def test_the_real_backend_says_why_it_is_absent() -> None:
    reason = cuda.BACKEND.unavailable()
    if torch.version.cuda is None:
        assert reason is not None
        assert "has no CUDA; install a CUDA build of torch" in reason


def test_thresholds_choose_the_first_that_takes_the_problem() -> None:
    rows = (
        GpuThreshold("bcq_linear", "a", 2),
        GpuThreshold("bcq_linear", "b", 16),
        GpuThreshold("bcq_linear", "c", 64),
    )
    asked = BCQ.problem("cpu")

    def choose(m: int, offered: tuple[str, ...], refused: str = "") -> str:
        refuse = lambda problem, name: "no" if name == refused else None  # noqa: E731
        return choose_on_gpu(asked._replace(M=m), offered, refuse, rows)

    assert choose(1, ("a", "b", "c")) == "a"
    assert choose(3, ("a", "b", "c")) == "b"
    assert choose(1, ("a", "b", "c"), "a") == "b"
    assert choose(1, ("c",)) == "c"
    assert choose(65, ("a", "b", "c")) == "dequantize"


def test_every_threshold_says_where_it_comes_from() -> None:
    for row in GPU_THRESHOLDS:
        assert row.device
        assert row.date
        assert row.op in CASES
