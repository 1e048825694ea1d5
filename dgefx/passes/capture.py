"""Capture: the whole model as one flat graph of torch calls, for looking only.

The model runs once, eagerly, under a `TorchFunctionMode` that writes every torch call into an
`fx.Graph` together with the modules it was made in. Whatever runs can be captured: Python control
flow, early exits and data-dependent branches resolve themselves, because nothing is symbolic.
Sizes are constants here, so this graph is never executed or rewritten; `passes.trace.block_trace`
makes the graph that is. Next: `passes.locate.sites`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from dgefx.outputs import Call, clone_call, tensors_in
from dgefx.passes.trace.wrapped_functions import seen_functions


@dataclass(frozen=True)
class ModuleCall:
    """args, kwargs: nodes in the place of tensors, None for one that the graph does not know.
    output: the tensor that was returned, or all that were, where they are in a container."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: fx.Node | tuple[fx.Node, ...]


@dataclass
class Capture:
    """The flat graph. Node meta: `shape`, `dtype`, `stack` (names of the modules it ran in,
    outermost first, each with its call count); `index`: the value of a constant that may be one.

    calls: of each module that ran, by name, in the order in which they first began.
    """

    graph: fx.Graph
    output: Any
    calls: dict[str, list[ModuleCall]] = field(default_factory=dict)

    def runs(self, module: str) -> int:
        """How often a module ran."""
        return len(self.calls.get(module, ()))


class Recorder(TorchFunctionMode):
    """Writes every torch call that yields tensors into a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.stack: list[str] = []
        self.nodes: Any = WeakIdKeyDictionary()
        self.names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        self.names.update({id(b): name for name, b in model.named_buffers(remove_duplicate=False)})

    def _mark(self, node: fx.Node, value: Tensor) -> None:
        node.meta["shape"] = tuple(value.shape)
        node.meta["dtype"] = value.dtype
        node.meta["stack"] = tuple(self.stack)
        self.nodes[value] = node

    def input(self, value: Tensor, name: str) -> None:
        self._mark(self.graph.placeholder(name), value)

    def node_of(self, value: Tensor) -> fx.Node:
        """The node that made `value`; parameters and foreign tensors become constants."""
        node = self.nodes.get(value)
        if node is None:
            name = self.names.get(id(value), "constant")
            node = self.graph.create_node("get_attr", name)
            self._mark(node, value)
            if value.dtype in (torch.int32, torch.int64):
                node.meta["index"] = value
        return node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, (tuple, list)):
            return tuple(self._argument(v) for v in value)
        if isinstance(value, dict):
            return {str(k): self._argument(v) for k, v in value.items()}
        if isinstance(value, (bool, int, float, str, slice, torch.dtype, torch.device, type(None))):
            if isinstance(value, slice):
                return slice(*(self._argument(v) for v in (value.start, value.stop, value.step)))
            return value
        return value if value is Ellipsis else str(value)

    def _record_write(
        self, func: Any, args: Any, kwargs: dict[str, Any], written: list[Tensor]
    ) -> None:
        """`x[i] = y`: what reads x from now on reads the result."""
        sources = (self._argument(a) for a in pytree.tree_leaves((args, kwargs)))
        read = tuple(source for source in sources if isinstance(source, fx.Node))
        for tensor in written:
            before = self.node_of(tensor)
            others = tuple(source for source in read if source is not before)
            node = self.graph.create_node("call_function", _set_item, (before, *others))
            self._mark(node, tensor)
            self._reach_base(tensor, node)

    def _reach_base(self, view: Tensor, node: fx.Node) -> None:
        """A write to a view is one to what it is a view of."""
        base = view._base
        if base is not None and base is not view and base in self.nodes:
            written = self.graph.create_node("call_function", _set_item, (self.nodes[base], node))
            self._mark(written, base)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.einsum and len(args) == 2 and isinstance(args[1], (tuple, list)):
            args = (args[0], *args[1])
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [_version(tensor) for tensor in given]
        result = func(*args, **kwargs)
        written = [t for t, version in zip(given, versions, strict=True) if _version(t) != version]
        is_tensor = isinstance(result, Tensor)
        if is_tensor and not written and any(result is tensor for tensor in given):
            return result  # `x.float()` of what is float already
        if written and not is_tensor:
            self._record_write(func, args, kwargs, written)
            return result
        if not is_tensor and not (
            isinstance(result, (tuple, list)) and any(isinstance(r, Tensor) for r in result)
        ):
            return result
        node = self.graph.create_node(
            "call_function",
            func,
            tuple(self._argument(a) for a in args),
            {k: self._argument(v) for k, v in kwargs.items()},
        )
        if is_tensor:
            self._mark(node, result)
            for tensor in written:
                self._reach_base(tensor, node)
            return result
        node.meta["stack"] = tuple(self.stack)
        for index, part in enumerate(result):
            if isinstance(part, Tensor):
                item = self.graph.create_node("call_function", _getitem, (node, index))
                self._mark(item, part)
        return result


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _set_item(base: Any, *parts: Any) -> Any:
    """Stands for a write to a part of `base`; never run."""
    raise NotImplementedError


_set_item.__name__ = "set_item"


def example_of(node: fx.Node) -> Any:
    """A tensor of the shape that a captured value has, of no memory; None for what is no tensor."""
    shape = node.meta.get("shape")
    return None if shape is None else torch.zeros(()).expand(shape)


def _getitem(parts: Any, index: int) -> Any:
    return parts[index]


_getitem.__name__ = "getitem"


@contextlib.contextmanager
def _module_calls(model: nn.Module, recorder: Recorder) -> Iterator[dict[str, list[ModuleCall]]]:
    """Keeps the recorder's stack of running modules, and notes their calls."""
    calls: dict[str, list[ModuleCall]] = {}
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():

            def enter(_m: nn.Module, _a: Any, name: str = name) -> None:
                recorder.stack.append(name)
                calls.setdefault(name, [])

            def leave(_m: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                recorder.stack.pop()
                given: Call = pytree.tree_map_only(Tensor, recorder.nodes.get, (args, kwargs))
                found = [recorder.nodes.get(tensor) for tensor in tensors_in(output)]
                nodes = tuple(node for node in found if node is not None)
                alone = isinstance(output, Tensor) and nodes
                calls[name].append(ModuleCall(given[0], given[1], nodes[0] if alone else nodes))

            hooks.enter_context(module.register_forward_pre_hook(enter, prepend=True))
            hooks.enter_context(module.register_forward_hook(leave, with_kwargs=True))
        yield calls


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recorder: Recorder | None = None,
) -> Capture:
    """Run `model` once and write down what it did.

    Args:
        model: in eval mode; hooks are added for the run and removed again.
        args, kwargs: the example call.
        recorder: writes the graph; one for `model`, of one's own to ask it meanwhile.
    """
    recorder = recorder or Recorder(model)
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for index, leaf in enumerate(leaves):
        recorder.input(leaf, f"input_{index}")
    with torch.no_grad(), seen_functions(model), _module_calls(model, recorder) as calls, recorder:
        output = model(*args, **kwargs)
    results = tensors_in(output)
    recorder.graph.output(tuple(recorder.node_of(value) for value in results))
    return Capture(recorder.graph, output, calls)


@contextlib.contextmanager
def recording(model: nn.Module, names: set[str]) -> Iterator[dict[str, Call]]:
    """The (cloned) arguments with which each named module is first called while `model` runs."""
    calls: dict[str, Call] = {}
    with contextlib.ExitStack() as hooks:
        for name in names:

            def keep(_m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                if name not in calls:
                    calls[name] = clone_call((args, kwargs))

            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(keep, with_kwargs=True))
        yield calls


@contextlib.contextmanager
def idle_modules(model: nn.Module) -> Iterator[set[str]]:
    """Which modules without children hand on what they get while `model` runs (drop paths in eval
    mode); known when the context ends."""
    idle: dict[str, bool] = {}
    found: set[str] = set()
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if next(module.children(), None) is not None:  # modules may refuse len()
                continue

            def note(_m: nn.Module, args: Any, output: Any, name: str = name) -> None:
                idle[name] = idle.get(name, True) and bool(args) and output is args[0]

            hooks.enter_context(module.register_forward_hook(note))
        yield found
    found.update(name for name, only in idle.items() if only)


def record_calls(
    model: nn.Module, names: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Call]:
    """The (cloned) arguments with which each named module is called in one run of `model`."""
    with torch.no_grad(), recording(model, names) as calls:
        model(*args, **kwargs)
    return calls
