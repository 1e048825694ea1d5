"""Attention cores: where queries meet keys, in a flat or a traced graph.

Shared by `passes.locate.sites` (which works on the flat capture) and `passes.emit.rewrite` (which
works on a block's own graph): scaled_dot_product_attention, multi_head_attention_forward, and
attention written out as products around a softmax (`passes.attention.unfused`), and deformable
attention, where queries sample a map (`passes.attention.sampling`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import Graph, Node

from dgefx.passes.attention.sampling import sampled_map
from dgefx.passes.attention.unfused import UnfusedAttention, UnfusedSearch, Values
from dgefx.passes.ops import argument, op_name


@dataclass(frozen=True)
class AttentionCore:
    """One attention.

    context_edges: (consumer, position or keyword of the argument) where the context enters the
    query path. An argument, not a producer: query, key and value may be one and the same value.
    query_axes: axes of `query`, negative, on which its tokens may lie.
    key_axes: of attention written out, values and their axis, negative, on which the keys lie: of
        the same size whatever the queries are.
    """

    kind: str
    query: Node
    key: Node
    value: Node
    output: Node
    context_edges: frozenset[tuple[Node, int | str]]
    query_axes: tuple[int, ...] = (-2,)
    key_axes: frozenset[tuple[Node, int]] = frozenset()

    @property
    def name(self) -> str:
        return str(self.output.name)


def _fused_core(node: Node, kind: str) -> AttentionCore | None:
    names = ("query", "key", "value")
    parts = [argument(node, i, name) for i, name in enumerate(names)]
    if not all(isinstance(part, Node) for part in parts):
        return None
    query, key, value = parts
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    positions = [i if len(node.args) > i else name for i, name in enumerate(names)]
    return AttentionCore(kind, query, key, value, node, frozenset((node, p) for p in positions[1:]))


def _sampling_core(node: Node, root: nn.Module | None) -> AttentionCore | None:
    found = sampled_map(node, root)
    if found is None:
        return None
    grid, value, place = found
    return AttentionCore(
        "grid_sample", grid, value, value, node, frozenset({(node, place)}), (-3, -2)
    )


def _unfused_core(written: UnfusedAttention) -> AttentionCore:
    scores, output = written.scores, written.output
    edges = {
        (scores.node, scores.operands[written.key]),
        (output.node, output.operands[written.value]),
    }
    return AttentionCore(
        "matmul-softmax-matmul",
        scores.operand(1 - written.key),
        scores.operand(written.key),
        output.operand(written.value),
        output.node,
        frozenset(edges),
        written.query_axes,
        written.key_axes,
    )


def find_cores(graph: Graph, values: Values, root: nn.Module | None = None) -> list[AttentionCore]:
    """All attention cores of `graph`, in order; see `search_cores`."""
    return search_cores(graph, values, root)[0]


def search_cores(
    graph: Graph, values: Values, root: nn.Module | None = None
) -> tuple[list[AttentionCore], UnfusedSearch]:
    """All attention cores of `graph`, in order, and the search that found the written ones.

    Args:
        graph: a flat capture or a traced block.
        values: of its nodes, see `passes.attention.unfused`.
        root: the module that call_module targets belong to.
    """
    written = UnfusedSearch(graph, root, values)
    cores = {w.output.node: _unfused_core(w) for w in written.find()}
    for node in graph.nodes:
        name = op_name(node, root) if node.op.startswith("call_") else ""
        if name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            core = _fused_core(node, name)
        elif name in ("grid_sample", "grid_sampler"):
            core = _sampling_core(node, root)
        else:
            continue
        if core is not None:
            cores[node] = core
    order = {node: index for index, node in enumerate(graph.nodes)}
    return sorted(cores.values(), key=lambda core: order[core.output]), written
