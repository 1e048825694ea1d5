"""Pass 2, locate: attention cores that ride on a residual stream, and the modules that own them.

Works on the flat capture as a networkx graph. A core converts when its keys, values and queries
all come from one stream x, when the path from the core to the output must pass an add whose other
operand is x, maybe scaled (a post-dominator of the core), and when one module takes x, or what x
is plus something, and hands out that sum, or what becomes of it without changing its size. Its
queries have to be the tokens of the stream, in windows or not. Everything else is reported with
the reason. Next: `passes.trace.block_trace`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace

import networkx as nx
from torch.fx import Graph, Node

from dgefx.passes.attention.core import AttentionCore, SearchedGraph
from dgefx.passes.attention.registry import form_of, search_cores
from dgefx.passes.capture import Capture, example_of
from dgefx.passes.diagnosis.no_layout import why_unplaced
from dgefx.passes.layout import Layout
from dgefx.passes.locate.grid import GridFinder
from dgefx.passes.locate.non_qk import non_qk_cores
from dgefx.passes.locate.repeats import Repeats
from dgefx.passes.ops import Op, argument, named, op_name
from dgefx.passes.reasons import KindName, Reason

_SINK = "sink"

#: leaves every element what it is; a cast to the type that a tensor has returns that tensor, so
#: that what a norm casts (`x.float()`) may be what is added to later
_SAME = named(Op.MOVES | Op.CASTS) | {"dropout", "float"}
#: what a stream may go through before it is added to: it stays the stream, scaled
_SCALING = _SAME | {"mul", "div"}
#: lets tokens see each other; a path through it is the update, not the stream
_ATTENDS = named(Op.PRODUCT) | {"softmax"}
_TOKENS_STAY = named(Op.TOKENWISE | Op.MOVES)
_LEARNED = Reason(
    "its stream starts with learned queries, not with the image's tokens",
    "pooling head or learned queries",
)
_NO_ADD = Reason(
    "no residual add around it: its queries do not ride on a residual stream (pooling head or "
    "learned queries)",
    "pooling head or learned queries",
)
_FOREIGN = Reason(
    "its queries do not come from the stream that its output is added to, although its keys do: "
    "foreign or learned queries",
    "foreign queries",
)
_OTHER_SHORTCUT = Reason(
    "its queries do not come from what its output is added to: the shortcut around it is pooled or "
    "projected, or belongs to another stream",
    "pooled or projected shortcut",
)
_CHANNELS = Reason("channel attention: queries are channels, not tokens", "channel attention")
_UNSCORED = Reason(
    "its weights are no product of queries and keys: linear, outlook or dynamic-convolution "
    "attention",
    "no query-key scores",
)


@dataclass
class Site:
    """One attention core of the model.

    name: the owning block (or, when refused, the innermost module). reason: why it stays dense.
    kind: of the reason, see `passes.reasons`.
    """

    name: str
    core: AttentionCore
    stream: Node | None = None
    layout: Layout | None = None
    reason: str | None = None
    kind: KindName | None = None

    def refuse(self, reason: Reason) -> None:
        """It stays dense."""
        self.reason, self.kind = reason.text, reason.kind


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


@dataclass(frozen=True)
class Residual:
    """stream: what the queries come from, and what is added to in `add`, maybe scaled."""

    stream: Node
    add: Node


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

    def _adds_after(self, core: AttentionCore) -> Iterator[tuple[Node, Node]]:
        """(operand that does not come from the core, add) for every add that its output must pass,
        nearest first."""
        node = self.post.get(core.output) if core.output in self.alive else None
        while isinstance(node, Node):
            sources = node.all_input_nodes
            if op_name(node) == "add" and len(sources) == 2:
                for stream, other in (sources, sources[::-1]):
                    if (
                        stream.op != "get_attr"
                        and stream.meta.get("shape") == node.meta["shape"]
                        and self.descends(other, core.output)
                        and not self.descends(stream, core.output)
                    ):
                        yield stream, node
            following = self.post.get(node)
            if following is node:
                break
            node = following

    def _origin(self, core: AttentionCore, stream: Node) -> Node | None:
        """The value that both the queries and the stream are made of: the stream itself, or what
        it is scaled or moved from, or what another branch beside this one was added to."""
        front, seen = [stream], {stream}
        while front:
            node = front.pop(0)
            if self.descends(core.query, node):
                return node
            # a sum whose keys come from it is the stream; one that they do not is another branch's
            beside = op_name(node) == "add" and not self.descends(core.key, node)
            if node.op.startswith("call_") and (op_name(node) in _SCALING or beside):
                fresh = [n for n in node.all_input_nodes if n not in seen and n.op != "get_attr"]
                seen.update(fresh)
                front.extend(fresh)
        return None

    def around(self, core: AttentionCore) -> Residual | Reason:
        """The residual add around a core, or the reason why there is none."""
        reason = _NO_ADD
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
                reason = Reason(
                    f"its {others[0]} do not come from the stream of its queries", "cross attention"
                )
            elif self.descends(core.key, stream):
                reason = _FOREIGN
            elif reason is not _FOREIGN:
                reason = _OTHER_SHORTCUT
        return reason


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


def skips_to(output: Node, streams: Container[Node]) -> Node | None:
    """The nearest of `streams` that `output` is, plus something: reachable backwards by adds, data
    movement, casts, scaling and dropout alone."""
    front, seen = [output], {output}
    while front:
        node = front.pop(0)
        if node in streams:
            return node
        if not node.op.startswith("call_"):
            continue
        name = op_name(node)
        sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
        scaled = name in ("mul", "div") and len(sources) == 1
        if name == "add" or name in _SAME or scaled:
            fresh = [n for n in sources if n not in seen]
            seen.update(fresh)
            front.extend(fresh)
    return None


def _size(node: Node) -> int:
    return math.prod(node.meta.get("shape", (0,)))


def keeps(output: Node, earlier: Node) -> bool:
    """Whether `output` is `earlier` updated: a path without attention leads there on which every
    value has as many elements."""
    size = _size(earlier)
    front, seen = [output], {output}
    while front:
        node = front.pop()
        if node is earlier:
            return True
        if not node.op.startswith("call_") or op_name(node) in _ATTENDS or form_of(node):
            continue
        fresh = [n for n in node.all_input_nodes if n not in seen and _size(n) == size]
        seen.update(fresh)
        front.extend(fresh)
    return False


def _owner(
    graph: Graph, core: AttentionCore, residual: Residual, repeats: Repeats, only: str | None = None
) -> tuple[str, Node] | Reason:
    """(innermost module that takes the stream and gives it back updated, its stream input).

    Args:
        only: ask about this module alone.
    """
    stack = [n for n in core.output.meta["stack"] if n in residual.add.meta["stack"]]
    stack = stack if only is None else [only]
    for module in reversed(stack):
        entering, leaving = _boundary(graph, module)
        entry = skips_to(residual.stream, {n for n in entering if n.op != "get_attr"})
        if entry is None:
            continue
        repeated = repeats.reason(module, residual.stream)
        if repeated is not None:
            return repeated
        if len(leaving) != 1:
            return Reason(
                f"module {module or '(root)'} hands out {len(leaving)} values, one expected",
                "further results",
            )
        (output,) = leaving
        if output.meta.get("shape") != entry.meta["shape"]:
            before, after = entry.meta["shape"], output.meta.get("shape") or ()
            one = len(before) == len(after) == 3 and before[1:2] > after[1:2] == (1,)
            return Reason(
                f"module {module or '(root)'} changes the stream's shape from {before} to {after}",
                "class attention" if one else "no block module",
            )
        if not keeps(output, residual.add):
            return Reason(
                f"the output of {module or '(root)'} is not its stream updated: what leads to it "
                f"from the sum with the attention has another size",
                "no block module",
            )
        if not module:
            return Reason(
                "its block is the whole model, not a module of its own", "no block module"
            )
        return module, entry
    return Reason("no module takes the residual stream and returns it updated", "no block module")


def _update_owner(
    graph: Graph, core: AttentionCore, residuals: _Residuals, capture: Capture, finder: GridFinder
) -> tuple[str, Node] | None:
    """(innermost module that takes tokens and gives back their update, its input).

    For an attention whose residual add is in no module of its own: next to another branch, or in a
    module that goes on to other shapes. Everything around the attention stays dense then.
    """
    for module in reversed(core.output.meta["stack"]):
        entering, leaving = _boundary(graph, module)
        if not module or capture.frames.get(module, 0) != 1 or len(leaving) != 1:
            continue
        (output,) = leaving
        for entry in entering:
            same = entry.op != "get_attr" and entry.meta["shape"] == output.meta.get("shape")
            parts = (core.query, core.key, core.value)
            if same and all(residuals.descends(part, entry) for part in parts):
                asked, held = finder.held(core.query), finder.held(entry)
                if asked is not None and held is not None and asked.count == held.count:
                    return module, entry
    return None


def _query_reason(
    core: AttentionCore, stream: Node, layout: Layout, finder: GridFinder, batch: int
) -> Reason | None:
    """Why the core's queries are not the tokens of the stream, or None."""
    tokens = layout.grid[0] * layout.grid[1]
    held, all_tokens = finder.held(core.query), finder.held(stream)
    if held is None or all_tokens is None:
        query, whole = core.query.meta["shape"], (tokens, layout.tokens)
        places = [query[axis] for axis in core.query_axes]
        if not set(places) & set(whole) and set(query[-2:]) & set(whole):
            return _CHANNELS
        count = core.form.query_count(core, layout, batch)
        same_grid = count >= tokens
    elif held.in_features != (-1 in core.query_axes):  # the last axis is that of features, or not
        return _CHANNELS
    elif not held.count:
        return Reason("its queries are prefix tokens alone: class attention", "class attention")
    else:
        count = held.count
        same_grid = (held.grid, count) == (all_tokens.grid, all_tokens.count)
    if same_grid:
        return None
    if count == 1:
        return Reason(
            f"1 query against {layout.tokens} tokens: class attention, or pooling to one token",
            "class attention",
        )
    return Reason(
        f"{count} queries against {layout.tokens} tokens: class or pooling attention, or a query "
        f"path that changes the grid",
        "queries on another grid",
    )


def _multi_scale(core: AttentionCore, cores: list[AttentionCore]) -> Reason | None:
    """Why a stream has no layout whose tokens sample several maps at once."""
    stack = core.output.meta["stack"]
    beside = [c for c in cores if c.form.levels and c.output.meta["stack"] == stack]
    if core not in beside or len(beside) < 2:
        return None
    return Reason(
        "multi-scale deformable attention: the stream is several grids one after another, not "
        "prefix tokens followed by the grid in raster order",
        "several grids",
    )


def _asks_with_learned(core: AttentionCore, cores: list[AttentionCore]) -> bool:
    """Whether its queries begin with learned ones, whatever of the image was added to them since:
    attention before it gives tokens where its own queries are."""
    before = {c.output: c for c in cores}
    front = [core.query]
    seen = set(front)
    while front:
        node = front.pop()
        if node.op == "placeholder":
            return False
        inputs = [before[node].query] if node in before else node.all_input_nodes
        fresh = [n for n in inputs if n not in seen]
        seen.update(fresh)
        front += fresh
    return True


def _no_residual(core: AttentionCore, reason: Reason, finder: GridFinder) -> Reason:
    """What attention is whose output is not added to a stream."""
    if reason is not _NO_ADD:
        return reason
    asking, asked = finder.held(core.query), finder.held(core.key)
    if asking is None or asked is None or not 1 < asking.count < asked.count:
        return reason
    return Reason(
        f"{asking.count} queries against {asked.count} tokens and no residual add around them: it "
        f"makes the grid smaller between stages",
        "queries on another grid",
    )


def _unplaced(
    core: AttentionCore, stream: Node, text: str, cores: list[AttentionCore], finder: GridFinder
) -> Reason:
    """Why the stream has no layout."""
    held, asking = finder.held(stream), finder.held(core.query)
    why = why_unplaced(stream, finder)
    if why is not None:
        return why
    if asking is not None and not asking.count:
        return Reason("its queries are prefix tokens alone: class attention", "class attention")
    if held is not None and held.grid == (1, 1):
        return Reason("a grid of 1 x 1 has nothing to pool", "nothing to pool")
    if held is not None:
        return Reason(text, "token order")
    if _asks_with_learned(core, cores):
        return _LEARNED
    return Reason(text, "layout unknown")


def locate(capture: Capture, batch: int) -> list[Site]:
    """Every attention core of the captured model, with its block or the reason it has none.

    Args:
        batch: images in the example call.
    """
    graph = capture.graph
    searched = SearchedGraph(graph, example_of)
    cores = search_cores(searched)
    unscored = non_qk_cores(searched, cores)
    if not cores and not unscored:
        return []
    residuals, finder = _Residuals(graph), GridFinder()
    repeats = Repeats(capture.frames, finder)
    sites = []
    for core in cores:
        stack = core.output.meta["stack"]
        site = Site(stack[-1] if stack else "", core)
        sites.append(site)
        residual = residuals.around(core)
        if isinstance(residual, Reason):
            site.refuse(_no_residual(core, residual, finder))
            continue
        owner, is_update = _owner(graph, core, residual, repeats), False
        if isinstance(owner, Reason):
            # what it asks with says more than what its module does
            layout = finder.layout(residual.stream)
            asks = isinstance(layout, Layout) and _query_reason(
                core, residual.stream, layout, finder, batch
            )
            found = None if asks else _update_owner(graph, core, residuals, capture, finder)
            if found is None:
                site.refuse(asks or (_LEARNED if _asks_with_learned(core, cores) else owner))
                continue
            owner, is_update = found, True
        site.name, site.stream = owner
        layout = finder.layout(site.stream)
        if isinstance(layout, str):
            multi = _multi_scale(core, cores)
            site.refuse(multi or _unplaced(core, site.stream, layout, cores, finder))
            continue
        site.layout = replace(layout, update=is_update)
        asking = _query_reason(core, site.stream, layout, finder, batch)
        asking = asking or core.form.refusal(core.output)
        if asking is not None:
            site.refuse(asking)
        elif layout.grid[0] * layout.grid[1] < 4:
            few = f"a grid of {layout.grid[0]} x {layout.grid[1]} has nothing to pool"
            site.refuse(Reason(few, "nothing to pool"))
    _refuse_outer_blocks(sites)
    joined = _join_shared_blocks(_once(sites))
    for site in joined:
        if site.reason is None:
            _widen(graph, site, cores, residuals, repeats, finder)
        if site.reason is None and site.layout is not None:
            first_only = _reads_first_only(graph, site.name, capture)
            site.layout = replace(site.layout, first_only=first_only)
    order = {node: index for index, node in enumerate(graph.nodes)}
    both = joined + _unscored_sites(unscored, {site.name for site in joined})
    return sorted(both, key=lambda site: order[site.core.output])


def _unscored_sites(unscored: list[AttentionCore], names: set[str]) -> list[Site]:
    """One per module that has none yet."""
    sites: dict[str, Site] = {}
    for core in unscored:
        stack = core.output.meta["stack"]
        name = stack[-1] if stack else ""
        if name not in names and name not in sites:
            sites[name] = Site(name, core)
            sites[name].refuse(_UNSCORED)
    return list(sites.values())


def _once(sites: list[Site]) -> list[Site]:
    """A module that runs several times is told once."""
    told: dict[tuple[str, KindName | None], Site] = {}
    for site in sites:
        if site.kind in ("shared module", "several views"):
            told.setdefault((site.name, site.kind), site)
    return [site for site in sites if told.get((site.name, site.kind), site) is site]


def _reads_first_only(graph: Graph, module: str, capture: Capture) -> bool:
    """Whether a block returns several tensors, of which the model reads the first alone."""
    results = capture.results.get(module, [])
    return len(results) > 1 and _boundary(graph, module)[1] == {results[0]}


def _refuse_outer_blocks(sites: list[Site]) -> None:
    """Of two blocks inside each other only the inner one converts."""
    for site in sites:
        inner = [s.name for s in sites if s.reason is None and s.name.startswith(f"{site.name}.")]
        if site.reason is None and inner:
            also = f"{site.name} also holds the block {inner[0]}, which converts by itself"
            site.refuse(Reason(also, "outer block"))


def _join_shared_blocks(sites: list[Site]) -> list[Site]:
    """A block with several attentions is one site; if one of them cannot convert, none does."""
    joined: list[Site] = []
    levels: set[tuple[str, str | None]] = set()  # one attention samples one map per level
    for site in sites:
        shared = [s for s in sites if s.name == site.name]
        refused = next((s for s in shared if s.reason is not None), None)
        if refused is None and shared[0] is not site:
            continue
        if site.reason is None and refused is not None:
            also = f"another attention of {site.name} does not convert: {refused.reason}"
            site.refuse(Reason(also, refused.kind or "other"))
        if site.core.form.levels:
            if (site.name, site.reason) in levels:
                continue
            levels.add((site.name, site.reason))
        joined.append(site)
    return joined


def _widen(
    graph: Graph,
    site: Site,
    cores: list[AttentionCore],
    residuals: _Residuals,
    repeats: Repeats,
    finder: GridFinder,
) -> None:
    """Let a block whose MLP sits in a sibling module be the module that holds both.

    An outer module takes the block's place if it too takes the stream and gives it back updated,
    holds no other attention, and adds nothing but tokenwise work with weights of its own.
    """
    own = [core for core in cores if _inside(core.output, site.name)]
    stack = list(site.core.output.meta["stack"])
    for module in reversed(stack[: stack.index(site.name)]):
        held = [core for core in cores if _inside(core.output, module)]
        if site.layout is not None and site.layout.update:
            return
        residual = residuals.around(site.core)
        if not module or len(held) != len(own) or isinstance(residual, Reason):
            return
        more = [
            node
            for node in graph.nodes
            if node.op.startswith("call_")
            and _inside(node, module)
            and not _inside(node, site.name)
        ]
        weighted = [node for node in more if op_name(node) in ("linear", "conv2d")]
        if not all(_is_tokenwise(node) for node in more):
            return
        owner = _owner(graph, site.core, residual, repeats, module)
        if isinstance(owner, Reason):
            return
        layout = finder.layout(owner[1])
        if weighted and isinstance(layout, Layout):
            site.name, site.stream, site.layout = *owner, layout


def _is_tokenwise(node: Node) -> bool:
    name = op_name(node)
    if name == "conv2d":
        weight = argument(node, 1, "weight")
        return isinstance(weight, Node) and tuple(weight.meta["shape"][2:]) == (1, 1)
    return name in _TOKENS_STAY
