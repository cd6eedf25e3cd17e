"""Builds the compiled parts of lutgemm; all other facts about the package are in pyproject.toml.

    lutgemm/_C.so             ops for the CPU: csrc/bind_cpu*.cpp and csrc/cpu/*.cpp, on torch's stable ABI
    lutgemm/_C_cuda.so        ops for NVIDIA GPUs: csrc/bind_cuda*.cpp and csrc/cuda/*.cu, on torch's stable ABI
    lutgemm/_host.<abi>.so    what is not an op: csrc/host_module.cpp, on pybind11, without torch

torch is looked up on disk and never imported: under build isolation it cannot be imported, while its headers are still
in the environment that the package is built for. A part that cannot be built is left out of the package, and
lutgemm/_build_info.json says why (`lutgemm env` shows it).

Environment variables
    LUTGEMM_BUILD    auto (default): build what can be built, _C_cuda if torch is a CUDA build and nvcc is found;
                     cpu: no _C_cuda, and a part that cannot be built is an error;
                     cuda: all parts, whatever torch is, and a part that cannot be built is an error;
                     none: pure Python
    LUTGEMM_CUDA_ARCHS    what _C_cuda is compiled for, default "80+PTX;90a": compute capabilities without the dot;
                          +PTX also keeps code that the driver compiles for GPUs of later capabilities
    CUDA_HOME, CXX, CXXFLAGS, NVCCFLAGS, LDFLAGS, MAX_JOBS    as usual
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, Distribution, setup
from setuptools.command.build import build
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent))  # build frontends leave it out

from build_tools.ninja_build import OBJECTS, compile_parts
from build_tools.parts import ROOT, STABLE_ABI_TARGET, Part, plan  # noqa: F401 - the emulator's build reads the target
from build_tools.toolchain import Machine, compiler_version, find_compiler, find_nvcc, find_torch

del sys.path[0]

MODE = os.environ.get("LUTGEMM_BUILD") or "auto"
MODES = ("auto", "cpu", "cuda", "none")
CUDA_ARCHS = os.environ.get("LUTGEMM_CUDA_ARCHS") or "80+PTX;90a"


class BuildParts(Command):
    """`build_ext`: the compiled parts and the note on those that are missing."""

    description = "compile lutgemm's shared objects"
    user_options: ClassVar = [("inplace", "i", "put the results beside the Python sources")]
    boolean_options: ClassVar = ["inplace"]
    editable_mode = False
    inplace = False
    build_lib: str | None = None

    def initialize_options(self) -> None:
        self.inplace = False
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def get_source_files(self) -> list[str]:
        return [file for part in PARTS for file in part.sources]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.editable_mode:
            return {}
        return {output: str(ROOT / "lutgemm" / Path(output).name) for output in self.get_outputs()}

    def get_outputs(self) -> list[str]:
        return [str(Path(str(self.build_lib), "lutgemm", name)) for name in self._written]

    _written: tuple[str, ...] = ()

    def run(self) -> None:
        if MODE not in MODES:
            raise CompileError(f"LUTGEMM_BUILD={MODE} is unknown; use one of {', '.join(MODES)}")
        ready = [part for part in PARTS if part.missing is None]
        skipped = {part.name: part.missing for part in PARTS if part.missing is not None}
        if ready and MACHINE.compiler:
            skipped |= compile_parts(ready, MACHINE.compiler, NVCC.command if NVCC else "nvcc")
        wanted = {name: reason for name, reason in skipped.items() if MODE == "cuda" or name != "_C_cuda"}
        if MODE in ("cpu", "cuda") and wanted:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in wanted.items())
            raise CompileError(f"LUTGEMM_BUILD={MODE} asks for every compiled part, but {reasons}")
        built = [part for part in ready if part.name not in skipped]
        for name, reason in skipped.items():
            if name == "_C_cuda" and (MODE == "cpu" or MACHINE.torch is None or MACHINE.torch.cuda is None):
                continue  # noted; who has no use for it need not be told
            print(f"warning: lutgemm.{name} is left out: {reason}", file=sys.stderr)
        info = {
            "built": [part.name for part in built],
            "skipped": skipped,
            "torch": MACHINE.torch.version if MACHINE.torch else None,
            "compiler": compiler_version(MACHINE.compiler) if MACHINE.compiler else None,
            "nvcc": NVCC.version if NVCC and any(part.name == "_C_cuda" for part in built) else None,
            "cuda_archs": CUDA_ARCHS if any(part.name == "_C_cuda" for part in built) else None,
        }
        self._place(built, json.dumps(info, indent=2) + "\n")

    def _place(self, built: list[Part], info: str) -> None:
        """The folder ends with exactly these outputs. Renaming spares processes that have an old one loaded."""
        in_place = self.inplace or self.editable_mode
        folder = ROOT / "lutgemm" if in_place else Path(str(self.build_lib), "lutgemm")
        folder.mkdir(parents=True, exist_ok=True)
        self._written = (*(part.output for part in built), "_build_info.json")
        for stale in {*folder.glob("_C*.so"), folder / PARTS[-1].output} - {folder / name for name in self._written}:
            stale.unlink(missing_ok=True)
        for part in built:
            temporary = folder / f".{part.output}.partial"
            shutil.copy2(ROOT / OBJECTS / part.output, temporary)
            temporary.replace(folder / part.output)
        (folder / "_build_info.json").write_text(info, "utf-8")


class Build(build):
    """Always runs `build_ext`, and into an empty folder: what an older build left there would end up in the wheel."""

    sub_commands: ClassVar = [("build_py", None), ("build_ext", None)]

    def run(self) -> None:
        library = Path(str(self.build_lib)).resolve()
        if library.is_dir() and Path(self.build_base).resolve() in library.parents:
            shutil.rmtree(library)
        super().run()


class LutgemmDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        """A wheel without compiled parts is tagged for any machine and any Python 3."""
        return any(part.missing is None for part in PARTS)


MACHINE = Machine(*find_compiler(), *find_torch(), *find_nvcc())
NVCC, NO_NVCC = MACHINE.nvcc, MACHINE.no_nvcc
PARTS = plan(MODE, CUDA_ARCHS, MACHINE)

if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(
        f"lutgemm is built by setuptools 77 or later, and this is {setuptools.__version__}: "
        "pip install --upgrade setuptools, or install without --no-build-isolation"
    )
if __name__ == "__main__":
    setup(distclass=LutgemmDistribution, cmdclass={"build": Build, "build_ext": BuildParts})
