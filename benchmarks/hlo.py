"""What a compiled program moves, read off its text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Operation(NamedTuple):
    """A line of a program: its name, the type of its result, what it does, with what."""

    name: str
    result: str
    kind: str
    operands: list[str]
    rest: str


LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)(?= [\w-]+\()|\S+) ([\w-]+)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+)(\d+)?\w*\[([\d,]*)\](\{[^}]*\})?")
# A layout's mark of a TPU's memory on the chip, and one that no layout has.
CHIP, NOWHERE = "S(1)", "none"
# Operations that run nothing.
NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def moved(text: str) -> list[int]:
    """Bytes that each operation of a compiled program reads and writes in main memory."""
    found = computations(text)
    types = {operation.name: operation.result for operation in found["ENTRY"]}
    bytes_of = []
    for operation in found["ENTRY"]:
        kind, result = operation.kind, operation.result
        if kind in NOTHING or kind.endswith(("-done", "-update")):
            continue
        if kind in ("copy-start", "slice-start"):
            # What is copied and the copy, which a slice's result has in this order.
            source, copy = (match[0] for match in list(ARRAY.finditer(result))[:2])
            if kind == "copy-start":
                source, copy = copy, source
            bytes_of.append((size(copy, NOWHERE) if size(source) else 0) + size(copy))
            continue
        inner = re.search(r"calls=%?([\w.-]+)", operation.rest)
        inside = found[inner[1]] if kind == "fusion" else []
        # Whichever branch of a conditional is taken, what it reads is not known.
        operands = [] if kind == "conditional" else operation.operands
        read = sum(min(size(types[v]), sliced(inside, i)) for i, v in enumerate(operands))
        bytes_of.append(read + size(result))
    return bytes_of


def sliced(inside: list[Operation], number: int) -> float:
    """Bytes that a fusion takes of an operand, if it takes slices of it and nothing else."""
    names = [
        operation.name
        for operation in inside
        if operation.kind == "parameter" and operation.rest.startswith(f"{number})")
    ]
    users = [operation for operation in inside if set(names) & set(operation.operands)]
    if users and all(user.kind == "slice" for user in users):
        return sum(size(user.result) for user in users)
    return math.inf


def computations(text: str) -> dict[str, list[Operation]]:
    """The operations of each, by its name; the main one's is `ENTRY`."""
    found: dict[str, list[Operation]] = {}
    for line in text.splitlines():
        if line.endswith("{") and "->" in line:
            name = line.split()[0].lstrip("%")
            operations = found.setdefault(name, [])
        elif match := LINE.match(line):
            rest = match[4]
            arguments = rest[: closing(rest)]
            names = re.findall(r"%([\w.-]+)", arguments)
            operations.append(Operation(match[1], match[2], match[3], names, rest))
    return found


def closing(text: str) -> int:
    """Where the parenthesis that was opened before the text is closed."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place
    return len(text)


def size(result: str, but: str = CHIP) -> int:
    """Bytes of a type's arrays, but for those in a memory of their own."""
    total = 0
    for kind, bits, dimensions, layout in ARRAY.findall(result):
        if but not in layout:
            width = 1 if kind == "pred" else int(bits or 0) / 8
            total += width * math.prod(int(d) for d in dimensions.split(",") if d)
    return int(total)
