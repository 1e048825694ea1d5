"""What a block calls that leaves no trace in its graph: autograd functions, questions for autocast.

Seen by a profiling function of the thread, for the time of a trace, so that nothing is patched.
Used by `passes.trace.tracer`.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dgefx.passes.errors import TraceError

_ASKS = frozenset(
    {
        torch.is_autocast_enabled,
        torch.is_autocast_cpu_enabled,
        torch.get_autocast_dtype,
        torch.get_autocast_gpu_dtype,
        torch.get_autocast_cpu_dtype,
    }
)

#: what entering `torch.autocast` calls
_SWITCHES = frozenset({torch.set_autocast_enabled, torch.autocast_increment_nesting})


def autocast_state() -> tuple[bool, ...]:
    """Whether autocast is on, by kind of device."""
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


class Calls:
    """What the traced code called; `reading` says whether the code that runs is the traced one."""

    def __init__(self, reading: Callable[[], bool]) -> None:
        self._reading = reading
        self._functions: dict[str, None] = {}
        self.knows_autocast = False  # switches it or asks for it
        self.asks_grad = False
        self._refused = ""
        self._numpy = b""

    def functions(self) -> tuple[str, ...]:
        """Names of the autograd functions."""
        return tuple(self._functions)

    def _note(self, frame: Any, event: str, called: Any) -> None:
        if event != "c_call" or not self._reading():
            return
        owner = getattr(called, "__self__", None)
        if isinstance(owner, random.Random):
            self._refused = "the block draws from Python's random module, which would be fixed"
        elif isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            if called.__name__ == "apply":
                self._functions[owner.__qualname__] = None
        elif called is torch.is_grad_enabled and not _is_library(frame):
            self.asks_grad = True
        elif called is torch.is_inference_mode_enabled and not _is_library(frame):
            self._refused = "the block asks for inference mode, which a trace would fix"
        elif called in _SWITCHES or (called in _ASKS and not _is_library(frame)):
            self.knows_autocast = True

    @contextmanager
    def noted(self) -> Iterator[None]:
        """While active, calls of this thread are noted.

        Raises:
            TraceError: at the end, where what was called would be fixed.
        """
        before: Any = sys.getprofile()
        self._numpy = _numpy_state()
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(before if callable(before) else None)
            if hasattr(before, "enable"):  # cProfile's, which Python 3.11 cannot set again
                before.enable()
        self._compare_numpy()
        if self._refused:
            raise TraceError(self._refused)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While active, nothing is noted: every call costs, whoever makes it."""
        if sys.getprofile() != self._note:
            yield
            return
        sys.setprofile(None)
        try:
            yield
        finally:
            sys.setprofile(self._note)

    @contextmanager
    def without_numpy(self) -> Iterator[None]:
        """While active, numpy's random numbers may be drawn: by a module that stays a call."""
        self._compare_numpy()
        try:
            yield
        finally:
            self._numpy = _numpy_state()

    def _compare_numpy(self) -> None:
        if _numpy_state() != self._numpy:
            self._refused = (
                "the block draws from numpy.random, which would be fixed (or another thread does "
                "meanwhile)"
            )


def _numpy_state() -> bytes:
    """Of numpy's own generator, whose calls no profiling function sees."""
    numpy = sys.modules.get("numpy")
    return b"" if numpy is None else pickle.dumps(numpy.random.get_state(legacy=False))


def _is_library(frame: Any) -> bool:
    """Whether PyTorch or this library asks for its own sake."""
    return str(frame.f_globals.get("__name__")).split(".")[0] in ("torch", "dgefx")
