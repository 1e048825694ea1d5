"""Blocks that run several times in one forward: with their whole encoder, once per view or image,
or by themselves, with the same weights. Used by `passes.locate.sites` to say which."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from dgefx.passes.layout import Layout
from dgefx.passes.locate.grid import GridFinder
from dgefx.passes.reasons import Reason


class Repeats:
    """Remembers the encoders that it found.

    Args:
        frames: how often each module of the model runs.
    """

    def __init__(self, frames: Mapping[str, int], finder: GridFinder) -> None:
        self.frames, self.finder = frames, finder
        self._encoders: set[str] = set()

    def reason(self, module: str, stream: Node) -> Reason | None:
        """Why a module with this stream stays dense if it runs more than once."""
        runs = self.frames.get(module, 0)
        if runs == 1:
            return None
        layout = self.finder.layout(stream)
        source = layout.source if isinstance(layout, Layout) else None
        if source is not None and self.frames.get(source) == runs:
            self._encoders.add(self._around(module, source, runs))
        # later stages of an encoder have grids that no module lays out
        whole = [name for name in self._encoders if _holds(name, module)]
        if not whole:
            return Reason(f"{module or '(root)'} runs {runs} times per forward", "shared module")
        encoder = max(whole, key=len) or "the model"
        return Reason(
            f"{encoder} runs its blocks {runs} times per forward, once per view or image: convert "
            f"it alone, with one of them",
            "several views",
        )

    def _around(self, module: str, source: str, runs: int) -> str:
        """The innermost module that holds both, one that is called as often where there is one."""
        parts = list(zip(module.split("."), source.split("."), strict=False))
        same = next((i for i, (a, b) in enumerate(parts) if a != b), len(parts))
        names = [".".join(module.split(".")[:count]) for count in range(same, 0, -1)]
        return next((n for n in names if self.frames.get(n) == runs), (names or [""])[0])


def _holds(outer: str, inner: str) -> bool:
    return not outer or inner == outer or inner.startswith(f"{outer}.")
