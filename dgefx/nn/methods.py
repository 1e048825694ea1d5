"""What a converted block answers for the methods of its dense block, such as `set_input_size`.

A `DGEBlock` says that it is of the dense block's class, and models call methods of their blocks on
the strength of it. What such a method changes is fixed in the generated code.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def refused_methods(kind: type, block: str) -> dict[str, Callable[..., None]]:
    """A method that raises ValueError for each that `kind` has besides what every module has.

    Args:
        kind: class of the dense block. block: its name in the model.
    """
    found = [n for base in kind.__mro__ for n, v in vars(base).items() if inspect.isfunction(v)]
    own = [n for n in dict.fromkeys(found) if not n.startswith("__") and not hasattr(nn.Module, n)]
    return {n: functools.partial(_refuse, block, kind.__name__, n) for n in own}


def _refuse(block: str, kind: str, name: str, *_args: Any, **_kwargs: Any) -> None:
    raise ValueError(
        f"block {block} is converted: {kind}.{name}() was written for the dense block, and what it "
        f"changes (sizes, windows, tables) is fixed in the converted one. Call it on the dense "
        f"model and convert again at that size: model = dgefx.revert(model), then {name}(), then "
        f"dgefx.convert(model)"
    )
