"""Locate: attention cores that ride on a residual stream, and the modules that own them.

A core converts when its keys, values and queries all come from one stream x, when the path from the
core to the output must pass an add whose other operand is x, maybe scaled (`residual`), and when
one module takes x, or what x is plus something, and hands out that sum, or what becomes of it
without changing its size (`owner`). The stream's tokens have to be a grid (`grid`), and the queries
its tokens, in windows or not. Everything else is a `Refusal`, which `passes.diagnosis` explains.
Next: `passes.trace.block_trace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from dgefx.passes.attention.core import AttentionCore, SearchedGraph
from dgefx.passes.attention.registry import search_cores
from dgefx.passes.capture import Capture, example_of
from dgefx.passes.layout import Layout
from dgefx.passes.locate.grid import GridFinder
from dgefx.passes.locate.non_qk import non_qk_cores
from dgefx.passes.locate.owner import stream_owner, update_owner
from dgefx.passes.locate.refusal import Cause, Refusal
from dgefx.passes.locate.residual import Residuals


@dataclass(frozen=True, eq=False)
class Site:
    """A block that may convert.

    name: of its module. core: its first attention. stream: its input, as laid out by `layout`.
    """

    name: str
    core: AttentionCore
    stream: Node
    layout: Layout


#: what every attention of a model comes to
Block = Site | Refusal


@dataclass(frozen=True)
class Located:
    """blocks: of every attention of a model, in the order in which they run. cores: all attentions
    with query-key scores. finder: knows the tokens of the model's values."""

    blocks: tuple[Block, ...]
    capture: Capture
    cores: tuple[AttentionCore, ...]
    finder: GridFinder

    @property
    def sites(self) -> list[Site]:
        """The blocks that may convert."""
        return [block for block in self.blocks if isinstance(block, Site)]


def locate(capture: Capture) -> Located:
    """Every attention core of the captured model, with its block or the cause why it has none."""
    searched = SearchedGraph(capture.graph, example_of)
    cores = search_cores(searched)
    residuals, finder = Residuals(capture.graph), GridFinder()
    found = [_block_of(core, cores, capture, residuals, finder) for core in cores]
    blocks = _one_per_module(_innermost(found))
    names = {block.name for block in blocks}
    for core in non_qk_cores(searched, cores, finder):
        name = _module_of(core)
        if name not in names:
            blocks.append(Refusal(name, core, Cause("no scores")))
            names.add(name)
    order = {node: index for index, node in enumerate(capture.graph.nodes)}
    blocks.sort(key=lambda block: order[block.core.output])
    return Located(tuple(blocks), capture, tuple(cores), finder)


def _module_of(core: AttentionCore) -> str:
    stack = core.output.meta["stack"]
    return stack[-1] if stack else ""


def _block_of(
    core: AttentionCore,
    cores: Sequence[AttentionCore],
    capture: Capture,
    residuals: Residuals,
    finder: GridFinder,
) -> Block:
    residual = residuals.around(core)
    if isinstance(residual, Cause):
        return Refusal(_module_of(core), core, residual)
    owner = stream_owner(capture, core, residual, cores)
    if isinstance(owner, Cause):
        # what it asks with says more than what its module does
        cause = _other_queries(core, residual.stream, finder)
        update = None if cause else update_owner(capture, core, residuals, finder)
        if update is None:
            return Refusal(_module_of(core), core, cause or owner, residual.stream)
        owner = update
    layout = finder.layout(owner.stream)
    if isinstance(layout, Cause):
        return Refusal(owner.module, core, layout, owner.stream)
    cause = _other_queries(core, owner.stream, finder)
    if cause is None and core.form.refusal(core.output) is not None:
        cause = Cause("refused call")
    if cause is None and layout.grid[0] * layout.grid[1] < 4:
        cause = Cause("small grid", layout.grid)
    if cause is not None:
        return Refusal(owner.module, core, cause, owner.stream)
    layout = replace(layout, update=owner.update, first_only=owner.first_only)
    return Site(owner.module, core, owner.stream, layout)


def _other_queries(core: AttentionCore, stream: Node, finder: GridFinder) -> Cause | None:
    """What the core's queries are if they are not the tokens of the stream; None where they are, or
    where that is not known."""
    asked, held = map(finder.token_ids, (core.query, stream))
    layout = finder.layout(stream)
    if asked is None or held is None or isinstance(layout, Cause):
        return None
    # the last axis is that of features, or not
    if asked.in_features != (-1 in core.query_axes):
        return Cause("channel queries")
    count = len(asked.tokens)
    if not count:
        return Cause("prefix queries")
    if (asked.grid, count) == (held.grid, len(held.tokens)):
        return None
    return Cause("other queries", (count, layout.tokens))


def _innermost(blocks: Sequence[Block]) -> list[Block]:
    """Of two blocks inside each other only the inner one converts."""
    names = [block.name for block in blocks if isinstance(block, Site)]
    found: list[Block] = []
    for block in blocks:
        inner = next((name for name in names if name.startswith(f"{block.name}.")), None)
        if isinstance(block, Site) and inner is not None:
            cause = Cause("outer block", (block.name, inner))
            block = Refusal(block.name, block.core, cause, block.stream)
        found.append(block)
    return found


def _one_per_module(blocks: Sequence[Block]) -> list[Block]:
    """A block with several attentions is one; if one of them cannot convert, none does."""
    refused: dict[str, Refusal] = {}
    for block in blocks:
        if isinstance(block, Refusal):
            refused.setdefault(block.name, block)
    found: list[Block] = []
    seen: set[object] = set()
    for block in blocks:
        key: object = block
        if isinstance(block, Site):
            if block.name in refused:
                cause = Cause("other attention", (block.name, refused[block.name]))
                block = Refusal(block.name, block.core, cause, block.stream)
            else:
                key = block.name
        if isinstance(block, Refusal) and _is_one_of_many(block):
            key = (block.name, block.cause.name)
        if key not in seen:
            found.append(block)
        seen.add(key)
    return found


def _is_one_of_many(block: Refusal) -> bool:
    """Whether a module runs several times, or samples several maps in one attention."""
    return block.core.form.levels or block.cause.name == "runs repeatedly"
