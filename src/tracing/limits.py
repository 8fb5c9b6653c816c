"""Owns the limits of what a graph may ask of the machine that reads or runs it, in one table.

A graph may come from anyone. What it costs to read is limited by the first six, which `unpack` and
`load_edits` take as an argument; what it makes of Python's own values, which have no size of their
own as tensors have, by the others, before it is made.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What is read of a file.

    Attributes:
        header: bytes of its JSON.
        count: nodes, tensors, files, saves and writes, each.
        depth: containers in containers, in one argument.
        parts: values in one argument.
        text: characters of a name that messages show.
        elements: numbers in a tensor that an edit computes, as far as shapes tell before it runs.
    """

    header: int = 100_000_000
    count: int = 1_000_000
    depth: int = 32
    parts: int = 1_000_000
    text: int = 4_000
    elements: int = 2**31


LIMITS = Limits()

#: Integers that Python computes: those that a tensor can hold, signed or not.
LEAST, MOST = -(2**63), 2**64 - 1
#: Values in a container that an operation makes, characters of a text, tensors that a split gives.
PARTS = 1_000_000
#: Containers in containers in a value.
DEPTH = 100
#: Values in all containers that the operations of one run make.
PARTS_OF_RUN = 32_000_000
#: The power that a matrix is raised to.
POWER = 1_000_000
