"""Prepared weights share regions of huge pages (`csrc/cpu/huge_pages.h`): blocks are apart, and memory comes back."""

from __future__ import annotations

import os
import re
import sys
import threading
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lutgemm import _native

REASON = _native.load_ops("_C")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

MIB = 1 << 20


@cache
def record(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    codes = torch.zeros(2, out_features, in_features // 32, dtype=torch.int32)
    return codes, torch.ones(2, out_features, 1, dtype=torch.float16)


def pack(out_features: int, in_features: int) -> Tensor:
    """A prepared weight of out_features * in_features / 4 bytes and a little more."""
    codes, scales = record(out_features, in_features)
    return torch.ops.lutgemm._bcq_pack_cpu(codes, scales, None, None, in_features, in_features, False, True)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))[1]) << 10


def overlaps(tensors: list[Tensor]) -> bool:
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.numel()) for t in tensors)
    return any(end > start for (_, end), (start, _) in pairwise(ranges))


def test_weights_lie_apart_and_keep_what_is_in_them():
    kept: list[tuple[int, Tensor]] = []
    for i in range(60):
        tensor = pack(64 * (1 + i % 7), 1024 * (1 + i % 5))
        assert tensor.data_ptr() % 64 == 0
        kept.append((i, tensor.fill_(i)))
        if i % 3 == 2:
            kept.pop(i % len(kept))
    assert not overlaps([tensor for _, tensor in kept])
    assert all(bool((tensor == i).all()) for i, tensor in kept)


def test_a_weight_larger_than_a_region():
    small, large = pack(64, 4096).fill_(1), pack(8192, 36864).fill_(2)
    assert large.numel() > 64 * MIB
    assert not overlaps([small, large])
    assert bool((small == 1).all())
    assert bool((large[::4096] == 2).all())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="the address sanitizer keeps freed memory")
def test_memory_comes_back():
    first = pack(4096, 4096)
    before = resident()
    for _ in range(2):
        tensors = [pack(4096, 4096).fill_(1) for _ in range(16)]
        between = tensors[::8]
        assert resident() - before > 60 * MIB
        del tensors
        assert resident() - before < (len(between) * 4 + 16) * MIB
        del between
    assert resident() - before < 16 * MIB
    assert first.numel() > 4 * MIB


def test_threads_take_weights_at_once():
    found: list[list[Tensor]] = [[] for _ in range(4)]

    def work(index: int) -> None:
        for i in range(30):
            found[index].append(pack(128, 2048).fill_(index))
            if i % 2:
                found[index].pop(0)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps([tensor for tensors in found for tensor in tensors])
    assert all(bool((tensor == index).all()) for index, tensors in enumerate(found) for tensor in tensors)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_takes_and_frees_its_own():
    kept = pack(1024, 1024).fill_(7)
    child = os.fork()
    if child == 0:
        mine = pack(128, 2048)
        mine[::64].fill_(8)  # few elements: torch's own threads do not outlive a fork
        right = bool((kept[::64] == 7).all()) and bool((mine[::64] == 8).all())
        del kept, mine
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bool((kept == 7).all())
