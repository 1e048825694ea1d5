"""Pass 4a, sides: which nodes of a block run on queries, and which on the dense context.

A block's graph is evaluated in two sides. Everything its output needs runs in the query side,
until an edge into an attention core's keys or values crosses into the context side, where the
stream is the dense input. What does not depend on the stream is shared. Next:
`passes.sides.find_axes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Graph, Node

from dgefx.passes.attention.core import AttentionCore
from dgefx.passes.attention.registry import find_cores, form_of
from dgefx.passes.errors import Refused
from dgefx.passes.ops import ELEMENTWISE, MOVEMENT, VIEWS, Op, map_sources, named, op_name
from dgefx.passes.sides.token_axes import size_read
from dgefx.passes.trace.block_trace import Trace


@dataclass(frozen=True)
class Sides:
    """query, context: nodes that run in each side (a node may run in both, or in none).

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

    @property
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


def _data_dependent(trace: Trace, flow: nx.DiGraph, stream: Node) -> set[Node]:
    """Nodes that the stream's data reaches: through tensors, not through mere sizes."""
    tensors = [n for n in flow if n.op == "output" or carries_tensor(trace.values.get(n))]
    return set(nx.descendants(flow.subgraph(tensors), stream)) | {stream}


def _tensors_behind(trace: Trace, flow: nx.DiGraph, size: Node) -> set[Node]:
    """The tensors whose shapes a size is computed from."""
    found: set[Node] = set()
    front = [size]
    while front:
        for source in flow.predecessors(front.pop()):
            if carries_tensor(trace.values.get(source)):
                found.add(source)
            else:
                front.append(source)
    return found


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
    """Assigns nodes to sides, backwards from the output."""

    def __init__(
        self,
        trace: Trace,
        stream: Node,
        token_counts: frozenset[int],
        update: bool,
        first_only: bool,
    ) -> None:
        self.trace, self.stream, self.token_counts = trace, stream, token_counts
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
        self.sized = nx.descendants(self.flow, stream)
        self.edges |= self._numbers()
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
        self.deferred: list[Node] = []
        self.front: list[tuple[Node, set[Node]]] = []
        self._dense_tail: set[Node] = set()

    def _numbers(self) -> set[tuple[Node, int | str]]:
        """(node, place) of sizes that tensors are scaled by: they are those of the dense grid,
        whatever the number of queries (a mean written out, a temperature that follows N)."""
        found: set[tuple[Node, int | str]] = set()
        for node in self.trace.graph.nodes:
            if not carries_tensor(self.trace.values.get(node)) or node.op == "call_module":
                continue
            form = form_of(node, self.trace.root)
            scales = () if form is None else form.scales
            found |= {
                (node, place)
                for place, value in [*enumerate(node.args), *node.kwargs.items()]
                if (self._name(node) in ELEMENTWISE or place in scales)
                and isinstance(value, Node)
                and self._is_size(value)
                and isinstance(self.trace.values[value], (int, float))
            }
        return found

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

    def _is_size(self, node: Node) -> bool:
        return node in self.sized and not carries_tensor(self.trace.values.get(node))

    def _enter(self, node: Node, asked: set[Node], of_view: bool) -> None:
        if self._is_size(node):
            if not self._is_plain(node, of_view and asked is self.query):
                self.front.append((node, asked))
            elif node not in self.query and node not in self.context:
                self.deferred.append(node)
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

    def _is_plain(self, node: Node, of_view: bool) -> bool:
        """Whether a size is the same in both sides, or not looked at (that of a view)."""
        value = self.trace.values[node]
        return isinstance(value, (torch.dtype, torch.device)) or (
            isinstance(value, int)
            and (of_view or value not in self.token_counts or self._counts_keys(node))
        )

    def _counts_keys(self, size: Node) -> bool:
        """Whether it is read off attention scores, along the axis of the keys."""
        read = size_read(size, self.trace)
        if read is None:
            return False
        tensor, axis = read
        place = (tensor, axis - self.trace.values[tensor].dim())
        return any(place in core.key_axes for core in self.cores)

    def _settle(self, size: Node) -> None:
        """Read a plain size where its tensors are computed anyway."""
        tensors = _tensors_behind(self.trace, self.flow, size)
        if size in self.query or size in self.context:
            return
        in_query = tensors <= self.query | self.pooled
        if isinstance(self.trace.values[size], int):
            # dtypes and devices are no numbers of tokens: any side's will do
            in_query = in_query and not tensors <= self.context
        self.front.append((size, self.query if in_query else self.context))

    def _visit_sources(self, node: Node, side: set[Node]) -> None:
        # a view's sizes along the token axes are replaced, its other sizes are those of the context
        is_view = node.op != "call_module" and self._name(node) in VIEWS

        def visit(source: Node, crosses: bool) -> Node:
            crosses = crosses and side is self.query
            self._enter(source, self.context if crosses else side, is_view)
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
            self._dense_tail = set()
        # sizes that the block returns are those of the dense grid
        for node in _results(self.trace):
            if self._is_size(node):
                self.front.append((node, self.context))

    def run(self) -> Sides:
        self._start()
        while self.front or self.deferred:
            if not self.front:
                self._settle(self.deferred.pop())
                continue
            node, side = self.front.pop()
            if node not in side:
                side.add(node)
                self._visit_sources(node, side)
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


def find_sides(
    trace: Trace,
    stream: Node,
    token_counts: frozenset[int],
    update: bool = False,
    first_only: bool = False,
) -> Sides:
    """Split the nodes of a traced block.

    Args:
        token_counts: sizes that may stand for a number of tokens, rows or columns. Any other size
            is the same in both sides and is read where its tensor is computed anyway.
        update: whether the block yields an update of the stream, not the stream updated.
        first_only: whether the model reads but the first tensor of its results.

    Raises:
        Refused: no attention core, or one that does not lead to the output.
    """
    return _Walk(trace, stream, token_counts, update, first_only).run()
