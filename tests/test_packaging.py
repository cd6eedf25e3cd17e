"""What is in the wheel and the sdist, what the build leaves out and why, and what an import must not do."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from lutgemm import _native

ROOT = Path(__file__).resolve().parent.parent
HOST = f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
needs_sources = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason=f"{ROOT} is not the source tree of lutgemm"
)
NO_NVCC = (
    runpy.run_path(str(ROOT / "setup.py"), run_name="build_plan")["NO_NVCC"] if (ROOT / "setup.py").is_file() else ""
)
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")),
    reason="no C++ compiler is on PATH",
)

# Small stand-ins for csrc/: what is tested is the build, in seconds.
BIND = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
torch::stable::Tensor copy(torch::stable::Tensor x) {
  STD_TORCH_CHECK(x.dim() == 2, "x has ", x.dim(), " dimensions");
  return torch::stable::clone(x);
}
STABLE_TORCH_LIBRARY_FRAGMENT(lutgemm_packaging_test, m) { m.def("copy(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(lutgemm_packaging_test, CPU, m) { m.impl("copy", TORCH_BOX(&copy)); }
"""
HOST_MODULE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_host, m) { m.def("answer", [] { return 42; }); }
"""


def make_tree(folder: Path) -> Path:
    """A copy of the source tree with stand-ins for csrc/, and with what older builds may have left behind."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", "*.egg-info", "build", "dist")
    for name in ("lutgemm", "bench", "kernels", "build_tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "csrc" / "cpu").mkdir(parents=True)
    (folder / "csrc" / "bind_cpu.cpp").write_text(BIND, "utf-8")
    (folder / "csrc" / "cpu" / "empty.cpp").write_text("", "utf-8")
    (folder / "csrc" / "host_module.cpp").write_text(HOST_MODULE, "utf-8")
    platform = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for stale in (
        "build/lib/lutgemm/old_module.py",
        "build/lib/kernels/__init__.py",
        f"build/{platform}/lutgemm/_C_cuda.so",
        f"build/{platform}/old_package/__init__.py",
        "lutgemm/_C_cuda.so",
        f"lutgemm/{HOST}",
        "lutgemm/_build_info.json",
    ):
        path = folder / stale
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("stale", "utf-8")
    return folder


def run(tree: Path, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Python in `tree`; a variable given as None is unset."""
    settings = {"LUTGEMM_BUILD": None, "CXX": None, "CXXFLAGS": None, "LDFLAGS": None, **environment}
    env = {key: value for key, value in {**os.environ, **settings}.items() if value is not None}
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=env, capture_output=True, text=True, check=False)


def backend_hook(tree: Path, hook: str, **environment: str | None) -> Path:
    """Calls the build backend as pip does without isolation. Returns what it built."""
    script = f"import setuptools.build_meta as m; print('built:', m.{hook}('out'))"
    done = run(tree, "-c", script, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "out" / done.stdout.rpartition("built:")[2].strip()


def wheel_files(wheel: Path) -> set[str]:
    """Names inside the wheel, its metadata folder left out."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def build_info(wheel: Path) -> dict[str, object]:
    with zipfile.ZipFile(wheel) as archive:
        info: dict[str, object] = json.loads(archive.read("lutgemm/_build_info.json"))
    return info


def pure_files(tree: Path) -> set[str]:
    """Every file that a wheel of `tree` must hold when nothing is compiled."""
    ours = {
        path.relative_to(tree).as_posix()
        for path in (tree / "lutgemm").rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc") and path.name != "_build_info.json"
    }
    bench = {
        f"lutgemm/bench/{path.relative_to(tree / 'bench').as_posix()}"
        for pattern in ("*.py", "*.cu")
        for path in (tree / "bench").rglob(pattern)
    }
    kernels = {f"lutgemm/kernels/{path.name}" for path in (tree / "kernels" / "triton").glob("*.py")}
    return ours | bench | kernels | {"lutgemm/_build_info.json"}


@needs_sources
def test_pure_wheel_holds_the_package_and_nothing_stale(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    wheel = backend_hook(tree, "build_wheel", LUTGEMM_BUILD="none")
    assert wheel_files(wheel) == pure_files(tree)
    assert wheel.name.endswith("-py3-none-any.whl")
    info = build_info(wheel)
    assert info["built"] == []
    assert set(info["skipped"]) == {"_C", "_C_cuda", "_host"}
    assert all("LUTGEMM_BUILD=none" in reason for reason in info["skipped"].values())


@needs_sources
@needs_compiler
def test_compiled_wheel_and_build_in_place(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    wheel = backend_hook(tree, "build_wheel", LUTGEMM_BUILD="cpu")
    assert wheel_files(wheel) == pure_files(tree) | {"lutgemm/_C.so", f"lutgemm/{HOST}"}
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}" in wheel.name
    info = build_info(wheel)
    assert info["built"] == ["_C", "_host"]
    assert set(info["skipped"]) == {"_C_cuda"}
    with zipfile.ZipFile(wheel) as archive:
        for name in ("lutgemm/_C.so", f"lutgemm/{HOST}"):
            assert str(tmp_path).encode() not in archive.read(name), f"{name} names the folder that it was built in"

    done = run(tree, "setup.py", "build_ext", "--inplace", LUTGEMM_BUILD="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no work to do" in done.stdout, "the second build compiled again"
    assert {path.name for path in (tree / "lutgemm").glob("*.so")} == {"_C.so", HOST}, "stale files stayed"
    script = (
        "import torch, lutgemm._native as n; module, why = n.host(); assert why is None and module.answer() == 42;"
        "assert n.load_ops('_C') is None; print(torch.ops.lutgemm_packaging_test.copy(torch.ones(2, 3)).sum().item())"
    )
    done = run(tree, "-c", script)
    assert done.stdout.strip() == "6.0", done.stdout + done.stderr

    (tree / "csrc" / "cpu" / "empty.cpp").write_text("int x = no_such_name;\n", "utf-8")
    done = run(tree, "setup.py", "build_ext", "--inplace", LUTGEMM_BUILD="cpu")
    assert done.returncode != 0
    assert "no_such_name" in done.stderr
    assert (tree / "lutgemm" / "_C.so").is_file(), "a refused build must not touch what is there"

    done = run(tree, "setup.py", "build_ext", "--inplace")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tree / "lutgemm").glob("*.so")} == {HOST}, "_C.so does not belong to these sources"
    info = json.loads((tree / "lutgemm" / "_build_info.json").read_text("utf-8"))
    assert info["built"] == ["_host"]
    assert "compiling failed" in info["skipped"]["_C"]
    assert "empty.cpp:1" in info["skipped"]["_C"]


@needs_sources
def test_without_compiler_the_package_installs_and_says_why(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    (tmp_path / "empty").mkdir()
    wheel = backend_hook(tree, "build_wheel", PATH=str(tmp_path / "empty"))
    assert wheel_files(wheel) == pure_files(tree)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = (
        "import torch, lutgemm; print(lutgemm.__file__); print(lutgemm.backends()['cpu']);"
        "from lutgemm import _native; print(_native.host()[1])"
    )
    done = run(tmp_path / "empty", "-c", script, PYTHONPATH=str(site), PATH=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    file, cpu, host = done.stdout.splitlines()
    assert Path(file).is_relative_to(site)
    assert "no C++ compiler" in cpu
    assert "no C++ compiler" in host

    done = run(tree, "setup.py", "build_ext", "--inplace", LUTGEMM_BUILD="cpu", PATH=str(tmp_path / "empty"))
    assert done.returncode != 0
    assert "no C++ compiler" in done.stderr


@needs_sources
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LUTGEMM_BUILD": "gpu"}, "LUTGEMM_BUILD=gpu is unknown; use one of auto, cpu, cuda, none"),
        ({"LUTGEMM_BUILD": "cpu", "CXX": "/no/such/c++"}, "CXX=/no/such/c++ is not to be found"),
        ({"LUTGEMM_BUILD": "cuda", "CUDA_HOME": "/no/such"}, "nvcc was not in /no/such/bin when lutgemm was built"),
        (
            {"LUTGEMM_BUILD": "cuda", "LUTGEMM_CUDA_ARCHS": "75"},
            "'75' is no arch of 80 or later, such as 80, 90a, 80+PTX",
        ),
    ],
)
def test_bad_build_settings_are_refused(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    if "LUTGEMM_CUDA_ARCHS" in environment and NO_NVCC:
        pytest.skip(NO_NVCC)
    tree = make_tree(tmp_path)
    (tree / "csrc" / "bind_cuda.cpp").write_text("", "utf-8")
    done = run(tree, "setup.py", "build_ext", "--inplace", **environment)
    assert done.returncode != 0
    assert message in done.stderr


@needs_sources
@needs_compiler
@pytest.mark.skipif(NO_NVCC is not None, reason=str(NO_NVCC))
def test_the_gpu_part_is_built_where_it_is_asked_for(tmp_path: Path) -> None:
    """For a torch without CUDA it is built on demand only, is well-formed, and stays unloaded."""
    tree = make_tree(tmp_path)
    (tree / "csrc" / "cuda").mkdir()
    (tree / "csrc" / "bind_cuda.cpp").write_text("void launch_it(); void* keep = (void*)&launch_it;\n", "utf-8")
    kernel = "__global__ void fill(int* x) { *x = 1; }\nvoid launch_it() { fill<<<1, 1>>>(nullptr); }\n"
    (tree / "csrc" / "cuda" / "fill.cu").write_text(kernel, "utf-8")
    done = run(tree, "setup.py", "build_ext", "--inplace", LUTGEMM_BUILD="cuda", LUTGEMM_CUDA_ARCHS="80, 9.0a+PTX")
    assert done.returncode == 0, done.stdout + done.stderr
    info = json.loads((tree / "lutgemm" / "_build_info.json").read_text("utf-8"))
    assert info["built"] == ["_C", "_C_cuda", "_host"]
    assert info["cuda_archs"] == "80, 9.0a+PTX"
    library = (tree / "lutgemm" / "_C_cuda.so").read_bytes()
    assert str(tmp_path).encode() not in library
    if torch.version.cuda is None:
        done = run(tree, "-c", "import lutgemm._native as n; print(n.load_ops('_C_cuda'))")
        assert "has no CUDA; install a CUDA build of torch" in done.stdout, done.stderr
        done = run(tree, "setup.py", "build_ext", "--inplace")
        assert "_C_cuda" not in done.stderr, "a warning of what nobody could use"
        assert not (tree / "lutgemm" / "_C_cuda.so").exists()
        info = json.loads((tree / "lutgemm" / "_build_info.json").read_text("utf-8"))
        assert "for which lutgemm was built, has no CUDA; install a CUDA build" in info["skipped"]["_C_cuda"]


@needs_sources
@pytest.mark.parametrize(
    ("version", "headers", "reason"),
    [
        ("2.10.1+cu128", True, "torch 2.10.1+cu128 is older than 2.11"),
        ("2.13.0+cpu", False, "has no C++ headers"),
        ("2.11.0", True, None),
        ("3.0.0a0+git12", True, None),
    ],
)
def test_torch_is_looked_up_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, headers: bool, reason: str | None
) -> None:
    (tmp_path / "torch" / "include" / "torch" / "csrc" / ("stable" if headers else "other")).mkdir(parents=True)
    (tmp_path / "torch" / "version.py").write_text(
        f"__version__ = '{version}'\ncuda: Optional[str] = '13.0'\n", "utf-8"
    )
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('the build imported torch')\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="build_plan")
    found, missing = build["find_torch"]()
    assert "torch" not in sys.modules
    if reason is None:
        assert (found.folder, found.version, found.cuda, missing) == (tmp_path / "torch", version, "13.0", None)
    else:
        assert found is None
        assert reason in missing


@needs_sources
def test_sdist_builds_the_same_wheel(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    sdist = backend_hook(tree, "build_sdist", LUTGEMM_BUILD="none")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    packed = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {"csrc/bind_cpu.cpp", "csrc/cpu/empty.cpp", "csrc/host_module.cpp", "setup.py", "LICENSE"} <= packed
    assert not [name for name in packed if name.endswith((".so", "_build_info.json")) or name.startswith("build/")]
    wheel = backend_hook(unpacked, "build_wheel", LUTGEMM_BUILD="none")
    assert wheel_files(wheel) == pure_files(tree)


@needs_sources
def test_every_package_on_disk_is_declared() -> None:
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "lutgemm").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    on_disk |= {
        ".".join((name, *path.parent.relative_to(ROOT / folder).parts))
        for folder, name in (("bench", "lutgemm.bench"), ("kernels/triton", "lutgemm.kernels"))
        for path in (ROOT / folder).rglob("__init__.py")
    }
    from setuptools.config.pyprojecttoml import read_configuration

    declared = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]["packages"]
    assert sorted(declared) == sorted(on_disk)


@needs_sources
def test_the_checkout_does_not_shadow_the_kernels_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    script = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    done = run(ROOT, "-c", script)
    assert str(ROOT) not in done.stdout, done.stdout + done.stderr


def test_import_starts_no_process() -> None:
    script = (
        "import sys, torch\n"
        "events = ('subprocess.Popen', 'os.system', 'os.posix_spawn', 'os.fork', 'os.exec')\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append((event, args)) if event in events else None)\n"
        "import lutgemm\n"
        "lutgemm.backends()\n"
        "assert not seen, seen\n"
    )
    done = run(Path.cwd(), "-c", script)
    assert done.returncode == 0, done.stderr


def test_reasons_of_missing_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_HERE", tmp_path)
    load_ops = _native.load_ops.__wrapped__
    assert "_C was not built" in load_ops("_C")
    (tmp_path / "_build_info.json").write_text(json.dumps({"skipped": {"_C": "no compiler at all"}}), "utf-8")
    assert load_ops("_C") == "no compiler at all"
    (tmp_path / "_C.so").write_bytes(b"this is no shared object")
    assert "_C.so does not load in torch" in load_ops("_C")


def test_a_host_module_of_another_python_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_HERE", tmp_path)
    host = _native.host.__wrapped__
    assert host() == (None, _native._build_reason("_host"))
    (tmp_path / "_host.cpython-27-x86_64-linux-gnu.so").write_bytes(b"")
    module, reason = host()
    assert module is None
    assert reason.startswith("_host.cpython-27-x86_64-linux-gnu.so is for another Python; this one needs " + HOST)
    assert "reinstall" in reason


@needs_sources
def test_the_build_starts_where_there_is_no_fcntl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled there, as on any system but Linux."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="build_plan")
    assert [part.missing for part in build["PARTS"]] == ["compiled parts exist for Linux, not for darwin"] * 3
