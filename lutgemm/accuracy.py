"""How exact a result must at least be: the names that `accuracy` takes, and their order."""

from __future__ import annotations

from .errors import ArgumentError

AUTO = "auto"

ACCURACIES = ("fast", "accurate", "near-exact", "exact")
"""From the least to the most exact; kernels know them by their index. A kernel may be better than what is asked for.

fast: table entries of 8 bits. accurate: 12 bits. near-exact: 16 bits. exact: fp32 entries. Sums are fp32 in all.
"""

DEFAULT = "accurate"
"""What "auto" means."""

EXACT, NEAR_EXACT = ACCURACIES.index("exact"), ACCURACIES.index("near-exact")

_LEVELS = {name: level for level, name in enumerate(ACCURACIES)} | {AUTO: ACCURACIES.index(DEFAULT)}


def resolve_accuracy(accuracy: str) -> int:
    """The index in `ACCURACIES` of a name; `ArgumentError` for a name that is unknown."""
    try:
        return _LEVELS[accuracy]
    except (KeyError, TypeError):
        known = [AUTO, *ACCURACIES]
        raise ArgumentError(f"accuracy={accuracy!r} is unknown; use one of {known}") from None
