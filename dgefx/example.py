"""The example call of a conversion, as shapes: kept in its record, written by `dgefx.serialize`.

What runs images through a converted model (calibration, maps, measuring, fitting gates) calls it
as `example_of` says.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dgefx.outputs import Call
from dgefx.record import Record, find_parts


def describe_tensor(value: Tensor) -> dict[str, Any]:
    """Shape and dtype in JSON's terms; see `dgefx.serialize`."""
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def describe_call(call: Call) -> list[Any]:
    """Shapes of an example call in JSON's terms; see `dgefx.serialize`."""

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return describe_tensor(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        return {"unknown": type(value).__name__}

    args, kwargs = call
    return [[describe(a) for a in args], {k: describe(v) for k, v in kwargs.items()}]


def example_of(model: nn.Module, record: Record) -> list[Any]:
    """How to call `model` with images, as `describe_call` describes it.

    The module that was converted is called as it was then. A model around it gets the tensors
    alone, a single one by position: the other arguments are the model's to decide.
    """
    if any(part.record is record and part.name == "" for part in find_parts(model)):
        return record.example
    args, kwargs = record.example
    tensors = [a for a in args if "shape" in a]
    named = {key: value for key, value in kwargs.items() if "shape" in value}
    return [list(named.values()), {}] if not tensors and len(named) == 1 else [tensors, named]
