"""What a trace decided on: the branches and numbers that Python made of types and sizes.

A trace takes the branch that the example takes. Decisions on a type are asked again for the other
floating types: the block holds for those in which all of them come out the same. Decisions on the
sizes of the stream become a small graph of their own, which the converted block asks at run time
(`dgefx.nn.guards`). Filled by `passes.trace.tracer`, read by `passes.plan.plan`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dgefx.ambient import working_dtype
from dgefx.nn.guards import FLOATS
from dgefx.passes.ops import Op, named, op_name
from dgefx.passes.trace.mutation import tensors_of
from dgefx.passes.walk import breadth_first

#: how many elements these have depends on what they are given
_SHAPED_BY_DATA = named(Op.SHAPED_BY_DATA)


@dataclass
class Decisions:
    """values: of the nodes of a trace. branches: what bool() was asked of. numbers: of what int(),
    float(), len() or a loop made a number. looked_into: devices and types by whose name or hash
    code may decide. dtype: the floating type that the block is traced for, although the trace runs
    in `base`. fixed: whether the types of values are constants.
    """

    values: dict[fx.Node, Any]
    dtype: torch.dtype
    base: torch.dtype = field(default_factory=working_dtype)
    branches: list[fx.Node] = field(default_factory=list)
    numbers: list[fx.Node] = field(default_factory=list)
    looked_into: list[Any] = field(default_factory=list)
    fixed: bool = False

    def branch(self, node: fx.Node) -> bool:
        """What `bool(node)` is, noted down."""
        self.branches.append(node)
        return bool(self.in_type(node, self.dtype))

    def number(self, node: fx.Node) -> None:
        """Note that Python made a number of a node."""
        self.numbers.append(node)

    def in_type(self, node: fx.Node, dtype: torch.dtype) -> Any:
        """The value of a node that no tensor's elements decide, had the block this type."""
        if dtype is self.base:
            return self.values[node]
        found: dict[fx.Node, Any] = {}

        def value(current: fx.Node) -> Any:
            if current not in found:
                found[current] = self._in_type(current, dtype, value)
            return found[current]

        return value(node)

    def _in_type(self, node: fx.Node, dtype: torch.dtype, value: Any) -> Any:
        here = self.values[node]
        if here is self.base and _reads_type(node):
            return dtype
        if _reads_item_size(node):
            of = self.values[node.all_input_nodes[0]]
            if isinstance(of, Tensor) and of.dtype is self.base:
                return dtype.itemsize
        if not node.op.startswith("call_function") or tensors_of(here):
            return here
        sources = node.all_input_nodes
        if all(value(source) is self.values[source] for source in sources):
            return here
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def asks_device(self) -> bool:
        """Whether a branch follows the device."""
        named = any(isinstance(value, torch.device) for value in self.looked_into)
        asked = self._asked("device", "is_cuda", "is_cpu", "is_mps", "is_xpu", "get_device")
        return named or asked

    def _asked(self, *names: str) -> bool:
        """Whether a branch follows one of these attributes or methods of a tensor."""
        behind = (n for branch in self.branches for n in _size_sources(branch, self.values))
        return any(
            (n.target is getattr and n.args[1] in names)
            or (n.op == "call_method" and n.target in names)
            for n in behind
        )

    def only_here(self) -> bool:
        """Whether it cannot be told what the branches are in another type."""
        named = any(isinstance(value, torch.dtype) for value in self.looked_into)
        return self.fixed or named or self._asked("type", "nbytes")

    def types(self) -> frozenset[torch.dtype]:
        """The floating types in which every branch is the one that was taken."""
        if self.only_here():
            return frozenset((self.base,))
        return frozenset(
            dtype
            for dtype in FLOATS
            if all(
                bool(self.in_type(n, dtype)) is bool(self.in_type(n, self.dtype))
                for n in self.branches
            )
        )


def _reads_type(node: fx.Node) -> bool:
    return node.target is getattr and str(node.args[1]) == "dtype"


def _reads_item_size(node: fx.Node) -> bool:
    """Whether a node is the size of a tensor's elements."""
    if node.op == "call_method":
        return node.target == "element_size"
    return node.target is getattr and str(node.args[1]) == "itemsize"


def has_shape_of_data(node: fx.Node, values: dict[fx.Node, Any], root: nn.Module) -> bool:
    """Whether the shape of a node's value may follow the elements of what it is computed from."""

    def is_computed(source: fx.Node) -> bool:
        return source.op.startswith("call_") and bool(tensors_of(values.get(source)))

    def sources(tensor: fx.Node) -> list[fx.Node]:
        return tensor.all_input_nodes if is_computed(tensor) else []

    tensors = filter(is_computed, breadth_first([node], sources))
    return any(is_shaped_by_data(tensor, values, root) for tensor in tensors)


def is_shaped_by_data(node: fx.Node, values: dict[fx.Node, Any], root: nn.Module) -> bool:
    """Whether an operation gives as many elements as the elements that it is given say."""
    name = op_name(node, root)
    if name in _SHAPED_BY_DATA:
        return True
    if name == "where":
        return len(node.args) + len(node.kwargs) == 1
    if name == "repeat_interleave":
        return any(isinstance(values.get(n), Tensor) for n in node.all_input_nodes[1:])
    if name != "getitem":
        return False
    index = node.args[1] if isinstance(node.args[1], (tuple, list)) else (node.args[1],)
    return any(
        isinstance(part, fx.Node)
        and isinstance(values[part], Tensor)
        and values[part].dtype in (torch.bool, torch.uint8)
        for part in index
    )


def _size_sources(node: fx.Node, values: dict[fx.Node, Any]) -> set[fx.Node]:
    """Nodes behind a number, as far as they are no tensors, and the tensors whose sizes it is."""

    def sources(number: fx.Node) -> list[fx.Node]:
        computed = number.op.startswith("call_") and not tensors_of(values[number])
        return number.all_input_nodes if computed else []

    return set(breadth_first([node], sources))


def follows_batch(node: fx.Node, values: dict[fx.Node, Any], stream: fx.Node, axis: int) -> bool:
    """Whether the first size of a tensor, or that of the images (`axis`) of one that is shaped as
    the stream, is among what a number is made of; or there are as many parts as images."""
    behind = _size_sources(node, values)
    for read in behind:
        if read.target is operator.getitem and isinstance(values[read], int):
            source = read.args[0]
            if isinstance(source, fx.Node) and isinstance(values[source], torch.Size):
                place = read.args[1]
                if place in (0, -len(values[source])) or (
                    values[source] == values[stream].shape and place in (axis,)
                ):
                    return True
        elif read.target == "size" and read.args[1:] in ((0,), (axis,)):
            return True
    value, images = values[node], values[stream].shape[axis]
    if isinstance(value, Tensor):
        return bool(value.dim()) and value.shape[0] % images == 0
    counted = isinstance(value, (tuple, list)) and not isinstance(value, torch.Size)
    return counted and len(value) > 0 and len(value) % images == 0


def _of_images(
    tensor: fx.Node, behind: set[fx.Node], values: dict[fx.Node, Any], images: int
) -> bool:
    """Whether all that is asked of a tensor is its first size, and that is the number of images: of
    a stream with images on the first axis it is the same."""
    sizes = [n for n in behind if tensor in n.all_input_nodes]
    reads = [n for n in behind if any(size in n.all_input_nodes for size in sizes)]
    shapes = all(isinstance(values[n], torch.Size) for n in sizes)
    firsts = all(n.target is operator.getitem and n.args[1] == 0 for n in reads)
    return shapes and firsts and values[tensor].shape[:1] == (images,)


def size_questions(
    decisions: Decisions, graph: fx.Graph, stream: fx.Node
) -> tuple[fx.Graph, tuple[bool, ...]] | None:
    """A graph, with the inputs of the block's own, of all branches that sizes decide, and what they
    were; None without any.

    Sizes that are read off a value of another shape than the stream's, and no argument of the
    block, are left out, but for the number of images: what they are on another grid is not known
    without running the block.
    """
    values, made = decisions.values, fx.Graph()
    shape = values[stream].shape
    inputs = {n: made.placeholder(str(n.target)) for n in graph.nodes if n.op == "placeholder"}
    asked: list[fx.Node] = []
    expected: list[bool] = []
    copies: dict[fx.Node, fx.Node] = {}
    for node in dict.fromkeys(decisions.branches):
        behind = _size_sources(node, values)
        tensors = {n for n in behind if tensors_of(values[n])}
        sized = any(isinstance(values[n], torch.Size) or n.target == "size" for n in behind)
        given = any(n.op == "placeholder" and n not in tensors for n in behind)
        typed = any(_reads_type(n) for n in behind)
        known = all(
            isinstance(values[n], Tensor)
            and (n in inputs or values[n].shape == shape or _of_images(n, behind, values, shape[0]))
            for n in tensors
        )
        calls = all(
            n.op in ("call_function", "call_method", "placeholder") or n in tensors for n in behind
        )
        if not (sized or given) or typed or not known or not calls:
            continue
        for n in tensors:
            copies[n] = inputs.get(n, inputs[stream])
        for n in graph.nodes:
            if n in behind and n not in copies:
                copies[n] = inputs[n] if n in inputs else made.node_copy(n, copies.__getitem__)
        asked.append(copies[node])
        expected.append(bool(values[node]))
    if not asked:
        return None
    made.output(tuple(asked))
    return made, tuple(expected)
