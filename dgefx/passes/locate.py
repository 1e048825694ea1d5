"""Pass 2, locate: attention cores that ride on a residual stream, and the modules that own them.

Works on the flat capture as a networkx graph. A core converts when its keys, values and queries
all come from one stream x, when the path from the core to the output must pass an add whose other
operand is x (a post-dominator of the core), and when one module holds x on its input and that add
on its way to its output. Everything else is reported with the reason. Next: `passes.trace`.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from torch.fx import Graph, Node

from dgefx.passes.capture import Capture
from dgefx.passes.cores import Core, find_cores
from dgefx.passes.grid import GridFinder, Layout
from dgefx.passes.ops import MOVEMENT, op_name

_SINK = "sink"


@dataclass
class Site:
    """One attention core of the model.

    name: the owning block (or, when refused, the innermost module). reason: why it stays dense.
    """

    name: str
    core: Core
    stream: Node | None = None
    layout: Layout | None = None
    reason: str | None = None


def flow(graph: Graph) -> nx.DiGraph:
    """The data flow of a flat graph; every result of the model leads to one sink."""
    digraph = nx.DiGraph()
    digraph.add_node(_SINK)
    for node in graph.nodes:
        if node.op == "output":
            digraph.add_edges_from((source, _SINK) for source in node.all_input_nodes)
            continue
        digraph.add_node(node)
        digraph.add_edges_from((source, node) for source in node.all_input_nodes)
    return digraph


class _Residuals:
    """Residual adds of a flow graph, by post-dominance."""

    def __init__(self, graph: Graph) -> None:
        self.digraph = flow(graph)
        order = {node: index for index, node in enumerate(graph.nodes)}
        self.order = order
        alive = nx.ancestors(self.digraph, _SINK) | {_SINK}
        self.alive = alive
        self.post = nx.immediate_dominators(self.digraph.subgraph(alive).reverse(copy=False), _SINK)

    def descends(self, node: Node, ancestor: Node) -> bool:
        """Whether `node` is computed from `ancestor` (or is it)."""
        seen: set[Node] = set()
        front = [node]
        while front:
            current = front.pop()
            if current is ancestor:
                return True
            if current in seen or self.order[current] < self.order[ancestor]:
                continue
            seen.add(current)
            front.extend(current.all_input_nodes)
        return False

    def add_after(self, core: Core) -> tuple[Node, Node] | None:
        """(stream, add): the first add every path from the core must pass, joining the stream
        the queries came from."""
        if core.output not in self.alive:
            return None
        node = self.post.get(core.output)
        while isinstance(node, Node):
            if op_name(node) == "add" and len(node.all_input_nodes) == 2:
                for stream in node.all_input_nodes:
                    other = next(n for n in node.all_input_nodes if n is not stream)
                    if (
                        stream.meta["shape"] == node.meta["shape"]
                        and self.descends(core.query, stream)
                        and self.descends(other, core.output)
                        and not self.descends(stream, core.output)
                    ):
                        return stream, node
            following = self.post.get(node)
            if following is node:
                break
            node = following
        return None


def _inside(node: Node, module: str) -> bool:
    return module in node.meta.get("stack", ())


def _boundary(graph: Graph, module: str) -> tuple[set[Node], set[Node]]:
    """(values that enter `module`, values that leave it)."""
    entering: set[Node] = set()
    leaving: set[Node] = set()
    for node in graph.nodes:
        if node.op == "output":
            leaving |= {n for n in node.all_input_nodes if _inside(n, module)}
            continue
        inside = node.op.startswith("call_") and _inside(node, module)
        for source in node.all_input_nodes:
            source_inside = source.op.startswith("call_") and _inside(source, module)
            if inside and not source_inside:
                entering.add(source)
            if source_inside and not inside:
                leaving.add(source)
    return entering, leaving


def skips_to(output: Node, stream: Node) -> bool:
    """Whether `output` is `stream` plus something: reachable by adds and data movement alone."""
    seen: set[Node] = set()
    front = [output]
    while front:
        node = front.pop()
        if node is stream:
            return True
        if node in seen or not node.op.startswith("call_"):
            continue
        seen.add(node)
        name = op_name(node)
        if name == "add" or name in MOVEMENT or name == "dropout":
            front.extend(node.all_input_nodes)
    return False


def _moved_from(node: Node) -> Node:
    """The value before any data movement."""
    while node.op.startswith("call_") and op_name(node) in MOVEMENT and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _owner(
    graph: Graph, core: Core, stream: Node, add: Node, capture: Capture
) -> tuple[str, Node] | str:
    """(innermost module that takes the stream and gives it back updated, its stream input)."""
    stack = [name for name in core.output.meta["stack"] if name in add.meta["stack"]]
    for module in reversed(stack):
        entering, leaving = _boundary(graph, module)
        candidates = [n for n in (stream, _moved_from(stream)) if n in entering]
        if not candidates:
            continue
        if len(leaving) != 1:
            return f"module {module or '(root)'} hands out {len(leaving)} values, one expected"
        (output,) = leaving
        entry = candidates[0]
        if output.meta.get("shape") != entry.meta["shape"]:
            return (
                f"module {module or '(root)'} changes the stream's shape from "
                f"{entry.meta['shape']} to {output.meta.get('shape')}"
            )
        if not skips_to(output, entry):
            return f"the output of {module or '(root)'} is not its input plus an update"
        if capture.frames.get(module, 0) != 1:
            return f"{module or '(root)'} runs {capture.frames.get(module, 0)} times per forward"
        if not module:
            return "its block is the whole model, not a module of its own"
        return module, entry
    return "no module takes the residual stream and returns it updated"


def _window_reason(core: Core, batch: int) -> str | None:
    """Whether the core's queries come in several groups per image."""
    query = core.query.meta["shape"]
    count = query[-2]
    if core.kind == "multi_head_attention_forward" or len(query) < 4:
        return None
    groups = query[0] // batch if len(query) == 4 else query[0] * query[1] // batch
    if groups > 1 and (len(query) == 4 or query[0] % batch == 0):
        return (
            f"windowed attention ({groups} windows of {count} tokens per image); windows are not "
            f"converted yet"
        )
    return None


def _query_reason(core: Core, layout: Layout) -> str | None:
    """Why the core's queries are not the stream's tokens, or None."""
    query, key = core.query.meta["shape"], core.key.meta["shape"]
    whole = (layout.grid[0] * layout.grid[1], layout.tokens)
    count = query[0] if core.kind == "multi_head_attention_forward" else query[-2]
    if count in whole:
        return None
    if key[-1] in whole and query[-1] in whole:
        return "channel attention: queries are channels, not tokens"
    return (
        f"{count} queries against {layout.tokens} tokens: class or pooling attention, or a query "
        f"path that changes the grid"
    )


def locate(capture: Capture, batch: int) -> list[Site]:
    """Every attention core of the captured model, with its block or the reason it has none.

    Args:
        batch: images in the example call.
    """
    graph = capture.graph
    cores = find_cores(graph)
    if not cores:
        return []
    residuals, finder = _Residuals(graph), GridFinder()
    sites = []
    for core in cores:
        stack = core.output.meta["stack"]
        site = Site(stack[-1] if stack else "", core)
        sites.append(site)
        found = residuals.add_after(core)
        if found is None:
            site.reason = (
                "no residual add around it: its queries do not ride on a residual stream "
                "(pooling head, learned or foreign queries)"
            )
            continue
        stream, add = found
        for part, label in ((core.key, "keys"), (core.value, "values")):
            if not residuals.descends(part, stream):
                site.reason = f"its {label} do not come from the stream of its queries"
        site.reason = site.reason or _window_reason(core, batch)
        owner = _owner(graph, core, stream, add, capture)
        if isinstance(owner, str):
            site.reason = site.reason or owner
            continue
        site.name, site.stream = owner
        layout = finder.layout(site.stream)
        if isinstance(layout, str):
            site.reason = site.reason or layout
            continue
        site.layout = layout
        site.reason = site.reason or _query_reason(core, layout)
        if site.reason is None and layout.grid[0] * layout.grid[1] < 4:
            site.reason = f"a grid of {layout.grid[0]} x {layout.grid[1]} has nothing to pool"
    _refuse_shared_blocks(sites)
    return sites


def _refuse_shared_blocks(sites: list[Site]) -> None:
    """A block with several cores converts only when the split can tell them apart: not yet."""
    owners: dict[str, int] = {}
    for site in sites:
        owners[site.name] = owners.get(site.name, 0) + 1
    for site in sites:
        if owners[site.name] > 1 and site.reason is None:
            site.reason = f"{site.name} holds {owners[site.name]} attentions; one expected"
