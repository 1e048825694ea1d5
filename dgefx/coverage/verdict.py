"""Which refusals are right: attention that is not query-key over the tokens of its own stream.

Used by `measure`. Every other kind of `dgefx.passes.reasons` counts against the library.
"""

from __future__ import annotations

from dgefx.passes.reasons import RIGHTLY_DENSE


def rightly_refused(kind: str) -> str | None:
    """What the attention is that was rightly refused, or None where it could convert.

    Args:
        kind: of a `BlockReport`.
    """
    return kind if kind in RIGHTLY_DENSE else None
