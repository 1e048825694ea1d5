"""What a block is besides the values of its parameters, as something that can be compared.

`description` is of a block that was not traced: blocks with equal ones are planned once.
`trace_signature` is of a traced block: blocks with equal ones share a rewritten graph, and
`plan_signature` what was verified once for their code. Where something cannot be compared there is
no signature, and the block is planned and verified alone. Used by `passes.plan.graph_cache`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from dgefx.copying import MODULE_ATTRIBUTES
from dgefx.nn.callspec import CallSpec
from dgefx.nn.guards import Guards
from dgefx.passes.layout import Layout
from dgefx.passes.ops import Op, named, op_name
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.trace.block_trace import Trace

#: objects that are equal where their values are
_PLAIN = (
    type(None),
    bool,
    int,
    complex,
    str,
    bytes,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
#: operations that floats among the arguments only scale
_SCALES = named(Op.SCALES)


class _NotComparable(Exception):
    """Something of which equality cannot be told."""


class _Identity:
    """An object that equals nothing but itself; kept, so that no other one takes its place."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def only_scales(value: Any) -> bool:
    """Whether a number only scales: a graph written for it holds for any other of its sign."""
    return isinstance(value, float) and 1e-6 < abs(value) < 1e6 and abs(value) != 1.0


def _kind(value: Tensor) -> Hashable:
    """A tensor without its elements."""
    if type(value.data) is not Tensor or value.layout is not torch.strided:
        raise _NotComparable
    return type(value), value.dtype, value.device, tuple(value.shape), value.stride()


def _content(value: Tensor) -> Hashable:
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return _kind(value), hashlib.sha256(data.numpy().tobytes()).digest()


def _weights(value: Tensor) -> Hashable:
    """A parameter, which may take any other values; constants of whole numbers may not."""
    return _kind(value) if value.is_floating_point() else _content(value)


def _frozen(
    value: Any,
    names: Mapping[Any, Hashable] = MappingProxyType({}),
    scales: bool = False,
) -> Hashable:
    """A value as something that can be compared, tensors by their elements.

    Args:
        names: of nodes, and by id of tensors that are compared by name as well.
        scales: whether floats that only scale are compared by their sign.
    """

    def frozen(part: Any) -> Hashable:
        return _frozen(part, names, scales)

    if isinstance(value, fx.Node) and value in names:
        return "node", names[value]
    if isinstance(value, Tensor):
        if id(value) in names:
            return names[id(value)], _content(value)
        # equal today, but each will learn by itself
        return _Identity(value) if value.requires_grad else _content(value)
    if isinstance(value, float):
        known = scales and only_scales(value)
        return float, ("+" if value > 0 else "-") if known else repr(value)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(frozen, value))
    if isinstance(value, dict):
        return type(value), tuple((frozen(key), frozen(part)) for key, part in value.items())
    if isinstance(value, slice):
        return slice, frozen(value.start), frozen(value.stop), frozen(value.step)
    if type(value) is functools.partial:
        parts = (value.func, value.args, value.keywords, vars(value))
        return functools.partial, tuple(map(frozen, parts))
    # 1 and True are equal; what other objects are equal is their own affair
    return (type(value), value) if isinstance(value, _PLAIN) else _Identity(value)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that may change gradients."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def module_signature(
    module: nn.Module, buffers: Callable[[Tensor], Hashable] = _content
) -> Hashable:
    """Everything about a module but its mode and the values of its parameters.

    Args:
        buffers: what of these counts.
    """
    found: list[Hashable] = []
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    # under which name what is known by several is counted
    first: dict[Any, Hashable] = {id(tensor): name for name, tensor in tensors}
    for name, part in module.named_modules(remove_duplicate=False):
        if part._forward_hooks or part._forward_pre_hooks or has_backward_hooks(part):
            raise _NotComparable
        own = {k: v for k, v in vars(part).items() if k not in MODULE_ATTRIBUTES}
        found.append((name, first.setdefault(id(part), name), type(part), _frozen(own, first)))
        # running statistics scale, as parameters do
        of_buffers = _weights if isinstance(part, _NormBase) else buffers
        for held, of_value in ((part._parameters, _weights), (part._buffers, of_buffers)):
            found += [
                (key, first.setdefault(id(value), f"{name}.{key}"), of_value(value))
                for key, value in held.items()
                if value is not None
            ]
    return tuple(found)


def _comparable(make: Callable[[], Hashable]) -> Hashable | None:
    """What is made, None if it cannot be compared: attributes are user code."""
    try:
        key = make()
        hash(key)
    except Exception:
        return None
    return key


def _called_as(spec: CallSpec) -> Hashable:
    return spec.names, _frozen(spec.defaults), spec.inputs, _frozen(spec.fixed)


def description(example: BlockExample, spec: CallSpec) -> Hashable | None:
    """All that decides how a block is traced; None if it cannot be told."""

    def make() -> Hashable:
        given, tree = pytree.tree_flatten(spec.example)
        streams = [v for v in given if isinstance(v, Tensor) and tuple(v.shape) == example.shape]
        if len(streams) != 1:
            raise _NotComparable
        leaves = tuple(_kind(v) if v is streams[0] else _frozen(v) for v in given)
        layout = dataclasses.replace(example.layout, source=None)
        return module_signature(example.block), str(tree), leaves, _called_as(spec), layout

    return _comparable(make)


def _value(node: fx.Node, trace: Trace, stream: fx.Node) -> Hashable:
    """What writing a graph may ask about a traced value."""
    value = trace.values.get(node)
    if isinstance(value, Tensor):
        if node.op == "get_attr":
            return _weights(value) if isinstance(value, nn.Parameter) else _content(value)
        # tables and masks decide what mixes with what, the stream's data does not
        return _content(value) if node.op == "placeholder" and node is not stream else _kind(value)
    if isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
        parts = (_kind(p) if isinstance(p, Tensor) else _frozen(p) for p in value)
        return type(value), tuple(parts)
    owner = getattr(value, "__self__", None)
    if isinstance(owner, Tensor):  # `x.reshape`, which comes with x
        return "method", str(getattr(value, "__name__", value))
    return _frozen(value)


def _called(trace: Trace, name: str) -> Hashable:
    """What writing a graph may ask about a module that is called: of one that works on every token
    alike, whatever it holds, its weights."""
    module = trace.root.get_submodule(name)
    if name not in trace.token_wise:
        return module_signature(module, _weights)
    held = itertools.chain(module.named_parameters(), module.named_buffers())
    return type(module), tuple((key, _weights(value)) for key, value in held)


def trace_signature(trace: Trace, stream: fx.Node, layout: Layout) -> Hashable | None:
    """All but the mode that decides how the graph of a trace is rewritten; None if it cannot be
    told.

    Args:
        stream: the placeholder of the residual stream. layout: of the stream.
    """
    numbers: dict[Any, Hashable] = {node: i for i, node in enumerate(trace.graph.nodes)}

    def make() -> Hashable:
        found: list[Hashable] = [dataclasses.replace(layout, source=None), numbers[stream]]
        for node in trace.graph.nodes:
            called = node.op == "call_module"
            found += (
                (node.op, node.target, node.name),
                _frozen((node.args, node.kwargs), numbers, op_name(node, trace.root) in _SCALES),
                _value(node, trace, stream),
                _called(trace, str(node.target)) if called else None,
            )
        return tuple(found)

    return _comparable(make)


def plan_signature(
    traces: Iterable[Hashable | None],
    guards: Iterable[Guards],
    block: nn.Module,
    spec: CallSpec,
    idle: frozenset[str],
) -> Hashable | None:
    """Equal for blocks that run the same code at any size, but for numbers that only scale; None
    if that cannot be told.

    Args:
        traces: their signatures. guards: what their code holds for. idle: parts of the block that
            do nothing in eval mode, as drop paths, whose rates may differ.
    """
    signatures = tuple(traces)

    def make() -> Hashable:
        if None in signatures or any(map(has_backward_hooks, block.modules())):
            raise _NotComparable
        held = [
            (
                tuple(
                    (s.module, s.name, _frozen(s.value, {}, s.module in idle)) for s in g.settings
                ),
                g.questions and g.questions.source,
                dataclasses.replace(g, settings=(), questions=None, answers=frozenset()),
            )
            for g in guards
        ]
        return signatures, tuple(held), _called_as(spec)

    return _comparable(make)
