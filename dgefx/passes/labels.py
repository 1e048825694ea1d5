"""Where an operation that moves data puts it: integer labels are run through it in place of values.

The one oracle for data movement. What the labels stand for is the caller's affair: tokens of the
image (`passes.locate.token_ids`), tokens in windows (`passes.sides.window_axes`), rows of a fused
projection (`passes.sides.projections`), the axis of the keys (`passes.attention.unfused`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node, map_arg

from dgefx.passes.ops import run_node


def moved(
    node: Node, labels: Mapping[Node, Any], values: Callable[[Node], Any], root: nn.Module | None
) -> Any:
    """What `node` makes of its arguments with labels in the place of some of them.

    Args:
        node: data movement. labels: of the arguments that are followed. values: of all others.
    """

    def pick(source: Node) -> Any:
        return labels[source] if source in labels else values(source)

    args, kwargs = map_arg((node.args, node.kwargs), pick)
    return run_node(node, root, args, kwargs)


def numbered(shape: Sequence[int], axes: Sequence[int], start: int = 0) -> Tensor:
    """Labels of this shape that count along some axes, the last of them fastest, and are equal
    along all others (stride 0)."""
    line = [1] * len(shape)
    for axis in axes:
        line[axis] = shape[axis]
    count = int(torch.Size(line).numel())
    return torch.arange(start, start + count).view(line).expand(tuple(shape))


def varies(ids: Tensor, axis: int) -> bool:
    """Whether numbers differ along an axis."""
    if ids.stride(axis) == 0:
        return False
    return ids.shape[axis] > 1 and not torch.equal(ids, ids.narrow(axis, 0, 1).expand_as(ids))
