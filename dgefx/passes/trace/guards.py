"""Trace, guards: under which conditions the graph of a trace is what the block does.

Turns what a trace read and decided into the `Guards` that a converted block asks in every call.
Called by `passes.plan.plan`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized

from dgefx.nn.code import GraphCode
from dgefx.nn.guards import FLOATS, Guards
from dgefx.passes.errors import TraceError
from dgefx.passes.ops import Op, named, op_name
from dgefx.passes.trace.block_trace import Trace, trace_with
from dgefx.passes.trace.decisions import size_questions
from dgefx.passes.walk import behind, breadth_first

_READS_TYPE = named(Op.READS_TYPE)


def guards_of(
    block: nn.Module,
    traced: Trace,
    place: int,
    generated: fx.Graph,
    types: frozenset[torch.dtype],
) -> Guards:
    """What has to hold while `generated`, split from `traced`, stands for the block.

    Args:
        block: the dense one. place: of the stream among its inputs. types: see `same_types`.
    """
    stream = [node for node in traced.graph.nodes if node.op == "placeholder"][place]
    asked = size_questions(traced.decisions, traced.graph, stream)
    calls = [(n.op, str(n.target)) for n in generated.nodes if n.op in ("call_module", "get_attr")]
    read_apart = {target.rpartition(".")[0] for op, target in calls if op == "get_attr"}
    called = sorted({str(n.target) for n in traced.graph.nodes if n.op == "call_module"})
    # modules that both sides need: called twice, or read for rows by each of them
    count = Counter(target for _, target in calls)
    doubled = tuple(name for name in called if count[name] > 1)
    modules = {name: block.get_submodule(name) for name in (*traced.entered, *called)}
    return Guards(
        settings=traced.settings,
        kinds=tuple((name, type(modules[name])) for name in traced.entered),
        bypassed=tuple(
            name
            for name, module in modules.items()
            if (name in traced.entered or name in read_apart) and not _has_torch_hooks(module)
        ),
        types=types,
        device=traced.values[stream].device.type if traced.decisions.asks_for_device() else None,
        questions=None if asked is None else GraphCode(asked[0], "questions"),
        answers=frozenset() if asked is None else frozenset((asked[1],)),
        aliases=_aliases(block),
        unpatched=tuple(name for name in traced.entered if "forward" not in vars(modules[name])),
        doubled=doubled,
        twice=tuple(
            name
            for name in doubled
            if traced.options.training and keeps_statistics(traced.root.get_submodule(name))
        ),
        knows_autocast=traced.knows_autocast,
    )


def _has_torch_hooks(module: nn.Module) -> bool:
    """Whether hooks of PyTorch's own compute its weights (weight norm): the trace holds them."""
    hooks = module._forward_pre_hooks.values()
    return any(type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks)


def _aliases(block: nn.Module) -> tuple[tuple[str, str], ...]:
    first: dict[nn.Module, str] = {}
    names = block.named_modules(remove_duplicate=False)
    pairs = ((first.setdefault(module, name), name) for name, module in names)
    return tuple((one, other) for one, other in pairs if one != other)


def keeps_statistics(module: nn.Module) -> bool:
    """Whether calls in train mode change later ones, by running statistics or a spectral norm."""
    for part in module.modules():
        if isinstance(part, _NormBase) and part.track_running_stats:
            return True
        # what a parametrization keeps, as spectral norm does
        held = getattr(part, "parametrizations", None) if is_parametrized(part) else None
        if isinstance(held, nn.Module) and any(True for _ in held.buffers()):
            return True
    return False


def same_types(block: nn.Module, traced: Trace) -> frozenset[torch.dtype]:
    """The floating types in which the block does what was traced: it decides alike, or its other
    branch comes to the same graph (a clamp of what is not finite)."""
    held = traced.decisions.types()
    if traced.decisions.knows_one_type():
        return held
    return held | {dtype for dtype in FLOATS - held if _same_graph(block, traced, dtype=dtype)}


def same_without_grad(block: nn.Module, traced: Trace) -> bool:
    """Whether the block does the same where gradients are off, if it asks for that."""
    return not traced.asks_grad or _same_graph(block, traced, grad=False)


def _same_graph(block: nn.Module, traced: Trace, **changed: Any) -> bool:
    """Whether a trace with other options computes the same."""
    options = dataclasses.replace(traced.options, **changed)
    try:
        other = trace_with(block, traced.spec, options)
    except TraceError:
        return False
    return _source(traced.graph) == _source(other.graph)


def _source(graph: fx.Graph) -> list[str]:
    """The calls of a graph that lead to its output, whatever its nodes are called."""
    needed = set(behind(graph.output_node()))
    numbers: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node in needed:
            numbers[node] = f"%{len(numbers)}"
            args = fx.map_arg((node.args, node.kwargs), numbers.__getitem__)
            lines.append(f"{node.op} {node.target} {args}")
    return lines


def types_asked(traced: Trace) -> frozenset[str]:
    """Names of the arguments that are bool tensors of which a trace asked the type, and may have
    decided something by it."""

    def is_bool(node: fx.Node) -> bool:
        value = traced.values.get(node)
        return isinstance(value, Tensor) and value.dtype == torch.bool

    def asks(start: fx.Node) -> bool:
        reached = set(breadth_first([start], lambda node: node.users))
        return any(
            (node.args[1] if node.target is getattr else op_name(node, traced.root)) in _READS_TYPE
            and any(source in reached and is_bool(source) for source in node.all_input_nodes)
            for node in reached
        )

    given = (node for node in traced.graph.nodes if node.op == "placeholder")
    return frozenset(str(node.target) for node in given if is_bool(node) and asks(node))
