"""What tests of `lutgemm bench` share: a case of milliseconds, and a small memory to measure."""

import pytest

from lutgemm.bench import layer, machine, runner
from lutgemm.testing import timing

TINY = ["bench", "--shapes", "64x128", "--bits", "2", "--group-size", "64", "--m", "2", "--seconds", "0.02"]


def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few cold copies and a quick look at the memory: these tests are about behaviour, not figures."""
    for module in (timing, runner, layer):
        monkeypatch.setattr(module, "cold_copies", lambda nbytes, total=None: 3)
    monkeypatch.setattr(machine, "last_level_cache", lambda: 1 << 20)
    monkeypatch.setattr(machine, "MIN_BANDWIDTH_BYTES", 1 << 20)
