"""Checkpoints on disk: streaming conversion, inspection, verification."""

from __future__ import annotations

from .convert import quantize_checkpoint
from .plan import Options, make_plan
from .reader import CheckpointFolder

__all__ = ["CheckpointFolder", "Options", "make_plan", "quantize_checkpoint"]
