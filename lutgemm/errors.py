"""The exceptions that lutgemm raises on purpose.

Each is also the built-in exception a caller would expect, so `except ValueError` keeps working.
"""


class LutgemmError(Exception):
    """Base of every error that lutgemm raises on purpose; the CLI prints it without a traceback and exits 1."""


class ArgumentError(LutgemmError, ValueError):
    """An argument is outside what is accepted. The text names the argument, its value and the accepted values."""


class FormatError(LutgemmError, ValueError):
    """Tensors do not form a valid weight of `formats/SPEC.md` (shape, dtype, version or value)."""


class BackendError(LutgemmError, RuntimeError):
    """An explicitly chosen backend or algorithm is absent or cannot take the problem. The text gives its reason."""


class CheckpointError(LutgemmError, RuntimeError):
    """A checkpoint on disk cannot be read, converted or written. The text names the file and the remedy."""
