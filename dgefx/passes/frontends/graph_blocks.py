"""Which nodes of a flat `fx.Graph` are a block: from a residual stream to its last update.

The cores and residual adds are those of `passes.locate.sites`, found on a capture of the graph
module whose operations are known by the node that made them. A block begins at its core's stream
and ends at the last residual add (the MLP's) before another core reads on; what is computed from
the stream in between is its body. `passes.frontends.block_extraction` makes modules of what is
found here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import networkx as nx
from torch import fx

from dgefx.outputs import Call
from dgefx.passes.attention.core import AttentionCore
from dgefx.passes.attention.registry import find_cores
from dgefx.passes.capture import example_of
from dgefx.passes.frontends.node_values import watch
from dgefx.passes.locate.sites import Residual, _Residuals
from dgefx.passes.ops import MOVEMENT, op_name


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


@dataclass(frozen=True)
class _Start:
    """A core's residual, and the nodes of the graph that are its stream and its add."""

    residual: Residual
    stream: int
    add: int


class _Finder:
    """Finds the blocks of one graph module."""

    def __init__(self, module: fx.GraphModule, call: Call) -> None:
        self.nodes: list[fx.Node] = list(module.graph.nodes)
        index = {node: i for i, node in enumerate(self.nodes)}
        self.flow = nx.DiGraph()
        self.flow.add_nodes_from(range(len(self.nodes)))
        self.flow.add_edges_from(
            (index[source], i) for i, n in enumerate(self.nodes) for source in n.all_input_nodes
        )
        inputs = [i for i, n in enumerate(self.nodes) if n.op == "placeholder"]
        fed = set(inputs).union(*(nx.descendants(self.flow, i) for i in inputs))
        #: what depends on parameters and constants alone
        self.constant = set(range(len(self.nodes))) - fed
        self.watched = watch(module, call)
        self.residuals = _Residuals(self.watched.capture.graph)
        self.cores = find_cores(self.watched.capture.graph, example_of)

    def find(self) -> list[GraphBlock]:
        """The graph's blocks, in order, without a node in common."""
        found: dict[AttentionCore, _Start] = {}
        for core in self.cores:
            residual = self.residuals.around(core)
            if isinstance(residual, Residual) and self._at_root(residual.add):
                add = self._first(residual.add)
                stream = None if add is None else self._stream(residual.stream, add)
                if add is not None and stream is not None:
                    found[core] = _Start(residual, stream, add)
        regions: list[GraphBlock] = []
        taken: set[int] = set()
        own = {core: self._names(self._body(s.stream, s.add)) for core, s in found.items()}
        for core, start in found.items():
            others = set().union(*own.values()) - own[core]
            region = self._region(start, own[core], others)
            if region is not None and not taken & set(region.body):
                regions.append(region)
                taken |= set(region.body)
        return self._placed(regions)

    def _at_root(self, node: fx.Node) -> bool:
        """Whether an operation is a node of this graph, not of a module that it calls."""
        return len(node.meta["stack"]) == 1

    def _first(self, node: fx.Node) -> int | None:
        """The first node of the graph that has a captured value."""
        return min(self.watched.value_of.get(node, ()), default=None)

    def _stream(self, node: fx.Node, add: int) -> int | None:
        """The last one with the value of a stream that leads to `add` by itself."""
        same = self.watched.value_of.get(node, [])
        for index in reversed(same):
            body = self._body(index, add)
            read = {source for i in body for source in self.flow.predecessors(i)}
            if index in read and not read & set(same) - body - {index}:
                return index
        return None

    def _name(self, index: int) -> str | None:
        """The module, parameter or buffer that a node uses."""
        node = self.nodes[index]
        return str(node.target) if node.op in ("call_module", "get_attr") else None

    def _names(self, body: set[int]) -> set[str]:
        return {name for i in body if (name := self._name(i)) is not None}

    # -- extent ------------------------------------------------------------------------------

    def _body(self, stream: int, output: int) -> set[int]:
        """Nodes from `stream` (without it) to `output`, and constants that only they read."""
        after = nx.descendants(self.flow, stream)
        body = (nx.ancestors(self.flow, output) & after) | {output}
        outside = {i for i in range(len(self.nodes)) if i not in body}
        front = list(body)
        while front:
            for source in self.flow.predecessors(front.pop()):
                if source in body or source not in self.constant:
                    continue
                # what others read too, a shared position table, stays where it is
                name = self._name(source)
                alone = set(self.flow.successors(source)) <= body
                if alone and not any(name and self._name(i) == name for i in outside - {source}):
                    body.add(source)
                    outside.discard(source)
                    front.append(source)
        return body

    def _ends(self, residual: Residual) -> Iterator[fx.Node]:
        """What every way from the residual add passes, until another core joins in."""
        digraph = self.residuals.digraph
        before = nx.ancestors(digraph, residual.add)
        foreign = {c.output for c in self.cores} - before
        foreign = foreign.union(*(nx.descendants(digraph, node) for node in foreign))
        node: object = self.residuals.post.get(residual.add)
        while isinstance(node, fx.Node) and node not in foreign:
            yield node
            following = self.residuals.post.get(node)
            if following is node:
                return
            node = following

    def _region(self, start: _Start, own: set[str], others: set[str]) -> GraphBlock | None:
        """The block around a core.

        Args:
            own: names used up to the residual add. others: those that other cores' blocks use.
        """
        residual, stream, end = start.residual, start.stream, start.add
        shape = residual.stream.meta["shape"]
        after = nx.descendants(self.residuals.digraph, residual.stream) | {residual.stream}
        names, away = own, False  # away: the last update was added in another layout
        for node in self._ends(residual):
            place = self._first(node)
            if math.prod(node.meta.get("shape", (0,))) != math.prod(shape):
                break
            if place is None:
                continue
            sources = node.all_input_nodes
            updates = op_name(node) == "add" and len(sources) == 2 and set(sources) <= after
            used = self._names(self._body(stream, place))
            if updates and not _together(own, used, others):
                break
            in_place = node.meta["shape"] == shape
            back = away and op_name(node) in MOVEMENT
            # of a post-norm block, its last norm
            part = common_path(names)
            follows = used > names and all(holds(part, name) for name in used - names)
            if updates:
                names, away = used, not in_place
            if in_place and (updates or back or follows):
                end, names, away = place, used, False
        return self._closed(stream, self._body(stream, end), end)

    def _closed(self, stream: int, body: set[int], end: int) -> GraphBlock | None:
        """The region of a body, if it hands out nothing but its end.

        Sizes of the stream that others read as well are computed outside and come in as inputs.
        """
        body = body - self._shared_sizes(body)
        if any(not set(self.flow.successors(i)) <= body for i in body - {end}):
            return None
        read = {source for i in body for source in self.flow.predecessors(i)} - body
        if stream not in read:
            return None
        inputs = (stream, *sorted(read - {stream}))
        return GraphBlock(common_path(self._names(body)), inputs, tuple(sorted(body)), end)

    def _shared_sizes(self, body: set[int]) -> set[int]:
        """Nodes of a body that compute sizes of the stream which are read outside too."""
        sizes: set[int] = set()
        for i in sorted(body):
            if i not in self.watched.tensors and set(self.flow.predecessors(i)) <= sizes | (
                set(self.flow) - body
            ):
                sizes.add(i)
        shared = {i for i in sizes if not set(self.flow.successors(i)) <= body}
        return shared.union(*(nx.ancestors(self.flow, i) & sizes for i in shared))

    def _placed(self, regions: list[GraphBlock]) -> list[GraphBlock]:
        """Regions that share a container, or whose container is called itself, get none."""
        called = {str(n.target) for n in self.nodes if n.op == "call_module"}
        placed = []
        for region in regions:
            path = region.path
            rivals = {other.path for other in regions if other is not region} | called
            shared = any(
                path == rival or (holds(path, rival) and rival not in called) or holds(rival, path)
                for rival in rivals
            )
            placed.append(replace(region, path="") if shared else region)
        return placed


def _together(own: set[str], used: set[str], others: set[str]) -> bool:
    """Whether what a block would use lies together, apart from what other blocks use."""
    part, whole = common_path(own), common_path(used)
    return part == whole or (bool(whole) and not any(holds(whole, name) for name in others))


def find_graph_blocks(module: fx.GraphModule, call: Call) -> list[GraphBlock]:
    """The blocks of a graph module.

    Args:
        module: in eval mode; not changed. call: example arguments.
    """
    return _Finder(module, call).find()
