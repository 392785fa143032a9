"""What is computed from what: ancestors and descendants of every node of a function, as bit sets.

A set of nodes is an int, bit ``i`` for the node at place ``i`` of the trace. Graphs of ten thousand nodes take some
25 MB, and questions such as "what lies between these two values" become one operation on two numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from ditopt.ir.binding import data_operands
from ditopt.ir.program import Function


class Reach:
    """Dataflow closure of ``function``; operands of which only the type is read do not count."""

    def __init__(self, function: Function) -> None:
        self.nodes = [n for n in function.graph.nodes if n.op != "output"]
        self.place = {n: i for i, n in enumerate(self.nodes)}
        self.reads = [[self.place[a] for a in data_operands(n)] for n in self.nodes]
        self.above = [1 << i for i in range(len(self.nodes))]
        """By place: the node and all that it is computed from."""
        self.below = list(self.above)
        """By place: the node and all that is computed from it."""
        for i, operands in enumerate(self.reads):
            for a in operands:
                self.above[i] |= self.above[a]
        for i in reversed(range(len(self.nodes))):
            for a in self.reads[i]:
                self.below[a] |= self.below[i]

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        """The set of these nodes."""
        out = 0
        for n in nodes:
            out |= 1 << self.place[n]
        return out

    def members(self, bits: int) -> list[fx.Node]:
        """The nodes of a set, in trace order."""
        return [self.nodes[i] for i in places(bits)]

    def between(self, start: fx.Node, end: fx.Node) -> int:
        """Nodes on the paths from ``start`` to ``end``, without ``start``."""
        return self.below[self.place[start]] & self.above[self.place[end]] & ~(1 << self.place[start])

    def convex(self, bits: int) -> int:
        """The set with all nodes that lie on a path from one of its members to another."""
        down = up = 0
        for i in places(bits):
            down |= self.below[i]
            up |= self.above[i]
        return down & up


def places(bits: int) -> list[int]:
    """Positions of the bits that are set, ascending."""
    text = bin(bits)
    last = len(text) - 1
    return [last - k for k in range(last, 1, -1) if text[k] == "1"]
