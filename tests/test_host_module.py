"""The torch-free host module: packing against the format's own, CPU features, and timing loops."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from lutgemm import _native
from lutgemm.formats import bcq

HOST, REASON = _native.host()
pytestmark = pytest.mark.skipif(HOST is None, reason=str(REASON))

bit_arrays = np_st.arrays(
    np.uint8, np_st.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=70), elements=st.integers(0, 1)
)


@settings(deadline=None, max_examples=100)
@given(bit_arrays)
def test_pack_bits_equals_the_format(bits: np.ndarray) -> None:
    words = HOST.pack_bits(bits)
    expected = torch.nn.functional.pad(torch.from_numpy(bits), (0, -bits.shape[-1] % 32))
    assert words.dtype == np.int32
    assert words.shape == (*bits.shape[:-1], -(-bits.shape[-1] // 32))
    if bits.size:
        assert np.array_equal(words, bcq.pack_bits(expected).numpy())
    assert np.array_equal(HOST.unpack_bits(words, bits.shape[-1]), bits)


@settings(deadline=None, max_examples=100)
@given(
    np_st.arrays(
        np.int32,
        np_st.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=9),
        elements=st.integers(-(2**31), 2**31 - 1),
    ),
    st.integers(0, 31),
)
def test_unpack_bits_equals_the_format(words: np.ndarray, surplus: int) -> None:
    k = 32 * words.shape[-1] - surplus
    bits = HOST.unpack_bits(words, k)
    assert bits.dtype == np.uint8
    assert np.array_equal(bits, bcq.unpack_bits(torch.from_numpy(words), k).numpy())


def test_strided_arrays_are_read_in_their_order() -> None:
    bits = np.arange(6 * 80, dtype=np.uint8).reshape(6, 80) & 1
    bits[::3] ^= 1
    assert np.array_equal(HOST.pack_bits(bits[::2, ::-1]), HOST.pack_bits(np.ascontiguousarray(bits[::2, ::-1])))


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (np.zeros(8, np.float32), "bits: got dtype float32"),
        (np.zeros(8, bool), "bits: got dtype bool"),
        (np.zeros(8, np.int32), "bits: got dtype int32"),
        (np.array(1, np.uint8), "bits: got a scalar"),
        (np.array([0, 1, 2], np.uint8), "every value must be 0 or 1"),
    ],
)
def test_pack_bits_refuses(bits: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HOST.pack_bits(bits)


@pytest.mark.parametrize(
    ("words", "k", "message"),
    [
        (np.zeros(2, np.int64), 64, "words: got dtype int64"),
        (np.zeros(2, np.int32), 65, "K=65: words has 2 words"),
        (np.zeros(2, np.int32), 32, "K=32: words has 2 words"),
        (np.zeros(2, np.int32), -1, "K=-1"),
        (np.zeros(2, np.int32), 2**62, "K=4611686018427387904"),
        (np.array(1, np.int32), 32, "words: got a scalar"),
    ],
)
def test_unpack_bits_refuses(words: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HOST.unpack_bits(words, k)


def test_cpu_features_name_the_machine() -> None:
    found = HOST.cpu_features()
    assert found["brand"]
    assert found["logical_cpus"] >= 1
    assert all(bytes_ >= 1024 for bytes_ in found["cache_bytes"].values())
    if found["architecture"] == "x86-64":
        flags = {name: value for name, value in found.items() if isinstance(value, bool)}
        assert {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi"} <= flags.keys()
        assert flags["avx2"] == ("AVX2" in torch.backends.cpu.get_cpu_capability()) or flags["avx512f"]


@pytest.mark.parametrize("measure", ["copy_bandwidth", "read_bandwidth"])
@pytest.mark.parametrize("threads", [1, 2])
def test_bandwidth_is_seconds_of_each_repeat(measure: str, threads: int) -> None:
    seconds = getattr(HOST, measure)(1 << 22, 5, threads)
    assert len(seconds) == 5
    assert all(1e-6 < s < 10 for s in seconds)


@pytest.mark.parametrize("measure", ["copy_bandwidth", "read_bandwidth"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1), "nbytes=0"),
        ((2**40, 1, 1), "nbytes="),
        ((1024, 0, 1), "repeats=0"),
        ((1024, 1, 0), "threads=0"),
        ((1024, 1, 5000), "threads=5000"),
    ],
)
def test_bandwidth_refuses(measure: str, arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(HOST, measure)(*arguments)


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer needs the address space")
@pytest.mark.parametrize("measure", ["copy_bandwidth", "read_bandwidth"])
def test_a_thread_that_the_system_refuses_is_an_exception(measure: str) -> None:
    """A little more address space than is in use holds the stacks of a few threads, not of a thousand."""
    code = (
        "import importlib.util as u, resource\n"
        f"spec = u.spec_from_file_location('_host', {HOST.__file__!r})\n"
        "host = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(host)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "hard = resource.getrlimit(resource.RLIMIT_AS)[1]\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))\n"
        "try:\n"
        f"    host.{measure}(1 << 16, 3, 1000)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        f"print(len(host.{measure}(1 << 16, 3, 1)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    refused, after = done.stdout.splitlines()
    assert refused.startswith("the system refused thread ")
    assert refused.endswith("use fewer threads or raise the limit (ulimit -u)")
    assert after == "3"


def test_long_loops_let_other_threads_run() -> None:
    worker = threading.Thread(target=HOST.read_bandwidth, args=(1 << 25, 60))
    worker.start()
    steps = 0
    while worker.is_alive():
        steps += 1
        time.sleep(0.001)
    worker.join()
    assert steps > 3


def test_now_is_the_steady_clock() -> None:
    before = HOST.now()
    time.sleep(0.01)
    assert 0.009 < HOST.now() - before < 10
