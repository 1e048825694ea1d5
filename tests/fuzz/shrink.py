"""A simpler random transformer of which the same is said: field by field back to its default.

`python -m tests.fuzz.shrink "Spec(...)"` prints what `check` says of it and the simpler spec.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from tests.fuzz import spec as names
from tests.fuzz.check import check
from tests.fuzz.spec import Spec


def verdict(spec: Spec) -> str:
    """What becomes of it, without names and numbers."""
    try:
        outcome = check(spec)
        said = "; ".join(sorted(set(outcome.reasons))) or "converted"
    except Exception as error:
        said = f"FAILED {type(error).__name__}: {error}"
    said = re.sub(r"(blocks|second)\.\d+\S*", "BLOCK", said)
    return re.sub(r"\d[\d.e+-]*", "#", said)


def _simpler(value: Any) -> Iterator[Any]:
    for field in dataclasses.fields(value):
        now, default = getattr(value, field.name), field.default
        if now == default:
            continue
        yield dataclasses.replace(value, **{field.name: default})
        if dataclasses.is_dataclass(now) and not isinstance(now, type):
            for inner in _simpler(now):
                yield dataclasses.replace(value, **{field.name: inner})


def shrink(spec: Spec) -> tuple[Spec, str]:
    """(simplest spec found, its verdict)."""
    said = verdict(spec)
    again = True
    while again:
        again = False
        for candidate in _simpler(spec):
            if verdict(candidate) == said:
                spec, again = candidate, True
                break
    return spec, said


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for text in sys.argv[1:]:
        print(*shrink(eval(text, vars(names))), sep="\n    ")
