"""How a problem is cut into programs: candidates, a model of what they cost, and the one that is taken.

Without tuning the candidate that the model calls cheapest is taken; tuning times the cheapest few and keeps the fastest
(`tuned.py`). The model counts issue slots and bytes; its constants are from the kernels' compiled code and from data
sheets. Nothing here was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

WORD = 32
"""Weights of a code word of BCQ."""
MAX_PARTS = 64
"""Most parts of y in a workspace: it is M * N * 4 bytes a part."""
SLOTS = {"lut_gemm": 5.0, "biqgemm": 5.0, "codegemm": 7.0}
"""Issue slots of a look-up, counted in code for sm_90: shift, mask, lane, shuffle, addition; or address, load, ..."""
TABLE_SLOTS = 7.0
"""Issue slots of a table entry, and of loading, moving and converting its x."""
SHARED_SLOTS = 3.0
"""Those of `SLOTS` that tokens of one program share: they are of the code, not of the table."""
DECODE_SLOTS = 4.0
"""Issue slots of a plane of a decoded weight."""
CLOCK_GHZ = 1.7
LANES = 128
"""Lanes that a multiprocessor issues in a clock."""
GB_PER_S = 20.0
"""Memory bandwidth for each multiprocessor (A100 19, H100 25, H200 36)."""
DOT_PER_CLOCK = {2: 1024, 4: 128}
"""Multiply-adds of a multiprocessor in a clock, by the bytes of x: mma.sync, and fp32 without TF32."""
WARPS_TO_HIDE = 12
"""Warps on a multiprocessor from which on latencies are hidden."""
LAUNCH_US = 2.0
TOKEN_CLASSES = (1, 2, 4, 8, 16, 64, 512)
"""The largest M of each class."""
MAX_ELEMENTS = 1 << 20
"""Triton's limit of a tensor in a kernel."""


class Device(NamedTuple):
    """What a choice depends on."""

    processors: int = 132
    warp: int = 32
    shared: int = 99 << 10
    """bytes of shared memory that a program may have"""
    interpreted: bool = False


class Task(NamedTuple):
    """A problem as the kernels see it. A unit is a word of 32 weights (BCQ) or a vector (codebooks)."""

    algorithm: str
    M: int
    N: int
    K: int
    planes: int
    unit: int
    """weights of a unit"""
    group_units: int
    x_bytes: int
    entries: int = 16
    """of a codebook"""

    @property
    def units(self) -> int:
        return -(-self.K // self.unit)


class Config(NamedTuple):
    """Sizes of a program; one that an algorithm does not have is 1."""

    block_m: int
    block_n: int
    chunk: int
    """units of a chunk; of a whole step in `dequant_gemm`"""
    chunks: int
    splits: int
    """parts of K, one program each; in `biqgemm` parts of the rows"""
    num_warps: int
    num_stages: int


def power_of_two(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(0, n - 1).bit_length()


def token_class(m: int) -> int:
    """The M that stands for m where nearly equal ones are treated alike: it is what tuning measures."""
    return next((most for most in TOKEN_CLASSES if m <= most), power_of_two(m))


def bcq_task(algorithm: str, m: int, n: int, k: int, bits: int, group_size: int, x_bytes: int) -> Task:
    """`bcq_linear` of x `[m, k]`, an element of which has x_bytes, and W `[n, k]`."""
    return Task(algorithm, m, n, k, bits, WORD, -(-min(group_size, k) // WORD), x_bytes)


def codebook_task(
    algorithm: str, m: int, n: int, k: int, codebooks: tuple[int, int, int], group_size: int, x_bytes: int
) -> Task:
    """`codebook_linear`, as `bcq_task`. codebooks: how many, entries of each, and vec_len, the shape of the tensor."""
    books, entries, vec_len = codebooks
    return Task(algorithm, m, n, k, books, vec_len, -(-min(group_size, k) // vec_len), x_bytes, entries)


def num_steps(task: Task, config: Config) -> int:
    """Steps that K takes."""
    if task.algorithm == "dequant_gemm":
        return -(-task.units // config.chunk)
    groups, last = divmod(task.units, task.group_units)
    per_group = -(-task.group_units // config.chunk)
    return -(-(groups * per_group + -(-last // config.chunk)) // config.chunks)


def split_evenly(steps: int, splits: int) -> tuple[int, int]:
    """(parts, steps of each) of at most `splits` parts, none of them empty."""
    each = -(-steps // max(1, min(splits, steps)))
    return -(-steps // each), each


def _splits(task: Task, config: Config, device: Device) -> list[int]:
    """Parts worth considering: none, and what gives each multiprocessor one, two or four programs."""
    programs = -(-task.N // config.block_n) * -(-task.M // config.block_m)
    if task.algorithm == "biqgemm":
        limit, programs = -(-task.N // config.block_n), num_steps(task, config) * -(-task.M // config.block_m)
    else:
        limit = min(MAX_PARTS, num_steps(task, config))
    wanted = [1, *(-(-times * device.processors // programs) for times in (1, 2, 4))]
    return sorted({split_evenly(limit, min(limit, parts))[0] for parts in wanted})


def blocks(task: Task, device: Device) -> Iterator[Config]:
    """Candidates before K (in `biqgemm` the rows) is cut into parts."""
    rows = [n for n in (32, 64, 128, 256) if n <= max(32, power_of_two(task.N))]
    longest = power_of_two(task.group_units)
    if task.algorithm == "dequant_gemm":
        tokens = [m for m in (16, 32, 64, 128) if m <= max(16, power_of_two(task.M))]
        for m, n, k in product(tokens[-2:], (64, 128), (64, 32) if task.x_bytes == 2 else (32,)):
            once, each = n * k * task.x_bytes, m * k * task.x_bytes + n * k // task.unit * task.planes * 4
            stages = _stages(once, each, device.shared)
            yield Config(m, n, max(1, k // task.unit), 1, 1, 4 if m * n <= 8192 else 8, stages)
        return
    tokens = [m for m in (1, 2, 4) if m <= power_of_two(task.M)]
    for m, n, warps in product(tokens, rows, (4, 8)):
        if task.algorithm == "codegemm":
            yield Config(m, n, min(16, longest), max(1, 4 // m), 1, warps, 1)
        elif n <= 128 // m:
            chunks = warps * device.warp // 16
            for chunk in sorted({min(4, longest, max(1, words // m)) for words in (4, 8)}):
                each = task.planes * chunks * n * (4 * chunk + 4)
                yield Config(m, n, chunk, chunks, 1, warps, _stages(0, each, device.shared // 2))


def _stages(once: int, each: int, shared: int) -> int:
    """The most stages of a loop, 3 at most, whose buffers fit: a loop of s stages has s - 1 of `each` bytes."""
    return next((stages for stages in (3, 2) if once + (stages - 1) * each <= shared), 1)


def _interpreted(task: Task) -> Config:
    """Few large programs: the interpreter's time is one of operations, not of elements."""
    n = min(512, max(16, power_of_two(task.N)))
    if task.algorithm == "dequant_gemm":
        return Config(min(128, max(16, power_of_two(task.M))), n, max(1, 128 // task.unit), 1, 2, 4, 1)
    chunk = min(4, power_of_two(task.group_units))
    chunks = min(16, power_of_two(-(-task.units // chunk)))
    m = power_of_two(task.M)
    while m * n * chunk * chunks * 8 > MAX_ELEMENTS // 2:
        m, n = (m // 2, n) if m > 16 else (m, n // 2)
    return Config(m, n, chunk, chunks, 2, 4, 1)


def candidates(task: Task, device: Device) -> list[Config]:
    """Configurations worth timing, the cheapest by the model first."""
    if device.interpreted:
        return [_interpreted(task)]
    found = [
        config._replace(splits=splits) for config in blocks(task, device) for splits in _splits(task, config, device)
    ]
    return sorted(found, key=lambda config: estimate_us(task, config, device))


def _work(task: Task, config: Config) -> tuple[int, float]:
    """Programs, and issue slots of all of them together."""
    m_blocks, n_blocks = -(-task.M // config.block_m), -(-task.N // config.block_n)
    steps = num_steps(task, config)
    units = steps * config.chunk * config.chunks
    tokens, rows = m_blocks * config.block_m, n_blocks * config.block_n
    if task.algorithm == "dequant_gemm":
        decode = m_blocks * rows * units * task.unit * (task.planes * DECODE_SLOTS + 2)
        return m_blocks * n_blocks * config.splits, decode + tokens * rows * task.K * LANES / DOT_PER_CLOCK[
            task.x_bytes
        ]
    per_unit = 8 if task.algorithm != "codegemm" else 1
    own = SLOTS[task.algorithm] - SHARED_SLOTS
    look_ups = units * per_unit * task.planes * rows * (tokens * own + m_blocks * SHARED_SLOTS)
    if task.algorithm == "codegemm":
        return m_blocks * n_blocks * config.splits, look_ups + task.M * units * task.planes * task.entries * task.unit
    tables = tokens * units * 8 * 16 * TABLE_SLOTS
    if task.algorithm == "biqgemm":
        return m_blocks * steps * config.splits, look_ups + tables * config.splits
    return m_blocks * n_blocks * config.splits, look_ups + tables * n_blocks


def estimate_us(task: Task, config: Config, device: Device) -> float:
    """The model's time: the longer of issuing and of reading, and what the parts of y cost."""
    programs, slots = _work(task, config)
    waves = -(-programs // device.processors)
    warps = min(waves, 8) * config.num_warps
    issue = slots / programs * waves / LANES / CLOCK_GHZ / 1e3 * max(1.0, WARPS_TO_HIDE / warps)
    bits = 32 * task.planes if task.unit == 32 and task.entries == 16 else 8 * task.planes
    read = task.N * task.units * bits / 8 + task.M * task.K * task.x_bytes
    busy = min(1.0, programs / device.processors)
    memory = read / (GB_PER_S * device.processors * 1e3) / busy
    parts = num_steps(task, config) if task.algorithm == "biqgemm" else config.splits
    if parts == 1:
        return max(issue, memory) + LAUNCH_US
    partial = 2 * 4 * task.M * task.N * parts / (GB_PER_S * device.processors * 1e3)
    return max(issue, memory) + partial + 2 * LAUNCH_US
