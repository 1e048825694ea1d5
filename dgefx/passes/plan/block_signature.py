"""What a block is besides the values of its parameters, as something that can be compared.

Used by `passes.plan.graph_cache`, which plans blocks of the same structure once.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import itertools
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from dgefx.nn.callspec import CallSpec
from dgefx.passes.layout import Layout
from dgefx.passes.ops import Op, named, op_name
from dgefx.passes.trace.tracer import Trace

_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
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
#: what floats among the arguments do not change the places of
_SCALES = named(Op.SCALES)
#: what of a tensor's elements does not add to the others, and of how many it has to be so that
#: one cannot tell from a block what another one mixes (a kernel that passes its input on)
_NEGLIGIBLE, _SPARSE = 1e-6, 1e-2


class _Unknown(Exception):
    """Something that cannot be compared."""


class _Same:
    """An object that equals nothing but itself; kept, so that no other one takes its place."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def is_free(value: Any) -> bool:
    """Whether a number only scales: any other of its sign would do for the split."""
    return isinstance(value, float) and 1e-6 < abs(value) < 1e6 and abs(value) != 1.0


def _kind(value: Tensor) -> Hashable:
    if type(value.data) is not Tensor or value.layout is not torch.strided:
        raise _Unknown
    return type(value), value.dtype, value.device, tuple(value.shape), value.stride()


def _digest(value: Tensor) -> bytes:
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).digest()


def _content(value: Tensor) -> Hashable:
    return _kind(value), _digest(value)


def _weights(value: Tensor) -> Hashable:
    """A parameter: any other values would do, unless many of them are as good as not there.

    Constant ones do not count: the split adds noise to them.
    """
    if not value.is_floating_point():
        return _content(value)
    size = value.detach().abs()
    there = size > _NEGLIGIBLE * (size.max() if size.numel() else 1.0)
    is_constant = not size.numel() or bool(value.max() - value.min() <= 1e-3 * size.max())
    if is_constant or float((~there).float().mean()) <= _SPARSE:
        return _kind(value)
    return _kind(value), _digest(there)


def _frozen(
    value: Any,
    numbers: Mapping[fx.Node, int] = MappingProxyType({}),
    scales: bool = False,
    owned: Mapping[int, str] = MappingProxyType({}),
) -> Hashable:
    """A value as something that can be compared, tensors by their elements.

    Args:
        numbers: of nodes. scales: whether its free floats are compared by their sign.
        owned: names, by id, of tensors that are compared by these as well.
    """

    def frozen(part: Any) -> Hashable:
        return _frozen(part, numbers, scales, owned)

    if isinstance(value, fx.Node) and value in numbers:
        return "node", numbers[value]
    if isinstance(value, Tensor):
        if id(value) in owned:
            return owned[id(value)], _content(value)
        # equal today, but each will learn by itself
        return _Same(value) if value.requires_grad else _content(value)
    if isinstance(value, float):
        return float, ("+" if value > 0 else "-") if scales and is_free(value) else repr(value)
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
    return (type(value), value) if isinstance(value, _PLAIN) else _Same(value)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that may change gradients."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _module(
    module: nn.Module,
    buffers: Callable[[Tensor], Hashable],
    idle: frozenset[str] = frozenset(),
) -> Hashable:
    """Everything about a module but its mode and the values of its parameters.

    Args:
        buffers: what of these counts. idle: parts whose floats do not.
    """
    found: list[Hashable] = []
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    # under which name what is known by several is counted
    first = {id(tensor): name for name, tensor in tensors}

    def named(name: str, part: nn.Module | Tensor) -> str:
        return first.setdefault(id(part), name)

    for name, part in module.named_modules(remove_duplicate=False):
        if part._forward_hooks or part._forward_pre_hooks or has_backward_hooks(part):
            raise _Unknown
        own = {k: v for k, v in vars(part).items() if k not in _OWN_ATTRIBUTES}
        found.append(
            (name, named(name, part), type(part), _frozen(own, scales=name in idle, owned=first))
        )
        # running statistics scale, as parameters do
        of_buffers = _weights if isinstance(part, _NormBase) else buffers
        for own_tensors, of_value in ((part._parameters, _weights), (part._buffers, of_buffers)):
            found += [
                (key, named(f"{name}.{key}", value), of_value(value))
                for key, value in own_tensors.items()
                if value is not None
            ]
    return tuple(found)


def _known(make: Callable[[], Hashable]) -> Hashable | None:
    """What is made, None if it cannot be compared: attributes are user code."""
    try:
        key = make()
        hash(key)
    except Exception:
        return None
    return key


def call_structure(
    block: nn.Module,
    spec: CallSpec,
    shape: tuple[int, ...],
    layout: Layout,
    idle: frozenset[str] = frozenset(),
) -> Hashable | None:
    """All that decides how a block is traced and split; None if it cannot be told.

    Stricter than `structure`, without which it saves the trace.

    Args:
        spec: of its call. shape, layout: of its stream.
        idle: parts that do nothing in eval mode. With them, all that decides how the block runs in
            eval mode at other sizes.
    """

    def make() -> Hashable:
        given, tree = pytree.tree_flatten(spec.example)
        streams = [v for v in given if isinstance(v, Tensor) and tuple(v.shape) == shape]
        if len(streams) != 1:
            raise _Unknown
        leaves = [_kind(v) if v is streams[0] else _frozen(v) for v in given]
        return (
            _module(block, _content, idle),
            (str(tree), tuple(leaves)),
            (spec.names, _frozen(spec.defaults), spec.inputs, _frozen(spec.fixed)),
            dataclasses.replace(layout, source=None),
        )

    return _known(make)


def _value(node: fx.Node, trace: Trace, stream: fx.Node) -> Hashable:
    """What the split may ask about a traced value."""
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
    """What the split may ask about a module that is called: of one that works on every token alike,
    whatever it holds, its weights."""
    module = trace.root.get_submodule(name)
    if name not in trace.apart:
        return _module(module, _weights)
    held = itertools.chain(module.named_parameters(), module.named_buffers())
    return type(module), tuple((key, _weights(value)) for key, value in held)


def structure(trace: Trace, stream: fx.Node, layout: Layout) -> Hashable | None:
    """All but the mode that decides how a traced block is split; None if it cannot be told.

    Args:
        stream: the placeholder of the residual stream. layout: of the stream.
    """
    numbers = {node: index for index, node in enumerate(trace.graph.nodes)}

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

    return _known(make)
