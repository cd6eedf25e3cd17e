"""The `lutgemm` command: one module per verb, imported only when its verb is used.

Exit codes: 0 done, 1 failed, 2 usage. Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from .. import __version__, _startup
from ..errors import LutgemmError

VERBS: dict[str, str] = {
    "quantize": "quantize a Hugging Face checkpoint",
    "inspect": "show formats, bits per weight and coverage of a checkpoint",
    "verify": "check a quantized checkpoint against its original",
    "eval": "perplexity of a model on a text file",
    "generate": "text from a prompt",
    "bench": "time the kernels against torch",
    "tune": "measure on this machine which kernel is the fastest when",
    "env": "show versions, backends and why one is missing",
    "demo": "quantize a real language model and show what it gains and loses",
}
"""Verb -> its line in `lutgemm --help`; each verb is the module `lutgemm.cli.<verb>`."""

EXTRAS = {
    "transformers": "hf",
    "tokenizers": "hf",
    "huggingface_hub": "hf",
    "numpy": "hf",
    "matplotlib": "bench",
    "gguf": "demo",
    "accelerate": "demo",
}
"""Optional package -> the extra of lutgemm that installs it."""


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="lutgemm",
        description="Low-bit linear layers by table look-up, and the tools that make them out of Hugging Face models.",
        epilog=f"verbs:\n{lines}\n\n`lutgemm VERB --help` shows the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lutgemm {__version__}")
    parser.add_argument("verb", choices=list(VERBS), metavar="VERB", help="what to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _fail(message: str) -> int:
    print(f"lutgemm: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _missing_package(verb: str, error: ModuleNotFoundError) -> int:
    package = (error.name or "").split(".")[0]
    if package in ("", "lutgemm"):
        return _fail(f"'{verb}' cannot start: {error}; reinstall lutgemm")
    extra = EXTRAS.get(package)
    install = f'pip install "lutgemm[{extra}]"' if extra else f"pip install {package}"
    return _fail(f"'{verb}' needs the package {package}, which is not installed; install it with: {install}")


def _run(module: ModuleType, verb: str, arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"lutgemm {verb}", description=module.HELP)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(arguments)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); returns the exit code. Usage errors exit 2."""
    args = _parser().parse_args(argv)
    module: ModuleType | None = None
    try:
        _startup.end()
        module = importlib.import_module(f".{args.verb}", __name__)
        code = _run(module, args.verb, args.arguments)
        sys.stdout.flush()
        return code
    except LutgemmError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _missing_package(args.verb, error)
    except KeyboardInterrupt:
        print(f"lutgemm: interrupted{getattr(module, 'INTERRUPTED', '')}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of stdout has gone (`lutgemm ... | head`): point stdout elsewhere so that exiting does not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return _fail(f"'{args.verb}' ran out of memory; free some, or use a machine with more")
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _fail(f"{name}{error.strerror or error}; check the path, its permissions and the disk")
