"""Why `passes.locate` gives an attention no block, as a name and the facts of it.

What a reader is told of each is in `passes.diagnosis.refusals`, which also looks further where the
cause alone says little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from dgefx.passes.attention.core import AttentionCore

NoLayout = Literal["no grid", "rank", "tokens on several axes", "tokens not in order", "no raster"]
CauseName = Literal[
    "no residual add",
    "cross attention",
    "foreign queries",
    "other shortcut",
    "no owner",
    "runs repeatedly",
    "several outputs",
    "another shape",
    "another size",
    "whole model",
    "channel queries",
    "prefix queries",
    "other queries",
    "small grid",
    "outer block",
    "other attention",
    "no scores",
    NoLayout,
]


@dataclass(frozen=True)
class Cause:
    """facts: numbers, shapes and module names, see `passes.diagnosis.refusals` for their order."""

    name: CauseName
    facts: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Refusal:
    """An attention core that converts with no block.

    name: the block that was looked at, or the innermost module around the core. stream: that it
    rides on, where there is one.
    """

    name: str
    core: AttentionCore
    cause: Cause
    stream: Node | None = None
