"""Attention without query-key scores: found so that it is reported, not to be converted.

Outlook attention and dynamic convolutions predict their weights, linear attention normalises keys
alone: a softmax weighs values of other tokens, and no product of queries and keys leads to it.
Used by `passes.locate.sites`. A softmax that weighs what is no other token (experts, branches,
heads, class embeddings) is no attention.
"""

from __future__ import annotations

from torch.fx import Node

from dgefx.passes.attention.core import AttentionCore, AttentionForm, SearchedGraph
from dgefx.passes.attention.unfused import UnfusedSearch, Weighed
from dgefx.passes.labels import varies
from dgefx.passes.locate.grid import GridFinder
from dgefx.passes.locate.token_ids import TokenIds
from dgefx.passes.ops import Op, argument, named
from dgefx.passes.walk import behind, breadth_first

_MOVES_OR_JOINS = named(Op.MOVES | Op.JOINS)
_FORM = AttentionForm("softmax")


def _vary(found: TokenIds | None, axes: tuple[int, ...]) -> bool | None:
    """Whether different tokens lie along an axis of a value; None where that is not known."""
    if found is None or found.ids.dim() < max(-axis for axis in axes):
        return None
    return any(varies(found.ids, axis) for axis in axes)


def non_qk_cores(
    searched: SearchedGraph, cores: list[AttentionCore], finder: GridFinder
) -> list[AttentionCore]:
    """Softmaxes of a flat capture that weigh its tokens without being attention of `cores`."""
    outputs = {core.output for core in cores}
    scored = {node for core in cores for node, _ in core.key_axes}
    samples = {core.output for core in cores if core.form.levels}
    search = UnfusedSearch(searched)

    def unmoved(node: Node) -> list[Node]:
        return node.all_input_nodes if searched.name(node) in _MOVES_OR_JOINS else []

    found = []
    for softmax in searched.calls.get("softmax", ()):
        axis = search.softmax_axis(softmax)
        if softmax in scored or axis is None:
            continue
        for weighed in search.weighed(softmax, axis):
            product = weighed.product
            node, values = product.node, product.operand(weighed.value)
            if node in outputs or not any(n.op == "placeholder" for n in behind(values)):
                continue
            before: set[Node] = set(breadth_first([values], unmoved))
            if samples & before:
                continue
            along = _vary(finder.token_ids(values), product.summed[weighed.value])
            if along is None:
                along = not _joined(search, weighed)
            if along:
                edge = (node, product.operands[weighed.value])
                found.append(AttentionCore(_FORM, softmax, values, values, node, frozenset({edge})))
    return found


def _joined(search: UnfusedSearch, weighed: Weighed) -> bool:
    """Whether what is summed over was stacked: branches or experts, not tokens."""
    values, summed = weighed.product.operand(weighed.value), weighed.product.summed
    for node in search.searched.calls.get("stack", ()):
        axis, rank = argument(node, 1, "dim", 0), len(node.meta.get("shape", ()))
        if not isinstance(axis, int) or not rank:
            continue
        for user, source, place in search.reached(node, axis % rank - rank):
            if (user, source) == (weighed.product.node, values) and place in summed[weighed.value]:
                return True
    return False
