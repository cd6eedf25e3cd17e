"""Quantizers do not depend on the state of the process: autocast, the default dtype, threads, where the weight is."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch

from lutgemm import ArgumentError, BCQConfig, CodebookConfig
from lutgemm.quantize import WeightRows, quantize, slabs, weight_error

CONFIGS = {
    "uniform": BCQConfig(bits=4, group_size=32, scale_kind="uniform"),
    "rtn": BCQConfig(bits=3, group_size=32, method="rtn"),
    "rtn free": BCQConfig(bits=3, group_size=32, method="rtn", scale_kind="free"),
    "clip": BCQConfig(bits=2, group_size=32, method="rtn_clip", scale_kind="free"),
    "free": BCQConfig(bits=3, group_size=32, scale_kind="free", nested_bits=(1, 2)),
    "alternating": BCQConfig(bits=2, group_size=64, method="alternating", scale_dtype="bfloat16"),
    "auto": BCQConfig(bits=3, group_size="row", scale_dtype="float32"),
    "codebook": CodebookConfig(vec_len=4, codebook_bits=5, group_size=32, iters=4),
    "codebooks": CodebookConfig(num_codebooks=2, vec_len=8, codebook_bits=4, group_size=32, iters=4),
}


def weight(rows: int = 24, columns: int = 200) -> torch.Tensor:
    values = torch.empty(rows, columns, dtype=torch.float32).normal_(generator=torch.Generator().manual_seed(3))
    values[: rows // 4] += 4  # groups on one side of 0
    return values


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "no_grad": torch.no_grad,
}


def everything(config, hessian):
    """All bytes of the record, and its error."""
    values = weight()
    record = quantize(values, config, hessian)
    bits = {name: tensor.contiguous().view(torch.uint8) for name, tensor in record.state_dict().items()}
    return bits, weight_error(values, record, hessian)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "hessian"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_same_bytes_under_autocast_and_any_default_dtype(config, weighted):
    hessian = torch.arange(1, 201, dtype=torch.float32) if weighted else None
    expected, error = everything(config, hessian)
    for name, surrounding in SURROUNDINGS.items():
        with surrounding():
            found, own_error = everything(config, hessian)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
        assert own_error == error, name


class OnDisk(WeightRows):
    """A weight that gives rows only; counts what it was asked for."""

    def __init__(self, values):
        self.values, self.largest = values, 0
        self.shape, self.dtype, self.device = tuple(values.shape), values.dtype, values.device

    def __getitem__(self, rows):
        found = self.values[rows].clone()
        self.largest = max(self.largest, found.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_rows_on_demand_give_the_bytes_of_the_tensor(config, dtype, monkeypatch):
    values = weight().to(dtype)
    expected = quantize(values, config)
    rows = OnDisk(values)
    with slabs.smaller_slabs(5 * 200):
        found = quantize(rows, config)
        error = weight_error(rows, found)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert error == weight_error(values, expected)
    assert rows.largest <= (5 if config.format == "codebook" or config.scale_kind != "auto" else 24) * 200


@pytest.mark.parametrize(
    "config", [CONFIGS["auto"], CONFIGS["codebook"], CONFIGS["rtn"]], ids=["auto", "codebook", "rtn"]
)
def test_nan_is_named_by_its_row_in_the_weight(config):
    """Row 640 is the 8th of the 16 rows that `auto` samples, and in the first slab of the others."""
    values = torch.zeros(1280, 1 << 13)
    values[640] = torch.nan
    with pytest.raises(ArgumentError, match=r"row 640\b"):
        quantize(values, config)


def test_threads_are_held_to_one_and_come_back(monkeypatch):
    seen = []
    original = torch.set_num_threads
    original(3)
    try:
        monkeypatch.setattr(torch, "set_num_threads", lambda n: (seen.append(n), original(n))[1])
        with slabs.one_thread(torch.device("cpu")):
            assert torch.get_num_threads() == 1
            with slabs.one_thread(torch.device("cpu")):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        assert seen == [1, 3]
        with pytest.raises(ArgumentError):
            quantize(torch.full((4, 64), torch.nan), CONFIGS["rtn"])
        assert torch.get_num_threads() == 3
    finally:
        original(1)


def test_concurrent_quantizing_leaves_the_threads_as_they_were():
    """The blocks of two Python threads overlap, in each order of leaving; torch is new to the second."""
    cpu = torch.device("cpu")
    torch.set_num_threads(3)
    try:
        for first_out in (0, 1):
            entered, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
            after = [0, 0]

            def work(index, entered=entered, leave=leave, after=after):
                if index == 0:
                    torch.set_num_threads(3)
                else:
                    entered[0].wait(10)
                with slabs.one_thread(cpu):
                    entered[index].set()
                    assert leave[index].wait(10)
                    assert torch.get_num_threads() == 1
                after[index] = torch.get_num_threads()

            threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
            for thread in threads:
                thread.start()
            assert entered[1].wait(10)
            for index in (first_out, 1 - first_out):
                leave[index].set()
                threads[index].join(10)
            assert after == [3, 3]
            assert torch.get_num_threads() == 3
        assert slabs._Guard.count == 0
    finally:
        torch.set_num_threads(1)


def test_concurrent_quantizing_gives_the_same_bytes():
    configs = [CONFIGS["uniform"], CONFIGS["free"], CONFIGS["codebook"], CONFIGS["codebooks"]]
    expected = [everything(config, None) for config in configs]
    found = [None] * len(configs)

    def work(index):
        for _ in range(3):
            found[index] = everything(configs[index], None)

    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(configs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    for (bits, error), (own_bits, own_error) in zip(expected, found, strict=True):
        assert all(torch.equal(own_bits[name], bits[name]) for name in bits)
        assert own_error == error
