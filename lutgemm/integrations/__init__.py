"""Plug-ins of other libraries. Importing lutgemm imports none of these: each is entered when its library is there."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TRANSFORMERS_REGISTRY = "transformers.quantizers.auto"
"""The module of transformers that holds its table of quantizers."""


PLUGIN = f"{__name__}.transformers"


def _register() -> None:
    """Import the plug-in, which registers itself; when this happens during its own import, it is about to."""
    if PLUGIN in sys.modules:
        return
    try:
        importlib.import_module(PLUGIN)
    except ImportError as error:
        warnings.warn(
            f"lutgemm cannot read its checkpoints in this transformers: {error}. Use transformers 5.0 or later.",
            RuntimeWarning,
            stacklevel=2,
        )


class _AfterImport(MetaPathFinder):
    """Registers the quantizer right after transformers has imported its table of quantizers."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRANSFORMERS_REGISTRY:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def execute_then_register(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Make `from_pretrained` know `quant_method: "lutgemm"`: now if transformers is imported, else when it is."""
    if TRANSFORMERS_REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
