"""Which refusals are right: attention that is not query-key over the tokens of its own stream.

Used by `measure`. Everything that is not recognised here counts against the library.
"""

from __future__ import annotations

import re

#: (pattern of the reason, what the attention is)
_KINDS = (
    (r"queries are channels, not tokens", "channel attention"),
    (r"prefix tokens alone: class attention", "class attention"),
    (r"\d+ queries against \d+ tokens", "class or pooling attention, or queries of another grid"),
    (r"changes the stream's shape from \(\d+, \d+, \d+\) to \(\d+, 1, \d+\)", "class attention"),
    (r"no residual add around it", "pooling head or learned queries"),
    (r"foreign or learned queries", "foreign or learned queries"),
    (r"the shortcut around it is pooled or projected", "shortcut pooled or projected"),
    (r"do not come from the stream of its queries", "cross attention to another stream"),
    (r"a grid of \d+ x \d+ has nothing to pool", "a grid with nothing to pool"),
    (r"causal attention", "causal attention"),
)


def rightly_refused(reason: str) -> str | None:
    """What the attention is that was rightly refused, or None where it could convert."""
    return next((what for pattern, what in _KINDS if re.search(pattern, reason)), None)
