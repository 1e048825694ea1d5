"""Pass 4c, projections: fused linear layers that both sides want, and who needs which rows.

A linear layer computed in both sides (fused qkv) is followed, on feature numbers, through pure
data movement to the values that the attention reads. Each side then computes only the rows that
arrive there. What cannot be followed is computed whole in both sides: exact, only slower.
Next: `passes.emit.rewrite`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dgefx.passes.ops import MOVEMENT, argument, op_name, run_node
from dgefx.passes.sides.sides import Sides
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


def linear_operands(node: fx.Node) -> tuple[fx.Node, Any, Any]:
    """(input, weight, bias) of a linear node; weight and bias are module attribute names for
    call_module, else what the call was given."""
    source = argument(node, 0, "input")
    assert isinstance(source, fx.Node)
    if node.op == "call_module":
        return source, f"{node.target}.weight", f"{node.target}.bias"
    return source, argument(node, 1, "weight"), argument(node, 2, "bias")


def _moves(node: fx.Node, trace: Trace) -> bool:
    """Whether a node but moves data; one that stops gradients has to stay."""
    name = op_name(node, trace.root)
    return node.op != "call_module" and name in MOVEMENT and name != "detach"


class _Follower:
    """Carries (position, feature) numbers of a projection's output through data movement."""

    def __init__(self, trace: Trace, base: dict[fx.Node, Any], linear: fx.Node) -> None:
        self.trace, self.base, self.linear = trace, base, linear
        shape = base[linear].shape
        self.count = shape[-1]
        positions = torch.arange(shape[:-1].numel()).view(*shape[:-1], 1)
        self.rows_per_image = positions.numel() // shape[0]
        self.numbers: dict[fx.Node, Any] = {
            linear: positions * self.count + torch.arange(self.count)
        }

    def follow(self, node: fx.Node) -> Any:
        if node not in self.numbers:
            source = node.all_input_nodes[0]
            self.follow(source)

            def pick(n: fx.Node) -> Any:
                return self.numbers.get(n, self.base[n])

            args, kwargs = fx.map_arg((node.args, node.kwargs), pick)
            self.numbers[node] = run_node(node, self.trace.root, args, kwargs)
        return self.numbers[node]

    def part(self, node: fx.Node) -> Part | None:
        """How the projection's rows lie in `node`, or None if they are not one plain range."""
        numbers = self.follow(node)
        if not isinstance(numbers, Tensor):
            return None
        found = self._plain_part(numbers)
        if found is not None:
            return found
        images = self.numbers[self.linear].shape[0]
        for axis, size in enumerate(numbers.shape):
            if size % images == 0 and size > images:  # images and heads on one axis
                split = self._plain_part(numbers.unflatten(axis, (images, -1)))
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
        singles = tuple(a for a, size in enumerate(numbers.shape) if size == 1)
        expected = self._arranged(start, stop, sizes, order, singles, lengths)
        if expected is None or not torch.equal(expected, numbers):
            return None
        return Part(start, stop, sizes, order, singles, lengths if len(lengths) > 1 else ())

    def _arranged(
        self,
        start: int,
        stop: int,
        sizes: tuple[int, ...],
        order: tuple[int, ...],
        singles: tuple[int, ...],
        lengths: tuple[int, ...],
    ) -> Tensor | None:
        if stop > self.count or not sizes:
            return None
        images = self.numbers[self.linear].shape[0]
        position = torch.arange(images * self.rows_per_image).view(images, *lengths, 1)
        value = position * self.count + torch.arange(start, stop)
        value = value.unflatten(-1, sizes)
        if value.dim() != len(order):
            return None
        value = value.permute(order)
        for axis in singles:
            value = value.unsqueeze(axis)
        return value if value.numel() else None


def _step(numbers: Tensor, axis: int) -> int | None:
    """The constant step of `numbers` along `axis` (its first one; checked as a whole later)."""
    first = numbers.select(axis, 0).reshape(-1)[:1]
    second = numbers.select(axis, 1).reshape(-1)[:1]
    return int(second - first)


def fused_projections(
    trace: Trace, sides: Sides, base: dict[fx.Node, Any]
) -> list[FusedProjection]:
    """Linear layers of both sides whose rows can be told apart.

    Args:
        base: a value for every node, with at least two images.
    """
    found = []
    for node in trace.graph.nodes:
        if node not in sides.query_side or node not in sides.context_side:
            continue
        if op_name(node, trace.root) != "linear":
            continue
        if node.op == "call_module":
            module = trace.root.get_submodule(str(node.target))
            if type(module) is not torch.nn.Linear or hasattr(module, HOOKED):
                continue
        follower = _Follower(trace, base, node)
        parts: list[dict[fx.Node, Part]] = []
        for side, edges in ((sides.query_side, False), (sides.context_side, True)):
            parts.append(_side_parts(follower, sides, side, edges, trace, node))
        if all(parts):
            found.append(FusedProjection(node, *parts))
    return found


def _side_parts(
    follower: _Follower,
    sides: Sides,
    side: frozenset[fx.Node],
    is_context: bool,
    trace: Trace,
    linear: fx.Node,
) -> dict[fx.Node, Part]:
    """The values in `side` through which the projection is read, or nothing if one cannot be told.

    As far along the data movement as every reader can still be told its rows.
    """

    def held_here(node: fx.Node, deeper: dict[fx.Node, Part]) -> dict[fx.Node, Part] | None:
        """`node` itself where its size is read: it would be projected for that alone. Not if it
        has more rows than what is read through it."""
        sizes = (int, torch.Size)
        if not any(u in side and isinstance(trace.values.get(u), sizes) for u in node.users):
            return None
        part = follower.part(node)
        start = min((p.start for p in deeper.values()), default=0)
        stop = max((p.stop for p in deeper.values()), default=0)
        if part is None or not part.keeps_features_last or (part.start, part.stop) != (start, stop):
            return None
        return {node: part}

    def resolve(node: fx.Node) -> dict[fx.Node, Part] | None:
        readers = [
            user
            for user in node.users
            if _reads(user, node, sides, side, is_context)
            and not isinstance(trace.values.get(user), (int, torch.Size))
        ]
        followed = [u in side and _moves(u, trace) and u.args[0] is node for u in readers]
        if all(followed):
            deeper = [resolve(user) for user in readers]
            if all(found is not None for found in deeper):
                parts = {n: part for found in deeper if found for n, part in found.items()}
                if all(part.keeps_features_last for part in parts.values()):
                    return held_here(node, parts) or parts
        part = follower.part(node)
        return None if part is None else {node: part}

    return resolve(linear) or {}


def _reads(
    user: fx.Node,
    node: fx.Node,
    sides: Sides,
    side: frozenset[fx.Node],
    is_context: bool,
) -> bool:
    """Whether `user` reads `node` as it is in the given side."""
    crossing = user in sides.query_side and any(
        source is node and crosses for source, crosses in sides.sources(user)
    )
    direct = user in sides.query_side and any(
        source is node and not crosses for source, crosses in sides.sources(user)
    )
    if is_context:
        return crossing or user in sides.context_side
    return direct and user in side
