"""Fixtures: the CUDA kernels under the emulator, on CPU tensors, as what "auto" takes; their calls for siblings."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import emulated_backend
import pytest
from conftest import REQUIRED
from emulated_backend import NAME, Emulated

from lutgemm.backends import cuda_siblings, gpu_siblings

backends = importlib.import_module("lutgemm.backends")


@pytest.fixture(scope="module")
def emulated() -> Iterator[Emulated]:
    """The emulated backend, which "auto" takes."""
    if emulated_backend.compiler() is None:
        if "emulator" in REQUIRED:
            pytest.fail("--require emulator: no g++ is on PATH")
        pytest.skip("no g++ is on PATH")
    built = emulated_backend.emulated()
    chosen = {NAME: built.backend, **backends._registry()}
    patch = pytest.MonkeyPatch()
    patch.setattr(backends, "_registry", lambda: chosen)
    engine = cuda_siblings.engine(emulated_backend.NAMESPACE)
    for kernel in (built.backend.bcq_linear, built.backend.codebook_linear):
        patch.setitem(gpu_siblings.engines(), kernel, engine)
    backends.registry.cache_clear()
    backends.forget_choices()
    yield built
    patch.undo()
    backends.registry.cache_clear()
    backends.forget_choices()


@pytest.fixture
def one_multiprocessor(emulated: Emulated) -> Iterator[None]:
    """On which layers of this size are not split along K for the sake of other multiprocessors."""
    emulated.control.set(sm_count=1)
    yield
    emulated.control.set(sm_count=4)


@pytest.fixture
def rows(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call of a kernel for siblings."""
    calls: list[int] = []
    operator = cuda_siblings._operator

    def counting(namespace: str, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            y = operator(namespace, name)(*arguments)
            if name != "_gpu_place":
                calls.append(y.shape[1])
            return y

        return call

    monkeypatch.setattr(cuda_siblings, "_operator", counting)
    return calls


@pytest.fixture
def change_engine(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces functions of the engine by others."""

    def change(**functions: Any) -> None:
        engine = gpu_siblings.engines()[emulated.backend.bcq_linear]
        for kernel in (emulated.backend.bcq_linear, emulated.backend.codebook_linear):
            monkeypatch.setitem(gpu_siblings.engines(), kernel, engine._replace(**functions))

    return change
