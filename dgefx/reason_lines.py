"""Blocks that stay dense for the same reason, as one line. Used by errors and by `dgefx.report`."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def alike(reason: str) -> str:
    """A reason without its numbers, those of layers, sizes and differences."""
    return _NUMBER.sub("#", reason)


def named(names: Sequence[str]) -> str:
    """ "blocks.0 to blocks.11 (12)"; a name or two as they are."""
    shown = [name or "(root)" for name in names]
    return " and ".join(shown) if len(shown) < 3 else f"{shown[0]} to {shown[-1]} ({len(shown)})"


def told(reasons: Sequence[str]) -> str:
    """The reason of blocks whose reasons are alike."""
    return reasons[0] if len(set(reasons)) == 1 else f"{reasons[0]}; the others alike"


def reason_lines(reasons: Sequence[tuple[str, str]]) -> list[str]:
    """ "names: reason", once per reason.

    Args:
        reasons: (name, reason) of every block.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, reason in reasons:
        groups.setdefault(alike(reason), []).append((name, reason))
    return [
        f"{named(list(dict.fromkeys(n for n, _ in group)))}: {told([r for _, r in group])}"
        for group in groups.values()
    ]
