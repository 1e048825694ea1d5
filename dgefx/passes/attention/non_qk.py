"""Attention without query-key scores: found so that it is reported, not to be converted.

Outlook attention and dynamic convolutions predict their weights, linear attention normalises keys
alone: a softmax weighs values of other tokens, and no product of queries and keys leads to it.
Used by `passes.locate.sites`. A softmax that weighs what is no other token (experts, branches,
heads, class embeddings) is no attention.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from dgefx.passes.attention.core import AttentionCore
from dgefx.passes.attention.unfused import UnfusedSearch, Weighed
from dgefx.passes.labels import varies
from dgefx.passes.locate.grid import GridFinder
from dgefx.passes.ops import Op, argument, named, op_name

_MOVES_OR_JOINS = named(Op.MOVES | Op.JOINS)


class _Tokens(GridFinder):
    def vary(self, node: Node, axes: tuple[int, ...]) -> bool | None:
        """Whether different tokens lie along an axis of a value; None where that is not known."""
        numbers = self._numbers(node)
        if numbers is None or numbers.ids.dim() < max(-axis for axis in axes):
            return None
        return any(varies(numbers.ids, axis) for axis in axes)


def non_qk_cores(
    graph: Graph, written: UnfusedSearch, cores: list[AttentionCore]
) -> list[AttentionCore]:
    """Softmaxes of a flat capture that weigh its tokens without being attention of `cores`.

    Args:
        written: after its search.
    """
    known = {core.output for core in cores}
    samples = {core.output for core in cores if core.kind == "grid_sample"}
    tokens = _Tokens()
    found = []
    for weighed in written.unscored:
        values = weighed.product.operand(weighed.value)
        node = weighed.product.node
        if node in known or not _of_input(values) or _moved_from(values, samples):
            continue
        along = tokens.vary(values, weighed.product.summed[weighed.value])
        if along is None:
            along = not _joined(graph, written, weighed)
        if along:
            edge = (node, weighed.product.operands[weighed.value])
            found.append(
                AttentionCore("softmax", weighed.softmax, values, values, node, frozenset({edge}))
            )
    return found


def _of_input(node: Node) -> bool:
    """Whether a value is computed from the model's input, as parameters are not."""
    seen, front = {node}, [node]
    while front:
        current = front.pop()
        if current.op == "placeholder":
            return True
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        front.extend(fresh)
    return False


def _moved_from(node: Node, sources: set[Node]) -> bool:
    """Whether a value is one of `sources`, moved or joined at most."""
    seen, front = {node}, [node]
    while front:
        current = front.pop()
        if current in sources:
            return True
        if current.op.startswith("call_") and op_name(current) in _MOVES_OR_JOINS:
            fresh = [n for n in current.all_input_nodes if n not in seen]
            seen.update(fresh)
            front.extend(fresh)
    return False


def _joined(graph: Graph, written: UnfusedSearch, weighed: Weighed) -> bool:
    """Whether what is summed over was stacked: branches or experts, not tokens."""
    values, summed = weighed.product.operand(weighed.value), weighed.product.summed
    for node in graph.nodes:
        if node.op != "call_function" or op_name(node) != "stack":
            continue
        axis, rank = argument(node, 1, "dim", 0), len(node.meta.get("shape", ()))
        if not isinstance(axis, int) or not rank:
            continue
        for user, source, place in written.reached(node, axis % rank - rank):
            if (user, source) == (weighed.product.node, values) and place in summed[weighed.value]:
                return True
    return False
