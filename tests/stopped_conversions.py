"""What tests of conversions that go on share: a small source, its result, and a conversion that stopped half-way."""

from __future__ import annotations

import pytest
import tiny_checkpoints as tiny

from lutgemm import BCQConfig
from lutgemm.checkpoint import convert, quantize_checkpoint

RTN = BCQConfig(bits=3, group_size=32, method="rtn")


def source(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("resume") / "src", sharded=True)


def result(src, tmp_path_factory):
    """The result of an uninterrupted conversion."""
    dst = tmp_path_factory.mktemp("whole") / "dst"
    quantize_checkpoint(src, dst, RTN, progress=False)
    return tiny.digests(dst)


def stop_after(monkeypatch, layers):
    """Let the conversion fail with KeyboardInterrupt after so many layers."""
    done = []
    original = convert.quantize_layer

    def counted(*args):
        if len(done) == layers:
            raise KeyboardInterrupt
        done.append(args)
        return original(*args)

    monkeypatch.setattr(convert, "quantize_layer", counted)
    return done


def stopped_half_way(src, tmp_path, monkeypatch):
    """A conversion that stopped after four of its seven layers."""
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(src, dst, RTN, progress=False)
    return dst
