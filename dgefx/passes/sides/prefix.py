"""Where a block takes its prefix tokens apart from the grid, or puts them back.

Rotary embeddings turn the tokens of the grid only: the block cuts the token axis right behind the
prefix tokens and joins the parts again. `passes.emit.packed` needs to know, since packed queries
have prefix tokens in front of every image, not in front of all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from dgefx.passes.ops import argument, op_name
from dgefx.passes.trace.block_trace import Trace

FIRST, REST, BOTH, OTHER = "first", "rest", "both", "other"


def _known(trace: Trace, value: Any) -> Any:
    return trace.values[value] if isinstance(value, fx.Node) else value


def cut_part(node: fx.Node, source: fx.Node, axis: int, prefix: int, trace: Trace) -> str | None:
    """What `node` takes from the token axis of `source`.

    Args:
        axis: the token axis of `source`, on which `prefix` tokens are in front of the grid.

    Returns:
        "first": the prefix tokens, "rest": the grid's, "both": a tuple of the two, "other": a cut
        elsewhere; None: the axis stays whole.
    """
    value = trace.values[source]
    name = "" if node.op == "call_module" else op_name(node, trace.root)
    if not isinstance(value, Tensor):
        return None
    parts = {range(prefix): FIRST, range(prefix, value.shape[axis]): REST}
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if Ellipsis in index:
            place = index.index(Ellipsis)
            filled = (slice(None),) * (value.dim() - len(index) + 1)
            index = (*index[:place], *filled, *index[place + 1 :])
        if len(index) <= axis or index[axis] == slice(None):
            return None if None not in index[: axis + 1] else OTHER
        cut = index[axis]
        others = [i for a, i in enumerate(index) if a != axis]
        if not isinstance(cut, slice) or any(i != slice(None) for i in others):
            return OTHER
        bounds = slice(*(_known(trace, b) for b in (cut.start, cut.stop, cut.step)))
        return parts.get(range(value.shape[axis])[bounds], OTHER)
    if name in ("split", "split_with_sizes"):
        along = argument(node, 2, "dim", 0)
        if not isinstance(along, int) or along % value.dim() != axis:
            return None
        sizes = argument(node, 1, "split_size")
        found = [_known(trace, s) for s in sizes] if isinstance(sizes, (tuple, list)) else []
        return BOTH if found == [prefix, value.shape[axis] - prefix] else OTHER
    if name in ("select", "narrow", "chunk", "unbind", "tensor_split"):
        along = argument(node, 1 if name in ("select", "narrow", "unbind") else 2, "dim", 0)
        return OTHER if isinstance(along, int) and along % value.dim() == axis else None
    return None


def joined_parts(node: fx.Node, body: fx.Node) -> fx.Node | None:
    """What `node`, a `cat`, puts in front of `body`; None if it does anything else."""
    parts = argument(node, 0, "tensors")
    if not isinstance(parts, (tuple, list)) or len(parts) != 2 or parts[1] is not body:
        return None
    return parts[0] if isinstance(parts[0], fx.Node) else None
