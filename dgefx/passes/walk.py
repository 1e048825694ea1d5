"""Walks over graphs: what can be reached from some nodes. Used by every stage."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch.fx import Node

N = TypeVar("N")


def breadth_first(starts: Iterable[N], following: Callable[[N], Iterable[N]]) -> Iterator[N]:
    """Everything reached from `starts`, themselves first, each once and the nearest first.

    Args:
        following: what a node leads to; asked after the node was yielded, so that a caller that
            has found what it looks for stops the walk.
    """
    waiting = deque(dict.fromkeys(starts))
    seen = set(waiting)
    while waiting:
        node = waiting.popleft()
        yield node
        for other in following(node):
            if other not in seen:
                seen.add(other)
                waiting.append(other)


def behind(*nodes: Node) -> Iterator[Node]:
    """Nodes, and all that they are computed from, nearest first."""
    return breadth_first(nodes, lambda node: node.all_input_nodes)
