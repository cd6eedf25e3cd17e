"""Work shared among threads (`csrc/cpu/parallel.h`): the same bits whoever does it, many callers, and a fork."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lutgemm
from lutgemm.testing.cases import OpCase

pytestmark = pytest.mark.skipif(lutgemm.backends()["cpu"] is not None, reason="no compiled kernels")

CASES = [
    OpCase(N=2100, K=2048, bits=4, accuracy=accuracy, M=m) for accuracy in ("accurate", "exact") for m in (1, 5, 40)
]


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def call(case: OpCase) -> torch.Tensor:
    x = torch.randn(case.M, case.K, generator=torch.Generator().manual_seed(0))
    return lutgemm.bcq_linear(x, WEIGHT, accuracy=case.accuracy, backend="cpu")


WEIGHT = CASES[0].weight()


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.accuracy}-{case.M}")
def test_many_callers_at_once_get_the_same_bits(case: OpCase):
    torch.set_num_threads(1)
    alone = call(case)
    torch.set_num_threads(4)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: call(case), range(40)))
    assert all(torch.equal(y, alone) for y in results)


@pytest.mark.usefixtures("four_threads")
def test_more_threads_than_cpus_and_then_fewer_give_the_same_bits():
    case = CASES[0]
    expected = call(case)
    for threads in (64, 3, 64, 2, 1):
        torch.set_num_threads(threads)
        assert torch.equal(call(case), expected)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_its_own_helpers():
    case = CASES[0]
    expected = call(case)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(call(case), expected) else 3)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child did not finish")
