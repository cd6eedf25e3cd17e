"""Siblings with Triton's kernels, through its interpreter: no GPU needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lutgemm.backends import triton as backend

CHECKS = Path(__file__).with_name("triton_fusion_checks.py")


@pytest.mark.skipif(backend.missing() is not None, reason=f"backend triton: {backend.missing()}")
def test_siblings_in_the_interpreter(tmp_path: Path):
    command = [sys.executable, "-m", "pytest", str(CHECKS), "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]
