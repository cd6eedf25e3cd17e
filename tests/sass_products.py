"""Whether a kernel touches the registers of a warpgroup's product (wgmma) while the tensor cores are at it.

A product runs beside the warps that started it until they wait for its group; touching its registers before that is
undefined. A kernel may wait too late (as in triton-lang/triton#9433), or ptxas may move an access up. Neither nvcc nor
the emulator, which never sees machine code, tells of it. So this walks all paths of what nvdisasm -c prints:

        /*0100*/          HGMMA.64x16x16.F32 R24, R40, gdesc[UR8], R24 ;        # R24..R31 += A, R40..R43, x B, shared
        /*0110*/          HGMMA.64x16x16.F32 R24, R44, gdesc[UR8], R24, gsb0 ;  # last of its group: wgmma.commit_group
        /*0120*/     @!P0 BRA `(.L_x_1) ;
        /*0130*/          WARPGROUP.DEPBAR.LE gsb0, 0x0 ;                       # wgmma.wait_group 0: no group is left
    .L_x_1:
        /*0140*/          STS.64 [R2], R24 ;                                    # wrong: by the branch, nothing waited

Sums in flight must not be read or written, A in flight must not be written; but products of the same sums may follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

PRODUCT = re.compile(r"[HQIB]GMMA\.")
"""Half and bfloat16, 8-bit floats, integers, bits."""
READS_ONLY = re.compile(r"[A-Z]*SETP2?\b|FCHK\b|BAR\b|BRX\b|JMX\b|CALL\b|RET\b|WARPSYNC\b|NANOSLEEP\b")
"""No result in registers, although the first operand that is no predicate can be one. A store's is an address."""
MOST_GROUPS = 16
"""Groups in flight that are told apart; the older ones count as one. A wait leaves 7 at most."""


class Product(NamedTuple):
    """A product in flight: its address; the registers of its sums and of A as bit masks."""

    address: int
    sums: int
    a: int


Group = frozenset[Product]


class State(NamedTuple):
    """Where a path is: its next instruction, groups in flight (the oldest first), products of no group yet, returns."""

    at: int
    groups: tuple[Group, ...] = ()
    left_open: Group = frozenset()
    calls: tuple[int, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """One instruction, `@!P0 name operands`, and the registers that it reads and writes as bit masks."""

    address: int
    guard: str
    name: str
    operands: str
    reads: int = 0
    writes: int = 0

    def __str__(self) -> str:
        return f"{self.address:#06x} {' '.join(f'{self.guard} {self.name} {self.operands}'.split())}"


@dataclass
class Code:
    """A kernel, with the functions that it calls; label -> index of the next instruction."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def registers(first: str, count: int) -> int:
    """R[first], ... as a mask."""
    return ((1 << count) - 1) << int(first)


def widths(name: str) -> tuple[int, ...]:
    """Registers of an instruction's operands, the last number for all that follow; addresses and predicates aside."""
    root, *modifiers = name.split(".")
    if root in ("HMMA", "IMMA"):
        return 4, 4, 2, 4
    if root in ("DADD", "DMUL", "DFMA") or (root == "CS2R" and "32" not in modifiers):
        return (2,)
    if root == "IMAD" and {"WIDE", "HI"} & set(modifiers):
        return 2 if "WIDE" in modifiers else 1, 1, 1, 2
    if root in ("LDSM", "STSM"):
        return ({"4": 4, "2": 2}.get(modifiers[-1], 1),)
    return (4,) if "128" in modifiers else (2,) if "64" in modifiers else (1,)


def accesses(name: str, operands: str) -> tuple[int, int]:
    """Masks of the registers that an instruction, no product, reads and writes."""
    reads = writes = place = 0
    wide, may_write = widths(name), READS_ONLY.match(name) is None
    for operand in re.sub(r"`\(.*?\)|\(\*.*?\*\)", "", operands).split(","):
        if re.fullmatch(r"!?U?P(\d|T)", operand.strip()):
            continue
        used = 0
        for number, pair in re.findall(r"\bR(\d+)(\.64)?", operand):
            used |= registers(number, (2 if pair else 1) if "[" in operand else wide[min(place, len(wide) - 1)])
        if place == 0 and may_write and "[" not in operand:
            writes = used
        else:
            reads |= used
        place += 1
    return reads, writes


def kernels(text: str) -> dict[str, Code]:
    """Symbol -> code, for each kernel of nvdisasm's text that has products."""
    found: dict[str, Code] = {}
    for section in filter(PRODUCT.search, re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]):
        code = found[re.split(r"[,\s]", section, maxsplit=1)[0]] = Code()
        for line in section.splitlines():
            if label := re.match(r"([.$\w]+):$", line):
                code.labels[label[1]] = len(code.instructions)
            elif one := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s)?\s*([A-Z][\w.]*)\s*(.*?)\s*;", line):
                masks = (0, 0) if PRODUCT.match(one[3]) else accesses(one[3], one[4])
                code.instructions.append(Instruction(int(one[1], 16), (one[2] or "").strip(), one[3], one[4], *masks))
    return found


def product(one: Instruction) -> Product:
    """What it uses: a thread has N / 2 of the 64 x N float sums, and 16 bytes of A where A is not in shared memory."""
    shape = re.match(r"\w+\.64x(\d+)x\d+\.(\w+)", one.name)
    used = re.match(r"R(\d+)(?:\.reuse)?, (?:R(\d+)(?:\.reuse)?, )?gdesc", one.operands)
    if shape is None or used is None:
        raise ValueError(f"a product of unknown form: {one}")
    count = int(shape[1]) // (4 if shape[2] == "F16" else 2)
    return Product(one.address, registers(used[1], count), registers(used[2], 4) if used[2] else 0)


def following(code: Code, one: Instruction, state: State) -> Iterator[State]:
    """Where a path goes on after an instruction that is not skipped by its guard."""
    at, groups, left_open, calls = state
    root = one.name.split(".")[0]
    targets = re.findall(r"`\((\S+)\)", one.operands)
    if PRODUCT.match(one.name):
        left_open |= {product(one)}
        if "gsb0" in one.operands:
            groups, left_open = (*groups, left_open), frozenset()
            if len(groups) > MOST_GROUPS:
                groups = (groups[0] | groups[1], *groups[2:])
    elif one.name.startswith("WARPGROUP.DEPBAR"):
        groups = groups[max(0, len(groups) - int(one.operands.split(",")[1], 0)) :]
    elif root in ("BRA", "BRX", "JMP", "JMX"):
        # BRX R6 -0x2600 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*) is by a table; BRA !P3, .. and BRA.DIV UR10, .. may go on
        targets += [label for table in re.findall(r'TARGETS ([^"]+)', one.operands) for label in table.split(",")]
        if not targets:
            raise ValueError(f"a jump to nowhere: {one}")
        yield from (state._replace(at=code.labels[target.strip()]) for target in targets)
        if root in ("BRX", "JMX") or (one.name == root and "," not in one.operands):
            return
    elif root == "CALL":
        if len(calls) > 3 or not targets:
            raise ValueError(f"a call that cannot be followed: {one}")
        yield state._replace(at=code.labels[targets[0]], calls=(*calls, at + 1))
        return
    elif root in ("RET", "EXIT"):
        if root == "RET":
            yield state._replace(at=calls[-1], calls=calls[:-1])
        return
    yield State(at + 1, groups, left_open, calls)


def wrongs(one: Instruction, products: Group) -> Iterator[str]:
    """What an instruction does to products in flight."""
    own = product(one) if PRODUCT.match(one.name) else None
    reads, writes = (own.a, own.sums) if own else (one.reads, one.writes)
    for other in sorted(products):
        sums = 0 if own and own.sums == other.sums else other.sums
        touched = {"writes sums": writes & sums, "reads sums": reads & other.sums, "writes A": writes & other.a}
        for what, mask in touched.items():
            if mask:
                which = ", ".join(f"R{number}" for number in range(mask.bit_length()) if mask >> number & 1)
                yield f"{one}: {what} ({which}) of the product in flight since {other.address:#06x}"


def faults(code: Code) -> list[str]:
    """Every access to registers of a product in flight, on any path, by address."""
    found: set[str] = set()
    seen: set[State] = set()
    paths = [State(0)]
    while paths:
        state = paths.pop()
        if state in seen or state.at >= len(code.instructions):
            continue
        seen.add(state)
        one = code.instructions[state.at]
        if state.groups or state.left_open:
            found.update(wrongs(one, state.left_open.union(*state.groups)))
        paths += following(code, one, state)
        if one.guard:
            paths.append(state._replace(at=state.at + 1))
    return sorted(found, key=lambda fault: (int(fault.split()[0], 16), fault))
