"""Emit, the per-image budget: every image has the same number of queries, on an axis of its own.

Nothing is emitted otherwise than it was written. `passes.emit.packed` is this for the average
budget.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dgefx.passes.emit.builder import GraphBuilder
from dgefx.passes.sides.facts import BlockFacts
from dgefx.passes.sides.token_axes import TokenAxes


class PerImageQueries:
    """What the way the queries of a batch lie decides."""

    def __init__(self, facts: BlockFacts) -> None:
        self.facts = facts

    def check(self, build: GraphBuilder) -> None:
        """Raise `Refused` where a block cannot be written for such queries."""

    def emit(self, build: GraphBuilder, node: fx.Node) -> Any:
        """A node of the query side; None: it is emitted as it was written."""
        return None

    def broadcast(
        self, build: GraphBuilder, original: fx.Node, emitted: Any, held: TokenAxes, rank: int
    ) -> Any:
        """An operand without an entry per token, as a value of `held` and `rank` axes meets it."""
        return emitted
