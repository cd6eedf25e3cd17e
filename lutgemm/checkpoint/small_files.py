"""The files of a checkpoint that are neither weights nor configuration: tokenizer, generation settings, licence."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from .atomic import atomic_writer, write_error
from .reader import CONFIG_NAME, REPORT_NAME, inside
from .safetensors_file import CHUNK

SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py", ".spm", ".bpe", ".vocab", ".codes")
PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
REPLACED = (CONFIG_NAME, REPORT_NAME, "lutgemm-state.json")
"""Written by the conversion itself."""

TEMPLATES = "additional_chat_templates"
LIMIT = 512 << 20
"""Largest file that is copied; a tokenizer stays far below."""


def _is_wanted(path: Path) -> bool:
    name = path.name
    if name in REPLACED or name.endswith(".index.json") or name.startswith("."):
        return False
    wanted = path.suffix in SUFFIXES or (name.startswith(PREFIXES) and path.suffix in ("", ".md", ".txt"))
    return wanted and path.is_file()


def _candidates(src: Path) -> list[tuple[Path, str]]:
    found = [(path, path.name) for path in sorted(src.iterdir()) if _is_wanted(path)]
    templates = src / TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        found += [(path, f"{TEMPLATES}/{path.name}") for path in sorted(templates.glob("*.jinja")) if path.is_file()]
    return found


def too_large_files(src: Path) -> dict[str, int]:
    """Relative name -> size in bytes of what would be copied if it were not above `LIMIT`."""
    sizes = {name: path.stat().st_size for path, name in _candidates(src)}
    return {name: size for name, size in sizes.items() if size > LIMIT}


def small_files(src: Path) -> list[tuple[Path, str]]:
    """(file, its relative name) of everything that is copied, in order. Links that lead outside are refused."""
    found = [(path, name) for path, name in _candidates(src) if path.stat().st_size <= LIMIT]
    for path, _ in found:
        inside(path.parent, path.name, str(src), src)
    return found


def copy_small_files(src: Path, dst: Path) -> None:
    """Copy them, each whole or not at all. Raises `CheckpointError`."""
    for path, name in small_files(src):
        target = dst / name
        try:
            target.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(target.parent, error) from None
        with atomic_writer(target) as out:
            try:
                handle = path.open("rb")
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
            with handle:
                while chunk := handle.read(CHUNK):
                    out.write(chunk)
