"""Bank conflicts and memory sectors of every CUDA kernel, as the emulator counts them, within a budget."""

from __future__ import annotations

import pytest
import test_cuda_emulated
from emulated_backend import NAME, Emulated

from lutgemm.backends import gpu_layouts
from lutgemm.ops import linear
from lutgemm.testing.cases import OpCase

emulated = test_cuda_emulated.emulated

BUDGET = {
    ("bcq_linear", "lut_gemm"): (1.0, 1.0),
    ("bcq_linear", "biqgemm"): (1.05, 1.1),
    ("bcq_linear", "bit_planes"): (1.2, 1.0),
    ("bcq_linear", "sign_planes"): (1.0, 1.0),
    ("bcq_linear", "dequant_gemm"): (1.0, 1.05),
    ("bcq_linear", "dequantize"): (1.0, 1.0),
    ("codebook_linear", "codegemm"): (1.05, 1.15),
    ("codebook_linear", "codebook_mma"): (1.0, 1.0),
    # Random centroids of 8 bytes from one table: 2.9 wavefronts for the 16 lanes of a half-warp.
    ("codebook_linear", "dequantize"): (3.0, 1.1),
}
"""(op, algorithm) -> wavefronts of shared memory and sectors of global memory, each over the least that could serve."""


@pytest.mark.parametrize("M", [1, 8])
@pytest.mark.parametrize(("op", "algorithm"), gpu_layouts.algorithms())
def test_accesses_are_within_their_budget(op: str, algorithm: str, M: int, emulated: Emulated) -> None:
    if test_cuda_emulated.ONLY and (op, algorithm) not in test_cuda_emulated.ALGORITHMS:
        pytest.skip("left out by LUTGEMM_EMULATED_ONLY")
    case = OpCase(op=op, M=M, N=512, K=1024, bits=3, vec_len=4, codebook_bits=8, group_size=128, dtype="float16")
    inputs = case.inputs("random")
    emulated.control.set(counts=1)
    emulated.control.reset_counts()
    try:
        linear(inputs.x, inputs.weight, backend=NAME, algorithm=algorithm, accuracy="accurate")
        sites = emulated.control.report()
    finally:
        emulated.control.set(counts=0)
    for space, budget in zip(("shared", "global"), BUDGET[op, algorithm], strict=True):
        own = [site for site in sites if site["space"] == space]
        cost, ideal = (sum(site[key] for site in own) for key in ("cost", "ideal"))
        worst = sorted(own, key=lambda site: site["ideal"] - site["cost"])[:4]
        assert cost <= budget * ideal, f"{space} memory, {cost} instead of {ideal}; the worst: {worst}"
