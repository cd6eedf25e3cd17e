"""bench/gpu.sh with a made-up Python: its steps, their order, its deadline, what it says of failures."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "gpu.sh"
pytestmark = pytest.mark.skipif(
    not SCRIPT.is_file() or shutil.which("bash") is None or shutil.which("timeout") is None,
    reason="needs the source tree, bash and GNU timeout",
)

TOOLS = {
    # what it is called with, and what the test wants of it: SLOW and FAIL are patterns of its arguments
    "python": """#!/bin/bash
case "$*" in
  *"import xdist"* | *find_spec*) exit 1 ;;
  *get_device_capability*) echo 90; exit 0 ;;
esac
echo "python $*" >> "$LOG"
if [[ -n $SLOW && "$*" == *$SLOW* ]]; then exec sleep 30; fi
if [[ -n $FAIL && "$*" == *$FAIL* ]]; then echo "it broke"; exit 3; fi
if [[ "$*" == *build_ext* ]]; then
  echo "archs $LUTGEMM_CUDA_ARCHS, $LUTGEMM_BUILD" >> "$LOG"; touch "$root/lutgemm/_C_cuda.so"
fi
echo done
""",
    "nvcc": """#!/bin/bash
echo "nvcc $*" >> "$LOG"
while (($# > 1)); do [[ $1 != -o ]] || { printf '#!/bin/sh\\necho {}\\n' > "$2"; chmod +x "$2"; }; shift; done
""",
    "compute-sanitizer": """#!/bin/bash
echo "compute-sanitizer $*" >> "$LOG"
""",
}


@pytest.fixture
def tree(tmp_path):
    """A checkout with nothing in it but what the script looks at."""
    root = tmp_path / "checkout"
    for folder in ("lutgemm", "bench/cuda", "kernels/triton", "csrc", "build_tools", "tests"):
        (root / folder).mkdir(parents=True)
    for file in ("setup.py", "csrc/kernel.cu", "lutgemm/__init__.py"):
        (root / file).touch()
    shutil.copy(SCRIPT, root / "bench")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in TOOLS.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return root


def run(tree, *arguments, seconds=300, **environment):
    """The script's output, status and the calls that it made."""
    log = tree.parent / "calls"
    log.write_text("")
    tools = tree.parent / "tools"
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "LOG": str(log)}
    env |= {"SLOW": "", "FAIL": "", "GPU_SECONDS": str(seconds), **environment}
    env.pop("LUTGEMM_CUDA_ARCHS", None)
    out = tree.parent / "out"
    ran = subprocess.run(
        ["bash", str(tree / "bench" / "gpu.sh"), str(out), *arguments], env=env, capture_output=True, text=True
    )
    return ran, log.read_text()


def steps_of(output):
    """Name -> verdict, in the order of the run."""
    return dict(re.findall(r"^== (\S+) +(.*?)(?:, \d+ s)?$", output, re.MULTILINE))


DEFAULT = ["build", "tests", "triton", "sanitizer", "primitives", "gpu", "block", "gpu-triton", "goals"]


def test_one_command_builds_tests_and_measures(tree):
    ran, calls = run(tree)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert list(steps_of(ran.stdout)) == DEFAULT
    assert set(steps_of(ran.stdout).values()) == {"ok"}
    marks = ["build_ext", "--require cuda", "--require triton", "compute-sanitizer --tool memcheck", "primitives.cu"]
    marks += ["--suite gpu --backends cuda", "--suite block", "--suite gpu --backends triton", "bench.goals"]
    found = [calls.index(mark) for mark in marks]
    assert found == sorted(found), "tests go before measuring, CUDA before Triton"
    assert "archs 90a, cuda" in calls
    assert calls.count("textbook_4bit") == 1
    out = tree.parent / "out"
    assert {f"{name}.log" for name in DEFAULT} <= {path.name for path in out.iterdir()}
    assert (out / "primitives.json").read_text() == "{}\n"
    assert (out / "goals.txt").is_file()


def test_the_head_comment_has_every_step_and_its_limit():
    text = SCRIPT.read_text()
    told = dict(re.findall(r"^#   (\S+) +\d+ +(\d+) ", text, re.MULTILINE))
    limits = dict(re.findall(r"^(?:[A-Z_]+=\d+ )*(?:if .*)?step (\S+) (\d+) ", text, re.MULTILINE))
    assert told == limits
    usual = re.search(r'^usual="(.*)"$', text, re.MULTILINE)[1].split()
    more = re.search(r'^known="\$usual (.*)"$', text, re.MULTILINE)[1].split()
    assert list(told) == usual + more
    assert usual == DEFAULT
    assert re.search(r"deadline=\$\{GPU_SECONDS:-(\d+)\}", text)[1] == "580", "ten minutes less what ends a step"


def test_every_test_that_needs_a_gpu_is_run(tree):
    """Those of Triton with its backend, all others with CUDA's; those that all backends share with both."""
    files = {"test_kernels.py": "", "test_cuda_gpu.py": "gpu", "test_fusion_triton.py": "gpu"}
    files |= {"test_gpu_behaviour.py": "gpu", "test_formats.py": "parametrize"}
    for name, mark in files.items():
        (tree / "tests" / name).write_text(f"@pytest.mark.{mark}")
    _, calls = run(tree, "tests triton")
    cuda, triton = ([*re.findall(r"/tests/(\S+)", line)] for line in calls.splitlines())
    assert cuda == ["test_kernels.py", "test_cuda_gpu.py"]
    assert triton == ["test_kernels.py", "test_gpu_behaviour.py", "test_fusion_triton.py"]


def test_a_library_newer_than_its_sources_is_used(tree):
    library = tree / "lutgemm" / "_C_cuda.so"
    library.touch()
    ran, calls = run(tree, "build")
    assert ran.returncode == 0
    assert "is newer than its sources: nothing is built" in ran.stdout
    assert "build_ext" not in calls
    later = time.time() + 10
    os.utime(tree / "csrc" / "kernel.cu", (later, later))
    ran, calls = run(tree, "build")
    assert "building: csrc/kernel.cu is new" in (tree.parent / "out" / "build.log").read_text()
    assert "build_ext" in calls


def test_steps_by_name_and_unknown_ones(tree):
    ran, calls = run(tree, "peers timeline goals")
    assert list(steps_of(ran.stdout)) == ["peers", "timeline", "goals"]
    assert "none of gemlite, humming, torchao, bitsandbytes is installed" in ran.stdout
    assert "build_ext" not in calls
    ran, calls = run(tree, "gpu everything")
    assert ran.returncode == 2
    assert "no step everything; there are: build tests" in ran.stderr
    assert not calls


def test_a_failure_is_counted_and_stops_nothing(tree):
    ran, _ = run(tree, FAIL="-m pytest")
    assert ran.returncode == 2, "tests and triton; the sanitizer's pytest is the sanitizer's affair"
    verdicts = steps_of(ran.stdout)
    assert verdicts["tests"] == verdicts["triton"] == "FAILED (3)"
    assert verdicts["gpu"] == "ok"
    assert "it broke" in ran.stdout
    ran, _ = run(tree, FAIL="lutgemm bench")
    assert ran.returncode == 3
    assert steps_of(ran.stdout)["gpu"] == "FAILED (3)"


def test_the_deadline_shortens_steps_and_later_ones_keep_their_share(tree):
    began = time.monotonic()
    ran, calls = run(tree, "gpu block goals", seconds=82, SLOW="--suite gpu")
    assert time.monotonic() - began < 15, "gpu got 82 - 80 seconds"
    verdicts = steps_of(ran.stdout)
    assert verdicts == {"gpu": "cut at its limit", "block": "ok", "goals": "ok"}
    assert ran.returncode == 0, "what was measured before the cut is kept: not a failure"
    assert "--suite block" in calls


def test_tests_that_get_no_time_have_failed_and_goals_are_told_all_the_same(tree):
    ran, calls = run(tree, "tests gpu goals", seconds=2, SLOW="--require cuda")
    verdicts = steps_of(ran.stdout)
    assert verdicts == {"tests": "cut at its limit", "gpu": "no time left", "goals": "ok"}
    assert ran.returncode == 1
    assert "bench.goals" in calls
