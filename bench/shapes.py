"""What is measured: layer shapes of known models, and named lists of cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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

BCQ = OpCase(op="bcq_linear", N=4096, K=4096, M=1, group_size=128)
CODEBOOK = OpCase(op="codebook_linear", N=4096, K=4096, M=1, group_size=128, vec_len=4, codebook_bits=8)


def _smoke() -> list[OpCase]:
    """Seconds: one small case of each op."""
    return [replace(BCQ, N=256, K=512, M=2), replace(CODEBOOK, N=256, K=512, M=2)]


def _cpu() -> list[OpCase]:
    """4096 x 4096 at every usual number of bits, for one token and small batches."""
    bcq = [replace(BCQ, bits=bits, M=m) for bits in (1, 2, 3, 4) for m in (1, 4, 16)]
    books = ((1, 8), (1, 4), (2, 8))
    return bcq + [replace(CODEBOOK, num_codebooks=c, vec_len=v, M=m) for c, v in books for m in (1, 4, 16)]


def _model(name: str) -> Callable[[], list[OpCase]]:
    def cases() -> list[OpCase]:
        shapes = MODELS[name].values()
        bcq = [replace(BCQ, N=n, K=k, group_size=64, bits=bits) for n, k in shapes for bits in (2, 3, 4)]
        return bcq + [replace(CODEBOOK, N=n, K=k, group_size=64) for n, k in shapes]

    return cases


SUITES: dict[str, Callable[[], list[OpCase]]] = {
    "smoke": _smoke,
    "cpu": _cpu,
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
