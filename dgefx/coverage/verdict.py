"""Which refusals are right: attention that is not query-key over the tokens of its own stream.

Used by `measure`. Every other kind of `dgefx.passes.reasons` counts against the library.
"""

from __future__ import annotations

from dgefx.passes.reasons import KINDS


def rightly_refused(kind: str) -> str | None:
    """What the attention is that was rightly refused, or None where it could convert.

    Args:
        kind: of a `BlockReport`.
    """
    return next((name for name, known in KINDS.items() if name == kind and known.right), None)
