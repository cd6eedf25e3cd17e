"""BCQ on fp16 tensor cores with activations that are not rounded (`csrc/cuda/sign_planes.cuh`).

It reads the layout of `bit_planes`, and the two share one copy of the weight.
"""

from __future__ import annotations

from torch import Tensor

from . import Algorithm, BcqRecord, Ops
from .bit_planes import _described, _made


def _sign_planes(ops: Ops, x: Tensor, record: BcqRecord, bias: Tensor | None, accuracy: int) -> Tensor:
    packed, _ = _made(record)
    return ops("_bcq_sign_planes_cuda")(x, packed, bias, *_described(record), accuracy)


ALGORITHMS = (Algorithm("bcq_linear", "sign_planes", _sign_planes),)
