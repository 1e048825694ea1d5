"""What a block calls that leaves no trace in its graph: autograd functions, questions for autocast,
random numbers.

Seen by a profiling function and a mode of the thread, for the time of a trace, so that nothing is
patched. Used by `passes.trace.tracer`.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.overrides import TorchFunctionMode

from dgefx.passes.errors import TraceError
from dgefx.passes.ops import RANDOM

if TYPE_CHECKING:
    from dgefx.passes.trace.tracer import ConcolicTracer

_ASKS_FOR_AUTOCAST = frozenset(
    getattr(torch, name)
    for name in "is_autocast_enabled is_autocast_cpu_enabled get_autocast_dtype "
    "get_autocast_gpu_dtype get_autocast_cpu_dtype".split()
)
#: what entering `torch.autocast` calls
_SWITCHES_AUTOCAST = frozenset({torch.set_autocast_enabled, torch.autocast_increment_nesting})


def autocast_state() -> tuple[bool, ...]:
    """Whether autocast is on, by kind of device."""
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class Calls(TorchFunctionMode):
    """What the traced code called.

    functions: names of autograd functions. knows_autocast: whether it switches autocast or asks
    for it. asks_grad: whether it asks if gradients are on.
    """

    def __init__(self, tracer: ConcolicTracer) -> None:
        super().__init__()
        self._tracer = tracer
        self.functions: dict[str, None] = {}
        self.knows_autocast = self.asks_grad = False
        self._refused = ""
        self._numpy = b""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What a block draws by itself stays a call; as a constant it would be fixed."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._tracer.executing or name.rstrip("_") not in RANDOM:
            return func(*args, **kwargs)
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if name.endswith("_") or torch.overrides.is_tensor_method_or_property(func):
            raise TraceError(f"{name} draws random numbers into a constant tensor")
        return self._tracer.create_proxy("call_function", func, args, kwargs)

    def note(self, frame: Any, event: str, called: Any) -> None:
        """The profiling function."""
        if event != "c_call" or self._tracer.executing:
            return
        owner = getattr(called, "__self__", None)
        if isinstance(owner, random.Random):
            self._refused = "the block draws from Python's random module, which would be fixed"
        elif isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            if called.__name__ == "apply":
                self.functions[owner.__qualname__] = None
        elif called in _SWITCHES_AUTOCAST:
            self.knows_autocast = True
        elif called is torch.is_grad_enabled:
            self.asks_grad |= not _is_library(frame)
        elif called in _ASKS_FOR_AUTOCAST:
            self.knows_autocast |= not _is_library(frame)
        elif called is torch.is_inference_mode_enabled and not _is_library(frame):
            self._refused = "the block asks for inference mode, which a trace would fix"

    @contextmanager
    def heard(self) -> Iterator[None]:
        """While active, calls of this thread are noted.

        Raises:
            TraceError: at the end, where what was called would be fixed.
        """
        profile: Any = sys.getprofile()
        self._numpy = _numpy_state()
        sys.setprofile(self.note)
        try:
            with self:
                yield
        finally:
            sys.setprofile(profile if callable(profile) else None)
            if hasattr(profile, "enable"):  # cProfile's, which Python 3.11 cannot set again
                profile.enable()
        self._look_at_numpy()
        if self._refused:
            raise TraceError(self._refused)

    def _look_at_numpy(self) -> None:
        if _numpy_state() != self._numpy:
            self._refused = (
                "the block draws from numpy.random, which would be fixed (or another thread does "
                "meanwhile)"
            )

    @contextmanager
    def numpy_may_draw(self) -> Iterator[None]:
        """What a module that stays a call draws meanwhile, it draws anew in every call. The state
        of numpy's generator is looked at, never set: other threads draw from it too."""
        self._look_at_numpy()
        try:
            yield
        finally:
            self._numpy = _numpy_state()


def _numpy_state() -> bytes:
    """Of numpy's own generator, whose calls no profiling function sees."""
    numpy = sys.modules.get("numpy")
    return b"" if numpy is None else pickle.dumps(numpy.random.get_state(legacy=False))


def _is_library(frame: Any) -> bool:
    """Whether PyTorch or this library asks for its own sake."""
    return str(frame.f_globals.get("__name__")).split(".")[0] in ("torch", "dgefx")
