"""Attention written out: a product of queries and keys, a softmax, a product with the values.

Whichever way the products are written (matmul, einsum, queries or keys on the left, values on
either side) and whatever happens to the scores in between, as long as keys stay keys: element by
element, moved, mixed between heads. Followed is the axis of the scores on which the keys lie; it is
the one that the softmax normalises and that the second product sums over. A form of
`passes.attention.registry`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from dgefx.passes.attention.core import AttentionCore, AttentionForm, SearchedGraph
from dgefx.passes.labels import moved, numbered, varies
from dgefx.passes.ops import MOVEMENT, Op, argument, named

_PRODUCTS = named(Op.PRODUCT)
_KEEPS_AXES = named(Op.ELEMENTWISE | Op.CASTS | Op.SAME) | {"softmax"}
#: mixes the last axis, or the channels of an image
_MIXES = {"linear": -1, "layer_norm": -1, "rms_norm": -1, "conv2d": -3, "batch_norm": None}

#: an axis, or the rows and columns that a view cuts it into; negative
Place = int | tuple[int, int]


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
class Weighed:
    """A softmax and a product that sums over what it normalises. value: which operand of `product`
    the softmax weighs."""

    softmax: Node
    product: Product
    value: int


class UnfusedAttention(AttentionForm):
    """Its core's output is the product with the values."""

    def __init__(self) -> None:
        super().__init__("matmul-softmax-matmul")

    def find(self, searched: SearchedGraph) -> list[AttentionCore]:
        """In the order of their scores."""
        search = UnfusedSearch(searched)
        found: dict[Node, AttentionCore] = {}
        if "softmax" not in searched.calls:
            return []
        for node in searched.graph.nodes:
            scores = None if node in found else search.product(node)
            if scores is None:
                continue
            for weighed, key in search.scored(scores):
                output, value = weighed.product, weighed.value
                edges = {
                    (node, scores.operands[key]),
                    (output.node, output.operands[value]),
                }
                core = AttentionCore(
                    self,
                    scores.operand(1 - key),
                    scores.operand(key),
                    output.operand(value),
                    output.node,
                    frozenset(edges),
                    tuple(own for own, _ in scores.kept[1 - key]),
                    search.key_axes(scores, key),
                )
                found.setdefault(output.node, core)
        return list(found.values())


class UnfusedSearch:
    """Follows the axis of the keys through one graph."""

    def __init__(self, searched: SearchedGraph) -> None:
        self.searched = searched

    def product(self, node: Node) -> Product | None:
        """What a matmul or a two-operand einsum multiplies; None for anything else."""
        if self.searched.name(node) not in _PRODUCTS or node.op == "call_module":
            return None
        if self.searched.name(node) == "einsum":
            return self._einsum(node)
        if len(node.args) < 2 or not all(isinstance(a, Node) for a in node.args[:2]):
            return None
        if any(self.searched.rank(a) < 2 for a in node.all_input_nodes[:2]):
            return None
        reflected = "rmatmul" in str(getattr(node.target, "__name__", node.target))
        places = (1, 0) if reflected else (0, 1)
        return Product(node, places, (((-2, -2),), ((-1, -1),)), ((-1,), (-2,)))

    def _einsum(self, node: Node) -> Product | None:
        equation, *operands = node.args
        if not isinstance(equation, str) or equation.count("->") != 1 or equation.count(",") != 1:
            return None
        if len(operands) != 2 or not all(isinstance(o, Node) for o in operands):
            return None
        ranks = [self.searched.rank(o) for o in operands if isinstance(o, Node)]
        spelled = _spelled_out(equation, ranks)
        if spelled is None:
            return None
        *labels, result = spelled
        kept: list[tuple[tuple[int, int], ...]] = []
        summed: list[tuple[int, ...]] = []
        for own, other in (labels, labels[::-1]):
            only = [a for a in own if a in result and a not in other]
            kept.append(
                tuple((own.index(a) - len(own), result.index(a) - len(result)) for a in only)
            )
            shared = [a for a in own if a in other and a not in result]
            summed.append(tuple(own.index(a) - len(own) for a in shared))
        return Product(node, (1, 2), (kept[0], kept[1]), (summed[0], summed[1]))

    def scored(self, scores: Product) -> Iterator[tuple[Weighed, int]]:
        """(softmax of a product and the product that it weighs, which operand holds the keys)."""
        for key, kept in enumerate(scores.kept):
            for _, axis in kept:
                for user, _, place in self.reached(scores.node, axis):
                    if isinstance(place, int) and self.softmax_axis(user) == place:
                        for weighed in self.weighed(user, place):
                            yield weighed, key

    def softmax_axis(self, node: Node) -> int | None:
        """The axis that a softmax normalises, negative; None of any other node."""
        if self.searched.name(node) != "softmax":
            return None
        axis: Any = argument(node, 1, "dim")
        if node.op == "call_module":
            assert self.searched.root is not None
            axis = getattr(self.searched.root.get_submodule(str(node.target)), "dim", None)
        rank = self.searched.rank(node)
        return axis % rank - rank if isinstance(axis, int) and rank else None

    def weighed(self, softmax: Node, axis: int) -> Iterator[Weighed]:
        """The products that sum over what a softmax normalises."""
        for user, weights, place in self.reached(softmax, axis):
            product = self.product(user)
            if product is None:
                continue
            for index in (0, 1):
                if product.operand(index) is weights and place in product.summed[index]:
                    yield Weighed(softmax, product, 1 - index)

    def key_axes(self, scores: Product, key: int) -> frozenset[tuple[Node, int]]:
        """Values and their axes on which the keys lie."""
        reached = (self.reached(scores.node, axis) for _, axis in scores.kept[key])
        return frozenset(
            (node, axis)
            for way in reached
            for _, node, place in way
            for axis in ((place,) if isinstance(place, int) else place)
        )

    def reached(self, start: Node, axis: int) -> Iterator[tuple[Node, Node, Place]]:
        """(reader, what it reads, where the axis lies there), as far as it can be followed."""
        seen: set[Node] = {start}
        front: list[tuple[Node, Place]] = [(start, axis)]
        while front:
            node, place = front.pop(0)
            for user in node.users:
                yield user, node, place
                following = self._through(user, node, place)
                if following is not None and user not in seen:
                    seen.add(user)
                    front.append((user, following))

    def _through(self, node: Node, source: Node, axis: Place) -> Place | None:
        """Where `axis` of `source` lies in `node`, or None if it does not stay an axis."""
        name = self.searched.name(node)
        if not isinstance(self.searched.values(node), Tensor):
            return None
        if name in _KEEPS_AXES or (name == "set_item" and source is node.args[0]):
            return axis
        if name in _MIXES:
            pointwise = name != "conv2d" or self._is_pointwise(node)
            return axis if pointwise and isinstance(axis, int) and axis != _MIXES[name] else None
        return self._moved(node, source, axis) if name in MOVEMENT else None

    def _is_pointwise(self, node: Node) -> bool:
        if node.op == "call_module":
            assert self.searched.root is not None
            weight: Any = self.searched.root.get_submodule(str(node.target)).weight
        else:
            weight = argument(node, 1, "weight")
            weight = self.searched.values(weight) if isinstance(weight, Node) else weight
        return isinstance(weight, Tensor) and tuple(weight.shape[2:]) == (1, 1)

    def _moved(self, node: Node, source: Node, axis: Place) -> Place | None:
        """Runs the movement on labels along the axis."""
        shape = self.searched.values(source).shape
        axes = (axis,) if isinstance(axis, int) else axis
        if -min(axes) > len(shape):
            return None
        try:
            labels = {source: numbered(shape, axes)}
            result = moved(node, labels, self.searched.values, self.searched.root)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None
        if not isinstance(result, Tensor):
            return None
        found = [a - result.dim() for a in range(result.dim()) if varies(result, a)]
        kept = math.prod(result.shape[a] for a in found) == math.prod(shape[a] for a in axes)
        if kept and len(found) == 1:
            return found[0]
        adjacent = kept and len(found) == 2 and found[0] + 1 == found[1]
        return (found[0], found[1]) if adjacent else None


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
