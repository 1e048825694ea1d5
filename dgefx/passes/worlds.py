"""Pass 4a, worlds: which nodes of a block run on queries, and which on the dense context.

A block's graph is evaluated in two worlds. Everything its output needs runs in the query world,
until an edge into an attention core's keys or values crosses into the context world, where the
stream is the dense input. What does not depend on the stream is shared. Next: `passes.forms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Graph, Node

from dgefx.passes.cores import Core, find_cores, map_sources
from dgefx.passes.ops import op_name
from dgefx.passes.trace import Trace


class Refused(ValueError):
    """A block that stays dense; the message is the reason shown in the report."""


@dataclass(frozen=True)
class Worlds:
    """query, context: nodes that run in each world (a node may run in both, or in none).

    Tensors that do not come from the stream's data (bias tables, RoPE, masks), even if they are
    made to its size, belong to the context: queries read them through `gather_constant`.
    """

    stream: Node
    output: Node
    core: Core
    edges: frozenset[tuple[Node, int | str]]  # arguments that are read from the context world
    query: frozenset[Node]
    context: frozenset[Node]

    def sources(self, node: Node) -> list[tuple[Node, bool]]:
        """(producer, whether it enters from the context world) for every argument of `node`."""
        found: list[tuple[Node, bool]] = []

        def pick(source: Node, crosses: bool) -> Node:
            found.append((source, crosses or source not in self.query))
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


def find_output(trace: Trace, flow: nx.DiGraph, stream: Node) -> Node:
    """The updated stream among the block's results.

    Raises:
        Refused: no result has the stream's shape, or another result depends on the stream.
    """
    results: list[Node] = next(n for n in trace.graph.nodes if n.op == "output").all_input_nodes
    shape = trace.values[stream].shape
    reached = nx.descendants(flow, stream)
    moving = [n for n in results if n in reached]
    fitting = [n for n in moving if getattr(trace.values[n], "shape", None) == shape]
    if not fitting:
        raise Refused("no result of the block has the shape of its input stream")
    if len(moving) > 1:
        raise Refused("the block returns further results that depend on its input")
    return fitting[0]


def find_worlds(trace: Trace, stream: Node, token_counts: frozenset[int]) -> Worlds:
    """Split the nodes of a traced block.

    Args:
        token_counts: sizes that may stand for a number of tokens, rows or columns. Any other size
            is the same in both worlds and is read where its tensor is computed anyway.

    Raises:
        Refused: not exactly one attention core, or one that does not lead to the output.
    """
    cores = find_cores(trace.graph, trace.root)
    if len(cores) != 1:
        raise Refused(f"{len(cores)} attentions in the traced block; one expected")
    (core,) = cores
    # `q.type_as(v)` asks for a dtype, not for v of the queries
    of_type = {(n, 1) for n in trace.graph.nodes if op_name(n, trace.root) == "type_as"}
    edges: frozenset[tuple[Node, int | str]] = core.context_edges | of_type
    flow = block_flow(trace.graph)
    output = find_output(trace, flow, stream)
    data = _data_dependent(trace, flow, stream)
    sized = nx.descendants(flow, stream)
    query: set[Node] = set()
    context: set[Node] = set()

    deferred: list[Node] = []

    def is_size(node: Node) -> bool:
        return node in sized and not carries_tensor(trace.values.get(node))

    def enter(node: Node, asked: set[Node]) -> None:
        if asked is query and is_size(node):
            value = trace.values[node]
            plain = isinstance(value, (torch.dtype, torch.device)) or (
                isinstance(value, int) and value not in token_counts
            )
            if plain and node not in query:
                deferred.append(node)
                return
        elif asked is query and node not in data:
            asked = context
        front.append((node, asked))

    def visit_sources(node: Node, world: set[Node]) -> None:
        def visit(source: Node, crosses: bool) -> Node:
            enter(source, context if crosses and world is query else world)
            return source

        map_sources(node, edges, visit)

    front = [(output, query)]
    while front or deferred:
        if not front:
            size = deferred.pop()
            tensors = _tensors_behind(trace, flow, size)
            in_context = tensors <= context and size not in query
            front.append((size, context if in_context else query))
        node, world = front.pop()
        if node not in world:
            world.add(node)
            visit_sources(node, world)
    if core.output not in query:
        raise Refused("the attention does not lead to the block's output")
    return Worlds(stream, output, core, edges, frozenset(query), frozenset(context))
