"""What the traced code calls on, reads from and writes to modules.

`torch.fx.Tracer.trace` patches `nn.Module` itself, so that models which other threads run meanwhile
go through the tracer as well. Here the modules of the traced copy, and they alone, are of derived
classes for the time, which tell the tracer. Used by `passes.trace.tracer`.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import functools
from collections.abc import Iterator, MutableMapping
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.copying import MODULE_ATTRIBUTES
from dgefx.nn.guards import Setting
from dgefx.passes.errors import TraceError
from dgefx.passes.trace.wrapped_functions import original

if TYPE_CHECKING:
    from dgefx.passes.trace.tracer import ConcolicTracer

_PLAIN = (
    *(type(None), bool, int, float, complex, str, enum.Enum, type),
    *(torch.dtype, torch.device, FunctionType, BuiltinFunctionType),
)
_MISSING = object()


def is_setting(value: Any) -> bool:
    """Whether a value is compared by what it is: a number, flag, function, or several of them."""
    if isinstance(value, (tuple, list)):
        return all(is_setting(part) for part in value) and value != []
    if isinstance(value, dict):  # an empty one is to be filled
        return bool(value) and all(is_setting(part) for part in (*value, *value.values()))
    return isinstance(value, _PLAIN)


#: what stands for the two in the names of attributes
_HEIGHT_AND_WIDTH = (("H", "W"), ("h", "w"), ("height", "width"), ("rows", "columns"))


def size_attributes(block: nn.Module, grid: tuple[int, int]) -> dict[tuple[str, str], int]:
    """(module, attribute) -> axis of the grid, of the numbers that a model may tell a block its
    grid by, as in `block.H, block.W = H, W`."""
    found: dict[tuple[str, str], int] = {}
    for part, module in block.named_modules():
        own = {name: value for name, value in vars(module).items() if type(value) is int}
        for name, value in own.items():
            beside = {name.replace(a, b) for a, b in _HEIGHT_AND_WIDTH if a in name}
            for other in sorted(beside):
                if value == grid[0] and own.get(other) == grid[1]:
                    found[part, name], found[part, other] = 0, 1
    return found


class ModuleState:
    """The plain attributes of modules that forward reads and writes.

    A number, flag or function that forward reads from `self` is a constant of the traced graph. So
    it becomes a guard of the converted block (`dgefx.nn.guards`): changed later, it is not ignored.
    What forward writes (`self.last = x`) no generated code would write again.
    """

    def __init__(self) -> None:
        self._read: dict[tuple[str, str], Any] = {}
        self._written: dict[tuple[str, str], tuple[Any, Any]] = {}

    def read(self, module: str, name: str, value: Any) -> None:
        """Note a read."""
        self._read.setdefault((module, name), value)

    def write(self, module: str, name: str, before: Any, value: Any) -> None:
        """Note a write."""
        first, _ = self._written.get((module, name), (before, value))
        self._written[module, name] = first, value

    def was_written(self, module: str, name: str) -> bool:
        """Whether forward itself set an attribute."""
        return (module, name) in self._written

    def settings(self) -> tuple[Setting, ...]:
        """Attributes as they were first read."""
        return tuple(Setting(*key, original(value)) for key, value in self._read.items())

    def changed(self) -> list[str]:
        """Names of attributes that forward gave another value than they had."""
        return [
            f"{module}.{name}" if module else name
            for (module, name), (before, value) in self._written.items()
            if not (is_setting(before) and Setting(module, name, before).is_now(value))
        ]


def _is_shared(name: str, value: Any) -> bool:
    return not name.startswith("__") and not callable(value) and is_setting(value)


#: a base that type checkers do not hold against `MutableMapping`
_Dict: Any = dict


class _HeldTensors(MutableMapping[str, Any], _Dict):
    """The parameters or buffers of a module, as the traced code reads them: by whichever method,
    `MutableMapping` has it from `__getitem__`."""

    def __init__(self, module: nn.Module, held: dict[str, Any], tracer: ConcolicTracer) -> None:
        _Dict.__init__(self, held)
        self._module, self._tracer = module, tracer

    def __getitem__(self, name: str) -> Any:
        value = _Dict.__getitem__(self, name)
        return self._tracer.read_tensor(value) if isinstance(value, Tensor) else value

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self:
            self._tracer.write_setting(self._module, name, _Dict.__getitem__(self, name), value)
        _Dict.__setitem__(self, name, value)

    def __iter__(self) -> Iterator[str]:
        # of Python: `dict(held)` and `{**held}` go past `__getitem__` where it is that of `dict`
        return _Dict.__iter__(self)

    def __reversed__(self) -> Iterator[str]:
        return _Dict.__reversed__(self)

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    __delitem__, __len__, __contains__ = _Dict.__delitem__, _Dict.__len__, _Dict.__contains__


class _Underived(nn.Module):
    """First of the bases of a class, it keeps the others from hearing that somebody derives from
    them: some keep a list of who does, ask for keywords, or forbid it."""

    def __init_subclass__(cls, **_options: Any) -> None:
        """Does not ask those after it."""


def _derived(kind: Any, tracer: ConcolicTracer) -> Any:
    """A class like `kind` whose instances tell of themselves."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    #: settings that the class keeps for its instances
    shared = {n for base in bases for n, v in vars(base).items() if _is_shared(n, v)}

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return tracer.call_module(self, functools.partial(kind.__call__, self), args, kwargs)

    def read(self: nn.Module, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if tracer.executing or (name in MODULE_ATTRIBUTES and name != "training"):
            return value
        if name in shared or name in object.__getattribute__(self, "__dict__"):
            return tracer.read_setting(self, name, value) if is_setting(value) else value
        return value

    def write(self: nn.Module, name: str, value: Any) -> None:
        tracer.write_setting(self, name, vars(self).get(name, _MISSING), value)
        kind.__setattr__(self, name, value)

    added = {
        "__call__": call,
        "__getattribute__": read,
        "__setattr__": write,
        **{name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")},
    }
    # not by the user's metaclass, which may do as much as `__init_subclass__`
    made_by = abc.ABCMeta if isinstance(kind, abc.ABCMeta) else type
    return made_by.__new__(type(kind), kind.__name__, (_Underived, kind), added)


@contextlib.contextmanager
def heard(root: nn.Module, tracer: ConcolicTracer) -> Iterator[None]:
    """While active, `tracer` hears of calls, reads and writes of all modules of `root`, and of
    those that modules hold outside the module tree, in lists and the like.

    Args:
        root: a copy that nobody else holds: its modules are of derived classes for the time.
    """
    own = (v for m in root.modules() for k, v in vars(m).items() if k not in MODULE_ATTRIBUTES)
    hidden = (leaf for leaf in pytree.tree_leaves(list(own)) if isinstance(leaf, nn.Module))
    kinds = {module: type(module) for module in (*root.modules(), *hidden)}
    held = [(m, name, vars(m)[name]) for m in kinds for name in ("_parameters", "_buffers")]
    try:
        for module, name, tensors in held:
            vars(module)[name] = _HeldTensors(module, tensors, tracer)
        derived = {kind: _derived(kind, tracer) for kind in dict.fromkeys(kinds.values())}
        for module, kind in kinds.items():
            try:
                object.__setattr__(module, "__class__", derived[kind])
            except (AttributeError, TypeError) as error:  # nothing would be heard of its settings
                raise TraceError(f"{kind.__name__} fixes the class of its instances") from error
        yield
    finally:
        for module, kind in kinds.items():
            with contextlib.suppress(AttributeError, TypeError):
                object.__setattr__(module, "__class__", kind)
        for module, name, before in held:
            # what forward added may be in the graph, what it replaced is noted as written
            now = vars(module)[name]
            before.update((key, dict.__getitem__(now, key)) for key in now if key not in before)
            vars(module)[name] = before
