"""Options `--require` and `--backend`, and the `run` fixture: every case x every backend, ISA, algorithm."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from lutgemm.backends import registry, tuned
from lutgemm.ops import linear
from lutgemm.testing.cases import CASES, Inputs, OpCase, laid_out
from lutgemm.testing.targets import Target, absent, targets
from lutgemm.testing.timing import torch_threads

THREADED_WORK = 1 << 20
"""M * N * K from which a case runs on two threads; below it a pool only costs time, most of all on a busy machine."""


TOOLS = ("neon", "nvcc", "emulator")
"""What `--require` knows beside backends: see test_neon.py, test_cuda_compile.py, test_cuda_emulated.py."""

REQUIRED: set[str] = set()
"""What `--require` names, for modules that skip themselves."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require", default="", help=f"backends, or some of {TOOLS}, whose absence fails, not skips")
    parser.addoption("--backend", default="", help="comma-separated backends: kernel tests of these only")


def backend_names(config: pytest.Config, option: str) -> list[str]:
    return [name for name in config.getoption(option).split(",") if name]


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; what tests start would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # fixtures of a module too; see `one_thread`
    os.environ[tuned.VARIABLE] = "0"  # what the user's machine was tuned to is no business of the tests
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matmuls, before CUDA starts
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "sanitizer: small, and worth running under compute-sanitizer")
    config.addinivalue_line("markers", "cases(list): the OpCases that the `run` fixture iterates (default: all)")
    REQUIRED.update(backend_names(config, "--require"))
    for option in ("--require", "--backend"):
        for name in backend_names(config, option):
            known = [*registry(), *(TOOLS if option == "--require" else ())]
            if name not in known:
                raise pytest.UsageError(f"{option}: backend {name!r} is unknown; use some of {known}")


@dataclass(frozen=True)
class Absent:
    """Stands for all runs of a backend that is not available."""

    backend: str
    reason: str


@dataclass(frozen=True)
class KernelRun:
    """One algorithm of one target on one case."""

    target: Target
    algorithm: str
    case: OpCase

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        choice = {"backend": self.target.backend, "algorithm": self.algorithm, "accuracy": self.case.accuracy}
        device = self.target.device
        if device == "cpu":
            return linear(inputs.x, inputs.weight, inputs.bias, **choice)
        x = laid_out(inputs.x.to(device), self.case.x_layout)
        bias = None if inputs.bias is None else inputs.bias.to(device)
        return linear(x, inputs.weight.to(device), bias, **choice).cpu()

    def __str__(self) -> str:
        return f"{self.target.name}-{self.algorithm}-{self.case.name}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("cases")
    cases = marker.args[0] if marker else [case for make in CASES.values() for case in make()]
    wanted = backend_names(metafunc.config, "--backend") or list(registry())
    required = backend_names(metafunc.config, "--require")
    params = []
    for target in targets():
        if target.backend in wanted:
            runs = [
                KernelRun(target, name, case)
                for case in cases
                for name in target.algorithms(case.op)
                if target.takes(case, name)
            ]
            marks = () if target.device == "cpu" else pytest.mark.gpu
            params += [pytest.param(run, id=str(run), marks=marks) for run in runs]
    for name, reason in absent().items():
        if name in wanted:
            marks = [] if "cpu" in registry()[name].device_types else [pytest.mark.gpu]
            marks += [] if name in required else [pytest.mark.skip(reason=f"backend {name}: {reason}")]
            params.append(pytest.param(Absent(name, reason), id=f"{name}-unavailable", marks=marks))
    metafunc.parametrize("run", params, indirect=True)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[KernelRun]:
    """The run, its instruction set in force, and every new tensor filled with NaN so that an unwritten result shows."""
    if isinstance(request.param, Absent):
        pytest.fail(f"--require {request.param.backend}: {request.param.reason}")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        case = request.param.case
        work = 0 if request.param.target.backend == "reference" else case.M * case.N * case.K
        threads = 2 if work >= THREADED_WORK else 1
        with request.param.target.active(), torch_threads(threads):
            yield request.param
    finally:
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch's pool held to one thread: small problems gain nothing from more, and lose much on a busy machine.

    Tests of threads ask for more within.
    """
    with torch_threads(1):
        yield
