"""Functions that become nodes where they are given a proxy.

Those of the `math` module, those that are operations of their own (`passes.ops.own_function`) and
those that users marked with `torch.fx.wrap` are replaced where everybody finds them, one trace at a
time, by wrappers that do the same for plain values. Used by `passes.trace.block_trace` and
`passes.capture`.
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
from types import ModuleType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import _symbolic_trace

from dgefx.passes.ops import OwnFunction, own_function, own_functions

_MATH = frozenset(id(f) for name, f in vars(math).items() if not name.startswith("_"))
_one_trace_at_a_time = threading.RLock()

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
    """What the code of a model's modules, and of functions that they hold, finds by its name."""
    modules = list(root.modules())
    code = [type(module).forward for module in modules]
    code += [value for module in modules for value in vars(module).values() if callable(value)]
    scopes = (getattr(function, "__globals__", {}) for function in code)
    return list({id(scope): scope for scope in scopes}.values())


def _own_function(value: Any) -> OwnFunction | None:
    """What a function, or the one that a `functools.partial` calls, is as an operation."""
    return own_function(value.func if isinstance(value, functools.partial) else value)


def _own_functions(root: nn.Module, attributes: bool = True) -> Found:
    """Where functions that are operations of their own (`passes.ops.own_function`) are found:
    under their names in any module, under any name in the code of `root` and, if asked for, in the
    attributes of its modules."""
    names = own_functions()
    if not names:
        return
    for imported in list(sys.modules.values()):
        scope = getattr(imported, "__dict__", {})
        found = names & scope.keys()
        yield from ((scope, name) for name in found if _own_function(scope[name]))
    for scope in (*_globals(root), *(map(vars, root.modules()) if attributes else ())):
        for name, value in list(scope.items()):
            if callable(value) and _own_function(value):
                yield scope, name


def _no_compilation() -> AbstractContextManager[Any]:
    """No thread compiles meanwhile: Dynamo would find wrappers where there are functions."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    return getattr(frames, "compile_lock", contextlib.nullcontext())


_ORIGINAL = "_dgefx_original"


def original(value: Any) -> Any:
    """What was replaced by a value, or the value itself."""
    while callable(value) and hasattr(value, _ORIGINAL):
        value = getattr(value, _ORIGINAL)
    return value


def _with_wrapper(function: Any, wrapper: Callable[[Any], Any]) -> Any:
    """Of a `functools.partial`, what it calls is wrapped: that is the operation."""
    if not isinstance(function, functools.partial):
        return wrapper(function)
    called = wrapper(function.func)
    if called is function.func:
        return function
    return functools.partial(called, *function.args, **function.keywords)


@contextlib.contextmanager
def _replaced(found: Found, wrapper: Callable[[Any], Any]) -> Iterator[None]:
    """While active, functions are replaced where everybody finds them."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    with _one_trace_at_a_time, _no_compilation():
        try:
            for (_, name), scope in {(id(scope), name): scope for scope, name in found}.items():
                function = scope[name] if name in scope else getattr(builtins, name)
                replacement = _with_wrapper(function, wrapper)
                if replacement is not function:
                    kept.append((scope, name, scope.get(name)))
                    scope[name] = replacement
                    setattr(replacement, _ORIGINAL, function)
            yield
        finally:
            for scope, name, function in reversed(kept):
                if function is None:
                    del scope[name]
                else:
                    scope[name] = function


def _stands_in(function: Any) -> bool:
    own = _own_function(function)
    return own is not None and own.stand_in is not None


def _with_stand_in(function: Any, otherwise: Callable[..., Any], counting: bool = False) -> Any:
    """What runs for a function that has a stand-in, and where that one computes the same."""
    own = own_function(function)
    if own is None or own.stand_in is None:
        return otherwise
    stand_in = own.stand_in

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        found = stand_in(counting, *args, **kwargs)
        return otherwise(*args, **kwargs) if found is NotImplemented else found

    return called


def stand_ins_run(root: nn.Module, counting: bool = False) -> AbstractContextManager[None]:
    """While active, stand-ins run in place of their functions if the code of a model calls some:
    for what the functions themselves cannot (counting FLOPs, gradients on this device).

    Args:
        counting: whether it is enough that they count the same FLOPs.
    """
    last = own_functions()
    for scope in _globals(root) if last else ():
        for value in list(scope.values()):
            known = vars(value) if isinstance(value, ModuleType) else {}
            if _stands_in(value) or any(_stands_in(known.get(name)) for name in last):
                # attributes of modules stay: they are compared
                functions = _own_functions(root, attributes=False)
                return _replaced(functions, lambda f: _with_stand_in(f, f, counting))
    return contextlib.nullcontext()


def wrapped_functions(root: nn.Module, opaque: bool) -> AbstractContextManager[None]:
    """While active, functions of `math` and those that are operations of their own are nodes where
    they are given a proxy, and functions that users marked with `torch.fx.wrap` are if `opaque`;
    else these are traced through."""

    def wrapped(function: Any) -> Any:
        return _with_stand_in(function, _symbolic_trace._create_wrapped_func(function))

    return _replaced(_functions(root, opaque), wrapped)


def seen_functions(root: nn.Module) -> AbstractContextManager[None]:
    """While active, a `TorchFunctionMode` sees the functions that are operations of their own."""
    if not own_functions():
        return contextlib.nullcontext()
    return _replaced(_own_functions(root), lambda f: _with_stand_in(f, _seen_by_modes(f)))


def _seen_by_modes(function: Any) -> Any:
    @functools.wraps(function)
    def seen(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if torch.overrides.has_torch_function(tensors):
            return torch.overrides.handle_torch_function(function, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return seen
