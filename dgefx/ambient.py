"""The library's own work gives the same in whatever modes the caller has entered.

`convert`, `explain`, `revert`, `calibrate`, `load` and `measured_ratio` run under the modes of a
fresh thread (`neutral`). What PyTorch keeps once per process is set for as long as any thread of
this library wants it (`Shared`), so that two conversions at a time do not restore each other's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from dgefx.kernels.autocast import DEVICES


@contextmanager
def neutral() -> Iterator[None]:
    """Gradients on, no inference mode, no autocast, and the CPU as the default device.

    All are of the thread. The default dtype is the process's, and stays: see `working_dtype`.
    Tensors that are made inside can be trained. Also a decorator.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def working_dtype() -> torch.dtype:
    """Of the copy that a conversion is tried on: float32, or float64 where that is the default.

    A forward that makes tensors of the default dtype gives the two of one dtype so.
    """
    return torch.promote_types(torch.float32, torch.get_default_dtype())


class Shared:
    """A setting of the process that several threads may want at a time.

    The first one sets it and the last one puts back what was before.

    Args:
        setting: makes a context in which it is set.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[Any]]) -> None:
        self._setting = setting
        self._lock = threading.Lock()
        self._holders = 0
        self._entered = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._holders == 0:
                self._entered.enter_context(self._setting())
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._entered.close()


def _force_eager() -> AbstractContextManager[Any]:
    return torch.compiler.set_stance("force_eager")


#: parts that torch.compile wraps run as they are written; nothing is compiled anew
eager = Shared(_force_eager)
