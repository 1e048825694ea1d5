"""Which nodes of a flat `fx.Graph` are a block: from a residual stream to its last update.

Residual adds around attention are found by `passes.locate.residual`, on a capture of the module in
which every operation is known by the node that made it. The block goes on from there, to the
last value of the stream's shape that uses more of the block's container, or adds an update to the
stream, before another attention reads on. `passes.frontends.block_extraction` makes modules of the
blocks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch.utils._pytree as pytree
from torch import Tensor, fx

from dgefx.outputs import Call
from dgefx.passes.attention.registry import find_cores
from dgefx.passes.capture import Recorder, capture, example_of
from dgefx.passes.locate.refusal import Cause
from dgefx.passes.locate.residual import Residual, Residuals
from dgefx.passes.ops import op_name


@dataclass(frozen=True)
class GraphBlock:
    """A block of a graph, by indices of its nodes in the order they run.

    path: of the container that holds all it uses and whose place it takes, "" if there is none.
    inputs: values that it reads, the stream first. body: its own nodes, `output` among them.
    """

    path: str
    inputs: tuple[int, ...]
    body: tuple[int, ...]
    output: int


@dataclass
class _Observed:
    """One run of a graph module, on its nodes by index.

    graph: the capture. makers: the node that ran when an operation was captured. holders: the nodes
    whose value a captured one is; several where modules hand through what they get. tensors: the
    nodes that give tensors; shapes: of those that give one.
    """

    graph: fx.Graph
    makers: dict[fx.Node, int] = field(default_factory=dict)
    holders: dict[fx.Node, list[int]] = field(default_factory=dict)
    tensors: set[int] = field(default_factory=set)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)


def _observe(module: fx.GraphModule, call: Call) -> _Observed:
    """Run a copy of the graph that tells the value of every node, under any calling convention."""
    recorder = Recorder(module)
    seen = _Observed(recorder.graph)

    def tell(index: int, value: Any) -> None:
        for node in reversed(recorder.graph.nodes):
            if node in seen.makers:
                break
            seen.makers[node] = index
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            seen.tensors.add(index)
        if isinstance(value, Tensor):
            seen.holders.setdefault(recorder.node_of(value), []).append(index)
            seen.shapes[index] = tuple(value.shape)

    graph = copy.deepcopy(module.graph)
    nodes = list(graph.nodes)
    first = next(node for node in nodes if node.op != "placeholder")
    for index, node in enumerate(nodes[:-1]):
        with graph.inserting_before(first if node.op == "placeholder" else node.next):
            graph.call_function(tell, (index, node))
    capture(fx.GraphModule(module, graph).eval(), *call, recorder=recorder)
    return seen


def common_path(names: set[str]) -> str:
    """The innermost module that holds everything named, by its dotted name; "" for the root."""
    owners = [name.split(".")[:-1] for name in sorted(names)]
    shared: list[str] = []
    for parts in zip(*owners, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def holds(path: str, name: str) -> bool:
    """Whether a name lies under a module's, neither being the root's."""
    return bool(path) and name.startswith(f"{path}.")


class _Finder:
    """Finds the blocks of one graph module."""

    def __init__(self, module: fx.GraphModule, call: Call) -> None:
        self.module = module
        self.nodes: list[fx.Node] = list(module.graph.nodes)
        index = {node: i for i, node in enumerate(self.nodes)}
        self.sources = [[index[source] for source in n.all_input_nodes] for n in self.nodes]
        self.readers = [{index[user] for user in n.users} for n in self.nodes]
        #: what uses a module, parameter or buffer, by its name
        self.users: dict[str, set[int]] = {}
        for i in range(len(self.nodes)):
            if name := self._name(i):
                self.users.setdefault(name, set()).update(self.readers[i])
        self.seen = _observe(module, call)
        #: the tensors that depend on the inputs, and the output
        self.flow = nx.DiGraph()
        sink, fed = len(self.nodes) - 1, set[int]()
        for i, node in enumerate(self.nodes):
            given = fed.intersection(self.sources[i])
            if given or node.op == "placeholder":
                fed.add(i)
                if i in self.seen.tensors or i == sink:
                    self.flow.add_node(i)
                    self.flow.add_edges_from((s, i) for s in given if s in self.flow)
        alive = nx.ancestors(self.flow, sink) | {sink}
        backwards = self.flow.subgraph(alive).reverse(copy=False)
        self.following: dict[int, int] = nx.immediate_dominators(backwards, sink)

    def find(self) -> list[GraphBlock]:
        """The graph's blocks, in order, without a node in common."""
        residuals = Residuals(self.seen.graph)
        cores = find_cores(self.seen.graph, example_of)
        starts = [self._start(residuals.around(core)) for core in cores]
        names = {start: self._names(self._body(*start)) for start in starts if start is not None}
        attentions = {self.seen.makers[core.output] for core in cores} & set(self.flow)
        blocks: list[GraphBlock] = []
        taken: set[int] = set()
        for (stream, add), own in names.items():
            others = set().union(*names.values()) - own
            end = self._end(stream, add, own, others, attentions)
            block = self._closed(stream, self._body(stream, end), end)
            if block is not None and not taken & set(block.body):
                blocks.append(block)
                taken |= set(block.body)
        return self._placed(blocks)

    def _start(self, residual: Residual | Cause) -> tuple[int, int] | None:
        """(the stream's last node that leads to its add by itself, the add), if both are nodes of
        this graph, not of a module that it calls."""
        if not isinstance(residual, Residual):
            return None
        add = self.seen.makers[residual.add]
        same = [i for i in self.seen.holders.get(residual.stream, ()) if i in self.flow]
        for stream in reversed(same):
            body = self._body(stream, add)
            read = {source for i in body for source in self.sources[i]}
            if stream in read and not read & set(same) - body - {stream}:
                return None if self.nodes[add].op == "call_module" else (stream, add)
        return None

    def _name(self, index: int) -> str | None:
        """The module, parameter or buffer that a node uses."""
        node = self.nodes[index]
        return str(node.target) if node.op in ("call_module", "get_attr") else None

    def _names(self, body: set[int]) -> set[str]:
        return {name for i in body if (name := self._name(i)) is not None}

    def _body(self, stream: int, output: int) -> set[int]:
        """Nodes from `stream` (without it) to `output`, and the sizes and constants that only they
        read: what others read too, a shared position table, stays where it is."""
        between = nx.ancestors(self.flow, output) & nx.descendants(self.flow, stream)
        body = between | {output}
        waiting = list(body)
        while waiting:
            for source in self.sources[waiting.pop()]:
                if source in body or source in self.flow:
                    continue
                name = self._name(source)
                if (self.users[name] if name else self.readers[source]) <= body:
                    body.add(source)
                    waiting.append(source)
        return body

    def _end(
        self, stream: int, add: int, own: set[str], others: set[str], attentions: set[int]
    ) -> int:
        """The last node of a block, of those that every way from its first add passes.

        Args:
            own: names used up to the add. others: those that other blocks use up to theirs.
            attentions: nodes that attend.
        """
        shapes = self.seen.shapes
        after = nx.descendants(self.flow, stream) | {stream}
        foreign = attentions - nx.ancestors(self.flow, add)
        foreign = foreign.union(*(nx.descendants(self.flow, node) for node in foreign))
        end, names, node = add, own, add
        updates = own  # names used up to the last add, which may be in another layout
        while (node := self.following.get(node, -1)) not in foreign and node in shapes:
            if math.prod(shapes[node]) != math.prod(shapes[stream]):
                break
            used = self._names(self._body(stream, node))
            part, whole = common_path(names), common_path(used)
            added = set(self.flow.predecessors(node))
            if op_name(self.nodes[node], self.module) == "add" and len(added & after) == 2:
                apart = bool(whole) and not any(holds(whole, name) for name in others)
                if part != whole and not apart:
                    break
                updates = used
            elif not all(holds(part, name) for name in used - names - updates):
                continue  # of a post-norm block, its last norm
            if used > names and shapes[node] == shapes[stream]:
                end, names = node, used
        return end

    def _closed(self, stream: int, body: set[int], end: int) -> GraphBlock | None:
        """The block of a body, if it hands out nothing but its end."""
        read = {source for i in body for source in self.sources[i]} - body
        if stream not in read or any(not self.readers[i] <= body for i in body - {end}):
            return None
        inputs = (stream, *sorted(read - {stream}))
        return GraphBlock(common_path(self._names(body)), inputs, tuple(sorted(body)), end)

    def _placed(self, blocks: list[GraphBlock]) -> list[GraphBlock]:
        """Blocks that share a container, or whose container is called itself, get none."""
        called = {str(n.target) for n in self.nodes if n.op == "call_module"}
        placed = []
        for block in blocks:
            path = block.path
            rivals = {other.path for other in blocks if other is not block} | called
            shared = any(
                path == rival or (holds(path, rival) and rival not in called) or holds(rival, path)
                for rival in rivals
            )
            placed.append(replace(block, path="") if shared else block)
        return placed


def find_graph_blocks(module: fx.GraphModule, call: Call) -> list[GraphBlock]:
    """The blocks of a graph module.

    Args:
        module: in eval mode; not changed. call: example arguments.
    """
    return _Finder(module, call).find()
