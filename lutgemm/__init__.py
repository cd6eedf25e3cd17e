"""Low-bit linear layers by table look-up: LUT-GEMM and BiQGEMM for binary codes, CodeGEMM for codebooks.

    y[M, N] = x[M, K] @ W[N, K].T + bias        M tokens, N out_features, K in_features
"""

from __future__ import annotations

from .backends import backends
from .config import BCQConfig, CodebookConfig
from .errors import ArgumentError, BackendError, CheckpointError, FormatError, LutgemmError
from .formats import BCQWeight, CodebookWeight
from .ops import bcq_linear, codebook_linear

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BCQConfig",
    "BCQWeight",
    "BackendError",
    "CheckpointError",
    "CodebookConfig",
    "CodebookWeight",
    "FormatError",
    "LutgemmError",
    "backends",
    "bcq_linear",
    "codebook_linear",
]
