"""What a run keeps: one record per measured line of ours, one per baseline that stood beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lutgemm.testing.cases import OpCase
from lutgemm.testing.timing import Timing


@dataclass(frozen=True)
class Bandwidth:
    """GB/s of memory with some number of threads, measured in this run; 0 where it was not. copy: reads and writes."""

    read_gb_per_s: float = 0.0
    copy_gb_per_s: float = 0.0

    def best(self, read_gb_per_s: float, copy_gb_per_s: float) -> Bandwidth:
        """The greater of these figures and new ones."""
        return Bandwidth(max(self.read_gb_per_s, read_gb_per_s), max(self.copy_gb_per_s, copy_gb_per_s))


def rates(timing: Timing | None, bytes_moved: int, memory: Bandwidth) -> dict[str, float | None]:
    """GB/s of the median, and that as a percentage of the memory's read bandwidth, or where that was not measured (on
    GPUs) of its copy bandwidth; None where there is no time.
    """
    speed = None if timing is None else bytes_moved / timing.median_us / 1e3
    wall = memory.read_gb_per_s or memory.copy_gb_per_s
    percent = None if speed is None or not wall else 100 * speed / wall
    return {"gb_per_s": speed, "bandwidth_percent": percent, **asdict(memory)}


def _times(timing: Timing | None) -> Mapping[str, float | None]:
    return timing.to_dict() if timing else dict.fromkeys(Timing.__dataclass_fields__)


@dataclass(frozen=True)
class BaselineRecord:
    """One baseline at one shape, mode and number of threads. No times where it is absent or was wrong."""

    name: str
    M: int
    N: int
    K: int
    device: str
    threads: int
    mode: str
    absent: str = ""
    """Why it did not run here; "" where it did."""
    bits_per_weight: float = 0.0
    bytes_moved: int = 0
    """The stored weight once, x and y once."""
    error: float | None = None
    """Relative L2 error against fp64 arithmetic on its own dequantized weight: what its activations and sums cost."""
    bound: float | None = None
    """The most that a correct result of its kind of arithmetic may have."""
    timing: Timing | None = None
    memory: Bandwidth = Bandwidth()

    @property
    def correct(self) -> bool:
        """False for a baseline whose result was wrong; an absent one has none."""
        return self.error is not None and self.bound is not None and self.error <= self.bound

    @property
    def message(self) -> str:
        """Why there is no time, or ""."""
        if self.absent:
            return self.absent
        return "" if self.correct else f"relative error {self.error:.1e} is above its bound {self.bound:.1e}"

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {
            "name": self.name,
            "device": self.device,
            "threads": self.threads,
            "mode": self.mode,
            "M": self.M,
            "N": self.N,
            "K": self.K,
            "bits_per_weight": self.bits_per_weight,
            **_times(self.timing),
            "bytes_moved": self.bytes_moved,
            **rates(self.timing, self.bytes_moved, self.memory),
            "error": self.error,
            "bound": self.bound,
            "correct": self.correct,
            "message": self.message or None,
        }


@dataclass(frozen=True)
class Record:
    """One measured line. Times are None when the result was wrong: nothing is timed that failed its check."""

    case: OpCase
    algorithm: str
    backend: str
    isa: str
    device: str
    threads: int
    mode: str
    bits_per_weight: float
    bytes_moved: int
    """The stored weight once, x and y once."""
    error: float | None
    """Relative L2 error against fp64; None where the call raised an error."""
    correct: bool
    message: str = ""
    timing: Timing | None = None
    memory: Bandwidth = Bandwidth()
    """with as many threads"""
    baselines: tuple[BaselineRecord, ...] = field(default=(), repr=False)
    """Those timed in turns with this line; shared by all lines of the group."""
    auto: bool = False
    """Whether this is the algorithm that the backend takes by itself."""

    @property
    def bandwidth_percent(self) -> float | None:
        return rates(self.timing, self.bytes_moved, self.memory)["bandwidth_percent"]

    @property
    def gb_per_s(self) -> float | None:
        return rates(self.timing, self.bytes_moved, self.memory)["gb_per_s"]

    def speedup(self, baseline: str, statistic: str = "median_us") -> float | None:
        """Time of a baseline over ours, both of the same interleaved run; None where either is missing."""
        found = next((b.timing for b in self.baselines if b.name == baseline), None)
        if self.timing is None or found is None:
            return None
        return float(getattr(found, statistic) / getattr(self.timing, statistic))

    @property
    def weights(self) -> str:
        """The format in a few characters: bits, or the codebooks, and what differs from the usual."""
        c = self.case
        if c.op == "codebook_linear":
            return f"{c.num_codebooks}x{c.vec_len}x{c.codebook_bits}"
        return f"{c.bits}-bit" + ("" if c.scale_kind == "free" else f" {c.scale_kind}")

    @property
    def repro(self) -> str:
        """The command that measures this line again."""
        c = self.case
        kind = (
            f"--bits {c.bits} --scale-kind {c.scale_kind}"
            if c.op == "bcq_linear"
            else f"--codebooks {c.num_codebooks}x{c.vec_len}x{c.codebook_bits}"
        )
        isa = f" --isa {self.isa}" if self.isa else ""
        device = "" if self.device == "cpu" else f" --device {self.device}"
        outliers = " --outliers" if c.outliers else ""
        return (
            f"lutgemm bench --op {c.op} --shapes {c.N}x{c.K} {kind} --m {c.M} --group-size {c.layout.group_size} "
            f"--dtype {c.dtype}{outliers} --accuracy {c.accuracy} --algorithms {self.algorithm} "
            f"--backends {self.backend}{isa}{device} --threads {self.threads} --{self.mode}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        c = self.case
        bcq = c.op == "bcq_linear"
        own = {"bits": c.bits, "scale_kind": c.scale_kind} if bcq else {}
        own |= {} if bcq else {k: getattr(c, k) for k in ("num_codebooks", "vec_len", "codebook_bits")}
        return {
            "op": c.op,
            "algorithm": self.algorithm,
            "auto": self.auto,
            "accuracy": c.accuracy,
            "backend": self.backend,
            "isa": self.isa or None,
            "device": self.device,
            "threads": self.threads,
            "mode": self.mode,
            "M": c.M,
            "N": c.N,
            "K": c.K,
            **own,
            "group_size": c.layout.group_size,
            "dtype": c.dtype,
            "outliers": c.outliers,
            "bits_per_weight": self.bits_per_weight,
            **_times(self.timing),
            "bytes_moved": self.bytes_moved,
            **rates(self.timing, self.bytes_moved, self.memory),
            "speedup": {b.name: self.speedup(b.name) for b in self.baselines if b.timing},
            "speedup_p10": {b.name: self.speedup(b.name, "p10_us") for b in self.baselines if b.timing},
            "error": self.error,
            "correct": self.correct,
            "message": self.message or None,
            "repro": self.repro,
        }
