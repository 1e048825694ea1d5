"""Calls of a model and what they return: tensors in any containers, and how far outputs differ.

Used by the passes, by calibration and by the measuring of coverage; depends on none of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

#: positional arguments and keyword arguments
Call = tuple[tuple[Any, ...], dict[str, Any]]


def clone_call(call: Call) -> Call:
    """The same call on copies of its tensors, without gradients: a model may change its input in
    place."""
    cloned: Call = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), call)
    return cloned


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of any output, in order: tuples, dicts, transformers' outputs, dataclasses and
    named containers in any nesting."""
    found: list[Tensor] = []
    pending = [output]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            pending.extend(reversed(list(value.values())))
        elif isinstance(value, (tuple, list)):
            pending.extend(reversed(value))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            pending.extend(
                getattr(value, field.name, None) for field in reversed(dataclasses.fields(value))
            )
        elif isinstance(value, SimpleNamespace):
            pending.extend(reversed(list(vars(value).values())))
        else:
            leaves = pytree.tree_leaves(value)  # of containers that were registered
            if not any(leaf is value for leaf in leaves):
                pending.extend(reversed(leaves))
    return found


def output_tensors(output: Any) -> list[Tensor]:
    """The floating point tensors of any model output."""
    return [t for t in tensors_in(output) if t.is_floating_point()]


def relative_error(found: Any, wanted: Any) -> float:
    """Largest relative error (2-norm) over the tensors of two outputs; infinite if not comparable
    or not finite."""
    pairs = list(zip(output_tensors(found), output_tensors(wanted), strict=False))
    if not pairs or len(output_tensors(found)) != len(output_tensors(wanted)):
        return float("inf")
    worst = 0.0
    for a, b in pairs:
        if a.shape != b.shape:
            return float("inf")
        size = b.double().norm().item()
        error = (a.double() - b.double()).norm().item() / max(size, 1e-30)
        if not error < float("inf"):  # also NaN
            return float("inf")
        worst = max(worst, error)
    return worst
