"""`Tables`: a module of tensors that no state_dict holds, as those of routers and of traces."""

from __future__ import annotations

from typing import Any, Self

from torch import nn


class Tables(nn.Module):
    """Refuses to be left with memory that nothing fills: `to_empty` from the meta device."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        empty = any(tensor.is_meta for tensor in self.buffers())
        super()._apply(fn, recurse)
        if empty and not any(tensor.is_meta for tensor in self.buffers()):
            raise ValueError(
                "a converted model cannot be made from the meta device: the tables of its blocks "
                "are in no state_dict. Put the dense model on its device first, load its weights, "
                "then use dgefx.convert or dgefx.load on it"
            )
        return self
