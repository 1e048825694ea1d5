"""Sampling cores: deformable attention, in a flat or a traced graph.

Its queries do not meet keys: they say where to look (offsets from a reference point) and how much
(weights), both by linear projections. `grid_sample` reads a dense map there. So the sampling grid
is the query side and the sampled map is keys and values at once. Used by `passes.attention.core`.

A `grid_sample` alone is no attention: spatial transformers, flow warping and the interpolation of
position embeddings read maps too. What tells attention is that the samples themselves are summed
with weights of a softmax. Samples that become keys and values by a projection (as in "Vision
Transformer with Deformable Attention") meet a softmax only there, and that is the core.

torch's FLOP counter counts no `grid_sample`, in neither model.
"""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from dgefx.passes.ops import ELEMENTWISE, Op, argument, named, op_name

_JOINS = named(Op.MOVES | Op.JOINS | Op.CASTS)
_WEIGHS = named(Op.PRODUCT) | {"mul"}
_BEHIND_WEIGHTS = ELEMENTWISE | _JOINS | {"softmax"}


def sampled_map(node: Node, root: nn.Module | None = None) -> tuple[Node, Node, int | str] | None:
    """(sampling grid, map, place of the map among the arguments) of a `grid_sample` that is
    attention; None of any other node."""
    if op_name(node, root) not in ("grid_sample", "grid_sampler"):
        return None
    value, grid = argument(node, 0, "input"), argument(node, 1, "grid")
    if not isinstance(value, Node) or not isinstance(grid, Node):
        return None
    if not _is_weighed(node, root):
        return None
    return grid, value, 0 if node.args else "input"


def _is_weighed(sample: Node, root: nn.Module | None) -> bool:
    """Whether the samples, moved at most, are multiplied by weights of a softmax."""
    samples = {sample}
    front = [sample]
    while front:
        for user in front.pop().users:
            name = op_name(user, root)
            if name in _WEIGHS:
                others = [n for n in user.all_input_nodes if n not in samples]
                if others and all(_is_softmax(n, root, samples) for n in others):
                    return True
            elif name in _JOINS and user not in samples:
                samples.add(user)
                front.append(user)
    return False


def _is_softmax(node: Node, root: nn.Module | None, samples: set[Node]) -> bool:
    """Whether a value is a softmax, moved or changed element by element, and none of samples."""
    seen: set[Node] = set()
    front = [node]
    found = False
    while front:
        current = front.pop()
        if current in samples:
            return False
        name = op_name(current, root)
        if current in seen or not current.op.startswith("call_") or name not in _BEHIND_WEIGHTS:
            continue
        seen.add(current)
        if name == "softmax":
            found = True
        else:
            front.extend(current.all_input_nodes)
    return found
