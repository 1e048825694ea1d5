"""Pass 3a, interception: what a tracer hears of a module that runs.

`torch.fx.Tracer.trace` patches `nn.Module` itself, so that models which other threads run meanwhile
go through the tracer as well. Here the modules of the traced copy, and they alone, hand their calls
and reads on. Only functions of the `math` module and those marked with `torch.fx.wrap` are replaced
where everybody finds them, one trace at a time, by wrappers that do the same for plain numbers.
Used by `passes.trace.tracer`.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import _symbolic_trace

from dgefx.passes.ops import own_functions, own_name

#: (attribute, value) -> what the reader gets
Read = Callable[[str, Any], Any]
#: (module, its own call, args, kwargs) -> result
CallModule = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_MATH = frozenset(id(f) for name, f in vars(math).items() if not name.startswith("_"))
_one_trace_at_a_time = threading.RLock()


class _Watched(dict[str, Any]):
    """Parameters or buffers of a module, of which `nn.Module.__getattr__` reads one by its name."""

    def __init__(self, held: dict[str, Any], read: Read) -> None:
        super().__init__(held)
        self.read = read

    def __getitem__(self, name: str) -> Any:
        return self.read(name, super().__getitem__(name))


def _hidden(modules: list[nn.Module]) -> list[nn.Module]:
    """Modules that others hold outside the module tree, in lists and the like."""
    known = set(modules)
    leaves = [leaf for m in modules for leaf in pytree.tree_leaves(list(vars(m).values()))]
    return [leaf for leaf in leaves if isinstance(leaf, nn.Module) and leaf not in known]


@contextlib.contextmanager
def watched_modules(root: nn.Module, call: CallModule, read: Read) -> Iterator[None]:
    """While active, calls of the modules below `root` go to `call`, and reads of the parameters and
    buffers of all its modules to `read`.

    Args:
        root: a copy that nobody else runs.
    """
    modules = list(root.modules())
    called = [m for m in (*modules, *_hidden(modules)) if m is not root]
    before = [(m, m._parameters, m._buffers) for m in modules]
    try:
        for module in called:

            def handed_on(*args: Any, _module: nn.Module = module, **kwargs: Any) -> Any:
                return call(_module, _module._call_impl, args, kwargs)

            # what `nn.Module.__call__` runs if it is set, as by `module.compile()`
            module.__dict__["_compiled_call_impl"] = handed_on
        for module in modules:
            module.__dict__["_parameters"] = _Watched(module._parameters, read)
            module.__dict__["_buffers"] = _Watched(module._buffers, read)
        yield
    finally:
        for module in called:
            module.__dict__.pop("_compiled_call_impl", None)
        for module, parameters, buffers in before:
            for name, held in (("_parameters", parameters), ("_buffers", buffers)):
                now = dict(module.__dict__[name])
                held.clear()
                held.update(now)
                module.__dict__[name] = held


Found = Iterator[tuple[dict[str, Any], str]]


def _functions(root: nn.Module, opaque: bool) -> Found:
    """(namespace, name) of the functions that become nodes where they are given a proxy."""
    for (_, name), scope in list(_symbolic_trace._wrapped_fns_to_patch.items()):
        if opaque or str(scope.get("__name__")).split(".")[0] == "torch":
            yield scope, name
    for scope in (vars(math), *_globals(root)):
        for name, value in list(scope.items()):
            if not name.startswith("_") and callable(value) and id(value) in _MATH:
                yield scope, name
    yield from _own_functions(root)


def _globals(root: nn.Module) -> list[dict[str, Any]]:
    """What the code of a model's modules finds by its name."""
    scopes = (getattr(type(module).forward, "__globals__", {}) for module in root.modules())
    return list({id(scope): scope for scope in scopes}.values())


def _own_functions(root: nn.Module) -> Found:
    """Where functions that are operations of their own (`passes.ops.set_own_names`) are found:
    under their names in any module, under any name in the code and the attributes of `root`."""
    names = own_functions()
    if not names:
        return
    for imported in list(sys.modules.values()):
        scope = getattr(imported, "__dict__", {})
        yield from ((scope, name) for name in names if own_name(scope.get(name)) is not None)
    for scope in (*_globals(root), *map(vars, root.modules())):
        for name, value in list(scope.items()):
            if callable(value) and own_name(value) is not None:
                yield scope, name


@contextlib.contextmanager
def _no_compilation() -> Iterator[None]:
    """No thread compiles meanwhile: Dynamo would find wrappers where there are functions."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    lock = getattr(frames, "compile_lock", None)
    with contextlib.nullcontext() if lock is None else lock:
        yield


_ORIGINAL = "_dgefx_original"


def original(value: Any) -> Any:
    """What was replaced by a value, or the value itself."""
    return getattr(value, _ORIGINAL, value) if callable(value) else value


@contextlib.contextmanager
def _replaced(found: Found, wrapper: Callable[[Any], Any]) -> Iterator[None]:
    """While active, functions are replaced where everybody finds them."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    with _one_trace_at_a_time, _no_compilation():
        try:
            for (_, name), scope in {(id(scope), name): scope for scope, name in found}.items():
                function = scope[name] if name in scope else getattr(builtins, name)
                kept.append((scope, name, scope.get(name)))
                scope[name] = wrapper(function)
                setattr(scope[name], _ORIGINAL, function)
            yield
        finally:
            for scope, name, function in reversed(kept):
                if function is None:
                    del scope[name]
                else:
                    scope[name] = function


def wrapped_functions(root: nn.Module, opaque: bool) -> AbstractContextManager[None]:
    """While active, functions of `math` and those that are operations of their own are nodes where
    they are given a proxy, and functions that users marked with `torch.fx.wrap` are if `opaque`;
    else these are traced through."""
    return _replaced(_functions(root, opaque), _symbolic_trace._create_wrapped_func)


def seen_functions(root: nn.Module) -> AbstractContextManager[None]:
    """While active, a `TorchFunctionMode` sees the functions that are operations of their own."""
    if not own_functions():
        return contextlib.nullcontext()
    return _replaced(_own_functions(root), _seen_by_modes)


def _seen_by_modes(function: Any) -> Any:
    @functools.wraps(function)
    def seen(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if torch.overrides.has_torch_function(tensors):
            return torch.overrides.handle_torch_function(function, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return seen
