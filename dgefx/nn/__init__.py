"""The modules a converted model gains: the DGE block, its router and the budget arithmetic."""

from dgefx.nn.block import DGEBlock
from dgefx.nn.router import Router

__all__ = ["DGEBlock", "Router"]
