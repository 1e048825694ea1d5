"""Trace: one block module as its own symbolic graph, in eval or in train mode.

`self.training` is decided while tracing, so a block is traced once in each. Where plain tracing
fails, custom modules and wrapped functions stay calls, or the types of values become constants.
Next: `passes.sides` and `passes.emit`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dgefx.ambient import working_dtype
from dgefx.nn.callspec import CallSpec
from dgefx.nn.guards import Setting
from dgefx.passes.errors import TraceError
from dgefx.passes.ops import run_node
from dgefx.passes.trace.copies import containers, empty_caches, shadow
from dgefx.passes.trace.decisions import Decisions
from dgefx.passes.trace.deterministic import random_numbers_kept
from dgefx.passes.trace.module_access import size_attributes
from dgefx.passes.trace.tensor_versions import set_item
from dgefx.passes.trace.tracer import ConcolicTracer
from dgefx.passes.trace.wrapped_functions import wrapped_functions
from dgefx.passes.user_code import error_text, is_internal


@dataclass(frozen=True)
class TraceOptions:
    """training: the mode. dtype: the floating type whose branches are taken; None: of the block's.
    grid: of its tokens; attributes that tell it stay reads. grad: whether gradients are on around
    the block. opaque: custom modules and wrapped functions stay calls. fixed_types: the types of
    values are constants."""

    training: bool
    dtype: torch.dtype | None = None
    grid: tuple[int, int] | None = None
    grad: bool = True
    opaque: bool = False
    fixed_types: bool = False


@dataclass
class Trace:
    """A block's own graph, and what it holds for. `root` is a copy of the block (without hooks)
    that it runs on."""

    graph: fx.Graph
    root: nn.Module
    spec: CallSpec
    options: TraceOptions
    values: dict[fx.Node, Any]
    constants: dict[str, Tensor]  # tensors that are no parameter or buffer of the block
    decisions: Decisions
    token_wise: frozenset[str]  # modules that stay calls, see `passes.trace.token_wise`
    entered: tuple[str, ...]  # modules that were gone through
    settings: tuple[Setting, ...]  # what forward read from attributes
    written: tuple[str, ...]  # attributes that forward sets
    functions: tuple[str, ...]  # autograd functions, whose own backward is not in the graph
    asks_grad: bool  # whether the block asked if gradients are on
    knows_autocast: bool  # whether the block runs otherwise where autocast is on


def trace(
    block: nn.Module, spec: CallSpec, training: bool, grid: tuple[int, int] | None = None
) -> Trace:
    """Trace `block` as `spec` calls it.

    Args:
        block: not changed; a copy is traced.
        training: trace the train-mode graph (dropout, drop path) instead of the eval one.
        grid: of its tokens; attributes that tell it stay reads.

    Raises:
        TraceError: with what could not be traced, and in which line of the block's code.
    """
    return trace_with(block, spec, TraceOptions(training, grid=grid))


def trace_with(block: nn.Module, spec: CallSpec, options: TraceOptions) -> Trace:
    """As `trace`."""
    errors: list[Exception] = []
    for opaque, fixed_types in ((False, False), (True, False), (False, True)):
        # PyTorch's own limits of a type take no proxy for one
        if fixed_types and "finfo" not in str(errors[0]):
            break
        attempt = dataclasses.replace(options, opaque=opaque, fixed_types=fixed_types)
        try:
            return _trace_copy(block, spec, attempt)
        except Exception as found:  # any user code may raise anything while traced
            errors.append(found)
    error = errors[0]
    if not isinstance(error, TraceError) and is_internal(error):
        raise error
    raise TraceError(f"cannot be traced: {error_text(error)}") from error


def _trace_copy(block: nn.Module, spec: CallSpec, options: TraceOptions) -> Trace:
    """One attempt."""
    root = shadow(block).train(options.training)
    in_place = [m for m in root.modules() if getattr(m, "inplace", False) is True]
    for module in in_place:  # running the nodes of the trace changes no value of it
        module.inplace = False  # type: ignore[assignment]
    parts = [m for m in root.modules() if m is not root] if options.opaque else []
    decisions = Decisions(root, options.dtype or working_dtype(), options.fixed_types)
    tracer = ConcolicTracer(
        root,
        spec,
        decisions,
        leaves=[m for m in parts if not any(m.children())],
        in_place=in_place,
        sizes=() if options.grid is None else size_attributes(root, options.grid),
        grad=options.grad,
    )
    held = containers(root)
    sizes = {name: len(value) for name, value in held.items()}
    with random_numbers_kept(), torch.set_grad_enabled(options.grad):
        empty_caches(root, block, spec)
        with wrapped_functions(root, options.opaque):
            graph = tracer.run()
    filled = [
        name
        for name, value in held.items()
        # a dictionary of what is made of parameters alone is a cache
        if tracer.holds_data(value) or (len(value) != sizes[name] and not isinstance(value, dict))
    ]
    _drop_unread(graph)
    return Trace(
        graph,
        root,
        spec,
        options,
        tracer.values,
        _constants(graph, block, root),
        decisions,
        tracer.token_wise(),
        tuple(tracer.entered),
        tracer.settings_read(),
        (*tracer.state.changed(), *filled),
        tuple(tracer.calls.functions),
        tracer.calls.asks_grad,
        tracer.calls.knows_autocast or options.fixed_types,
    )


def _drop_unread(graph: fx.Graph) -> None:
    """Remove what was written into bases that nothing reads afterwards."""
    for node in reversed(graph.nodes):
        if node.target is set_item and not node.users:
            graph.erase_node(node)


def _constants(graph: fx.Graph, block: nn.Module, root: nn.Module) -> dict[str, Tensor]:
    """Tensors that a graph reads from `root`, a copy, and `block` has not."""
    names = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in root.named_buffers(remove_duplicate=False)}
    constants = {}
    for node in graph.nodes:
        if node.op == "get_attr" and (target := str(node.target)) not in names:
            value = run_node(node, root, (), {})
            if isinstance(value, Tensor) and attribute_of(block, target) is None:
                constants[target] = value
    return constants


def attribute_of(block: nn.Module, target: str) -> Tensor | None:
    """The tensor that is a plain attribute of the block's, which the model may set anew."""
    owner, _, name = target.rpartition(".")
    try:
        value = vars(block.get_submodule(owner)).get(name)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None
