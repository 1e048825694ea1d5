"""`evaluating`: eval mode for a while, and every module's own mode again after it.

Used wherever a user's model is run to look at it: calibration, maps, measuring, fitting gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dgefx.ambient import eager


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; hooks and the mode are no reason to compile anything anew."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with eager():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
