"""Pass 3a: einops on symbolic values, as its functions and layers meet them in a traced block.

einops asks the subclasses of its `AbstractBackend` which of them knows a tensor; here is the one
that knows this library's proxies, made when a block is traced in a process that has einops loaded.
Sizes stay symbolic, so the graph holds ordinary reshapes and permutes that fit any image size.
Used by `passes.trace.tracer`.
"""

from __future__ import annotations

import functools
import sys
from typing import Any


def know_proxies(kind: type) -> None:
    """Make einops take values of type `kind` for tensors, if einops is loaded at all."""
    backends = sys.modules.get("einops._backends")
    if backends is not None:
        _backend(backends, kind)


@functools.cache
def _backend(backends: Any, kind: type) -> type:
    """einops finds the class by itself. Cached: einops knows its subclasses weakly."""

    class ProxyBackend(backends.TorchBackend):
        framework_name = __name__  # looked up in sys.modules

        def is_appropriate_type(self, tensor: Any) -> bool:
            return isinstance(tensor, kind)

        def shape(self, x: Any) -> list[Any]:
            # a list has no hash, so that einops keeps no recipe with proxies in its caches
            return [x.shape[axis] for axis in range(x.ndim)]

    return ProxyBackend
