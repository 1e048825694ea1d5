"""In-place operations made functional while a block is traced: which they are, and how.

Used by `passes.trace.tracer`; what else shares the memory that they write to is followed by
`passes.trace.tensor_versions`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from dgefx.passes.errors import TraceError
from dgefx.passes.ops import Op, named
from dgefx.passes.trace.tensor_versions import set_item, shares_memory

if TYPE_CHECKING:
    from dgefx.passes.trace.tracer import ConcolicTracer

_AUGMENTED = "add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift"
#: `x += y` and the like, by the names of their functions in `operator`, with what they compute
AUGMENTED: dict[str, Any] = {
    f"i{name.rstrip('_')}": getattr(operator, name) for name in _AUGMENTED.split()
}

#: there is no functional form, and no reading of what was there
_FILLS = frozenset(f"{name}_" for name in named(Op.FILLS))


def is_fill(node: fx.Node) -> bool:
    """Whether a node writes to memory that was made for it."""
    return node.op == "call_method" and str(node.target) in _FILLS


@dataclass(frozen=True)
class FunctionalForm:
    """The call that computes what an in-place call writes into its first argument.

    fills: it has to run in place, on memory that nothing else reads.
    """

    kind: str
    target: Any
    kwargs: dict[str, Any]
    fills: bool = False


def functional_form(kind: str, target: Any, kwargs: dict[str, Any]) -> FunctionalForm | None:
    """How to compute an in-place call without changing anything; None: it is not in place.

    Raises:
        TraceError: an in-place call that cannot be told apart or done otherwise.
    """
    if kind not in ("call_method", "call_function"):
        return None
    is_method = kind == "call_method"
    name = target if is_method else getattr(target, "__name__", "")
    if kwargs.get("out") is not None:
        raise TraceError(f"{name} writes into a tensor given as out=")
    if name == "__setitem__":
        raise TraceError("a computed value is written into a constant tensor")
    # methods where only the right side is symbolic
    core = name.removeprefix("__").removesuffix("__") if is_method else name
    if core in AUGMENTED and (is_method or target is getattr(operator, core)):
        return FunctionalForm("call_function", AUGMENTED[core], kwargs)
    if not is_method and kwargs.get("inplace") is True:
        return FunctionalForm(kind, target, {**kwargs, "inplace": False})
    if not name.endswith("_") or name.endswith("__") or name.startswith("_"):
        return None
    if name in _FILLS:
        return FunctionalForm(kind, target, kwargs, fills=True)
    module = str(getattr(target, "__module__", "torch") or "torch")
    if not is_method and not module.startswith("torch"):
        return None  # a user's function
    owners = (Tensor,) if is_method else (torch, torch.nn.functional)
    found = (getattr(owner, name[:-1], None) for owner in owners)
    function = next(filter(callable, found), None)
    if function is None:
        raise TraceError(f"{name} changes a tensor in place and has no form that does not")
    return FunctionalForm(kind, name[:-1] if is_method else function, kwargs)


def write_item(tracer: ConcolicTracer, node: fx.Node, index: Any, value: Any) -> None:
    """`tensor[index] = value`, of the tensor that `node` is a version of."""
    now = tracer.tensors.current(node)
    if not isinstance(tracer.values[now], Tensor):
        raise TraceError(f"an item of {node.name}, which is no tensor, is set")
    places, new = tracer.create_arg(index), tracer.create_arg(value)
    now = tracer.tensors.current(node)
    if now.target is set_item and now.args[1:] == (places, new):
        return  # `x[i] += y` has written through its view of x already
    changed = tracer.emit("call_function", set_item, (now, places, new), {})
    tracer.tensors.write(node, changed)


def write(tracer: ConcolicTracer, form: FunctionalForm, args: Any) -> Any:
    """Make an in-place call functional; its tensor holds the result from now on."""
    written, *others = args
    node = written.node if isinstance(written, fx.Proxy) else None
    if node is None or not isinstance(tracer.values[tracer.tensors.current(node)], Tensor):
        # a number, or a tensor that was made without proxies: `mask += x` binds a new value
        if isinstance(written, Tensor):
            if form.fills:
                raise TraceError(f"{form.target} fills a constant tensor with computed values")
            proxy = tracer.create_proxy(form.kind, form.target, args, form.kwargs)
            tracer.changed_constants.append(written)
            return proxy
        return tracer.create_proxy(form.kind, form.target, args, form.kwargs)
    unread = tracer.tensors.is_unread(node)
    rest, kwargs = tracer.create_arg(tuple(others)), tracer.create_arg(form.kwargs)
    source = now = tracer.tensors.current(node)
    if form.fills and not unread:
        source = tracer.emit("call_method", "clone", (now,), {})
    old = tracer.values[now]
    new = tracer.emit(form.kind, form.target, (source, *rest), kwargs)
    value = tracer.values[new]
    if not form.fills and shares_memory(old, value):  # as of `x.unsqueeze_(0)`
        if not tracer.tensors.is_alone(node):
            raise TraceError(f"{new.name} changes the shape of a tensor that is seen elsewhere")
    elif value.shape != old.shape or value.dtype != old.dtype:
        raise TraceError(f"{new.format_node()} has another shape or type in place")
    tracer.tensors.write(node, new)
    return tracer.proxy(tracer.tensors.tensor(node))


def write_by_module(tracer: ConcolicTracer, target: str, args: Any, kwargs: Any) -> Any:
    """A module like nn.ReLU(inplace=True): it stays, on a copy of what others read too."""
    written = next((a for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy)), None)
    if written is None:
        raise TraceError(f"{target} changes a constant tensor in place")
    unread = tracer.tensors.is_unread(written.node)
    old = tracer.tensors.current(written.node)
    new = tracer.emit("call_module", target, tracer.create_arg(args), tracer.create_arg(kwargs))
    if shares_memory(tracer.values[old], tracer.values[new]):  # dropout in eval mode
        tracer.tensors.add(new)
        return tracer.proxy(new)
    if not unread:
        with tracer.graph.inserting_before(new):
            copied = tracer.emit("call_method", "clone", (old,), {})
        new.replace_input_with(old, copied)
    tracer.tensors.write(written.node, new)
    return tracer.proxy(tracer.tensors.tensor(written.node))
