"""Blocks of the same structure are split once: what two traces must share to share their graphs.

The blocks of a vision transformer mostly differ in the values of their parameters and in the
probabilities of their drop paths, and mostly do in train mode what they do in eval mode. The split
looks at neither. Asked by `passes.rewrite` between trace and split; every block is verified by
itself afterwards, whether its graph was split for it or for a twin.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from dgefx.nn.callspec import CallSpec
from dgefx.passes.grid import Layout
from dgefx.passes.mutation import tensors_of
from dgefx.passes.split import SplitBlock, split
from dgefx.passes.trace import Trace

if TYPE_CHECKING:
    from dgefx.passes.rewrite import BlockPlan

_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


class _Unknown(Exception):
    """Something that cannot be compared."""


class _Scalar(float):
    """A float of a traced graph that knows which of them it is."""

    place: int


def _is_free(value: Any) -> bool:
    """Whether a number only scales: any other of its sign would do for the split."""
    return isinstance(value, float) and value not in (0.0, 1.0, -1.0) and math.isfinite(value)


def _kind(value: Tensor) -> Hashable:
    return type(value), value.dtype, value.device, tuple(value.shape), value.stride()


def _content(value: Tensor) -> Hashable:
    if type(value.detach()) is not Tensor or value.layout is not torch.strided:
        raise _Unknown
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return _kind(value), hashlib.sha256(data.numpy().tobytes()).digest()


def _frozen(value: Any, numbers: dict[fx.Node, int] | None = None, exact: bool = False) -> Hashable:
    """A value as something that can be compared, tensors by their elements.

    Args:
        numbers: of nodes. exact: every float by its value.
    """

    def frozen(part: Any) -> Hashable:
        return _frozen(part, numbers, exact)

    if isinstance(value, fx.Node) and numbers is not None:
        return "node", numbers[value]
    if isinstance(value, Tensor):
        return _content(value)
    if _is_free(value) and not exact:
        return "positive" if value > 0 else "negative"
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(frozen, value))
    if isinstance(value, dict):
        return dict, tuple((key, frozen(part)) for key, part in value.items())
    if isinstance(value, slice):
        return slice, frozen(value.start), frozen(value.stop), frozen(value.step)
    if not isinstance(value, Hashable):
        raise _Unknown
    return type(value), value  # 1, 1.0 and True are equal


def _module(module: nn.Module, exact: bool = False) -> Hashable:
    """Everything about a module but its mode and the values of its parameters.

    Args:
        exact: its floats and buffers by their values.
    """
    found = []
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            raise _Unknown
        own = {k: v for k, v in vars(part).items() if k not in _OWN_ATTRIBUTES}
        parameters = part.named_parameters(recurse=False)
        kinds = tuple((key, type(value.data), _kind(value)) for key, value in parameters)
        of_buffer = _content if exact else _kind
        buffers = tuple((key, of_buffer(value)) for key, value in part.named_buffers(recurse=False))
        found.append((name, type(part), _frozen(own, exact=exact), kinds, buffers))
    return tuple(found)


def is_same_code(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules do the same with inputs of any size: they have the same classes, settings
    and shapes. False where that cannot be told."""
    try:
        return one is other or _module(one) == _module(other)
    except _Unknown:
        return False


def call_structure(
    block: nn.Module, spec: CallSpec, leaves: list[Any], shape: tuple[int, ...], layout: Layout
) -> Hashable | None:
    """All that decides how a block is traced and split; None if it cannot be told.

    Stricter than `structure`, without which it saves the trace.

    Args:
        leaves: the graph inputs of its call. shape, layout: of its stream.
    """
    streams = [v for v in leaves if isinstance(v, Tensor) and tuple(v.shape) == shape]
    if len(streams) != 1:
        return None
    inputs = [_kind(v) if v is streams[0] else v for v in leaves]
    fields = (spec.names, spec.defaults, spec.inputs, spec.fixed)
    try:
        key = (
            _module(block, exact=True),
            _frozen((inputs, fields), exact=True),
            dataclasses.replace(layout, source=None),
        )
        hash(key)
    except (_Unknown, TypeError):
        return None
    return key


def _value(node: fx.Node, trace: Trace, stream: fx.Node) -> Hashable:
    """What the split may ask about a traced value."""
    value = trace.values.get(node)
    if isinstance(value, Tensor):
        # tables and masks decide what mixes with what, parameters and the stream's data do not
        free = isinstance(value, nn.Parameter) and value.is_floating_point()
        given = node.op == "get_attr" or (node.op == "placeholder" and node is not stream)
        return _content(value) if given and not free else _kind(value)
    if isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
        parts = (_kind(p) if isinstance(p, Tensor) else _frozen(p) for p in value)
        return type(value), tuple(parts)
    if isinstance(getattr(value, "__self__", None), Tensor):  # `x.reshape`, which comes with x
        return "method", value.__name__
    return _frozen(value)


def structure(trace: Trace, stream: fx.Node, layout: Layout) -> Hashable | None:
    """All but the mode that decides how a traced block is split; None if it cannot be told.

    Args:
        stream: the placeholder of the residual stream. layout: of the stream.
    """
    numbers = {node: index for index, node in enumerate(trace.graph.nodes)}
    found: list[Hashable] = [dataclasses.replace(layout, source=None), numbers[stream]]
    try:
        for node in trace.graph.nodes:
            called = node.op == "call_module"
            found += (
                (node.op, node.target, node.name),
                _frozen((node.args, node.kwargs), numbers),
                _value(node, trace, stream),
                _module(trace.root.get_submodule(str(node.target))) if called else None,
            )
        key = tuple(found)
        hash(key)
    except (_Unknown, TypeError):
        return None
    return key


def _number_scalars(graph: fx.Graph) -> list[float]:
    """Mark the free floats of a graph's arguments, in place."""
    found: list[float] = []

    def mark(value: Any) -> Any:
        if not _is_free(value):
            return value
        scalar = _Scalar(value)
        scalar.place = len(found)
        found.append(value)
        return scalar

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, mark)
        node.kwargs = fx.node.map_aggregate(node.kwargs, mark)
    return found


def _with_scalars(graph: fx.Graph, scalars: list[float]) -> fx.Graph:
    """A copy of a split graph with the floats of another trace."""

    def replace(value: Any) -> Any:
        return scalars[value.place] if isinstance(value, _Scalar) else value

    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copy = copies[node] = made.node_copy(node, copies.__getitem__)
        copy.args = fx.node.map_aggregate(copy.args, replace)
        copy.kwargs = fx.node.map_aggregate(copy.kwargs, replace)
    return made


def _ignores_mode(one: Trace, other: Trace) -> bool:
    """Whether two traces of a block, of the same structure, in eval and in train mode, compute the
    same: all their values are equal and nothing keeps statistics (zeros would hide their use).
    The parameters are not looked at: the split of the first trace added noise to its own."""
    called = (str(n.target) for n in one.graph.nodes if n.op == "call_module")
    if any(True for name in called for _ in one.root.get_submodule(name).buffers()):
        return False
    values = (
        [v for n in t.graph.nodes if n.op != "get_attr" for v in tensors_of(t.values.get(n))]
        for t in (one, other)
    )
    return all(torch.equal(a, b) for a, b in zip(*values, strict=True))


@dataclass
class Split:
    """block: the split of `trace`. owner: name of the block that was split for it. scalars: the
    free floats of the trace that was split. key: its structure, if that can be told."""

    block: SplitBlock
    owner: str
    scalars: list[float]
    key: Hashable | None
    trace: Trace | None


class Twins:
    """The splits of one conversion so far.

    plans: of whole blocks, by `call_structure`.
    """

    def __init__(self) -> None:
        self.plans: dict[Hashable, BlockPlan] = {}
        self._found: dict[Hashable, Split] = {}

    def split(
        self,
        trace: Trace,
        stream: fx.Node,
        layout: Layout,
        packs: bool,
        name: str,
        evaluated: Split | None = None,
    ) -> Split:
        """`passes.split.split`, unless that was done for a trace of this structure and mode.

        Args:
            trace: its floats are marked.
            name: of the block. evaluated: what this gave for its trace in eval mode.

        Raises:
            Refused: with the reason why the block stays dense.
        """
        key = structure(trace, stream, layout)
        scalars = _number_scalars(trace.graph)
        known = self._found.get((key, trace.root.training)) if key is not None else None
        if known is None and evaluated is not None and evaluated.trace is not None:
            same = key is not None and key == evaluated.key
            known = evaluated if same and _ignores_mode(evaluated.trace, trace) else None
        if known is None:
            made = Split(split(trace, stream, layout, packs), name, scalars, key, trace)
            if key is not None:  # without the values of the trace, which are large
                self._found[key, trace.root.training] = dataclasses.replace(made, trace=None)
            return made
        block = known.block
        if scalars != known.scalars:
            block = dataclasses.replace(block, graph=_with_scalars(block.graph, scalars))
        return Split(block, known.owner, scalars, key, trace)
