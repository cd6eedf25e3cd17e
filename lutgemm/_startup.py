"""Imported before torch, whose import takes a second: an interrupt of the `lutgemm` command meanwhile is one line.

A program that imports lutgemm keeps its own handling of SIGINT.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _is_command() -> bool:
    """Whether this process is the console script `lutgemm` or `python -m lutgemm`."""
    script = sys.argv[0] if sys.argv else ""
    if script != "-m":  # what Python puts there until it has found the module that -m names
        return script.replace("\\", "/").rpartition("/")[2] in ("lutgemm", "lutgemm.exe")
    return ("-m", "lutgemm") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)


def _leave(signum: int, frame: FrameType | None) -> None:
    """Nothing is opened or written yet, and an exception might be swallowed by the import that it lands in."""
    os.write(2, b"lutgemm: interrupted\n")
    os._exit(1)


def end() -> None:
    """Start-up is over: from here on an interrupt is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
