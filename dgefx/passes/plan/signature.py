"""What a block is besides the values of its parameters, as bytes that can be compared.

`description` is of a block that was not traced: blocks with equal ones are planned once.
`trace_signature` is of a traced block: blocks with equal ones share a rewritten graph, and
`plan_signature` what was verified once for their code. They are pickles in which tensors are
replaced by what counts of them. What cannot be pickled, or has hooks, has no signature (None), and
the block is planned and verified alone. Used by `passes.plan.graph_cache`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from dgefx.nn.callspec import CallSpec
from dgefx.nn.guards import Guards
from dgefx.passes.layout import Layout
from dgefx.passes.ops import Op, named, op_name
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.trace.block_trace import Trace

_SCALES = named(Op.SCALES)
#: what of a tensor's elements does not add to the others, and of how many it has to be so that one
#: cannot tell from a block what another one mixes
_NEGLIGIBLE, _SPARSE = 1e-6, 1e-2
#: how a class may say what it holds; packages of which no class hides anything
_OWN_RULES = frozenset({"__reduce__", "__reduce_ex__", "__getstate__"})
_KNOWN = sys.stdlib_module_names | {"torch", "numpy", "dgefx"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _NotComparable(Exception):
    """Something of which equality cannot be told."""


def only_scales(value: Any) -> bool:
    """Whether a number only scales: a graph written for it holds for any other of its sign."""
    return isinstance(value, float) and 1e-6 < abs(value) < 1e6 and abs(value) != 1.0


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that may change gradients."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


class _Signer(pickle.Pickler):
    """Pickles values with modules without their mode, and tensors by their kind, and by their
    elements unless these may be any.

    Args:
        free: tensors of which any elements would do, as of parameters. idle: modules whose numbers
            only scale.
    """

    def __init__(self, file: io.BytesIO, free: Iterable[Tensor], idle: Iterable[nn.Module]) -> None:
        super().__init__(file, protocol=5)
        self.free = {id(tensor) for tensor in free}
        self.idle = set(idle)
        self.numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        """What stands for a tensor; which of those seen so far it is counts, too: equal today, two
        parameters learn each by itself."""
        if isinstance(value, type):
            return "type", value.__qualname__, id(value)
        if not isinstance(value, Tensor):
            return None
        if type(value.data) is not Tensor or value.layout is not torch.strided:
            raise _NotComparable
        number = self.numbers.setdefault(id(value), len(self.numbers))
        kind = (type(value).__name__, str(value.dtype), str(value.device), value.shape)
        if not value.is_floating_point() or not (
            isinstance(value, nn.Parameter) or id(value) in self.free
        ):
            content = _digest(value)
        else:
            content = _sparsity(value) if isinstance(value, nn.Parameter) else b""
        return number, kind, value.stride(), content

    def reducer_override(self, value: Any) -> Any:
        """What stands for a module: its class and what it holds."""
        if not isinstance(value, nn.Module):
            if _says_what_it_holds(type(value)):
                raise _NotComparable
            return NotImplemented
        if any(getattr(value, hooks) for hooks in _HOOKS):
            raise _NotComparable
        held = {name: part for name, part in vars(value).items() if name != "training"}
        if value in self.idle:
            held = {name: _sign(part) for name, part in held.items()}
        return object.__new__, (type(value),), held


def _says_what_it_holds(kind: type) -> bool:
    """Whether a class pickles by a rule of its own, which may leave something out."""
    users = (base for base in kind.__mro__ if base.__module__.partition(".")[0] not in _KNOWN)
    return any(not _OWN_RULES.isdisjoint(vars(base)) for base in users)


def _digest(value: Tensor) -> bytes:
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).digest()


def _sparsity(value: Tensor) -> bytes:
    """Where a parameter is as good as zero, if that is so in many places: a mask, or a matrix that
    passes its input on. Constant ones do not count: rewriting adds noise to them."""
    if not value.numel():
        return b""
    size = value.detach().abs()
    most = size.max()
    there = size > _NEGLIGIBLE * most
    dense = value.numel() - int(there.count_nonzero()) <= _SPARSE * value.numel()
    if dense or bool(value.max() - value.min() <= 1e-3 * most):
        return b""
    return _digest(there)


def _signed(
    make: Callable[[], Any], free: Iterable[Tensor] = (), idle: Iterable[nn.Module] = ()
) -> bytes | None:
    """The signature of what is made, None if it cannot be compared: attributes are user code."""
    file = io.BytesIO()
    try:
        _Signer(file, free, idle).dump(make())
    except Exception:
        return None
    return file.getvalue()


def _statistics(module: nn.Module) -> list[Tensor]:
    """Running statistics, which scale as parameters do."""
    norms = (part for part in module.modules() if isinstance(part, _NormBase))
    return [buffer for norm in norms for buffer in norm.buffers()]


def _called_as(spec: CallSpec) -> Any:
    return spec.names, spec.defaults, spec.inputs, spec.fixed


def _without_source(layout: Layout) -> Layout:
    return dataclasses.replace(layout, source=None)


def description(example: BlockExample, spec: CallSpec) -> bytes | None:
    """All that decides how a block is traced; None if it cannot be told."""
    given, tree = pytree.tree_flatten(spec.example)
    streams = [v for v in given if isinstance(v, Tensor) and tuple(v.shape) == example.shape]
    if len(streams) != 1:
        return None
    described = (example.block, str(tree), given, _called_as(spec), _without_source(example.layout))
    return _signed(lambda: described, (*streams, *_statistics(example.block)))


def _value(node: fx.Node, trace: Trace) -> Any:
    """What writing a graph may ask about a traced value."""
    value = trace.values.get(node)
    owner = getattr(value, "__self__", None)
    # `x.reshape` comes with x
    return str(getattr(value, "__name__", value)) if isinstance(owner, Tensor) else value


def _called(trace: Trace, name: str) -> Any:
    """What writing a graph may ask about a module that is called: of one that works on every token
    alike, whatever it holds, its weights."""
    module = trace.root.get_submodule(name)
    if name not in trace.token_wise:
        return module
    return type(module), [*module.named_parameters(), *module.named_buffers()]


def trace_signature(trace: Trace, stream: fx.Node, layout: Layout) -> bytes | None:
    """All but the mode that decides how the graph of a trace is rewritten; None if it cannot be
    told.

    Args:
        stream: the placeholder of the residual stream. layout: of the stream.
    """
    numbers = {node: ("node", index) for index, node in enumerate(trace.graph.nodes)}

    def of_argument(value: Any, scales: bool) -> Any:
        if isinstance(value, fx.Node):
            return numbers[value]
        return _sign(value) if scales else value

    def of_node(node: fx.Node) -> Any:
        scales = op_name(node, trace.root) in _SCALES
        given = fx.node.map_aggregate((node.args, node.kwargs), lambda v: of_argument(v, scales))
        called = _called(trace, str(node.target)) if node.op == "call_module" else None
        return node.op, node.target, node.name, given, _value(node, trace), called

    # tables and masks decide what mixes with what, the stream's data does not
    computed: list[Tensor] = []
    fixed: set[int] = set()
    for node, value in trace.values.items():
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        if node.op in ("get_attr", "placeholder") and node is not stream:
            fixed.update(map(id, tensors))
        else:
            computed += tensors
    free = [tensor for tensor in computed if id(tensor) not in fixed]
    nodes = list(trace.graph.nodes)
    return _signed(
        lambda: (_without_source(layout), numbers[stream], list(map(of_node, nodes))),
        free + _statistics(trace.root),
    )


def _sign(value: Any) -> Any:
    """Of a number that only scales; anything else as it is."""
    return ("+" if value > 0 else "-") if only_scales(value) else value


def plan_signature(
    traces: Iterable[bytes | None],
    guards: Iterable[Guards],
    block: nn.Module,
    spec: CallSpec,
    idle: frozenset[str],
) -> bytes | None:
    """Equal for blocks that do the same in any call, but for the values of their parameters and
    numbers that only scale; None if that cannot be told. What the example call does not read (a
    branch that larger images take) counts too.

    Args:
        traces: their signatures. guards: what their code holds for. idle: parts of the block that
            do nothing in eval mode, as drop paths, whose rates may differ.
    """
    signatures = tuple(traces)
    if None in signatures or any(map(has_backward_hooks, block.modules())):
        return None

    def held(guards: Guards) -> Any:
        settings = [
            (s.module, s.name, _sign(s.value) if s.module in idle else s.value)
            for s in guards.settings
        ]
        rest = dataclasses.replace(guards, settings=(), questions=None, answers=frozenset())
        return settings, guards.questions and guards.questions.source, rest

    return _signed(
        lambda: (signatures, [*map(held, guards)], _called_as(spec), block),
        _statistics(block),
        map(block.get_submodule, idle),
    )
