"""The module that a residual stream and its update belong to. Step of `passes.locate.sites`."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from dgefx.passes.attention.core import AttentionCore
from dgefx.passes.attention.registry import form_of
from dgefx.passes.capture import Capture
from dgefx.passes.locate.grid import GridFinder
from dgefx.passes.locate.refusal import Cause
from dgefx.passes.locate.residual import SAME, Residual, Residuals
from dgefx.passes.ops import MOVEMENT, TOKENWISE, Op, argument, named, op_name
from dgefx.passes.walk import breadth_first

#: lets tokens see each other; a path through it is the update, not the stream
_ATTENDS = named(Op.PRODUCT) | {"softmax"}
_TOKENWISE = TOKENWISE | MOVEMENT


@dataclass(frozen=True)
class Owner:
    """A module that takes a stream and gives it, or its update, back.

    stream: its input. first_only: whether it returns several tensors, of which the model reads the
    first alone. update: whether it gives back what is to be added to the stream.
    """

    module: str
    stream: Node
    first_only: bool
    update: bool = False


def _is_inside(node: Node, module: str) -> bool:
    return node.op.startswith("call_") and module in node.meta["stack"]


def _boundary(graph: Graph, module: str) -> tuple[set[Node], set[Node]]:
    """(values that enter `module`, values that leave it)."""
    entering: set[Node] = set()
    leaving: set[Node] = set()
    for node in graph.nodes:
        inside = _is_inside(node, module)
        for source in node.all_input_nodes:
            if inside and not _is_inside(source, module):
                entering.add(source)
            elif not inside and _is_inside(source, module):
                leaving.add(source)
    return {node for node in entering if node.op != "get_attr"}, leaving


def _first_alone(capture: Capture, module: str, output: Node) -> bool:
    """Whether `output`, all that leaves the module, is the first of the tensors it returns."""
    results = capture.calls[module][-1].output
    return isinstance(results, tuple) and len(results) > 1 and results[0] is output


def _skips_to(output: Node, streams: Container[Node]) -> Node | None:
    """The nearest of `streams` that `output` is, plus something: reachable backwards by adds, data
    movement, casts, scaling and dropout alone."""

    def before(node: Node) -> list[Node]:
        if not node.op.startswith("call_"):
            return []
        name = op_name(node)
        sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
        scaled = name in ("mul", "div") and len(sources) == 1
        return sources if name == "add" or name in SAME or scaled else []

    return next((node for node in breadth_first([output], before) if node in streams), None)


def _size(node: Node) -> int:
    return math.prod(node.meta.get("shape", (0,)))


def _keeps(output: Node, earlier: Node) -> bool:
    """Whether `output` is `earlier` updated: a path without attention leads there on which every
    value has as many elements."""
    size = _size(earlier)

    def before(node: Node) -> list[Node]:
        if not node.op.startswith("call_") or op_name(node) in _ATTENDS or form_of(node):
            return []
        return [n for n in node.all_input_nodes if _size(n) == size]

    return any(node is earlier for node in breadth_first([output], before))


def _owner_at(capture: Capture, residual: Residual, module: str) -> Owner | Cause | None:
    """`module`, if it takes the stream and gives it back updated; None if it does not take it."""
    entering, leaving = _boundary(capture.graph, module)
    entry = _skips_to(residual.stream, entering)
    if entry is None:
        return None
    runs = capture.runs(module)
    if runs != 1:
        return Cause("runs repeatedly", (module, runs))
    if len(leaving) != 1:
        return Cause("several outputs", (module, len(leaving)))
    (output,) = leaving
    before, after = entry.meta["shape"], output.meta.get("shape") or ()
    if before != after:
        return Cause("another shape", (module, before, after))
    if not _keeps(output, residual.add):
        return Cause("another size", (module,))
    if not module:
        return Cause("whole model")
    return Owner(module, entry, _first_alone(capture, module, output))


def stream_owner(
    capture: Capture, core: AttentionCore, residual: Residual, cores: Sequence[AttentionCore]
) -> Owner | Cause:
    """The innermost module that takes the stream and gives it back updated; with its MLP, where
    that sits in a module beside it.

    Args:
        cores: all of the model's.
    """
    stack, around_add = core.output.meta["stack"], residual.add.meta["stack"]
    modules = [name for name in stack if name in around_add][::-1]
    found = ((name, _owner_at(capture, residual, name)) for name in modules)
    owner = next((owner for _, owner in found if owner is not None), Cause("no owner"))
    if isinstance(owner, Cause):
        return owner
    for module in modules[modules.index(owner.module) + 1 :]:
        wider, more = _owner_at(capture, residual, module), _between(capture, module, owner.module)
        foreign = any(c.output in more for c in cores)
        if not isinstance(wider, Owner) or foreign or not all(map(_is_tokenwise, more)):
            break
        if any(op_name(node) in ("linear", "conv2d") for node in more):  # with weights of its own
            owner = wider
    return owner


def _between(capture: Capture, outer: str, inner: str) -> list[Node]:
    """What a module does besides what one inside it does."""
    nodes = capture.graph.nodes
    return [n for n in nodes if _is_inside(n, outer) and not _is_inside(n, inner)]


def _is_tokenwise(node: Node) -> bool:
    if op_name(node) == "conv2d":
        weight = argument(node, 1, "weight")
        return isinstance(weight, Node) and tuple(weight.meta["shape"][2:]) == (1, 1)
    return op_name(node) in _TOKENWISE


def update_owner(
    capture: Capture, core: AttentionCore, residuals: Residuals, finder: GridFinder
) -> Owner | None:
    """The innermost module that takes tokens and gives back their update.

    For an attention whose residual add is in no module of its own: next to another branch, or in a
    module that goes on to other shapes. Everything around the attention stays dense then.
    """
    parts, asked = (core.query, core.key, core.value), finder.token_ids(core.query)
    if asked is None:
        return None
    count = len(asked.tokens)
    for module in reversed(core.output.meta["stack"]):
        entering, leaving = _boundary(capture.graph, module)
        if not module or capture.runs(module) != 1 or len(leaving) != 1:
            continue
        (output,) = leaving
        for entry in entering:
            if entry.meta["shape"] != output.meta.get("shape"):
                continue
            held = finder.token_ids(entry)
            known = held is not None and len(held.tokens) == count
            if known and all(residuals.descends(part, entry) for part in parts):
                return Owner(module, entry, _first_alone(capture, module, output), update=True)
    return None
