"""Sides, tables: tensors that do not come from the stream but have an entry per token.

Position biases and masks meet the queries by broadcasting or in an einsum. What is found here is
which axes of a table are those of tokens, and at which slots of a window a mask changes, so that no
patch may reach across. Used by `passes.sides.facts` and `passes.emit.tables`.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dgefx.nn.windows import borders_of, usual_step
from dgefx.passes.errors import Refused
from dgefx.passes.ops import ELEMENTWISE
from dgefx.passes.sides.token_axes import TokenAxes, TokenFacts
from dgefx.passes.sides.window_partition import Cuts, Partition, mask_cuts


def table_axes(
    facts: TokenFacts, node: fx.Node, table: fx.Node, held: TokenAxes, rank: int
) -> tuple[int, ...] | None:
    """Axes of a table with an entry per token, where it is broadcast with a value of `rank` axes
    and these token axes; None where it has no such entries.

    Raises:
        Refused: it has another number of entries there.
    """
    shape, sizes = facts.shape(table), facts.axis_sizes(held)
    axes = tuple(axis - (rank - len(shape)) for axis in held.axes)
    if any(a < 0 for a in axes) or tuple(shape[a] for a in axes) != sizes:
        if any(a >= 0 and shape[a] > 1 for a in axes):
            raise Refused(
                f"{node.name} combines tokens with a table of shape {shape} that does not "
                f"follow the query axis",
                "table beside the queries",
            )
        return None
    return axes if max(sizes) > 1 else None


def met_by_broadcasting(facts: TokenFacts, node: fx.Node) -> tuple[TokenAxes, int] | None:
    """Axes and rank of what the operands of `node` are broadcast with, if they are."""
    core = facts.sides.core_at(node)
    fused = core is not None and core.form.gathers_mask
    met = core.query if core is not None and fused else node
    if not fused and facts.name(node) not in ELEMENTWISE:
        return None
    held = facts.token_axes.get(met)
    if held is None or not held.holds_tokens:
        return None
    return held, len(facts.shape(met))


def einsum_tables(facts: TokenFacts, node: fx.Node) -> tuple[str, fx.Node, list[int]]:
    """(equation, operand that holds tokens, positions of operands with an entry per token) of an
    einsum.

    An equation without tables, or one that is not understood, has no positions; so has any other
    operation.
    """
    if facts.name(node) != "einsum" or facts.sides.core_at(node) is not None:
        return "", node, []
    equation, *operands = node.args
    known, asking = facts.token_axes, facts.sides.on_queries
    nodes = [o for o in operands if isinstance(o, fx.Node) and o in known and o in asking]
    nodes = [o for o in nodes if known[o].kind in ("tokens", "grid", "window")]
    if not isinstance(equation, str) or len(nodes) != 1 or "->" not in equation or "." in equation:
        return "", node, []
    equation = equation.replace(" ", "")
    labels = equation.split("->")[0].split(",")
    tokens = nodes[0]
    own = labels[operands.index(tokens)]
    wanted = {own[axis] for axis in known[tokens].axes}
    tables = [
        index
        for index, operand in enumerate(operands)
        if operand is not tokens and wanted & set(labels[index])
    ]
    return equation, tokens, tables


def find_cuts(facts: TokenFacts, in_slots: frozenset[fx.Node]) -> Cuts:
    """Per axis, slots before which patches end because a mask changes there."""
    cuts: tuple[set[int], set[int]] = (set(), set())
    if facts.partition is None:
        return ((), ())
    for node in facts.trace.graph.nodes:
        met = met_by_broadcasting(facts, node) if node in in_slots else None
        for _, source in facts.sides.tables_of(node) if met is not None else ():
            if met is not None and (axes := table_axes(facts, node, source, *met)) is not None:
                found = _cuts_of(facts.trace.values[source], axes, facts.partition, *met)
                for known, new in zip(cuts, found, strict=True):
                    known |= new
    maps = facts.partition.rows, facts.partition.columns
    borders = [borders_of(tokens, usual_step(tokens)) for tokens in maps]
    rows, columns = (
        tuple(sorted(new - set(known))) for new, known in zip(cuts, borders, strict=True)
    )
    return rows, columns


def _cuts_of(
    table: Tensor, axes: tuple[int, ...], partition: Partition, held: TokenAxes, rank: int
) -> tuple[set[int], set[int]]:
    """Slot rows and columns at which a table changes that is added to a value held like this.

    Args:
        axes: slot axes of the table. rank: of the value.
    """
    count = partition.windows[0] * partition.windows[1]
    leads = [held.batch] if held.merged else list(held.windows)
    leads = [a - (rank - table.dim()) for a in leads if a is not None]
    leads = [a for a in leads if a >= 0 and table.shape[a] > 1]
    if not leads or count == 1:
        return set(), set()
    value = table.movedim((*leads, *axes), tuple(range(len(leads) + len(axes))))
    value = value.flatten(0, len(leads) - 1).flatten(1, len(axes))
    if held.merged:
        value = value.unflatten(0, (-1, count, held.inner)).transpose(0, 1).movedim(2, 1)
        value = value.movedim(3, 1)
    if partition.order is not None:
        windows, slots = (torch.tensor(numbers) for numbers in partition.order)
        value = value[windows][:, slots]
    return mask_cuts(value, partition.size)
