"""Deformable attention: queries sample a map. A form of `passes.attention.registry`.

Its queries do not meet keys: they say where to look (offsets from a reference point) and how much
(weights), both by linear projections. `grid_sample` reads a dense map there. So the sampling grid
is the query side and the sampled map is keys and values at once.

A `grid_sample` alone is no attention: spatial transformers, flow warping and the interpolation of
position embeddings read maps too. What tells attention is that the samples themselves are summed
with weights of a softmax. Samples that become keys and values by a projection (as in "Vision
Transformer with Deformable Attention") meet a softmax only there, and that is the core.

torch's FLOP counter counts no `grid_sample`, in neither model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn
from torch.fx import Node

from dgefx.kernels.packed_sampling import packed_grid_sample
from dgefx.passes.attention.core import PER_IMAGE, AttentionCore, AttentionForm
from dgefx.passes.errors import Refused
from dgefx.passes.ops import Op, argument, named, op_name
from dgefx.passes.walk import breadth_first

if TYPE_CHECKING:
    from dgefx.passes.emit.builder import GraphBuilder

_JOINS = named(Op.MOVES | Op.JOINS | Op.CASTS)
_WEIGHS = named(Op.PRODUCT) | {"mul"}
_BEHIND_WEIGHTS = named(Op.MOVES | Op.JOINS | Op.CASTS | Op.ELEMENTWISE)


class SamplingAttention(AttentionForm):
    """The queries are a grid of places to read a map at."""

    levels = True

    def __init__(self) -> None:
        super().__init__("grid_sample")

    def match(self, node: Node, root: nn.Module | None) -> AttentionCore | None:
        value, grid = argument(node, 0, "input"), argument(node, 1, "grid")
        if not isinstance(value, Node) or not isinstance(grid, Node):
            return None
        if not _is_weighed(node, root):
            return None
        edge = (node, 0 if node.args else "input")
        return AttentionCore(self, grid, value, value, node, frozenset({edge}), (-3, -2))

    def _refuse_unfollowed(self) -> NoReturn:
        raise Refused(
            "deformable attention whose sampling grid does not follow the tokens",
            "output does not follow queries",
        )

    def emit_packed(self, core: AttentionCore, build: GraphBuilder) -> Node:
        """Positions are packed queries, maps are of every image."""
        node, axes = core.output, build.facts.token_axes[core.query]
        rank = len(build.facts.shape(core.query))
        if axes.batch != 0 or axes.axes[0] not in (1, 2) or rank != 4:
            raise Refused(
                f"{node.name}: it does not sample per image and token; {PER_IMAGE}",
                "packed queries",
            )
        self.require_prefix(core, build)
        value, grid = build.context[core.value], build.operand(core.query)
        options: dict[str, Any] = {
            "mode": argument(node, 2, "mode", "bilinear"),
            "padding_mode": argument(node, 3, "padding_mode", "zeros"),
            "align_corners": argument(node, 4, "align_corners"),
        }
        operands = (value, grid, build.routing, axes.axes[0])
        return build.graph.create_node(
            "call_function", packed_grid_sample, operands, options, name=node.name
        )


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

    def before(value: Node) -> list[Node]:
        through = op_name(value, root) in _BEHIND_WEIGHTS and value not in samples
        return value.all_input_nodes if through else []

    found = set(breadth_first([node], before))
    return not found & samples and any(op_name(n, root) == "softmax" for n in found)
