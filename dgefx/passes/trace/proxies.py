"""Symbolic values of a trace, and what Python may ask of them.

Every proxy has the value of the example call, so that Python's questions (`bool`, `len`, a loop)
get the model's answer; `passes.trace.decisions` notes each, and refuses those about the elements of
tensors. Made by `passes.trace.tracer`.
"""

from __future__ import annotations

import dis
import functools
import operator
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from dgefx.passes.errors import TraceError
from dgefx.passes.trace.in_place import AUGMENTED

if TYPE_CHECKING:
    from dgefx.passes.trace.tracer import ConcolicTracer

#: attributes and methods of a tensor that are about its gradient, and no part of a graph
_ASKS_OF_GRADIENTS = frozenset(
    "requires_grad grad grad_fn is_leaf register_hook retain_grad requires_grad_ is_inference "
    "register_post_accumulate_grad_hook".split()
)
_UNPACK = dis.opmap["UNPACK_SEQUENCE"]


class ConcolicProxy(fx.Proxy):
    """A symbolic value that knows what it is in the example call."""

    tracer: ConcolicTracer

    @property
    def _now(self) -> fx.Node:
        """The node that holds the value, after all that was written into it."""
        return self.tracer.tensors.current(self.node)

    @property
    def _value(self) -> Any:
        return self.tracer.values[self._now]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array"):  # numpy looks for these
            raise AttributeError(name)
        if name in _ASKS_OF_GRADIENTS:
            raise TraceError(f"the block asks for {name} of a value, which a trace would fix")
        if name == "dtype" and self.tracer.decisions.fixed_types:
            return self._value.dtype
        if name == "ndim" and isinstance(self._value, Tensor):
            return self._value.ndim  # the same at any size, and a key that einops looks up
        return ConcolicAttribute(self, name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.set_item(self, index, value)

    def __repr__(self) -> str:
        value = self._value
        if isinstance(value, torch.device):
            return DeviceName(str(value), lambda: self._look(value))
        if isinstance(value, torch.dtype):
            self._look(value)
            return str(value)
        return super().__repr__()

    def _look(self, value: Any) -> None:
        self.tracer.decisions.looked_into.append(value)

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __len__(self) -> int:
        return len(self.tracer.decisions.counted(self._now))

    def __array__(self, *_types: Any) -> Any:
        """What `np.sqrt(N)` makes of a size."""
        value = self.tracer.decisions.number(self._now)
        if not isinstance(value, (int, float)):
            raise TraceError(f"numpy is given the values of {self.node.name}; use torch")
        return torch.tensor(value, dtype=torch.float64).numpy()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Python takes every proxy for callable: `cond() if callable(cond) else cond` of a flag
        if isinstance(self._value, bool):
            return self._value
        return super().__call__(*args, **kwargs)

    def __contains__(self, item: Any) -> bool:
        if isinstance(self._value, (Tensor, tuple, list)):
            return any(part == item for part in self._parts())
        return item in self._value

    def __iter__(self) -> Iterator[Any]:
        """`a, b = x` says itself how many there are, and decides nothing by it. As that of
        `fx.Proxy`, which disassembles all of the block's code to know."""
        frame = sys._getframe(1)
        code, place = frame.f_code.co_code, frame.f_lasti
        if code[place] == _UNPACK:
            return (operator.getitem(self, index) for index in range(code[place + 1]))
        return self._parts()

    def _parts(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in range(len(self))])

    def __hash__(self) -> int:
        value = self._value
        if isinstance(value, torch.dtype):  # a set that it is not in asks no more
            self._look(value)
        return hash(value) if isinstance(value, (torch.dtype, torch.device)) else id(self)


class ConcolicAttribute(ConcolicProxy, fx.proxy.Attribute):
    """`x.shape`, or `x.view` before it is called."""


def _as_number(convert: Callable[..., Any]) -> Any:
    """`int(x)` and the like: the number that the trace keeps."""

    def method(self: ConcolicProxy, *args: Any) -> Any:
        return convert(self.tracer.decisions.number(self._now), *args)

    return method


def _augmented(function: Any) -> Any:
    """`x += y` of a proxy; without it Python would take `x = x + y`, which no other name sees."""

    def method(self: ConcolicProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _convert in (operator.index, int, float, round):
    setattr(ConcolicProxy, f"__{_convert.__name__}__", _as_number(_convert))
for _name in AUGMENTED:
    setattr(ConcolicProxy, f"__{_name}__", _augmented(getattr(operator, _name)))


class DeviceName(str):
    """What `str` makes of a device. As a key of a cache (`self.tables[str(x.device)]`, as in LeViT)
    it decides nothing; code that looks into it (`str(x.device).startswith("mps")`) decides by it.

    Args:
        look: called when something looks into the text.
    """

    look: Callable[[], None]

    def __new__(cls, text: str, look: Callable[[], None]) -> DeviceName:
        made = super().__new__(cls, text)
        made.look = look
        return made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DeviceName):  # of keys of a dictionary, one is found again
            self.look()
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __radd__(self, before: str) -> str:
        self.look()
        return before + str.__str__(self)

    __hash__ = str.__hash__


def _looking(plain: Any) -> Any:
    def method(self: DeviceName, *args: Any, **kwargs: Any) -> Any:
        self.look()
        return plain(self, *args, **kwargs)

    return method


_LOOKS = {f"__{name}__" for name in "contains getitem iter len add mod format lt le gt ge".split()}
for _name, _plain in vars(str).items():
    if _name in _LOOKS or not _name.startswith("_"):
        setattr(DeviceName, _name, _looking(_plain))


def teach_einops() -> None:
    """Make einops take proxies for tensors, if it is loaded at all.

    It asks the subclasses of its `AbstractBackend` which of them knows a tensor. Sizes stay
    symbolic, so the graph holds ordinary reshapes and permutes that fit any image size.
    """
    backends = sys.modules.get("einops._backends")
    if backends is not None:
        _einops_backend(backends)


@functools.cache
def _einops_backend(backends: Any) -> type:
    """einops finds the class by itself. Cached: einops knows its subclasses weakly."""

    class ProxyBackend(backends.TorchBackend):
        framework_name = __name__  # looked up in sys.modules

        def is_appropriate_type(self, tensor: Any) -> bool:
            return isinstance(tensor, ConcolicProxy)

        def shape(self, x: Any) -> list[Any]:
            # a list has no hash, so that einops keeps no recipe with proxies in its caches
            return [x.shape[axis] for axis in range(x.ndim)]

    return ProxyBackend
