"""The residual add around an attention core, by post-dominance in the data flow of a flat graph.

First step of `passes.locate.sites`; `passes.frontends.graph_blocks` asks the same of a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_

from torch.fx import Graph, Node

from dgefx.passes.attention.core import AttentionCore
from dgefx.passes.locate.refusal import Cause
from dgefx.passes.ops import Op, named, op_name
from dgefx.passes.walk import breadth_first

#: leaves every element what it is; a cast to the type that a tensor has returns that tensor, so
#: that what a norm casts (`x.float()`) may be what is added to later
SAME = named(Op.MOVES | Op.CASTS) | {"dropout", "float"}
#: what a stream may go through before it is added to: it stays the stream, scaled
_SCALING = SAME | {"mul", "div"}


@dataclass(frozen=True)
class Residual:
    """stream: what the queries come from, and what is added to in `add`, maybe scaled."""

    stream: Node
    add: Node


class Residuals:
    """Residual adds of a flat graph. Sets of its nodes are the bits of an integer."""

    def __init__(self, graph: Graph) -> None:
        self._bit = {node: 1 << index for index, node in enumerate(graph.nodes)}
        #: what a value is computed from, and itself
        self._made_of: dict[Node, int] = {}
        for node in graph.nodes:
            sources = (self._made_of[source] for source in node.all_input_nodes)
            self._made_of[node] = reduce(or_, sources, self._bit[node])
        #: post-dominators, and itself; of values that the model's output is computed from
        self._passed: dict[Node, int] = {}
        for node in reversed(graph.nodes):
            ways = [self._passed[user] for user in node.users if user in self._passed]
            if ways or node.op == "output":
                self._passed[node] = self._bit[node] | reduce(and_, ways or [0])

    def passed(self, node: Node) -> list[Node]:
        """What every way from a value to the model's output passes, nearest first."""
        met = self._passed.get(node, 0) & ~self._bit[node]
        return [n for n, bit in self._bit.items() if bit & met and n.op != "output"]

    def descends(self, node: Node, ancestor: Node) -> bool:
        """Whether `node` is computed from `ancestor` (or is it)."""
        return bool(self._made_of[node] & self._bit[ancestor])

    def _adds_after(self, core: AttentionCore) -> Iterator[tuple[Node, Node]]:
        """(operand that does not come from the core, add) for every add that its output must pass,
        nearest first."""
        for node in self.passed(core.output):
            sources = node.all_input_nodes
            if op_name(node) != "add" or len(sources) != 2:
                continue
            for stream, other in (sources, sources[::-1]):
                if (
                    stream.op != "get_attr"
                    and stream.meta.get("shape") == node.meta["shape"]
                    and self.descends(other, core.output)
                    and not self.descends(stream, core.output)
                ):
                    yield stream, node

    def _origin(self, core: AttentionCore, stream: Node) -> Node | None:
        """The value that both the queries and the stream are made of: the stream itself, or what
        it is scaled or moved from, or what another branch beside this one was added to."""

        def before(node: Node) -> list[Node]:
            # a sum whose keys come from it is the stream; one that they do not is another branch's
            beside = op_name(node) == "add" and not self.descends(core.key, node)
            if not node.op.startswith("call_") or not (op_name(node) in _SCALING or beside):
                return []
            return [n for n in node.all_input_nodes if n.op != "get_attr"]

        made_of = breadth_first([stream], before)
        return next((node for node in made_of if self.descends(core.query, node)), None)

    def around(self, core: AttentionCore) -> Residual | Cause:
        """The residual add around a core, or the cause why there is none."""
        cause = Cause("no residual add")
        for stream, add in self._adds_after(core):
            origin = self._origin(core, stream)
            if origin is not None:
                others = [
                    label
                    for part, label in ((core.key, "keys"), (core.value, "values"))
                    if not self.descends(part, origin)
                ]
                if not others:
                    return Residual(origin, add)
                # queries are added to what they gave (MViT), or this is cross attention
                cause = Cause("cross attention", (others[0],))
            elif self.descends(core.key, stream):
                cause = Cause("foreign queries")
            elif cause.name != "foreign queries":
                cause = Cause("other shortcut")
        return cause
