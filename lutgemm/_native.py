"""Loads the compiled parts, each on its own, and keeps the reason when one is absent. Nothing is compiled here."""

from __future__ import annotations

import importlib
import json
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_HERE = Path(__file__).parent


def _build_reason(name: str) -> str:
    """Why the build left `name` out, as setup.py recorded it, or what to do when it recorded nothing."""
    info = _HERE / "_build_info.json"
    if info.is_file():
        reasons = json.loads(info.read_text(encoding="utf-8")).get("skipped", {})
        if name in reasons:
            return str(reasons[name])
    return f"{name} was not built; install with a C++17 compiler on PATH: pip install --force-reinstall --no-deps ."


@cache
def load_ops(name: str = "_C") -> str | None:
    """Load the operator library `lutgemm/<name>*.so`. None when it is there and loads, else the reason."""
    if name.endswith("_cuda") and torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA; install a CUDA build of torch, then lutgemm again"
    libraries = sorted(_HERE.glob(f"{name}.so")) + sorted(_HERE.glob(f"{name}.*.so"))
    if not libraries:
        return _build_reason(name)
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0].name} does not load in torch {torch.__version__}: {error.__cause__ or error}"
    return None


@cache
def host() -> tuple[ModuleType | None, str | None]:
    """(the torch-free host module `lutgemm._host`, None), or (None, why it is absent)."""
    wanted = f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not (_HERE / wanted).is_file():
        others = ", ".join(sorted(path.name for path in _HERE.glob("_host.*.so")))
        if others:
            return None, f"{others} is for another Python; this one needs {wanted}: reinstall lutgemm with it"
        return None, _build_reason("_host")
    try:
        return importlib.import_module("lutgemm._host"), None
    except ImportError as error:
        return None, f"_host does not load: {error}"
