"""Why `passes.locate` gives an attention no block, as a name and the facts of it.

What a reader is told of each is in `passes.diagnosis.refusals`, which also looks further where the
cause alone says little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from dgefx.passes.attention.core import AttentionCore


@dataclass(frozen=True)
class Cause:
    """name: a key of the words in `passes.diagnosis.refusals`. facts: numbers, shapes and module
    names, in the order in which these words have them."""

    name: str
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
