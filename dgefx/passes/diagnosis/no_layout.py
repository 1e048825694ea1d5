"""Why the tokens of a stream have no place in an image: what was done to them on the way.

Walks back along the residual path as `passes.locate.grid` does, past what that one cannot follow.
Used by `passes.locate.sites` for streams without a layout.
"""

from __future__ import annotations

from torch.fx import Node

from dgefx.passes.locate.grid import GridFinder
from dgefx.passes.ops import RANDOM, Op, argument, named, op_name
from dgefx.passes.reasons import Reason

_SELECTS = named(Op.SELECTS)
_VOLUMES = named(Op.VOLUME)


def _behind(nodes: list[Node]) -> set[Node]:
    """`nodes` and all that they are computed from."""
    seen, front = set(nodes), list(nodes)
    while front:
        fresh = [n for n in front.pop().all_input_nodes if n not in seen]
        seen.update(fresh)
        front.extend(fresh)
    return seen


def _inputs(nodes: set[Node]) -> set[Node]:
    return {node for node in nodes if node.op == "placeholder"}


def _place(node: Node) -> str:
    stack = node.meta["stack"]
    return (stack and stack[-1]) or "the model"


def _selected(node: Node) -> Reason | None:
    """Where a node takes some of the tokens, or all in another order, that are not known before."""
    tokens, index = node.all_input_nodes[:1], node.all_input_nodes[1:]
    if op_name(node) not in _SELECTS or not index or not _inputs(_behind(tokens)):
        return None
    causes = _behind(index)
    if _inputs(causes):
        how = "by the values of its input (pruning by a score, a mask, proposals)"
    elif any(op_name(cause) in RANDOM for cause in causes):
        how = "at random (patch dropout, masked training)"
    else:
        return None
    return Reason(f"{_place(node)} selects or shuffles its tokens {how}", "selected tokens")


def _joined(node: Node, finder: GridFinder) -> Reason | None:
    """Where several grids become one sequence."""
    parts = node.args[0] if op_name(node) == "cat" and node.args else None
    axis = argument(node, 1, "dim", 0)
    if not isinstance(parts, (tuple, list)) or not isinstance(axis, int):
        return None
    held, origins = [], []
    for part in parts:
        if not isinstance(part, Node):
            continue
        tokens, shape = finder.held(part), part.meta["shape"]
        along = tokens is not None and tokens.in_features == (axis % len(shape) == len(shape) - 1)
        if tokens is not None and along and 0 < tokens.count <= shape[axis]:
            held.append(tokens)
            origins.append(_inputs(_behind([part])))
    if len(held) < 2:
        return None
    different = len({tokens.grid for tokens in held}) > 1
    grids = " and ".join(f"{h} x {w}" for h, w in (tokens.grid for tokens in held))
    if not set.intersection(*origins):
        return Reason(
            f"its stream holds the tokens of several images one after another, of {grids}",
            "several images",
        )
    if different:
        return Reason(f"its stream is several grids one after another, {grids}", "several grids")
    return None  # parts of one grid


def _sources(node: Node) -> list[Node]:
    """Where the tokens of a value come from."""
    known = GridFinder.sources(node)
    further = op_name(node) in _SELECTS | _VOLUMES
    return known or (node.all_input_nodes[:1] if further else [])


def _of_input(seen: set[Node], given: list[Node]) -> Reason | None:
    """What the model was given in the place of images."""
    numbers = [n for n in given if not n.meta["dtype"].is_floating_point]
    tokens = [n for n in _inputs(seen) if n not in numbers]
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
    volumes = {op_name(n) for n in seen} & _VOLUMES
    for node in tokens:
        if len(node.meta["shape"]) == 5 or volumes:
            return Reason(
                f"its tokens are of a volume or a video: they come from an input of shape "
                f"{node.meta['shape']}",
                "volume or video",
            )
    return None


def why_unplaced(stream: Node, finder: GridFinder) -> Reason | None:
    """What makes the tokens of a captured stream no grid, or None where that is not known."""
    front, seen = [stream], {stream}
    while front:
        node = front.pop(0)
        if node.op.startswith("call_"):
            reason = _selected(node) or _joined(node, finder)
            if reason is not None:
                return reason
        fresh = [n for n in _sources(node) if n not in seen]
        seen.update(fresh)
        front.extend(fresh)
    return _of_input(seen, [n for n in stream.graph.nodes if n.op == "placeholder"])
