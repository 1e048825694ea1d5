"""Attention written out: a product of queries and keys, a softmax, a product with the values.

Whichever way the products are written (matmul, einsum, queries or keys on the left, values on
either side) and whatever happens to the scores in between, as long as keys stay keys: element by
element, moved, mixed between heads. Followed is the axis of the scores on which the keys lie; it is
the one that the softmax normalises and that the second product sums over. Used by
`passes.attention.core`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, map_arg

from dgefx.passes.ops import MOVEMENT, Op, argument, named, op_name

#: the value of a node that is no tensor, and a tensor of the right shape for one that is
Values = Callable[[Node], Any]

_PRODUCTS = named(Op.PRODUCT)
_KEEPS_AXES = named(Op.ELEMENTWISE | Op.CASTS | Op.SAME) | {"softmax"}
#: mixes the last axis, or the channels of an image
_MIXES = {"linear": -1, "layer_norm": -1, "rms_norm": -1, "conv2d": -3, "batch_norm": None}


@dataclass(frozen=True)
class Product:
    """A product of two values.

    operands: their positions among the arguments. kept: per operand, (its own axis, axis in the
    result) of what only it has. summed: per operand, the axes that are summed over. All axes are
    negative.
    """

    node: Node
    operands: tuple[int, int]
    kept: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]
    summed: tuple[tuple[int, ...], tuple[int, ...]]

    def operand(self, index: int) -> Node:
        node = self.node.args[self.operands[index]]
        assert isinstance(node, Node)
        return node


@dataclass(frozen=True)
class UnfusedAttention:
    """An attention that is written out.

    key: which operand of `scores` the keys are. value: which operand of `output` the values are.
    query_axes: axes of the queries on which their tokens may lie. key_axes: scores and weights,
    and what lies between, with the axis of the keys.
    """

    scores: Product
    output: Product
    key: int
    value: int
    query_axes: tuple[int, ...]
    key_axes: frozenset[tuple[Node, int]]


@dataclass(frozen=True)
class Weighed:
    """A softmax and a product that sums over what it normalises. value: which operand of `product`
    the softmax weighs."""

    softmax: Node
    product: Product
    value: int


def _rank(value: Any) -> int:
    return value.dim() if isinstance(value, Tensor) else 0


def product_of(node: Node, root: nn.Module | None, values: Values) -> Product | None:
    """What a matmul or a two-operand einsum multiplies; None for anything else."""
    name = op_name(node, root)
    if name not in _PRODUCTS or node.op == "call_module":
        return None
    if name == "einsum":
        return _einsum_product(node, values)
    if len(node.args) < 2 or not all(isinstance(a, Node) for a in node.args[:2]):
        return None
    if any(_rank(values(a)) < 2 for a in node.all_input_nodes[:2]):
        return None
    places = (1, 0) if _is_reflected(node) else (0, 1)
    return Product(node, places, (((-2, -2),), ((-1, -1),)), ((-1,), (-2,)))


def _is_reflected(node: Node) -> bool:
    return "rmatmul" in str(getattr(node.target, "__name__", node.target))


def _spelled_out(equation: str, ranks: list[int]) -> list[str] | None:
    """The axis labels of an equation's operands and of its result, "..." as labels of its own."""
    terms, result = equation.replace(" ", "").split("->")
    labels = [*terms.split(","), result]
    if "..." in equation:
        spare = [a for a in string.ascii_letters if a not in equation]
        counts = [
            rank - len(term) + 3 if "..." in term else 0
            for term, rank in zip(labels, [*ranks, 0], strict=False)
        ]
        counts[-1] = max(counts[:-1])  # broadcast against each other, aligned on the right
        if min(counts[:-1]) < 0:
            return None
        dots = ["".join(spare[:count][::-1]) for count in counts]
        labels = [term.replace("...", own) for term, own in zip(labels, dots, strict=True)]
    return None if any("." in term for term in labels) else labels


def _einsum_product(node: Node, values: Values) -> Product | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        return None
    if not isinstance(equation, str) or equation.count("->") != 1 or equation.count(",") != 1:
        return None
    if len(operands) != 2 or not all(isinstance(o, Node) for o in operands):
        return None
    ranks = [_rank(values(o)) for o in operands if isinstance(o, Node)]
    spelled = _spelled_out(equation, ranks)
    if spelled is None:
        return None
    *labels, result = spelled
    kept: list[tuple[tuple[int, int], ...]] = []
    summed: list[tuple[int, ...]] = []
    for own, other in (labels, labels[::-1]):
        only = [label for label in own if label in result and label not in other]
        kept.append(tuple((own.index(a) - len(own), result.index(a) - len(result)) for a in only))
        shared = [label for label in own if label in other and label not in result]
        summed.append(tuple(own.index(a) - len(own) for a in shared))
    return Product(node, (1, 2), (kept[0], kept[1]), (summed[0], summed[1]))


#: an axis, or the rows and columns that a view cuts it into; negative
Place = int | tuple[int, int]


class _Follower:
    """Carries one axis of a value forward through what keeps it apart from all others."""

    def __init__(self, root: nn.Module | None, values: Values) -> None:
        self.root, self.values = root, values

    def through(self, node: Node, source: Node, axis: Place) -> Place | None:
        """Where `axis` of `source` lies in `node`, or None if it does not stay an axis."""
        name = op_name(node, self.root)
        if not isinstance(self.values(node), Tensor):
            return None
        if name in _KEEPS_AXES or (name == "set_item" and source is node.args[0]):
            return axis
        if name in _MIXES:
            mixed = _MIXES[name]
            pointwise = name != "conv2d" or self._is_pointwise(node)
            return axis if pointwise and isinstance(axis, int) and axis != mixed else None
        if name in MOVEMENT and node.op != "call_module":
            return self._moved(node, source, axis)
        return None

    def _is_pointwise(self, node: Node) -> bool:
        if node.op == "call_module":
            assert self.root is not None
            weight: Any = self.root.get_submodule(str(node.target)).weight
        else:
            weight = argument(node, 1, "weight")
            weight = self.values(weight) if isinstance(weight, Node) else weight
        return isinstance(weight, Tensor) and tuple(weight.shape[2:]) == (1, 1)

    def _moved(self, node: Node, source: Node, axis: Place) -> Place | None:
        """Runs the movement on numbers along the axis."""
        shape = list(self.values(source).shape)
        axes = (axis,) if isinstance(axis, int) else axis
        if -min(axes) > len(shape):
            return None
        line = [1] * len(shape)
        for place in axes:
            line[place] = shape[place]
        count = math.prod(line)
        numbers = torch.arange(count).view(line).expand(shape)
        args, kwargs = map_arg(
            (node.args, node.kwargs), lambda n: numbers if n is source else self.values(n)
        )
        try:
            if node.op == "call_method":
                moved = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                moved = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None
        if not isinstance(moved, Tensor):
            return None
        found = [a - moved.dim() for a in range(moved.dim()) if _varies(moved, a)]
        if math.prod(moved.shape[a] for a in found) != count:
            return None
        if len(found) == 1:
            return found[0]
        return (found[0], found[1]) if len(found) == 2 and found[0] + 1 == found[1] else None


def _varies(numbers: Tensor, axis: int) -> bool:
    if numbers.shape[axis] < 2 or numbers.stride(axis) == 0:
        return False
    return not torch.equal(numbers, numbers.narrow(axis, 0, 1).expand_as(numbers))


def _softmax_axis(node: Node, root: nn.Module | None, rank: int) -> int | None:
    if node.op == "call_module":
        assert root is not None
        axis: Any = getattr(root.get_submodule(str(node.target)), "dim", None)
    else:
        axis = argument(node, 1, "dim")
    return axis % rank - rank if isinstance(axis, int) else None


class UnfusedSearch:
    """Finds the attentions of one graph that are written out.

    Attributes:
        unscored: softmaxes that weigh something in a product although no product of queries and
            keys leads to them; see `passes.attention.non_qk`.
    """

    def __init__(self, graph: Graph, root: nn.Module | None, values: Values) -> None:
        self.graph, self.root, self.values = graph, root, values
        self._follower = _Follower(root, values)
        self.unscored: list[Weighed] = []

    def find(self) -> list[UnfusedAttention]:
        """In the order of their scores."""
        found: dict[Node, UnfusedAttention] = {}
        scored: set[Node] = set()
        for node in self.graph.nodes:
            if not node.op.startswith("call_") or node in found:
                continue
            scores = product_of(node, self.root, self.values)
            if scores is None:
                continue
            for key, softmax, axis in self._softmaxes(scores):
                for output, value in self._sums(softmax, axis):
                    scored.add(softmax)
                    axes = tuple(own for own, _ in scores.kept[1 - key])
                    keys = self._key_axes(scores, key)
                    written = UnfusedAttention(scores, output, key, value, axes, keys)
                    found.setdefault(output.node, written)
        for node in self.graph.nodes:
            if node.op.startswith("call_") and op_name(node, self.root) == "softmax":
                self._note_unscored(node, scored)
        return list(found.values())

    def _note_unscored(self, softmax: Node, scored: set[Node]) -> None:
        rank = _rank(self.values(softmax))
        axis = _softmax_axis(softmax, self.root, rank) if rank else None
        if softmax in scored or axis is None:
            return
        for product, value in self._sums(softmax, axis):
            self.unscored.append(Weighed(softmax, product, value))

    def reached(self, start: Node, axis: int) -> Iterator[tuple[Node, Node, Place]]:
        """(reader, what it reads, where the axis lies there), as far as it can be followed."""
        seen: set[Node] = {start}
        front: list[tuple[Node, Place]] = [(start, axis)]
        while front:
            node, place = front.pop(0)
            for user in node.users:
                yield user, node, place
                following = self._follower.through(user, node, place)
                if following is not None and user not in seen:
                    seen.add(user)
                    front.append((user, following))

    def _softmaxes(self, scores: Product) -> Iterator[tuple[int, Node, int]]:
        """(which operand holds the keys, softmax, axis of the keys)."""
        for key, kept in enumerate(scores.kept):
            for _, axis in kept:
                for user, _, place in self.reached(scores.node, axis):
                    if op_name(user, self.root) != "softmax":
                        continue
                    rank = _rank(self.values(user))
                    if not isinstance(place, int) or not rank:
                        continue
                    if _softmax_axis(user, self.root, rank) == place:
                        yield key, user, place

    def _key_axes(self, scores: Product, key: int) -> frozenset[tuple[Node, int]]:
        reached = (self.reached(scores.node, axis) for _, axis in scores.kept[key])
        return frozenset(
            (node, axis)
            for way in reached
            for _, node, place in way
            for axis in ((place,) if isinstance(place, int) else place)
        )

    def _sums(self, softmax: Node, axis: int) -> Iterator[tuple[Product, int]]:
        """(product that sums over the keys, which operand the values are)."""
        for user, weights, place in self.reached(softmax, axis):
            product = product_of(user, self.root, self.values)
            if product is None:
                continue
            for index in (0, 1):
                if product.operand(index) is weights and place in product.summed[index]:
                    yield product, 1 - index
