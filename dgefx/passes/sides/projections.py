"""Sides, projections: fused linear layers that both sides want, and who needs which rows.

A linear layer computed in both sides (fused qkv) is followed, on feature numbers, through pure
data movement to the values that the attention reads. Each side then computes only the rows that
arrive there. What cannot be followed is computed whole in both sides: exact, only slower.
Used by `passes.sides.facts`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dgefx.passes.labels import moved, numbered
from dgefx.passes.ops import MOVEMENT, argument, op_name
from dgefx.passes.sides.sides import Sides
from dgefx.passes.sides.token_axes import TokenFacts
from dgefx.passes.trace.block_trace import Trace
from dgefx.passes.trace.copies import HOOKED


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a projection arriving at one value.

    features: sizes that the rows split into. order: permutation of (batch, *tokens, *features) to
    the value's axes without those of size 1 in `singles`. positions: sizes of the token axes, if
    there are several (windows, slots). merged: axis that is one with the next in the value.
    """

    start: int
    stop: int
    features: tuple[int, ...]
    order: tuple[int, ...]
    singles: tuple[int, ...]
    positions: tuple[int, ...] = ()
    merged: int | None = None

    @property
    def keeps_features_last(self) -> bool:
        """Whether a head's features stay the last axis.

        Keys that are laid out transposed in one go make Inductor (torch 2.14) take them for plain
        ones when it replaces matmul-softmax-matmul, and fail.
        """
        return self.order[-1] == len(self.order) - 1

    def position_axis(self, place: int, rank: int) -> int:
        """The axis, of a value with `rank` axes, that one of the token axes becomes."""
        apart = rank + (self.merged is not None)
        axes = [axis for axis in range(apart) if axis not in self.singles]
        axis = axes[self.order.index(1 + place)]
        return axis - (self.merged is not None and axis > self.merged)


@dataclass(frozen=True)
class FusedProjection:
    """A linear layer with the parts of it that each side reads."""

    linear: fx.Node
    query: dict[fx.Node, Part]
    context: dict[fx.Node, Part]

    def parts(self, context: bool) -> dict[fx.Node, Part]:
        """Those of one side."""
        return self.context if context else self.query


def linear_operands(node: fx.Node) -> tuple[fx.Node, Any, Any]:
    """(input, weight, bias) of a linear node; weight and bias are module attribute names for
    call_module, else what the call was given."""
    source = argument(node, 0, "input")
    assert isinstance(source, fx.Node)
    if node.op == "call_module":
        return source, f"{node.target}.weight", f"{node.target}.bias"
    return source, argument(node, 1, "weight"), argument(node, 2, "bias")


def moves_data(node: fx.Node, trace: Trace) -> bool:
    """Whether a node but moves data; one that stops gradients has to stay."""
    if not node.op.startswith("call_") or node.op == "call_module":
        return False
    name = op_name(node, trace.root)
    return name in MOVEMENT and name != "detach"


class _Rows:
    """Follows (position, feature) labels of a projection's output through data movement."""

    def __init__(self, facts: TokenFacts, linear: fx.Node) -> None:
        self.facts = facts
        shape = facts.values[linear].shape
        self.images, self.count = shape[0], shape[-1]
        self.rows_per_image = shape[1:-1].numel()
        self.labels: dict[fx.Node, Any] = {linear: numbered(shape, range(len(shape)))}

    def _follow(self, node: fx.Node) -> Any:
        if node not in self.labels:
            self._follow(node.all_input_nodes[0])
            values, root = self.facts.values, self.facts.trace.root
            self.labels[node] = moved(node, self.labels, values.__getitem__, root)
        return self.labels[node]

    def part(self, node: fx.Node) -> Part | None:
        """How the projection's rows lie in `node`, or None if they are not one plain range."""
        labels = self._follow(node)
        if not isinstance(labels, Tensor):
            return None
        found = self._plain_part(labels)
        if found is not None:
            return found
        for axis, size in enumerate(labels.shape):
            if size % self.images == 0 and size > self.images:  # images and heads on one axis
                split = self._plain_part(labels.unflatten(axis, (self.images, -1)))
                if split is not None:
                    return dataclasses.replace(split, merged=axis)
        return None

    def _plain_part(self, numbers: Tensor) -> Part | None:
        if not numbers.numel():
            return None
        position, feature = numbers // self.count, numbers % self.count
        batch = None
        tokens: list[tuple[int, int]] = []  # (step, axis)
        features: list[int] = []
        for axis, size in enumerate(numbers.shape):
            if size == 1:
                continue
            step, own = _step(position, axis), _step(feature, axis)
            if step == self.rows_per_image and batch is None and own == 0:
                batch = axis
            elif step and own == 0:
                tokens.append((step, axis))
            elif step == 0:
                features.append(axis)
            else:
                return None
        places = [axis for _, axis in sorted(tokens, reverse=True)]
        sizes = tuple(numbers.shape[a] for a in features)
        lengths = tuple(numbers.shape[a] for a in places)
        if batch is None or torch.Size(lengths).numel() != self.rows_per_image:
            return None
        axes = [a for a, size in enumerate(numbers.shape) if size > 1]
        start = int(feature.min())
        stop = start + int(torch.Size(sizes).numel())
        source = [batch, *places, *features]
        order = tuple(source.index(axis) for axis in axes)
        if stop > self.count or not sizes or len(order) != len(source):
            return None
        rows = torch.arange(self.images * self.rows_per_image).view(self.images, *lengths, 1)
        rows = (rows * self.count + torch.arange(start, stop)).unflatten(-1, sizes).permute(order)
        if not torch.equal(rows, numbers.squeeze()):
            return None
        singles = tuple(a for a, size in enumerate(numbers.shape) if size == 1)
        return Part(start, stop, sizes, order, singles, lengths if len(lengths) > 1 else ())


def _step(numbers: Tensor, axis: int) -> int | None:
    """The constant step of `numbers` along `axis` (its first one; checked as a whole later)."""
    first = numbers.select(axis, 0).reshape(-1)[:1]
    second = numbers.select(axis, 1).reshape(-1)[:1]
    return int(second - first)


def fused_projections(facts: TokenFacts) -> list[FusedProjection]:
    """Linear layers of both sides whose rows can be told apart."""
    found = []
    for node in facts.trace.graph.nodes:
        both = node in facts.sides.query_side and node in facts.sides.context_side
        if not both or facts.name(node) != "linear":
            continue
        if node.op == "call_module":
            module = facts.trace.root.get_submodule(str(node.target))
            if type(module) is not torch.nn.Linear or hasattr(module, HOOKED):
                continue
        rows = _Rows(facts, node)
        query, context = (_side_parts(rows, facts, node, context) for context in (False, True))
        if query and context:
            found.append(FusedProjection(node, query, context))
    return found


def _side_parts(
    rows: _Rows, facts: TokenFacts, node: fx.Node, context: bool
) -> dict[fx.Node, Part] | None:
    """The values of a side through which `node` is read, or nothing if one cannot be told.

    As far along the data movement as every reader can still be told its rows.
    """
    readers = [user for user in node.users if _reads(user, node, facts.sides, context)]
    if all(
        moves_data(user, facts.trace) and argument(user, 0, "input") is node for user in readers
    ):
        deeper = [_side_parts(rows, facts, user, context) for user in readers]
        if all(found is not None for found in deeper):
            parts = {n: part for found in deeper if found for n, part in found.items()}
            if all(part.keeps_features_last for part in parts.values()):
                return parts
    part = rows.part(node)
    return None if part is None else {node: part}


def _reads(user: fx.Node, node: fx.Node, sides: Sides, context: bool) -> bool:
    """Whether `user` reads `node` as it is in the given side."""
    if user in sides.query_side:
        crossings = {crosses for source, crosses in sides.sources(user) if source is node}
        if context in crossings:
            return True
    return context and user in sides.context_side
