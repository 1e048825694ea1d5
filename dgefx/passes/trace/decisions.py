"""What a trace decided on: the branches and numbers that Python made of types and sizes.

A trace takes the branch that the example takes. Decisions on a type are asked again for the other
floating types: the block holds for those in which all of them come out the same. Decisions on the
sizes of the stream become a small graph of their own, which the converted block asks at run time
(`dgefx.nn.guards`). Filled by `passes.trace.tracer`, read by `passes.trace.guards` and
`passes.plan.plan`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dgefx.ambient import working_dtype
from dgefx.nn.guards import FLOATS
from dgefx.passes.errors import TraceError
from dgefx.passes.ops import RANDOM, Op, named, op_name
from dgefx.passes.trace.tensor_versions import tensors_of
from dgefx.passes.walk import breadth_first

_SHAPED_BY_DATA = named(Op.SHAPED_BY_DATA)
_READS_ELEMENTS = named(Op.READS_ELEMENTS)
#: what blocks ask before they clamp half precision
_CHECKS_RANGE = named(Op.CHECKS_RANGE)


@dataclass
class Decisions:
    """root: the traced module. values: of the nodes of the trace. dtype: the floating type that the
    block is traced for, although the trace runs in `base`. fixed_types: whether the types of values
    are constants. branches: what bool() was asked of. numbers: of what int(), float(), len() or a
    loop made a number. looked_into: devices and types by whose name or hash code may decide.
    """

    root: nn.Module
    dtype: torch.dtype
    fixed_types: bool = False
    values: dict[fx.Node, Any] = field(default_factory=dict)
    base: torch.dtype = field(default_factory=working_dtype)
    branches: list[fx.Node] = field(default_factory=list)
    numbers: list[fx.Node] = field(default_factory=list)
    looked_into: list[Any] = field(default_factory=list)

    # -- while the block is traced -----------------------------------------------------------

    def branch(self, node: fx.Node) -> bool:
        """What `bool(node)` is."""
        self._refuse_data(node)
        self.branches.append(node)
        return bool(self._in_type(node, self.dtype))

    def number(self, node: fx.Node) -> Any:
        """The value that Python makes a number of, which it stays."""
        self._refuse_data(node)
        self.numbers.append(node)
        return self.values[node]

    def counted(self, node: fx.Node) -> Any:
        """The value whose parts Python counts."""
        if not tensors_of(self.values[node]):
            return self.number(node)
        if has_shape_of_data(node, self.values, self.root):
            raise TraceError(f"a branch or number follows the value of {node.name}, by its size")
        self.numbers.append(node)
        return self.values[node]

    def _refuse_data(self, node: fx.Node) -> None:
        """Raise TraceError where Python is about to fix a number that follows the block's data,
        random numbers, or a parameter, which may be trained. The size of what is selected by the
        data's values follows them.
        """
        for source in breadth_first([node], self._read_for):
            given = source.op == "placeholder" and isinstance(self.values[source], Tensor)
            trained = source.op == "get_attr" and isinstance(self.values[source], nn.Parameter)
            if given or trained:
                raise TraceError(f"a branch or number follows the value of {node.name}")
            name = op_name(source, self.root)
            if name in RANDOM:
                raise TraceError(f"a branch or number follows random numbers, which {name} draws")

    def _read_for(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose elements, or numbers, a node's value is made of."""
        name = op_name(node, self.root)
        if name in _CHECKS_RANGE:
            return []
        # from a tensor to a number only by reading its elements: a size is none of them
        if tensors_of(self.values[node]) or name in _READS_ELEMENTS:
            return node.all_input_nodes
        return [
            source
            for source in node.all_input_nodes
            if not tensors_of(self.values[source])
            or has_shape_of_data(source, self.values, self.root)
        ]

    # -- in other floating types -------------------------------------------------------------

    def _in_type(self, node: fx.Node, dtype: torch.dtype) -> Any:
        """The value of a node that no tensor's elements decide, had the block this type."""
        if dtype is self.base:
            return self.values[node]
        found: dict[fx.Node, Any] = {}

        def value(source: fx.Node) -> Any:
            if source not in found:
                found[source] = self._value_in_type(source, dtype, value)
            return found[source]

        return value(node)

    def _value_in_type(self, node: fx.Node, dtype: torch.dtype, value: Any) -> Any:
        here = self.values[node]
        if here is self.base and _reads_type(node):
            return dtype
        if _reads_item_size(node):
            of = self.values[node.all_input_nodes[0]]
            if isinstance(of, Tensor) and of.dtype is self.base:
                return dtype.itemsize
        if node.op != "call_function" or tensors_of(here):
            return here
        if all(value(source) is self.values[source] for source in node.all_input_nodes):
            return here
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def types(self) -> frozenset[torch.dtype]:
        """The floating types in which every branch is the one that was taken."""
        if self.knows_one_type():
            return frozenset((self.base,))
        return frozenset(
            dtype
            for dtype in FLOATS
            if all(
                bool(self._in_type(n, dtype)) is bool(self._in_type(n, self.dtype))
                for n in self.branches
            )
        )

    def knows_one_type(self) -> bool:
        """Whether it cannot be told what the branches are in another type."""
        named = any(isinstance(value, torch.dtype) for value in self.looked_into)
        return self.fixed_types or named or self._asks_for("type", "nbytes")

    def asks_for_device(self) -> bool:
        """Whether a branch follows the device."""
        named = any(isinstance(value, torch.device) for value in self.looked_into)
        return named or self._asks_for(
            "device", "is_cuda", "is_cpu", "is_mps", "is_xpu", "get_device"
        )

    def _asks_for(self, *names: str) -> bool:
        """Whether a branch follows one of these attributes or methods of a tensor."""
        return any(
            (n.target is getattr and n.args[1] in names)
            or (n.op == "call_method" and n.target in names)
            for branch in self.branches
            for n in _size_sources(branch, self.values)
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
    for read in _size_sources(node, values):
        if read.target is operator.getitem and isinstance(values[read], int):
            source, place = read.args
            sizes = values[source] if isinstance(source, fx.Node) else None
            if isinstance(sizes, torch.Size):
                images = axis if sizes == values[stream].shape else 0
                if place in (0, -len(sizes), images):
                    return True
        elif read.target == "size" and read.args[1:] in ((0,), (axis,)):
            return True
    value, images = values[node], values[stream].shape[axis]
    if isinstance(value, Tensor):
        return bool(value.dim()) and value.shape[0] % images == 0
    counted = isinstance(value, (tuple, list)) and not isinstance(value, torch.Size)
    return counted and len(value) > 0 and len(value) % images == 0


def _counts_images(
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
    copies: dict[fx.Node, fx.Node] = {}
    asked: dict[fx.Node, bool] = {}
    for branch in dict.fromkeys(decisions.branches):
        behind = _size_sources(branch, values)
        tensors = {n for n in behind if tensors_of(values[n])}
        sized = any(isinstance(values[n], torch.Size) or n.target == "size" for n in behind)
        given = any(n in inputs for n in behind - tensors)
        known = all(
            isinstance(values[n], Tensor)
            and (
                n in inputs
                or values[n].shape == shape
                or _counts_images(n, behind, values, shape[0])
            )
            for n in tensors
        )
        others = [n for n in behind - tensors if n.op in ("call_module", "get_attr")]
        if not (sized or given) or not known or others or any(map(_reads_type, behind)):
            continue
        for n in graph.nodes:
            if n in tensors:
                copies[n] = inputs.get(n, inputs[stream])
            elif n in behind and n not in copies:
                copies[n] = inputs[n] if n in inputs else made.node_copy(n, copies.__getitem__)
        asked[branch] = bool(values[branch])
    if not asked:
        return None
    made.output(tuple(copies[branch] for branch in asked))
    return made, tuple(asked.values())
