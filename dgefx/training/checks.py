"""One check of number arguments for the whole of `dgefx.training`."""

from __future__ import annotations

import math


def check_number(name: str, value: object, *, positive: bool = False) -> float:
    """`value` as a finite float of at least 0, or over it.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, found {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and not value):
        bound = "positive" if positive else "at least 0"
        raise ValueError(f"{name} must be {bound} and finite, found {value!r}")
    return float(value)
