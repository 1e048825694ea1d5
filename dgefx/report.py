"""`Report`: what a conversion did or would do, block by block, printed as a table."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dgefx.reason_lines import alike, named, told


@dataclass(frozen=True)
class BlockReport:
    """One attention block of the model.

    name: module name. status: "converted" or "dense". reason: why it stays dense, else "".
    ratio: its MACs over the dense block's (1.0 if dense). slots: queries per image and level (under
    the average budget: on average), finest first, without prefix tokens. grid: (H, W) tokens.
    prefix: prefix tokens. kind: of the reason, one of `dgefx.passes.reasons`, and advice: what can
    be done about it; both "" of a converted block.
    """

    name: str
    status: str
    reason: str
    ratio: float
    slots: tuple[int, ...] = ()
    grid: tuple[int, int] | None = None
    prefix: int = 0
    kind: str = ""
    advice: str = ""

    @property
    def query_slots(self) -> int:
        """Queries per image, prefix tokens included."""
        return sum(self.slots) + (self.prefix if self.slots else 0)


def _rows(blocks: Sequence[BlockReport]) -> list[list[BlockReport]]:
    """Blocks of one row: dense ones after each other whose reasons are alike."""

    def key(numbered: tuple[int, BlockReport]) -> Hashable:
        number, block = numbered
        return (block.kind, alike(block.reason)) if block.reason else number

    return [[b for _, b in group] for _, group in itertools.groupby(enumerate(blocks), key)]


@dataclass(frozen=True)
class Report:
    """Whole-model figures and every attention block seen; none where a model has no attention.

    gamma: asked for. ratio: MACs over the dense model's, by `FlopCounterMode`. macs, macs_dense:
    multiply-accumulates per image. floor: the lowest ratio this model can be set to. calibrated:
    whether the blocks' shares were measured (`dgefx.calibrate`) or guessed from their depth. held:
    whether the ratio holds by construction; if not (`DGEConfig(capacity=None)`), it is what the
    model has when its gates keep to their budgets, which only training brings about.
    """

    gamma: float
    ratio: float
    macs: float
    macs_dense: float
    floor: float
    blocks: tuple[BlockReport, ...] = field(default_factory=tuple)
    calibrated: bool = False
    held: bool = True

    @property
    def converted(self) -> tuple[BlockReport, ...]:
        """The blocks that were (or would be) converted."""
        return tuple(b for b in self.blocks if b.status == "converted")

    def __str__(self) -> str:
        table = Table(
            title=(
                f"gamma {self.gamma:g}: MAC ratio {self.ratio:.3f} "
                f"({self.macs / 1e9:.3f} of {self.macs_dense / 1e9:.3f} GMACs per image, "
                f"floor {self.floor:.3f}), {len(self.converted)} of {len(self.blocks)} attention "
                f"blocks converted"
            )
        )
        if not self.calibrated and self.converted and self.gamma < 1.0:
            table.caption = (
                "shares of the budget guessed from depth; dgefx.calibrate(model, images) measures "
                "them on a few unlabelled images"
            )
        if not self.blocks:
            table.caption = (
                "no attention blocks found, so there is nothing to convert; dgefx.convert says "
                "what was looked for"
            )
        if self.gamma < self.floor and self.converted:
            table.caption = (
                f"gamma {self.gamma:g} is under the floor: what remains is the keys and values of "
                f"all tokens, one query per coarsest patch and the layers that are not converted"
            )
        if not self.held:
            table.caption = (
                "ratio of gates that keep to their budgets: capacity=None lets them ask for any "
                "number of queries, so only training brings it about"
            )
        for column in ("block", "status", "grid", "queries", "slots per level", "ratio", "reason"):
            table.add_column(column, justify="right" if column in ("queries", "ratio") else "left")
        for block, *others in _rows(self.blocks):
            grid = "" if block.grid is None else f"{block.grid[0]}x{block.grid[1]}"
            grid += f"+{block.prefix}" if block.prefix else ""
            table.add_row(
                named(list(dict.fromkeys(b.name for b in (block, *others)))),
                block.status,
                grid,
                str(block.query_slots) if block.slots else "",
                " + ".join(str(s) for s in block.slots),
                f"{block.ratio:.3f}",
                escape(told([b.reason for b in (block, *others)])),
            )
        console = Console(width=160, no_color=True)
        with console.capture() as captured:
            console.print(table)
            for kind, advice in {b.kind: b.advice for b in self.blocks if b.advice}.items():
                console.print(f"{kind}: {advice}", markup=False, highlight=False)
        return captured.get().rstrip()
