"""The CPU codebook operators refuse arguments that do not fit, naming them."""

from __future__ import annotations

import pytest
import torch
from codebook_cases import Case, make_weight

from lutgemm import _native

REASON = _native.load_ops("_C")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def arguments() -> dict[str, object]:
    w = make_weight(Case(2, 4, 8, 16, 32, 8))
    return {
        "x": torch.zeros(2, 32),
        "codes": w.codes,
        "codebooks": w.codebooks,
        "scales": w.scales,
        "bias": None,
        "packed": None,
        "group_size": 8,
        "isa": 0,
        "accuracy": 3,
    }


REFUSED = {
    "x of another K": ({"x": torch.zeros(2, 36)}, "codes: got shape"),
    "x of no dimension": ({"x": torch.zeros(())}, "x: got shape"),
    "x of K = 0": ({"x": torch.zeros(2, 0)}, "K=0"),
    "x not contiguous": ({"x": torch.zeros(32, 2).T}, "x: must be contiguous"),
    "x fp64": ({"x": torch.zeros(2, 32, dtype=torch.float64)}, "x: must be float32"),
    "bias of another N": ({"bias": torch.zeros(15)}, "bias: got shape"),
    "bias of another dtype": ({"bias": torch.zeros(16).half()}, "bias: must have the dtype of x"),
    "codes of two dimensions": ({"codes": torch.zeros(16, 8, dtype=torch.uint8)}, "codes: got shape"),
    "codes of five codebooks": ({"codes": torch.zeros(5, 16, 8, dtype=torch.uint8)}, "num_codebooks"),
    "codes of no rows": ({"codes": torch.zeros(2, 0, 8, dtype=torch.uint8)}, r"\(N\)=0"),
    "codes int16 at 8 bits": ({"codes": torch.zeros(2, 16, 8, dtype=torch.int16)}, "codes: must be uint8"),
    "codes not contiguous": ({"codes": torch.zeros(2, 8, 16, dtype=torch.uint8).mT}, "codes: must be contiguous"),
    "codebooks of 3 entries": ({"codebooks": torch.zeros(2, 3, 4).half()}, "power of two"),
    "codebooks of 8192": ({"codebooks": torch.zeros(2, 8192, 4).half()}, "from 2 to 4096"),
    "codebooks of vec_len 3": ({"codebooks": torch.zeros(2, 256, 3).half()}, "vec_len=3"),
    "codebooks of vec_len 8": ({"codebooks": torch.zeros(2, 256, 8).half()}, "codes: got shape"),
    "codebooks too few": ({"codebooks": torch.zeros(1, 256, 4).half()}, "codebooks: got shape"),
    "codebooks of another dtype": ({"codebooks": torch.zeros(2, 256, 4)}, "dtype of scales"),
    "scales too few": ({"scales": torch.zeros(16, 3).half()}, "scales: got shape"),
    "scales integer": ({"scales": torch.zeros(16, 4, dtype=torch.int32)}, "scales: must be float32"),
    "group_size 0": ({"group_size": 0}, "group_size=0"),
    "group_size negative": ({"group_size": -8}, "group_size=-8"),
    "group_size huge": ({"group_size": 2**62}, "group_size="),
    "group_size not of vectors": ({"group_size": 6}, "multiple of vec_len"),
    "group_size other than scales": ({"group_size": 16}, "scales: got shape"),
    "packed of floats": ({"packed": torch.zeros(64)}, "packed: must be uint8"),
    "packed of two dimensions": ({"packed": torch.zeros(2, 64, dtype=torch.uint8)}, "packed: got shape"),
    "isa 4": ({"isa": 4}, "isa=4"),
    "accuracy 4": ({"accuracy": 4}, "accuracy=4"),
    "isa -1": ({"isa": -1}, "isa=-1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lutgemm._codebook_linear_cpu(*(arguments() | change).values())


@pytest.mark.parametrize(
    ("rows", "dtype", "message"),
    [
        ((-1, 4), torch.float32, "row_begin=-1"),
        ((0, 17), torch.float32, "row_end=17"),
        ((5, 4), torch.float32, "row_end=4"),
        ((0, 4), torch.float64, "dtype: must be float32"),
    ],
)
def test_wrong_rows_are_refused(rows: tuple[int, int], dtype: torch.dtype, message: str) -> None:
    a = arguments()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lutgemm._codebook_dequantize_cpu(a["codes"], a["codebooks"], a["scales"], 32, 8, *rows, dtype, 0)


@pytest.mark.parametrize(("k", "message"), [(0, "K=0"), (-4, "K=-4"), (2**62, "K="), (64, "codes: got shape")])
def test_a_wrong_width_is_refused(k: int, message: str) -> None:
    a = arguments()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lutgemm._codebook_pack_cpu(a["codes"], a["codebooks"], a["scales"], k, 8)
