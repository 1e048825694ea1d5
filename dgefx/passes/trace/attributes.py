"""What a trace reads from the modules that it goes through, and what it writes to them.

A number, flag or function that forward reads from `self` is a constant of the traced graph. So it
becomes a guard of the converted block (`dgefx.nn.guards`): changed later, it is not ignored. What
forward writes (`self.last = x`) no generated code would write again. Used by `passes.trace.tracer`
on its own copy of a block.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from dgefx.nn.block_types import FUNCTION, SWITCH

_MACHINERY = frozenset(vars(nn.Module())) - {"training"} | {"_compiled_call_impl"}
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    enum.Enum,
    torch.dtype,
    torch.device,
    FunctionType,
    BuiltinFunctionType,
    type,
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


def told_sizes(block: nn.Module, grid: tuple[int, int]) -> dict[tuple[str, str], int]:
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


@dataclass
class Attributes:
    """reads: settings by (module, attribute), as they were first read. writes: by the same, the
    values before and after forward set it. `reading` says whether the code that runs is the traced
    one, `live` what it gets for attributes that stay reads in the traced graph."""

    reading: Callable[[], bool]
    live: Callable[[str, str, Any], Any]
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    writes: dict[tuple[str, str], tuple[Any, Any]] = field(default_factory=dict)

    def read(self, module: str, name: str, value: Any) -> Any:
        """Note a read, unless forward itself has set what it reads; what the code gets."""
        if not self.reading() or (module, name) in self.writes or not is_setting(value):
            return value
        if name in (SWITCH, FUNCTION):  # the converted block heeds it itself
            return False if name == SWITCH else value
        found = self.live(module, name, value)
        if found is value:
            self.reads.setdefault((module, name), value)
        return found

    def write(self, module: str, name: str, before: Any, value: Any) -> None:
        """Note a write."""
        if self.reading():
            first, _ = self.writes.get((module, name), (before, value))
            self.writes[module, name] = (first, value)

    def changed(self) -> list[str]:
        """Names of attributes that forward gave another value than they had."""
        return [
            f"{module}.{name}" if module else name
            for (module, name), (before, value) in self.writes.items()
            if not (is_setting(value) and is_setting(before) and _equal(before, value))
        ]


def _equal(first: Any, second: Any) -> bool:
    return type(first) is type(second) and bool(first == second)


def _is_shared(name: str, value: Any) -> bool:
    return not name.startswith("__") and not callable(value) and is_setting(value)


def _watching_type(kind: Any, name: str, log: Attributes) -> Any:
    get, put = kind.__getattribute__, kind.__setattr__
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    #: settings that the class keeps for its instances
    shared = {n for base in bases for n, v in vars(base).items() if _is_shared(n, v)}

    def read(self: nn.Module, attribute: str) -> Any:
        value = get(self, attribute)
        own = object.__getattribute__(self, "__dict__")
        if attribute not in _MACHINERY and (attribute in own or attribute in shared):
            return log.read(name, attribute, value)
        return value

    def write(self: nn.Module, attribute: str, value: Any) -> None:
        before = object.__getattribute__(self, "__dict__").get(attribute, _MISSING)
        log.write(name, attribute, before, value)
        put(self, attribute, value)

    added = {
        "__getattribute__": read,
        "__setattr__": write,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind)(kind.__name__, (kind,), added)


def containers(root: nn.Module) -> dict[str, tuple[Any, int]]:
    """Lists, dictionaries and sets that modules keep, with how much they hold."""
    return {
        f"{part}.{name}" if part else name: (value, len(value))
        for part, module in root.named_modules()
        for name, value in vars(module).items()
        if name not in _MACHINERY and isinstance(value, (list, dict, set, deque))
    }


@contextmanager
def watched(root: nn.Module, log: Attributes) -> Iterator[None]:
    """While active, what is read from and written to the modules of `root` is noted.

    Args:
        root: a copy that nobody else holds: its modules are of derived classes for the time.
    """
    kinds: dict[nn.Module, type] = {}
    try:
        for name, module in root.named_modules():
            kind = type(module)
            try:
                made = _watching_type(kind, name, log)
                module.__class__ = made
            except TypeError:  # a class that is final, or laid out by C
                continue
            kinds[module] = kind
        yield
    finally:
        for module, kind in kinds.items():
            object.__setattr__(module, "__class__", kind)
