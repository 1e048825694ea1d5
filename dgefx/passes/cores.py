"""Attention cores: where queries meet keys, in a flat or a traced graph.

Shared by `passes.locate` (which works on the flat capture) and `passes.split` (which works on a
block's own graph): scaled_dot_product_attention, multi_head_attention_forward, and
matmul - softmax - matmul with anything element by element in between. Deformable attention, where
queries sample a map, is recognised by `passes.sampling`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, Node, map_arg

from dgefx.passes.ops import ELEMENTWISE, argument, op_name
from dgefx.passes.sampling import sampled_map

_BETWEEN = ELEMENTWISE | {"softmax", "contiguous", "view", "reshape", "expand"}


@dataclass(frozen=True)
class Core:
    """One attention.

    context_edges: (consumer, position or keyword of the argument) where the context enters the
    query path. An argument, not a producer: query, key and value may be one and the same value.
    """

    kind: str
    query: Node
    key: Node
    value: Node
    output: Node
    context_edges: frozenset[tuple[Node, int | str]]

    @property
    def name(self) -> str:
        return str(self.output.name)


def _fused_core(node: Node, kind: str) -> Core | None:
    names = ("query", "key", "value")
    parts = [argument(node, i, name) for i, name in enumerate(names)]
    if not all(isinstance(part, Node) for part in parts):
        return None
    query, key, value = parts
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    positions = [i if len(node.args) > i else name for i, name in enumerate(names)]
    return Core(kind, query, key, value, node, frozenset((node, p) for p in positions[1:]))


def _sampling_core(node: Node, root: nn.Module | None) -> Core | None:
    found = sampled_map(node, root)
    if found is None:
        return None
    grid, value, place = found
    return Core("grid_sample", grid, value, value, node, frozenset({(node, place)}))


def _tensor_args(node: Node) -> list[Node]:
    return [a for a in node.args if isinstance(a, Node)]


def _scores(softmax: Node, root: nn.Module | None) -> Node | None:
    """The product of queries and keys under a softmax, through anything element by element."""
    seen: set[Node] = set()
    front = [softmax]
    while front:
        node = front.pop(0)
        if node in seen:
            continue
        seen.add(node)
        name = op_name(node, root)
        if name == "matmul" or name == "einsum":
            return node
        if name in _BETWEEN or node is softmax:
            front.extend(node.all_input_nodes)
    return None


def _weighted_sum(softmax: Node, root: nn.Module | None) -> tuple[Node, Node] | None:
    """(product of weights and values, its weights operand) after a softmax."""
    seen: set[Node] = set()
    front = [softmax]
    while front:
        node = front.pop(0)
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            name = op_name(user, root)
            if name in ("matmul", "einsum"):
                return user, node
            if name in _BETWEEN:
                front.append(user)
    return None


def _manual_core(softmax: Node, root: nn.Module | None) -> Core | None:
    scores, applied = _scores(softmax, root), _weighted_sum(softmax, root)
    if scores is None or applied is None:
        return None
    output, weights = applied
    operands = _tensor_args(scores)
    others = [a for a in _tensor_args(output) if a is not weights]
    if len(operands) != 2 or len(others) != 1 or output is scores or operands[0] is operands[1]:
        return None
    if _tensor_args(output)[0] is not weights:
        return None  # values on the left: handled once such models are (v @ attn^T)
    query, key = operands
    edges = frozenset({(scores, scores.args.index(key)), (output, output.args.index(others[0]))})
    return Core("matmul-softmax-matmul", query, key, others[0], output, edges)


def map_sources(
    node: Node, edges: frozenset[tuple[Node, int | str]], pick: Callable[[Node, bool], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `node` with every producer replaced by `pick(producer, crosses)`."""

    def convert(argument: Any, place: int | str) -> Any:
        crosses = (node, place) in edges
        return map_arg(argument, lambda source: pick(source, crosses))

    args = tuple(convert(argument, i) for i, argument in enumerate(node.args))
    kwargs = {name: convert(argument, name) for name, argument in node.kwargs.items()}
    return args, kwargs


def find_cores(graph: Graph, root: nn.Module | None = None) -> list[Core]:
    """All attention cores of `graph`, in order.

    Args:
        graph: a flat capture or a traced block.
        root: the module that call_module targets belong to.
    """
    cores: list[Core] = []
    for node in graph.nodes:
        if not node.op.startswith("call_"):
            continue
        name = op_name(node, root)
        core = None
        if name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            core = _fused_core(node, name)
        elif name == "softmax":
            core = _manual_core(node, root)
        elif name in ("grid_sample", "grid_sampler"):
            core = _sampling_core(node, root)
        if core is not None:
            cores.append(core)
    return cores
