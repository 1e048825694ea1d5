"""Pass 3, trace: one block module as its own symbolic graph.

A concolic tracer: proxies are symbolic, and every one carries the value it has for the example
call, so Python control flow on sizes, flags or data takes the branch that the model takes. Calls
of `torch.nn` modules stay calls (parameters, dropout and hooks stay alive); everything else is
traced through. A block is traced once in eval and once in train mode, since `self.training` is
decided while tracing. Next: `passes.split`.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dgefx.nn.callspec import CallSpec


class TraceError(ValueError):
    """A block that cannot be traced; the message says where."""


class ConcolicProxy(fx.Proxy):
    """A symbolic value that knows what it is in the example call."""

    tracer: ConcolicTracer

    @property
    def _value(self) -> Any:
        return self.tracer.values[self.node]

    def __len__(self) -> int:
        return len(self._value)

    def __index__(self) -> int:
        return operator.index(self._value)

    def __int__(self) -> int:
        return int(self._value)

    def __float__(self) -> float:
        return float(self._value)

    def __contains__(self, item: Any) -> bool:
        return item in self._value

    def __hash__(self) -> int:
        return id(self)


class ConcolicTracer(fx.Tracer):
    """See the module docstring.

    Args:
        spec: the example call.
        leaves: modules to keep as calls although they are not from `torch.nn`.
    """

    def __init__(self, spec: CallSpec, leaves: frozenset[nn.Module] = frozenset()) -> None:
        super().__init__(autowrap_modules=(math,))
        self.proxy_buffer_attributes = True
        self.spec = spec
        self.leaves = leaves
        self.values: dict[fx.Node, Any] = {}
        self._executing = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.leaves or isinstance(m, nn.MultiheadAttention):
            return True
        return type(m).__module__.startswith("torch.nn") and not any(m.children())

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names = self.spec.input_names()
        example = self.spec.bind((), self.spec.example)
        proxies = []
        for name, value in zip(names, example, strict=True):
            self._next_input = value
            proxies.append(self.create_proxy("placeholder", name, (), {}))

        def run(root: nn.Module, *leaves: Any) -> Any:
            return root_fn(root, **self.spec.assemble(list(leaves)))

        return run, [self.root, *proxies]

    def proxy(self, node: fx.Node) -> ConcolicProxy:
        return ConcolicProxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        node = proxy.node
        if kind == "placeholder":
            self.values[node] = self._next_input
        elif kind != "output":
            self.values[node] = self._execute(node)
        return proxy

    def _execute(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        self._executing = True
        try:
            with torch.no_grad():
                return run_node(node, self.root, args, kwargs)
        except Exception as error:
            raise TraceError(f"{node.format_node()} failed while tracing: {error}") from error
        finally:
            self._executing = False

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._executing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._executing:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.values[obj.node])

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = self.values[obj.node]
        count = value.shape[0] if isinstance(value, Tensor) else len(value)
        return iter([operator.getitem(obj, i) for i in range(count)])

    def keys(self, obj: fx.Proxy) -> Any:
        return self.values[obj.node].keys()


def run_node(node: fx.Node, root: nn.Module, args: Any, kwargs: Any) -> Any:
    """Execute one node of any of this library's graphs."""
    if node.op == "get_attr":
        value: Any = root
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    if node.op == "call_module":
        return root.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    raise TraceError(f"cannot execute {node.op} node {node}")


_FUNCTIONAL = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
#: fill a tensor that was just made: nothing else can hold its old value
_FILLS = frozenset("bernoulli_ uniform_ normal_ fill_ zero_ copy_ random_ exponential_".split())


def _functionalise(graph: fx.Graph) -> None:
    """`x += y` becomes `x + y`: a value is shared by two worlds, so nothing may change it.

    Whatever read the changed value later reads the new one.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _FUNCTIONAL:
            node.target = _FUNCTIONAL[node.target]
        elif node.op == "call_method" and node.target.endswith("_") and node.target not in _FILLS:
            plain = node.target.rstrip("_")
            if node.target.startswith("_") or not hasattr(Tensor, plain):
                continue
            node.target = plain
        else:
            continue
        changed = node.args[0]
        if isinstance(changed, fx.Node):
            for user in list(changed.users):
                if user > node:
                    user.replace_input_with(changed, node)


@dataclass
class Trace:
    """A block's own graph. `root` is a copy of the block (without hooks) that it runs on."""

    graph: fx.Graph
    root: nn.Module
    spec: CallSpec
    values: dict[fx.Node, Any]
    constants: dict[str, Tensor]  # tensors that are no parameter or buffer of the block


#: marks modules of a traced copy that had hooks: they must be called, not bypassed
HOOKED = "_dgefx_hooked"


def strip_user_hooks(model: nn.Module) -> nn.Module:
    """Remove forward hooks from a copy, so that user code never sees a proxy.

    Those of torch itself (weight norm, spectral norm) compute parameters and stay.
    """
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                owner = hook if hasattr(hook, "__module__") else type(hook)
                setattr(module, HOOKED, True)
                if not str(owner.__module__).startswith("torch."):
                    del hooks[key]
    return model


def shadow(block: nn.Module) -> nn.Module:
    """A copy to trace and try things on."""
    return strip_user_hooks(copy.deepcopy(block))


def _childless(root: nn.Module) -> frozenset[nn.Module]:
    return frozenset(m for m in root.modules() if not any(m.children()) and m is not root)


def trace(block: nn.Module, spec: CallSpec, training: bool) -> Trace:
    """Trace `block` as `spec` calls it.

    Args:
        block: not changed; a copy is traced.
        training: trace the train-mode graph (dropout, drop path) instead of the eval one.

    Raises:
        TraceError: with the operation that could not be traced.
    """
    error: Exception | None = None
    for keep_custom in (False, True):
        root = shadow(block).train(training)
        tracer = ConcolicTracer(spec, _childless(root) if keep_custom else frozenset())
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
                graph = tracer.trace(root)
        except Exception as found:  # any user code may raise anything while traced
            error = error or found
            continue
        _functionalise(graph)
        names = {n for n, _ in root.named_parameters(remove_duplicate=False)}
        names |= {n for n, _ in root.named_buffers(remove_duplicate=False)}
        constants = {}
        for node in graph.nodes:
            if node.op == "get_attr" and node.target not in names:
                constants[str(node.target)] = run_node(node, root, (), {})
        return Trace(graph, root, spec, tracer.values, constants)
    raise TraceError(f"cannot be traced: {type(error).__name__}: {error}")
