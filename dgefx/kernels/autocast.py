"""The dtype that autocast asks for, for operators that cast as PyTorch's own do.

Used by `kernels.attend` and `kernels.stencil_op` in front of their operators.
"""

from __future__ import annotations

import torch

#: devices with autocast: asked for once, as Dynamo of PyTorch 2.11 does not trace the question
DEVICES = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla")
    if torch.amp.is_autocast_available(kind)
)


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of autocast on devices of this kind ("cuda"), None where it is off."""
    if kind in DEVICES and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None
