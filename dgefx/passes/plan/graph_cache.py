"""Blocks of the same structure are split once: what two traces must share to share their graphs.

The blocks of a vision transformer mostly differ in the values of their parameters and in the
probabilities of their drop paths, and mostly do in train mode what they do in eval mode. The split
looks at neither, as long as no parameter hides what others would show. Asked by `passes.plan.plan`
before the trace and before the split; every block is verified by itself afterwards, whether its
graph was split for it or for a twin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from dgefx.nn.callspec import Path
from dgefx.passes.emit.rewrite import RewrittenGraph, split
from dgefx.passes.layout import Layout
from dgefx.passes.plan.block_signature import is_free, structure
from dgefx.passes.trace.mutation import tensors_of
from dgefx.passes.trace.tracer import Trace

if TYPE_CHECKING:
    from dgefx.passes.plan.plan import BlockPlan


class _Scalar(float):
    """A float of a traced graph that knows which of them it is."""

    place: int


def _number_scalars(graph: fx.Graph) -> list[float]:
    """Mark the free floats of a graph's arguments, in place."""
    found: list[float] = []

    def mark(value: Any) -> Any:
        if not is_free(value):
            return value
        scalar = _Scalar(value)
        scalar.place = len(found)
        found.append(value)
        return scalar

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, mark)
        node.kwargs = fx.node.map_aggregate(node.kwargs, mark)
    return found


def _with_scalars(graph: fx.Graph, scalars: list[float]) -> fx.Graph:
    """A copy of a split graph with the floats of another trace."""

    def replace(value: Any) -> Any:
        return scalars[value.place] if isinstance(value, _Scalar) else value

    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copy = copies[node] = made.node_copy(node, copies.__getitem__)
        copy.args = fx.node.map_aggregate(copy.args, replace)
        copy.kwargs = fx.node.map_aggregate(copy.kwargs, replace)
    return made


def _is_mode_free(module: nn.Module) -> bool:
    """Whether a module that is called mixes tokens in train mode as it does in eval mode."""
    ours = type(module).__module__.startswith("torch.nn.modules.")
    draws = isinstance(module, (nn.MultiheadAttention, nn.RReLU))
    return ours and not draws and not any(True for _ in module.buffers())


def _ignores_mode(one: Trace, other: Trace) -> bool:
    """Whether two traces of a block, of the same structure, in eval and in train mode, compute the
    same: what they call is known to, and all their values are equal (zeros may hide much).
    The parameters are not looked at: the split of the first trace added noise to its own."""
    called = {str(n.target) for n in one.graph.nodes if n.op == "call_module"}
    called -= one.apart & other.apart
    if not all(_is_mode_free(one.root.get_submodule(name)) for name in called):
        return False
    values = (
        [v for n in t.graph.nodes if n.op != "get_attr" for v in tensors_of(t.values.get(n))]
        for t in (one, other)
    )
    return all(torch.equal(a, b) for a, b in zip(*values, strict=True))


@dataclass
class Split:
    """block: the split of `trace`. owner: name of the block that was split for it. scalars: the
    free floats of the trace that was split. key: its structure, if that can be told."""

    block: RewrittenGraph
    owner: str
    scalars: list[float]
    key: Hashable | None
    trace: Trace | None


class GraphCache:
    """The splits of one conversion so far.

    plans: of whole blocks, by `call_structure`. bound: those of verified blocks, bound to their
        sizes, by `eval_key`. compared: `gradient_key` of those whose gradients and batch sizes
        were. formed: for which flags None and False are the same, and which forms of masks hold, by
        `gradient_key`; see `passes.plan.call_forms`.
    """

    def __init__(self) -> None:
        self.plans: dict[Hashable, BlockPlan] = {}
        self.bound: dict[Hashable, BlockPlan] = {}
        self.compared: set[Hashable] = set()
        self.formed: dict[Hashable, tuple[frozenset[Path], frozenset[Any]]] = {}
        self._found: dict[Hashable, Split] = {}

    def split(
        self,
        trace: Trace,
        stream: fx.Node,
        layout: Layout,
        packs: bool,
        name: str,
        evaluated: Split | None = None,
    ) -> Split:
        """`passes.emit.rewrite.split`, unless that was done for a trace of this structure and mode.

        Args:
            trace: its floats are marked.
            name: of the block. evaluated: what this gave for its trace in eval mode.

        Raises:
            Refused: with the reason why the block stays dense.
        """
        key = structure(trace, stream, layout)
        scalars = _number_scalars(trace.graph)
        known = self._found.get((key, trace.root.training)) if key is not None else None
        if known is None and evaluated is not None and evaluated.trace is not None:
            same = key is not None and key == evaluated.key
            known = evaluated if same and _ignores_mode(evaluated.trace, trace) else None
        if known is None:
            made = Split(split(trace, stream, layout, packs), name, scalars, key, trace)
            if key is not None:  # without the values of the trace, which are large
                self._found[key, trace.root.training] = dataclasses.replace(made, trace=None)
            return made
        block = known.block
        if scalars != known.scalars:
            block = dataclasses.replace(block, graph=_with_scalars(block.graph, scalars))
        return Split(block, known.owner, scalars, key, trace)
