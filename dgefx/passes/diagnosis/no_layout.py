"""Why the tokens of a stream have no place in an image: what was done to them on the way.

Walks back along the residual path as `passes.locate.grid` does, past what that one cannot follow.
Used by `passes.diagnosis.refusals` for streams without a layout.
"""

from __future__ import annotations

from torch.fx import Node

from dgefx.passes.locate.grid import GridFinder
from dgefx.passes.ops import RANDOM, Op, argument, named, op_name
from dgefx.passes.reasons import Reason
from dgefx.passes.walk import behind, breadth_first

_SELECTS = named(Op.SELECTS)
_VOLUMES = named(Op.VOLUME)


def _inputs(node: Node) -> set[Node]:
    """The inputs of the model that a value is computed from."""
    return {before for before in behind(node) if before.op == "placeholder"}


def _selected(node: Node) -> Reason | None:
    """Where a node takes some of the tokens, or all in another order, that are not known before."""
    tokens, *index = node.all_input_nodes or [node]
    if op_name(node) not in _SELECTS or not index or not _inputs(tokens):
        return None
    if any(map(_inputs, index)):
        how = "by the values of its input (pruning by a score, a mask, proposals)"
    elif any(op_name(cause) in RANDOM for cause in behind(*index)):
        how = "at random (patch dropout, masked training)"
    else:
        return None
    stack = node.meta["stack"]
    place = (stack and stack[-1]) or "the model"
    return Reason(f"{place} selects or shuffles its tokens {how}", "selected tokens")


def _joined(node: Node, finder: GridFinder) -> Reason | None:
    """Where several grids become one sequence."""
    parts = node.args[0] if op_name(node) == "cat" and node.args else None
    axis = argument(node, 1, "dim", 0)
    if not isinstance(parts, (tuple, list)) or not isinstance(axis, int):
        return None
    held, origins = [], []
    for part in parts:
        tokens = finder.token_ids(part) if isinstance(part, Node) else None
        if tokens is None:
            continue
        size, last = part.meta["shape"][axis], axis in (-1, len(part.meta["shape"]) - 1)
        if tokens.in_features == last and 0 < len(tokens.tokens) <= size:
            held.append(tokens)
            origins.append(_inputs(part))
    if len(held) < 2:
        return None
    grids = " and ".join(f"{h} x {w}" for h, w in (tokens.grid for tokens in held))
    if not set.intersection(*origins):
        return Reason(
            f"its stream holds the tokens of several images one after another, of {grids}",
            "several images",
        )
    if len({tokens.grid for tokens in held}) > 1:
        return Reason(f"its stream is several grids one after another, {grids}", "several grids")
    return None  # parts of one grid


def _sources(node: Node) -> list[Node]:
    """Where the tokens of a value come from, also past what has no token ids."""
    known = GridFinder.sources(node)
    further = op_name(node) in _SELECTS | _VOLUMES
    return known or (node.all_input_nodes[:1] if further else [])


def _of_input(passed: list[Node]) -> Reason | None:
    """What the model was given in the place of images.

    Args:
        passed: values that the stream's tokens were in.
    """
    given = [node for node in passed[0].graph.nodes if node.op == "placeholder"]
    numbers = [n for n in given if not n.meta["dtype"].is_floating_point]
    tokens = [n for n in passed if n in given and n not in numbers]
    for node in tokens:
        shape = node.meta["shape"]
        placed = any(
            n.meta["shape"][:2] == shape[:2] and len(n.meta["shape"]) == 3 for n in numbers
        )
        if placed or (numbers and len(shape) <= 3):
            return Reason(
                f"its tokens are patches that the model is given, as {shape}, with their places "
                f"or sizes as data beside them",
                "packed patches",
            )
    for node in tokens:
        shape = node.meta["shape"]
        if len(shape) == 5 or any(op_name(n) in _VOLUMES for n in passed):
            return Reason(
                f"its tokens are of a volume or a video: they come from an input of shape {shape}",
                "volume or video",
            )
    return None


def why_no_layout(stream: Node, finder: GridFinder) -> Reason | None:
    """What makes the tokens of a captured stream no grid, or None where that is not known."""
    passed = []
    for node in breadth_first([stream], _sources):
        passed.append(node)
        if node.op.startswith("call_"):
            reason = _selected(node) or _joined(node, finder)
            if reason is not None:
                return reason
    return _of_input(passed)
