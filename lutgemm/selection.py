"""Which modules are to be quantized, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .errors import ArgumentError


@dataclass(frozen=True)
class Selection:
    """Which modules are to be quantized, by their full dotted name.

    skip: names whose dotted parts are a run of the module's: "lm_head", "layers.0", "self_attn.q_proj" each name a
    module, all of its kind, or a whole branch. include, exclude: regular expressions, searched in the full name; with
    `include`, only what one of them finds is taken.
    """

    skip: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, skip: Any = (), include: Any = (), exclude: Any = ()) -> Selection:
        """A selection from strings or sequences of strings (or None). Raises `ArgumentError` for anything else."""
        included, excluded = _strings("include", include), _strings("exclude", exclude)
        return cls(_strings("skip", skip), _patterns("include", included), _patterns("exclude", excluded))

    def reason_to_skip(self, name: str) -> str | None:
        """Why the module of that name is left alone, or None when it is taken."""
        for entry in self.skip:
            if f".{entry}." in f".{name}.":
                return f"skip names {entry!r}"
        if self.include and not any(re.search(pattern, name) for pattern in self.include):
            return "include does not match it"
        for pattern in self.exclude:
            if re.search(pattern, name):
                return f"exclude matches it ({pattern!r})"
        return None


def _strings(argument: str, value: Any) -> tuple[str, ...]:
    values = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(entry, str) for entry in values):
        raise ArgumentError(f"{argument}={value!r} is not supported; use a string or a sequence of strings")
    return values


def _patterns(argument: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ArgumentError(f"{argument}={pattern!r} is not a regular expression: {error}") from None
    return patterns
