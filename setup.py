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

import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, Distribution, setup
from setuptools.command.build import build
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
OBJECTS = Path("build", f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}")
MODE = os.environ.get("LUTGEMM_BUILD") or "auto"
MODES = ("auto", "cpu", "cuda", "none")

CUDA_ARCHS = os.environ.get("LUTGEMM_CUDA_ARCHS") or "80+PTX;90a"

OLDEST_TORCH = (2, 11)
OLDEST_CUDA = (12, 4)
LAUNCHERS = ("ccache", "sccache", "distcc")
STABLE_ABI_TARGET = "0x020b000000000000"  # torch 2.11: one binary serves that release and all later ones
# No contraction: a*b+c rounds alike in the scalar and in the vector kernels unless a kernel asks for an FMA by name.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
# gcc calls the deliberately undefined registers of its own AVX-512 headers uninitialized; clang does not know the flag.
CXX_FLAGS += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", "--compress-mode=size"]


@dataclass(frozen=True)
class Part:
    """One shared object: what it is made of, or why it cannot be made here."""

    name: str
    output: str
    """file name inside the package"""
    sources: tuple[str, ...] = ()
    """relative to the project's root"""
    flags: tuple[str, ...] = ()
    nvcc_flags: tuple[str, ...] = ()
    """of its .cu files"""
    links: tuple[str, ...] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Torch:
    folder: Path
    version: str
    cuda: str | None
    """the CUDA version that it was built for"""


@dataclass(frozen=True)
class Nvcc:
    command: str
    home: Path
    """of the toolkit: include/, lib64/"""
    version: str


def site_folders() -> list[Path]:
    """Where the target interpreter finds installed packages; under build isolation sys.path does not hold them all."""
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix, "pyvenv.cfg")
    isolated = config.is_file() and not re.search(r"system-site-packages\s*=\s*true", config.read_text("utf-8"), re.I)
    if not isolated:
        folders += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]


def find_torch() -> tuple[Torch | None, str | None]:
    """The installed torch, or why its headers cannot be used."""
    for folder in site_folders():
        version_file = folder / "torch" / "version.py"
        if not version_file.is_file():
            continue
        version = re.search(r"^__version__ = '([^']+)'", version_file.read_text("utf-8"), re.M)
        if version is None:
            return None, f"{version_file} states no version"
        numbers = tuple(int(number) for number in re.findall(r"\d+", version[1])[:2])
        if numbers < OLDEST_TORCH:
            return None, f"torch {version[1]} is older than {'.'.join(map(str, OLDEST_TORCH))}; upgrade torch"
        if not (folder / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
            return None, f"torch {version[1]} in {folder} has no C++ headers"
        cuda = re.search(r"^cuda\b[^=\n]*= *'([^']+)'", version_file.read_text("utf-8"), re.M)
        return Torch(folder / "torch", version[1], cuda[1] if cuda else None), None
    where = sysconfig.get_path("purelib")
    return None, f"torch was not in {where} at build time; install torch, then this package with --no-build-isolation"


def find_compiler() -> tuple[list[str] | None, str | None]:
    """The C++ compiler's command (it may have a launcher before it, as in CXX="ccache g++"), or why there is none."""
    if asked := os.environ.get("CXX"):
        command = shlex.split(asked)
        return (command, None) if shutil.which(command[0]) else (None, f"CXX={asked} is not to be found")
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name], None
    return None, "no C++ compiler (g++, clang++, c++) was on PATH when lutgemm was built; install one, then reinstall"


def find_nvcc() -> tuple[Nvcc | None, str | None]:
    """CUDA's compiler, or why it cannot be used. Its toolkit is what it says itself: on PATH it may be a wrapper."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home, "bin")) for home in homes] or [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    command = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if command is None:
        where = f"in {' or '.join(places)}" if homes else "on PATH or in /usr/local/cuda"
        return None, f"nvcc was not {where} when lutgemm was built; install the CUDA toolkit, then reinstall"
    asked = subprocess.run([command, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    told = re.search(r"^#\$ TOP=(.+)$", asked.stderr, re.M)
    home = Path(told[1].strip()).resolve() if told else Path(command).resolve().parent.parent
    release = re.search(r"release (\d+\.\d+)", compiler_version([command], "release"))
    if release is None:
        return None, f"{command} does not tell its version"
    if tuple(map(int, release[1].split("."))) < OLDEST_CUDA:
        return None, f"{command} is of CUDA {release[1]}, older than {'.'.join(map(str, OLDEST_CUDA))}; upgrade it"
    if not (home / "include" / "cuda_runtime_api.h").is_file():
        return None, f"{home} has no include/cuda_runtime_api.h; install CUDA's runtime headers"
    return Nvcc(command, home, release[1]), None


def arch_flags(archs: str) -> tuple[str, ...]:
    """nvcc's flags for a list such as "80+PTX;90a"; `CompileError` for one that says nothing."""
    flags = []
    for arch in filter(None, re.split(r"[;,\s]+", archs.replace(".", ""))):
        found = re.fullmatch(r"(\d{2,3}[af]?)(\+PTX)?", arch)
        if found is None or int(found[1].rstrip("af")) < 80:
            raise CompileError(
                f"LUTGEMM_CUDA_ARCHS={archs}: {arch!r} is no arch of 80 or later, such as 80, 90a, 80+PTX"
            )
        flags.append(f"-gencode=arch=compute_{found[1]},code=sm_{found[1]}")
        if found[2]:
            flags.append(f"-gencode=arch=compute_{found[1]},code=compute_{found[1]}")
    return tuple(flags)


def find_ninja() -> str | None:
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    return shutil.which("ninja")


def compiler_version(compiler: list[str], word: str = "") -> str:
    """The first line of what it says of its version, that has the word in it."""
    run = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return next((line for line in (run.stdout or run.stderr).splitlines() if word in line), "").strip()


def sources(*patterns: str) -> tuple[str, ...]:
    found = (path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern))
    return tuple(sorted(path.as_posix() for path in found))


def ops_part(torch: Torch | None, no_torch: str | None) -> Part:
    files = sources("csrc/bind_cpu*.cpp", "csrc/cpu/*.cpp")
    if not any("bind_cpu" in file for file in files):
        return Part("_C", "_C.so", missing="csrc/bind_cpu.cpp is not in this source tree")
    if torch is None:
        return Part("_C", "_C.so", missing=no_torch)
    return Part("_C", "_C.so", files, binding_flags(torch), links=torch_links(torch))


def binding_flags(torch: Torch) -> tuple[str, ...]:
    """Of files with torch headers."""
    return (
        "-Icsrc",
        f"-isystem{torch.folder / 'include'}",
        # the error messages of inlined torch headers name their file: keep this machine's folders out of the binary
        f"-ffile-prefix-map={torch.folder.parent}=.",
        f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}",
    )


def torch_links(torch: Torch) -> tuple[str, ...]:
    """torch loads its libraries privately, so all three must stay NEEDED; where they lie is its affair: no rpath."""
    return (f"-L{torch.folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")


def host_compiler(compiler: list[str]) -> str:
    """The compiler itself, for nvcc: without a launcher before it."""
    return compiler[1] if len(compiler) > 1 and Path(compiler[0]).name in LAUNCHERS else compiler[0]


def cuda_part(torch: Torch | None, no_torch: str | None, compiler: list[str] | None) -> Part:
    def left_out(reason: str | None) -> Part:
        return Part("_C_cuda", "_C_cuda.so", missing=reason)

    files = sources("csrc/bind_cuda*.cpp", "csrc/cuda/*.cu")
    if not any("bind_cuda" in file for file in files):
        return left_out("csrc/bind_cuda.cpp is not in this source tree")
    if MODE == "cpu":
        return left_out("LUTGEMM_BUILD=cpu was set when lutgemm was built; use auto or cuda")
    if torch is None:
        return left_out(no_torch)
    if MODE == "auto" and torch.cuda is None:
        found = f"torch {torch.version}, for which lutgemm was built, has no CUDA"
        return left_out(f"{found}; install a CUDA build of torch and reinstall lutgemm, or set LUTGEMM_BUILD=cuda")
    if NVCC is None:
        return left_out(NO_NVCC)
    return Part(
        "_C_cuda",
        "_C_cuda.so",
        files,
        # USE_CUDA: torch's headers then declare the way to its current stream
        (*binding_flags(torch), f"-isystem{NVCC.home / 'include'}", "-DUSE_CUDA"),
        (*NVCC_FLAGS, f"-ccbin={host_compiler(compiler or ['g++'])}", *arch_flags(CUDA_ARCHS)),
        # the static runtime: nothing to find at run time but the driver; its symbols stay inside
        (
            *torch_links(torch),
            "-Wl,--exclude-libs,ALL",
            *(f"-L{folder}" for name in ("lib64", "lib") if (folder := NVCC.home / name).is_dir()),
            "-lcudart_static",
            "-lrt",
            "-ldl",
            "-lpthread",
        ),
    )


def host_part() -> Part:
    output = f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    files = sources("csrc/host_module.cpp", "csrc/host/*.cpp")
    if not files:
        return Part("_host", output, missing="csrc/host_module.cpp is not in this source tree")
    if not importlib.util.find_spec("pybind11"):
        return Part("_host", output, missing="pybind11 was not installed; pip install pybind11")
    python_headers = Path(sysconfig.get_path("include"))
    if not (python_headers / "Python.h").is_file():
        return Part("_host", output, missing=f"{python_headers} has no Python.h; install Python's development files")
    import pybind11

    return Part("_host", output, files, ("-Icsrc", f"-isystem{pybind11.get_include()}", f"-isystem{python_headers}"))


def plan(compiler: list[str] | None, no_compiler: str | None, torch: Torch | None, no_torch: str | None) -> list[Part]:
    """Every part of the package, each with its recipe or with the reason why it is left out."""
    parts = [ops_part(torch, no_torch), cuda_part(torch, no_torch, compiler), host_part()]
    reason = None
    if MODE == "none":
        reason = "LUTGEMM_BUILD=none was set when lutgemm was built; unset it"
    elif not sys.platform.startswith("linux"):
        return [
            Part(p.name, p.output, missing=f"compiled parts exist for Linux, not for {sys.platform}") for p in parts
        ]
    elif compiler is None:
        reason = no_compiler
    elif find_ninja() is None:
        reason = "ninja was not found; pip install ninja"
    said = [part.missing is None or MODE == "none" for part in parts]
    return [Part(p.name, p.output, missing=reason) if reason and new else p for p, new in zip(parts, said, strict=True)]


def ninja_text(text: str) -> str:
    return text.replace("$", "$$")


def ninja_path(path: str | Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(parts: list[Part], compiler: list[str]) -> str:
    """The build graph. ninja recompiles a file whose text, included headers or command line changed."""
    cxx = ninja_text(shlex.join(compiler))
    extra = ninja_text(os.environ.get("CXXFLAGS", ""))
    extra_cuda = ninja_text(os.environ.get("NVCCFLAGS", ""))
    extra_link = ninja_text(os.environ.get("LDFLAGS", ""))
    lines = [
        f"builddir = {ninja_path(OBJECTS)}",
        "rule compile",
        f"  command = {cxx} -MMD -MF $out.d $flags {extra} -c $in -o $out",
        "  description = c++ $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {ninja_text(shlex.quote(NVCC.command if NVCC else 'nvcc'))} -MMD -MF $out.d $flags {extra_cuda} "
        "-c $in -o $out",
        "  description = nvcc $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -shared $in -o $out $links {extra_link}",
        "  description = link $out",
    ]
    for part in parts:
        objects = [ninja_path(OBJECTS / part.name / f"{file}.o") for file in part.sources]
        flags = ninja_text(shlex.join([*CXX_FLAGS, *part.flags]))
        nvcc_flags = ninja_text(shlex.join(part.nvcc_flags))
        for file, target in zip(part.sources, objects, strict=True):
            rule, its_flags = ("nvcc", nvcc_flags) if file.endswith(".cu") else ("compile", flags)
            lines += [f"build {target}: {rule} {ninja_path(file)}", f"  flags = {its_flags}"]
        lines += [f"build {ninja_path(OBJECTS / part.output)}: link {' '.join(objects)}"]
        lines += [f"  links = {ninja_text(shlex.join(part.links))}"]
    return "\n".join(lines) + "\n"


def run_ninja(targets: list[str]) -> str | None:
    """None when all targets are up to date, else the first line that reports an error. The output passes through."""
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [str(find_ninja()), "-f", str(OBJECTS / "build.ninja"), "-k", "0", *jobs, *targets]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line.strip())
    if process.wait() == 0:
        return None
    telling = [line for line in lines if "error:" in line or "undefined reference" in line] or lines[-1:]
    return telling[0][:300] if telling else f"ninja ended with status {process.returncode}"


def compile_parts(parts: list[Part], compiler: list[str]) -> dict[str, str]:
    """Brings the shared objects in `OBJECTS` up to date. Returns name -> error of those that fail."""
    import fcntl  # exists on POSIX only, as do the compiled parts

    folder = ROOT / OBJECTS
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(ninja_file(parts, compiler), "utf-8")
        if run_ninja([str(OBJECTS / part.output) for part in parts]) is None:
            return {}
        errors = {part.name: run_ninja([str(OBJECTS / part.output)]) for part in parts}
    return {name: f"compiling failed: {error}" for name, error in errors.items() if error}


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
        if ready and COMPILER:
            skipped |= compile_parts(ready, COMPILER)
        wanted = {name: reason for name, reason in skipped.items() if MODE == "cuda" or name != "_C_cuda"}
        if MODE in ("cpu", "cuda") and wanted:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in wanted.items())
            raise CompileError(f"LUTGEMM_BUILD={MODE} asks for every compiled part, but {reasons}")
        built = [part for part in ready if part.name not in skipped]
        for name, reason in skipped.items():
            if name == "_C_cuda" and (MODE == "cpu" or TORCH is None or TORCH.cuda is None):
                continue  # noted; who has no use for it need not be told
            print(f"warning: lutgemm.{name} is left out: {reason}", file=sys.stderr)
        info = {
            "built": [part.name for part in built],
            "skipped": skipped,
            "torch": TORCH.version if TORCH else None,
            "compiler": compiler_version(COMPILER) if COMPILER else None,
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


COMPILER, NO_COMPILER = find_compiler()
TORCH, NO_TORCH = find_torch()
NVCC, NO_NVCC = find_nvcc()
PARTS = plan(COMPILER, NO_COMPILER, TORCH, NO_TORCH)

if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(
        f"lutgemm is built by setuptools 77 or later, and this is {setuptools.__version__}: "
        "pip install --upgrade setuptools, or install without --no-build-isolation"
    )
if __name__ == "__main__":
    setup(distclass=LutgemmDistribution, cmdclass={"build": Build, "build_ext": BuildParts})
