"""Sides: which nodes of a block run on queries, and which on the dense context.

A block's graph is evaluated in two sides. Everything its output needs runs in the query side,
until an edge into an attention core's keys or values crosses into the context side, where the
stream is the dense input. What does not depend on the stream is shared. Sizes belong to neither
side: they are those of the dense grid. Next: `passes.sides.find_axes`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Graph, Node

from dgefx.passes.attention.core import AttentionCore
from dgefx.passes.attention.registry import find_cores
from dgefx.passes.errors import Refused
from dgefx.passes.ops import MOVEMENT, Op, map_sources, named, op_name
from dgefx.passes.trace.block_trace import Trace


@dataclass(frozen=True)
class Sides:
    """query, context: tensors that are computed in each side (one may be in both, or in none).

    Tensors that do not come from the stream's data (bias tables, RoPE, masks), even if they are
    made to its size, belong to the context: queries read them through `gather_constant`.

    The main path is what every way from the stream to the output passes. Where the context needs
    a value of it that attention has changed already (keys of a second attention, a norm or a
    convolution on the main path itself), that value is un-pooled from the query side
    (`materialised`). Where the query side goes on from it, it is pooled again (`pooled`).
    """

    stream: Node
    output: Node
    cores: tuple[AttentionCore, ...]
    edges: frozenset[tuple[Node, int | str]]  # arguments that are read from the context side
    query_side: frozenset[Node]
    context_side: frozenset[Node]
    materialised: frozenset[Node]
    pooled: frozenset[Node]
    main: frozenset[Node]  # context nodes on the way to a pooled one
    unread: frozenset[Node]  # results beside the output that the model does not read

    @functools.cached_property
    def on_queries(self) -> frozenset[Node]:
        """Nodes that have a value in the query side."""
        return self.query_side | self.pooled

    @property
    def output_is_dense(self) -> bool:
        """Whether the output is a value of the context."""
        return self.output not in self.query_side

    def core_at(self, node: Node) -> AttentionCore | None:
        """The core whose result `node` is."""
        return next((core for core in self.cores if core.output is node), None)

    def tables_of(self, node: Node) -> list[tuple[int | str, Node]]:
        """(position or keyword, tensor) of arguments that do not come from the stream's data."""
        places: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
        return [
            (place, source)
            for place, source in places
            if isinstance(source, Node)
            and source not in self.on_queries
            and source in self.context_side
            and (node, place) not in self.edges
        ]

    def sources(self, node: Node) -> list[tuple[Node, bool]]:
        """(producer, whether it enters from the context side) for every argument of `node`."""
        found: list[tuple[Node, bool]] = []

        def pick(source: Node, crosses: bool) -> Node:
            found.append((source, crosses or source not in self.on_queries))
            return source

        map_sources(node, self.edges, pick)
        return found


def block_flow(graph: Graph) -> nx.DiGraph:
    """Data flow between the nodes of a block's graph."""
    digraph = nx.DiGraph()
    digraph.add_nodes_from(graph.nodes)
    digraph.add_edges_from((s, n) for n in graph.nodes for s in n.all_input_nodes)
    return digraph


def carries_tensor(value: Any) -> bool:
    """Whether a traced value is a tensor or holds one."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def is_size(trace: Trace, node: Node) -> bool:
    """Whether a node's value is computed and no tensor: a size, a type, a number made of them."""
    return node.op.startswith("call_") and not carries_tensor(trace.values.get(node))


def _data_dependent(trace: Trace, flow: nx.DiGraph, stream: Node) -> set[Node]:
    """Nodes that the stream's data reaches: through tensors, not through mere sizes."""
    tensors = [n for n in flow if n.op == "output" or carries_tensor(trace.values.get(n))]
    return set(nx.descendants(flow.subgraph(tensors), stream)) | {stream}


def _results(trace: Trace) -> list[Node]:
    """The different values that a block returns, in order."""
    return next(n for n in trace.graph.nodes if n.op == "output").all_input_nodes


def find_output(trace: Trace, flow: nx.DiGraph, stream: Node, first_only: bool = False) -> Node:
    """The updated stream among the block's results.

    Args:
        first_only: whether only the first tensor of the results is read.

    Raises:
        Refused: no result has the stream's shape, or another one, that is read, depends on it.
    """
    results = _results(trace)
    shape = trace.values[stream].shape
    reached = nx.descendants(flow, stream)
    moving = [n for n in results if n in reached and carries_tensor(trace.values.get(n))]
    fitting = [n for n in moving if getattr(trace.values[n], "shape", None) == shape]
    if not fitting:
        raise Refused("no result of the block has the shape of its input stream", "no block module")
    first = next(n for n in results if carries_tensor(trace.values.get(n)))
    if len(moving) > 1 and not (first_only and first is fitting[0]):
        raise Refused(
            "the block returns further results that depend on its input", "further results"
        )
    return fitting[0]


#: operations that leave a main path what it is
KEEPS_STREAM = named(Op.MOVES | Op.CASTS) | {"add", "cat", "dropout"}


def main_path(trace: Trace, flow: nx.DiGraph, stream: Node, output: Node) -> list[Node]:
    """What every way of the stream's data to the output passes, from the stream on."""
    data = _data_dependent(trace, flow, stream)
    within = flow.subgraph(data)
    if output is stream:
        return [stream]
    before = nx.immediate_dominators(within, stream)
    path = [output]
    while path[-1] is not stream:
        path.append(before[path[-1]])
    return path[::-1]


class _Walk:
    """Assigns tensors to sides, backwards from the output."""

    def __init__(self, trace: Trace, stream: Node, update: bool, first_only: bool) -> None:
        self.trace, self.stream = trace, stream
        self.cores = tuple(find_cores(trace.graph, trace.values.get, trace.root))
        if not self.cores:
            raise Refused("no attention in the traced block", "other")
        # `q.type_as(v)` asks for a dtype, not for v of the queries
        of_type = {(n, 1) for n in trace.graph.nodes if op_name(n, trace.root) == "type_as"}
        self.edges: frozenset[tuple[Node, int | str]] = frozenset(of_type).union(
            *(core.context_edges for core in self.cores)
        )
        self.flow = block_flow(trace.graph)
        self.output = find_output(trace, self.flow, stream, first_only)
        self.data = _data_dependent(trace, self.flow, stream)
        # an update has no main path: attention is on every way to it
        path = [stream] if update else main_path(trace, self.flow, stream, self.output)
        self.path = path
        outputs = [core.output for core in self.cores]
        self.attended = set(outputs).union(*(nx.descendants(self.flow, n) for n in outputs))
        self.query: set[Node] = set()
        self.context: set[Node] = set()
        self.materialised: set[Node] = set()
        self.pooled: set[Node] = set()
        self.measured: set[Node] = set()  # tensors whose sizes are read
        self.front: list[tuple[Node, set[Node]]] = []
        self._dense_tail: set[Node] = set()

    def _name(self, node: Node) -> str:
        return op_name(node, self.trace.root)

    def _replaces_stream(self, node: Node) -> bool:
        """Whether a node of the main path is more than an update of the stream."""
        return (
            node in self.path[1:]
            and node.op.startswith("call_")
            and self._name(node) not in KEEPS_STREAM
            and isinstance(self.trace.values.get(node), Tensor)
            and not any(core.output is node for core in self.cores)
        )

    def _enter(self, node: Node, asked: set[Node]) -> None:
        if is_size(self.trace, node):
            self._measure(node)
            return
        if asked is self.query:
            if node not in self.data:
                asked = self.context
            elif self._replaces_stream(node):
                self.pooled.add(node)
                asked = self.context
        elif (
            node in self.path
            and node in self.attended
            and node not in self._dense_tail
            and not self._replaces_stream(node)
        ):
            self.materialised.add(node)
            asked = self.query
        self.front.append((node, asked))

    def _measure(self, size: Node) -> None:
        """Note the tensors that a size, or a type, is computed from."""
        for source in size.all_input_nodes:
            if is_size(self.trace, source):
                self._measure(source)
            else:
                self.measured.add(source)

    def _visit_sources(self, node: Node, side: set[Node]) -> None:
        def visit(source: Node, crosses: bool) -> Node:
            self._enter(source, self.context if crosses and side is self.query else side)
            return source

        map_sources(node, self.edges, visit)

    def _start(self) -> None:
        """From the output; movement after the last operation on the main path stays dense."""
        node = self.output
        for earlier in reversed(self.path[:-1]):
            if node.op.startswith("call_") and self._name(node) in MOVEMENT:
                node = earlier
        if self._replaces_stream(node):
            self.front.append((self.output, self.context))
            self._dense_tail = set(self.path[self.path.index(node) :])
        else:
            self.front.append((self.output, self.query))
        for node in _results(self.trace):
            if is_size(self.trace, node):
                self._measure(node)

    def run(self) -> Sides:
        self._start()
        while self.front or self.measured:
            if self.front:
                node, side = self.front.pop()
                if node not in side:
                    side.add(node)
                    self._visit_sources(node, side)
                continue
            # what is computed in no side is computed for its size
            node = self.measured.pop()
            if node not in self.query | self.context | self.pooled:
                self._enter(node, self.context)
        for core in self.cores:
            if core.output not in self.query:
                raise Refused("an attention of the block does not lead to its output", "other")
        return Sides(
            self.stream,
            self.output,
            self.cores,
            self.edges,
            frozenset(self.query),
            frozenset(self.context),
            frozenset(self.materialised),
            frozenset(self.pooled),
            self._main(),
            frozenset(n for n in _results(self.trace) if n in self.data and n is not self.output),
        )

    def _main(self) -> frozenset[Node]:
        starts = self.materialised | {self.stream}
        within = self.flow.subgraph(self.context | starts)
        after = set().union(*(nx.descendants(within, n) for n in starts))
        before = set(self.pooled).union(*(nx.ancestors(within, n) for n in self.pooled))
        return frozenset(after & before & self.context)


def find_sides(trace: Trace, stream: Node, update: bool = False, first_only: bool = False) -> Sides:
    """Split the tensors of a traced block.

    Args:
        update: whether the block yields an update of the stream, not the stream updated.
        first_only: whether the model reads but the first tensor of its results.

    Raises:
        Refused: no attention core, or one that does not lead to the output.
    """
    return _Walk(trace, stream, update, first_only).run()
