"""What is measured: layer shapes of known models, and named lists of cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from lutgemm.accuracy import ACCURACIES, DEFAULT
from lutgemm.errors import ArgumentError
from lutgemm.testing.cases import OpCase

Shape = tuple[int, int]
"""(N, K): out_features, in_features."""

MODELS: dict[str, dict[str, Shape]] = {
    "llama-3.1-8b": {
        "q_proj, o_proj": (4096, 4096),
        "k_proj, v_proj": (1024, 4096),
        "gate_proj, up_proj": (14336, 4096),
        "down_proj": (4096, 14336),
    },
    "smollm2-135m": {
        "q_proj, o_proj": (576, 576),
        "k_proj, v_proj": (192, 576),
        "gate_proj, up_proj": (1536, 576),
        "down_proj": (576, 1536),
    },
}
"""Model -> its distinct linear layers (lm_head left out, as in quantized checkpoints)."""

BCQ = OpCase(op="bcq_linear", N=4096, K=4096, M=1, group_size=128, accuracy=DEFAULT)
CODEBOOK = OpCase(
    op="codebook_linear", N=4096, K=4096, M=1, group_size=128, vec_len=4, codebook_bits=8, accuracy=DEFAULT
)


def _smoke() -> list[OpCase]:
    """Seconds: one small case of each op."""
    return [replace(BCQ, N=256, K=512, M=2), replace(CODEBOOK, N=256, K=512, M=2)]


OTHER_SHAPES: tuple[Shape, ...] = ((14336, 4096), (4096, 14336), (1024, 1024), (576, 1536), (1536, 576))
"""Wide and tall layers, a small one, and ones whose N or K no block divides."""


def _cpu() -> list[OpCase]:
    """The list behind the README's table: bits, tokens, shapes and group sizes, x with outliers."""
    bcq = replace(BCQ, outliers=True)
    cases = [replace(bcq, bits=bits, M=m) for m in (1, 4, 16) for bits in (1, 2, 3, 4)]
    cases += [replace(bcq, bits=3, M=512), replace(CODEBOOK, outliers=True)]
    cases += [replace(bcq, bits=bits, group_size=g) for bits in (2, 4) for g in (32, 64, 0)]
    cases += [replace(bcq, bits=bits, accuracy=a) for bits in (2, 4) for a in ACCURACIES if a != DEFAULT]
    cases += [replace(bcq, N=n, K=k, bits=bits, M=m) for n, k in OTHER_SHAPES for m in (1, 16) for bits in (2, 3, 4)]
    return cases


GPU_SHAPES: tuple[Shape, ...] = (
    (4096, 4096),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (8192, 8192),
    (57344, 8192),
    (8192, 28672),
)
"""Layers of 8B and 70B models, those that read the same activations stacked."""
MAIN_GPU_SHAPES = ((4096, 4096), (28672, 4096), (8192, 8192))
ALL_TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
SOME_TOKENS = (1, 8, 16, 1024)


GPU_KINDS = (
    *(replace(BCQ, bits=bits) for bits in (1, 2, 3, 4)),
    CODEBOOK,
    replace(CODEBOOK, num_codebooks=2, vec_len=8),
    replace(BCQ, bits=4, scale_kind="uniform"),
)
"""1 to 4 bits, two codebooks of 2 bits, and 4 bits on an integer grid."""


def _gpu(everything: bool = False) -> list[OpCase]:
    """Every kind at every shape and number of tokens, or without `everything` the other shapes at some only."""
    return [
        replace(kind, N=n, K=k, M=m, dtype="float16")
        for n, k in GPU_SHAPES
        for m in (ALL_TOKENS if everything or (n, k) in MAIN_GPU_SHAPES else SOME_TOKENS)
        for kind in GPU_KINDS
    ]


def urgency(case: OpCase) -> int:
    """How soon a case is measured on a GPU, 0 first: the figures that kernels are judged by, one token through the main
    shapes; then few tokens; then many; then the other shapes, one token first.
    """
    main = (case.N, case.K) in MAIN_GPU_SHAPES
    order = [main and case.M == 1, main and case.M <= 16, main and case.M in (32, 1024), case.M == 1, main]
    return next((rank for rank, wanted in enumerate(order) if wanted), len(order))


def _model(name: str) -> Callable[[], list[OpCase]]:
    def cases() -> list[OpCase]:
        shapes = MODELS[name].values()
        bcq = [replace(BCQ, N=n, K=k, group_size=64, bits=bits) for n, k in shapes for bits in (2, 3, 4)]
        return bcq + [replace(CODEBOOK, N=n, K=k, group_size=64) for n, k in shapes]

    return cases


SUITES: dict[str, Callable[[], list[OpCase]]] = {
    "smoke": _smoke,
    "cpu": _cpu,
    "gpu": _gpu,
    "gpu-all": partial(_gpu, everything=True),
    **{name: _model(name) for name in MODELS},
}
"""Name of `--suite` -> its cases."""


def parse_shapes(text: str) -> list[Shape]:
    """`"4096x4096,llama-3.1-8b"` -> (N, K) pairs; a model's name stands for its shapes. Raises `ArgumentError`."""
    shapes: list[Shape] = []
    for part in text.split(","):
        if part in MODELS:
            shapes += MODELS[part].values()
            continue
        n, _, k = part.partition("x")
        if not (n.isdecimal() and k.isdecimal() and int(n) > 0 and int(k) > 0):
            raise ArgumentError(f"shapes: {part!r} is not NxK (4096x4096) nor one of {sorted(MODELS)}")
        shapes.append((int(n), int(k)))
    return list(dict.fromkeys(shapes))


def parse_codebooks(text: str) -> list[tuple[int, int, int]]:
    """`"1x4x8,2x8x8"` -> (num_codebooks, vec_len, codebook_bits) triples. Raises `ArgumentError`."""
    found = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            raise ArgumentError(f"codebooks: {part!r} is not num_codebooks x vec_len x codebook_bits, such as 1x4x8")
        c, v, b = map(int, numbers)
        found.append((c, v, b))
    return found
