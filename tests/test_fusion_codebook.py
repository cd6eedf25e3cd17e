"""Siblings of codebook weights: the CUDA kernels under the emulator, on CPU tensors. Needs g++."""

import pytest
import torch
from sibling_models import CODEBOOK, close, siblings

from lutgemm.backends import gpu_layouts, gpu_siblings

pytest_plugins = ["emulated_siblings"]
pytestmark = pytest.mark.usefixtures("one_multiprocessor")

ALL = 70 + 20 + 33


@pytest.mark.parametrize("bias", [False, True])
def test_codebooks_of_the_same_values_are_stacked(bias, rows):
    apart, fused = siblings(CODEBOOK, bias, shared=True)
    with torch.no_grad():
        for shape in ((1, 96), (5, 96), (2, 3, 96), (96,), (0, 96)):
            x = torch.randn(shape)
            assert close(fused(x), apart(x))
        x = torch.randn(1, 96)
        assert close(fused.q_proj(x), apart.q_proj(x))
        for model in (apart, fused):
            model.v_proj.codebooks.mul_(2)  # no longer shared
        assert close(fused.k_proj(x), apart.k_proj(x))
        assert close(fused.v_proj(x), apart.v_proj(x))
    assert rows == [ALL] * 6


@pytest.mark.parametrize(("sizes", "sm_count"), [((64, 32, 33), 1), ((64, 32, 33), 7), ((32, 160, 96), 132)])
def test_siblings_with_codebooks_of_their_own(sizes, sm_count, emulated, rows):
    """Whatever share of the blocks each has."""
    apart, fused = siblings(CODEBOOK, True, sizes=sizes)
    emulated.control.set(sm_count=sm_count)
    with torch.no_grad():
        for shape in ((1, 96), (2, 3, 96)):
            x = torch.randn(shape)
            assert close(fused(x), apart(x))
        x = torch.randn(5, 96).half()
        assert close(fused.half()(x), apart.half()(x))
    assert rows == [sum(sizes)] * 3


def test_every_algorithm_for_codebooks_takes_siblings(emulated):
    """Whichever kernel it has for so many tokens."""
    kernel, half = emulated.backend.codebook_linear, torch.float16
    layers = list(siblings(CODEBOOK, sizes=(64, 32, 33))[0].half().children())
    every = [gpu_siblings.sibling(layer.weight_record, None) for layer in layers]
    for op, algorithm in gpu_layouts.algorithms():
        if op != "codebook_linear" or algorithm == "dequantize":
            continue
        for m in (1, 20, 40):
            x = torch.randn(m, 96, dtype=half)
            y = gpu_siblings.run(every, x, kernel, algorithm, 1)
            assert y is not None, (algorithm, m)
            weights = [layer.weight_record.dequantize() for layer in layers]
            assert close(y, (x.float() @ torch.cat(weights).T).half(), 2e-3)
