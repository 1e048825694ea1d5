"""Why attentions have no block that converts, in words: the causes that `passes.locate` gives.

Where such a cause says little, the capture is looked at once more, for what was done to the tokens
(`no_layout`), for queries that are learned, or for an encoder that runs once per view. Asked by
`passes.pipeline`, for what is refused alone.
"""

from __future__ import annotations

from typing import Any

from dgefx.passes.attention.core import AttentionCore
from dgefx.passes.capture import Capture
from dgefx.passes.diagnosis.no_layout import why_no_layout
from dgefx.passes.layout import Layout
from dgefx.passes.locate.refusal import Refusal
from dgefx.passes.locate.sites import Block, Located
from dgefx.passes.reasons import KindName, Reason
from dgefx.passes.walk import breadth_first

#: words, with the facts of the cause put in, and kind; by cause and by what is found beyond it
_WORDS: dict[str, tuple[str, KindName]] = {
    "no residual add": (
        "no residual add around it: its queries do not ride on a residual stream (pooling head or "
        "learned queries)",
        "pooling head or learned queries",
    ),
    "learned queries": (
        "its stream starts with learned queries, not with the image's tokens",
        "pooling head or learned queries",
    ),
    "cross attention": (
        "its {} do not come from the stream of its queries",
        "cross attention",
    ),
    "foreign queries": (
        "its queries do not come from the stream that its output is added to, although its keys "
        "do: foreign or learned queries",
        "foreign queries",
    ),
    "other shortcut": (
        "its queries do not come from what its output is added to: the shortcut around it is "
        "pooled or projected, or belongs to another stream",
        "pooled or projected shortcut",
    ),
    "no owner": ("no module takes the residual stream and returns it updated", "no block module"),
    "several outputs": ("module {} hands out {} values, one expected", "further results"),
    "another shape": ("module {} changes the stream's shape from {} to {}", "no block module"),
    "one token left": ("module {} changes the stream's shape from {} to {}", "class attention"),
    "another size": (
        "the output of {} is not its stream updated: what leads to it from the sum with the "
        "attention has another size",
        "no block module",
    ),
    "whole model": ("its block is the whole model, not a module of its own", "no block module"),
    "runs repeatedly": ("{} runs {} times per forward", "shared module"),
    "encoder repeated": (
        "{} runs its blocks {} times per forward, once per view or image: convert it alone, with "
        "one of them",
        "several views",
    ),
    "channel queries": (
        "channel attention: queries are channels, not tokens",
        "channel attention",
    ),
    "prefix queries": (
        "its queries are prefix tokens alone: class attention",
        "class attention",
    ),
    "one query": (
        "{} query against {} tokens: class attention, or pooling to one token",
        "class attention",
    ),
    "other queries": (
        "{} queries against {} tokens: class or pooling attention, or a query path that changes "
        "the grid",
        "queries on another grid",
    ),
    "fewer queries": (
        "{} queries against {} tokens and no residual add around them: it makes the grid smaller "
        "between stages",
        "queries on another grid",
    ),
    "small grid": ("a grid of {} x {} has nothing to pool", "nothing to pool"),
    "outer block": ("{} also holds the block {}, which converts by itself", "outer block"),
    "no scores": (
        "its weights are no product of queries and keys: linear, outlook or dynamic-convolution "
        "attention",
        "no query-key scores",
    ),
    "several levels": (
        "multi-scale deformable attention: the stream is several grids one after another, not "
        "prefix tokens followed by the grid in raster order",
        "several grids",
    ),
    "no grid": ("no spatial operation lays out its tokens (grid not found)", "layout unknown"),
    "rank": (
        "the stream has {} axes; (B, N, C), (B, H, W, C) or (B, C, H, W) needed",
        "token order",
    ),
    "tokens on several axes": (
        "tokens do not lie along one axis of the stream",
        "token order",
    ),
    "tokens not in order": (
        "the stream's tokens are not prefix tokens followed by every token of the grid",
        "token order",
    ),
    "no raster": ("the stream's grid is not in raster order", "token order"),
}


def _say(name: str, *facts: Any) -> Reason:
    words, kind = _WORDS[name]
    return Reason(words.format(*("(root)" if fact == "" else fact for fact in facts)), kind)


def refusal_reasons(located: Located) -> dict[Block, Reason]:
    """Why each refused attention of a model stays dense."""
    refused = [block for block in located.blocks if isinstance(block, Refusal)]
    encoders = _encoders(refused, located)
    return {refusal: _reason(refusal, located, encoders) for refusal in refused}


def _reason(refusal: Refusal, located: Located, encoders: set[str]) -> Reason:
    name, facts, core = refusal.cause.name, refusal.cause.facts, refusal.core
    match name:
        case "other attention":
            module, other = facts
            why = _reason(other, located, encoders)
            return Reason(f"another attention of {module} does not convert: {why.text}", why.kind)
        case "refused call" if (call := core.form.refusal(core.output)) is not None:
            return call
        case "no residual add":
            asking, asked = map(located.finder.token_ids, (core.query, core.key))
            if asking and asked and 1 < len(asking.tokens) < len(asked.tokens):
                return _say("fewer queries", len(asking.tokens), len(asked.tokens))
        case "other queries" if facts[0] == 1:
            return _say("one query", *facts)
        case "no grid" | "rank" | "tokens on several axes" | "tokens not in order" | "no raster":
            return _without_layout(refusal, located)
        case _ if name in _OF_OWNER and _asks_with_learned(core, located.cores):
            return _say("learned queries")
        case "runs repeatedly":
            module, runs = facts
            return _repeated(module, runs, encoders)
        case "another shape":
            _, before, after = facts
            if len(before) == len(after) == 3 and before[1:2] > after[1:2] == (1,):
                return _say("one token left", *facts)
    return _say(name, *facts)


#: causes that `locate.owner` gives
_OF_OWNER = {
    "no owner",
    "runs repeatedly",
    "several outputs",
    "another shape",
    "another size",
    "whole model",
}


def _without_layout(refusal: Refusal, located: Located) -> Reason:
    """Why the stream has no layout."""
    core, stream, finder = refusal.core, refusal.stream, located.finder
    assert stream is not None
    held, asking = map(finder.token_ids, (stream, core.query))
    if _samples_levels(core, located.cores):
        return _say("several levels")
    why = why_no_layout(stream, finder)
    if why is not None:
        return why
    if asking is not None and not len(asking.tokens):
        return _say("prefix queries")
    if held is not None and held.grid == (1, 1):
        return _say("small grid", *held.grid)
    if held is None and _asks_with_learned(core, located.cores):
        return _say("learned queries")
    return _say(refusal.cause.name, *refusal.cause.facts)


def _samples_levels(core: AttentionCore, cores: tuple[AttentionCore, ...]) -> bool:
    """Whether its tokens sample several maps at once."""
    stack = core.output.meta["stack"]
    beside = [c for c in cores if c.form.levels and c.output.meta["stack"] == stack]
    return core in beside and len(beside) > 1


def _asks_with_learned(core: AttentionCore, cores: tuple[AttentionCore, ...]) -> bool:
    """Whether its queries begin with learned ones, whatever of the image was added to them since:
    attention before it gives tokens where its own queries are."""
    query_of = {c.output: c.query for c in cores}
    before = breadth_first(
        [core.query], lambda n: [query_of[n]] if n in query_of else n.all_input_nodes
    )
    return not any(node.op == "placeholder" for node in before)


# -- blocks that run several times, by themselves or with their whole encoder, once per view ------


def _encoders(refused: list[Refusal], located: Located) -> set[str]:
    """Modules that run their patch embedding as often as their blocks, which is several times."""
    found = set()
    for refusal in refused:
        if refusal.cause.name != "runs repeatedly" or refusal.stream is None:
            continue
        module, runs = refusal.cause.facts
        layout = located.finder.layout(refusal.stream)
        source = layout.source if isinstance(layout, Layout) else None
        if source is not None and located.capture.runs(source) == runs:
            found.add(_around(module, source, located.capture))
    return found


def _around(module: str, source: str, capture: Capture) -> str:
    """The innermost module that holds both, one that is called as often where there is one."""
    parts = list(zip(module.split("."), source.split("."), strict=False))
    same = next((i for i, (a, b) in enumerate(parts) if a != b), len(parts))
    names = [".".join(module.split(".")[:count]) for count in range(same, 0, -1)]
    runs = capture.runs(source)
    return next((n for n in names if capture.runs(n) == runs), (names or [""])[0])


def _repeated(module: str, runs: int, encoders: set[str]) -> Reason:
    # later stages of an encoder have grids that no module lays out
    whole = [name for name in encoders if not name or f"{module}.".startswith(f"{name}.")]
    if whole:
        return _say("encoder repeated", max(whole, key=len) or "the model", runs)
    return _say("runs repeatedly", module, runs)
