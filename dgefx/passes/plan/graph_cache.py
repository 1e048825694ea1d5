"""Graphs that were rewritten, and blocks that were verified, for blocks that are alike.

The blocks of a vision transformer mostly differ in the values of their parameters and in the
probabilities of their drop paths, and mostly do in train mode what they do in eval mode. A graph is
rewritten once for all of them (`passes.plan.signature`), and what follows from the code alone is
verified once; every block is compared with its own dense block all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from dgefx.passes.emit.emitter import RewrittenGraph
from dgefx.passes.emit.rewrite import split
from dgefx.passes.layout import Layout
from dgefx.passes.plan.signature import only_scales, trace_signature
from dgefx.passes.trace.block_trace import Trace

if TYPE_CHECKING:
    from dgefx.passes.plan.call_forms import KnownForms
    from dgefx.passes.plan.plan import BlockPlan, HeldSizes


class _Scale(float):
    """A float of a traced graph that knows which of them it is."""

    place: int


def _number_scales(graph: fx.Graph) -> list[float]:
    """Mark the floats of a graph's arguments that only scale, in place."""
    found: list[float] = []

    def mark(value: Any) -> Any:
        if not only_scales(value):
            return value
        scale = _Scale(value)
        scale.place = len(found)
        found.append(value)
        return scale

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, mark)
        node.kwargs = fx.node.map_aggregate(node.kwargs, mark)
    return found


def _with_scales(graph: fx.Graph, scales: list[float]) -> fx.Graph:
    """A copy of a rewritten graph with the floats of another trace."""

    def replace(value: Any) -> Any:
        return scales[value.place] if isinstance(value, _Scale) else value

    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copy = copies[node] = made.node_copy(node, copies.__getitem__)
        copy.args = fx.node.map_aggregate(copy.args, replace)
        copy.kwargs = fx.node.map_aggregate(copy.kwargs, replace)
    return made


def _ignores_mode(module: nn.Module) -> bool:
    """Whether a module that is called mixes tokens in train mode as it does in eval mode."""
    ours = type(module).__module__.startswith("torch.nn.modules.")
    draws = isinstance(module, (nn.MultiheadAttention, nn.RReLU))
    return ours and not draws and not any(True for _ in module.buffers())


def ignores_mode(trace: Trace) -> bool:
    """Whether all that a trace calls does the same in both modes, so that the graph of a trace in
    eval mode serves the equal one in train mode."""
    called = {str(n.target) for n in trace.graph.nodes if n.op == "call_module"} - trace.token_wise
    return all(_ignores_mode(trace.root.get_submodule(name)) for name in called)


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph. owner: name of the block that it was written for. scales: the floats of
    that one's trace that only scale. key: signature of the trace. same_in_training: whether it
    serves an equal trace in train mode too."""

    graph: RewrittenGraph
    owner: str
    scales: list[float]
    key: bytes | None
    same_in_training: bool


@dataclass
class GraphCache:
    """What one conversion has found so far.

    plans: of blocks, by their `description`. By their `plan_signature`, of blocks that were
    verified: sizes: on which they hold; forms: of their calls; compared: whose gradients and batch
    sizes were.
    """

    plans: dict[bytes, BlockPlan] = field(default_factory=dict)
    sizes: dict[Hashable, HeldSizes] = field(default_factory=dict)
    forms: dict[Hashable, KnownForms] = field(default_factory=dict)
    compared: set[Hashable] = field(default_factory=set)
    _graphs: dict[tuple[bytes, bool], Rewritten] = field(default_factory=dict)

    def rewrite(
        self,
        trace: Trace,
        stream: fx.Node,
        layout: Layout,
        packs: bool,
        name: str,
        evaluated: Rewritten | None = None,
    ) -> Rewritten:
        """The rewritten graph of a trace, that of an equal one if there was one before.

        Args:
            trace: its floats are marked.
            name: of the block. evaluated: what this gave for its trace in eval mode.

        Raises:
            Refused: with the reason why the block stays dense.
        """
        key = trace_signature(trace, stream, layout)
        scales = _number_scales(trace.graph)
        known = None if key is None else self._graphs.get((key, trace.root.training))
        alike = ignores_mode(trace)
        if known is None and evaluated is not None and key is not None and key == evaluated.key:
            known = evaluated if evaluated.same_in_training and alike else None
        if known is None:
            known = Rewritten(split(trace, stream, layout, packs, name), name, scales, key, alike)
            if key is not None:
                self._graphs[key, trace.root.training] = known
            return known
        graph = known.graph
        if scales != known.scales:
            graph = dataclasses.replace(graph, graph=_with_scales(graph.graph, scales))
        return dataclasses.replace(known, graph=graph, scales=scales, key=key)
