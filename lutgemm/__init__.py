"""Low-bit linear layers by table look-up: LUT-GEMM and BiQGEMM for binary codes, CodeGEMM for codebooks.

y[M, N] = x[M, K] @ W[N, K].T + bias        M tokens, N out_features, K in_features
"""

from __future__ import annotations

from . import _startup as _startup  # first of all imports

# isort: split

from typing import TYPE_CHECKING, Any

from .backends import backends
from .config import BCQConfig, CodebookConfig
from .errors import ArgumentError, BackendError, CheckpointError, FormatError, LutgemmError
from .formats import BCQWeight, CodebookWeight
from .fusion import fuse
from .integrations import register_with_transformers
from .nn import BCQLinear, CodebookLinear, replace_linear, set_accuracy
from .ops import bcq_linear, codebook_linear
from .quantize import quantize_bcq, quantize_codebook

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BCQConfig",
    "BCQLinear",
    "BCQWeight",
    "BackendError",
    "CheckpointError",
    "CodebookConfig",
    "CodebookLinear",
    "CodebookWeight",
    "FormatError",
    "LutgemmConfig",
    "LutgemmError",
    "backends",
    "bcq_linear",
    "codebook_linear",
    "fuse",
    "load",
    "quantize_bcq",
    "quantize_codebook",
    "replace_linear",
    "set_accuracy",
]

if TYPE_CHECKING:
    from .integrations.transformers import LutgemmConfig, load

_FROM_TRANSFORMERS = ("LutgemmConfig", "load")
"""Names that need transformers, whose import takes seconds: resolved at first use."""


def __getattr__(name: str) -> Any:
    if name not in _FROM_TRANSFORMERS:
        raise AttributeError(f"module 'lutgemm' has no attribute {name!r}")
    try:
        from .integrations import transformers
    except ModuleNotFoundError as error:
        raise ImportError(f"lutgemm.{name} needs transformers ({error}); pip install 'lutgemm[hf]'") from error
    return getattr(transformers, name)


register_with_transformers()
