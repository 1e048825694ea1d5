"""What is known of one block that converts: its generated code, what that holds for, and what its
verification asks about.

`plan_block` traces a block in both modes and has its graphs rewritten. The stages after it
(`verify`, `sizes`, `call_forms`) look at a plan; `install` builds the converted block of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from dgefx.config import DGEConfig
from dgefx.nn.call_form import CallForm
from dgefx.nn.callspec import CallSpec
from dgefx.nn.code import GraphCode
from dgefx.nn.guards import Guards
from dgefx.nn.hierarchy import Grid
from dgefx.nn.router_tables import space_of
from dgefx.nn.windows import WindowRule
from dgefx.passes.emit.coarse_reference import CoarseReference
from dgefx.passes.errors import Refused
from dgefx.passes.layout import Layout
from dgefx.passes.ops import op_name
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.plan.graph_cache import GraphCache, Rewritten
from dgefx.passes.plan.signature import description, plan_signature
from dgefx.passes.sides.sides import KEEPS_STREAM
from dgefx.passes.stage_log import log_stage
from dgefx.passes.trace.block_trace import Trace, attribute_of, trace
from dgefx.passes.trace.decisions import follows_batch
from dgefx.passes.trace.guards import guards_of, same_types, same_without_grad, types_asked
from dgefx.passes.walk import breadth_first


@dataclass(frozen=True)
class HeldSizes:
    """On which grids a plan is what its dense block is; found by `passes.plan.sizes`.

    windows: the rule of its windows on these. only_here: on none but the example's. answers: of the
    questions of its guards, in eval and in train mode, on all that were tried.
    """

    windows: WindowRule | None
    only_here: bool
    answers: tuple[frozenset[tuple[bool, ...]], frozenset[tuple[bool, ...]]]


@dataclass(frozen=True)
class BlockPlan:
    """Everything about one block that converts.

    name, layout, channels: of the block and its stream. spec: how it is called; rank: which of its
    arguments of the stream's shape is the stream. eval_code, train_code, constants: generated.
    guards: what the code holds for, in eval and in train mode. attributes: buffers and plain
    attributes that it reads, as the example run left them. needs_grid_shape: whether only the model
    knows the running grid, see `passes.locate.grid_source`. windows: how its attention partitions
    the grid; fixed_slots: see `dgefx.kernels.window`; stencils: kernel sizes of its
    depthwise convolutions. only_here: whether it holds at no other size. forms: other ways to call
    it, see `passes.plan.call_forms`.

    For its verification. exact_at_any_level: on input that is constant within patches: it has no
    tables, stencils or full-resolution operations. tokens_apart: nothing but attention mixes its
    tokens. reference: what it must yield below the finest granularity, of blocks whose graph was
    rewritten for themselves. types_asked: names of the arguments that are bool tensors of which it
    asks the type in eval mode. functions: autograd functions that the trace went through.
    numbers_images: whether Python made a number of a batch size. eval_calls_more: whether it calls
    in eval mode what it does not in train mode.

    graphs_of: names of the blocks whose graphs these are. copy_of: the block that differs from this
    one in its parameters only, "" if none. signature: see `passes.plan.signature`.
    """

    name: str
    layout: Layout
    channels: int
    spec: CallSpec
    rank: int
    eval_code: GraphCode
    train_code: GraphCode
    constants: dict[str, Tensor]
    guards: tuple[Guards, Guards]
    attributes: dict[str, Tensor]
    needs_grid_shape: bool
    windows: WindowRule | None
    fixed_slots: bool
    stencils: frozenset[int]
    exact_at_any_level: bool
    tokens_apart: bool
    graphs_of: tuple[str, str]
    types_asked: frozenset[str] = frozenset()
    functions: tuple[str, ...] = ()
    numbers_images: bool = False
    eval_calls_more: bool = False
    reference: CoarseReference | None = field(default=None, repr=False)
    only_here: bool = False
    forms: tuple[CallForm, ...] = ()
    copy_of: str = ""
    signature: bytes | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """For `passes.stage_log`."""
        whose = self.same_graph_as or self.copy_of
        same = self.train_code.is_same(self.eval_code)
        settings = [f"{s.module}.{s.name} = {s.value!r}" for s in self.guards[0].settings]
        lines = [
            f"stream: {self.layout}, argument {self.rank} of its shape, {self.channels} channels",
            f"generated code, in eval mode{f' (as of {whose})' if whose else ''}:",
            self.eval_code.source.strip(),
            f"in train mode: {'the same' if same else self.train_code.source.strip()}",
            f"settings that it holds for: {', '.join(settings)}",
            f"windows: {self.windows}, stencils: {sorted(self.stencils)}",
            f"exact at any level on patch-constant input: {self.exact_at_any_level}",
            f"tokens mixed by attention alone: {self.tokens_apart}",
        ]
        return "\n".join(lines)

    @property
    def same_graph_as(self) -> str:
        """The block whose graph it has in eval mode; "" if its own."""
        return self.graphs_of[0] if self.graphs_of[0] != self.name else ""

    @property
    def code_key(self) -> Hashable | None:
        """Equal for blocks that run the same code but for numbers that only scale, at any size;
        None where that cannot be told."""
        return None if self.signature is None else (self.signature, self.graphs_of)

    @property
    def has_questions(self) -> bool:
        """Whether branches on sizes are asked about in every call."""
        return any(guards.questions is not None for guards in self.guards)

    def costs_like(self, other: BlockPlan) -> bool:
        """Whether two blocks that have one graph run the same code in eval mode."""
        return self.fixed_slots == other.fixed_slots and self.eval_code.is_same(other.eval_code)

    def runs_like(self, other: BlockPlan) -> bool:
        """Whether they run the same code in both modes."""
        return self.costs_like(other) and self.train_code.is_same(other.train_code)

    def restricted(self, held: HeldSizes) -> BlockPlan:
        """This plan on the sizes on which it holds."""
        pairs = zip(self.guards, held.answers, strict=True)
        first, second = (guards.also_on(answers) for guards, answers in pairs)
        return dataclasses.replace(
            self, windows=held.windows, only_here=held.only_here, guards=(first, second)
        )

    def tried(self, questions: bool = True) -> BlockPlan:
        """This plan without warnings, for blocks that are only tried.

        Args:
            questions: whether branches on sizes are asked about.
        """
        less: dict[str, Any] = {"bypassed": (), "doubled": (), "twice": ()}
        if not questions:
            less["questions"] = None
        first, second = (dataclasses.replace(guards, **less) for guards in self.guards)
        return dataclasses.replace(self, guards=(first, second))

    def for_copy(self, name: str, source: str | None) -> BlockPlan:
        """The plan of a block that differs in its parameters only, with its grid from `source`."""
        return dataclasses.replace(
            self,
            name=name,
            copy_of=self.name,
            reference=None,
            layout=dataclasses.replace(self.layout, source=source),
            eval_code=self.eval_code.labelled(name),
            train_code=self.train_code.labelled(f"{name} train"),
            forms=(),
        )

    def space(self, config: DGEConfig) -> Grid:
        """What the block's patch hierarchy is built on, at the converted size."""
        return space_of(self.layout.grid, self.windows, config)


def _streams(traced: Trace, shape: tuple[int, ...]) -> list[fx.Node]:
    """Placeholders of the stream's shape."""
    found = [
        n
        for n in traced.graph.nodes
        if n.op == "placeholder"
        and isinstance(traced.values[n], Tensor)
        and tuple(traced.values[n].shape) == shape
    ]
    if not found:
        raise Refused(
            f"no argument of the block holds its stream of shape {shape}", "no block module"
        )
    return found


def _stream_rank(traced: Trace, found: list[fx.Node]) -> int:
    """Which argument of the stream's shape is the stream: that which goes on to the result, with
    updates added, and not one that only takes part in them (positions, values of a block before).
    """

    def kept(node: fx.Node) -> list[fx.Node]:
        keeps = node.op.startswith("call_") and op_name(node, traced.root) in KEEPS_STREAM
        return node.all_input_nodes if keeps else []

    results = next(n for n in traced.graph.nodes if n.op == "output").all_input_nodes
    stream: set[fx.Node] = set(breadth_first(results, kept))
    return next((rank for rank, node in enumerate(found) if node in stream), 0)


def _require_stateless(traces: list[Trace]) -> None:
    written = dict.fromkeys(name for traced in traces for name in traced.written)
    if written:
        raise Refused(
            f"its forward sets {', '.join(written)} on the module, which the converted block would "
            f"leave as it was",
            "keeps state",
        )


def _calls(graph: fx.Graph) -> Counter[tuple[str, ...]]:
    """What is called how often, attributes by their names."""
    return Counter(
        (node.op, str(node.target), *(str(a) for a in node.args if isinstance(a, str)))
        for node in graph.nodes
    )


def kept_tensor(block: nn.Module, target: str) -> Tensor | None:
    """A buffer or a plain attribute of a block."""
    try:
        return block.get_buffer(target)
    except AttributeError:
        return attribute_of(block, target)


def _kept_tensors(block: nn.Module, *graphs: fx.Graph) -> dict[str, Tensor]:
    """The buffers and plain attributes that graphs read."""
    names = {str(n.target) for graph in graphs for n in graph.nodes if n.op == "get_attr"}
    found = ((name, kept_tensor(block, name)) for name in sorted(names))
    return {name: value for name, value in found if value is not None}


def call_spec(example: BlockExample) -> CallSpec:
    """How a block is called.

    Raises:
        Refused: its forward does not say.
    """
    if "forward" in vars(example.block):
        raise Refused("its forward is patched on the instance", "forward signature")
    try:
        return CallSpec.of(example.block, *example.call)
    except ValueError as error:
        raise Refused(str(error), "forward signature") from error


def plan_block(
    example: BlockExample,
    packs: bool = False,
    cache: GraphCache | None = None,
    idle: frozenset[str] = frozenset(),
) -> BlockPlan:
    """Trace one block in both modes and rewrite its graphs.

    Args:
        example: its rank is not looked at.
        packs: whether the queries of a batch are packed, see `passes.emit.packed`.
        cache: blocks of the same model that were planned before; None: none.
        idle: parts of the block that do nothing in eval mode.

    Raises:
        Refused, TraceError: the reason why the block stays dense.
    """
    spec = call_spec(example)
    cache = GraphCache() if cache is None else cache
    key = description(example, spec)
    if key is not None and key in cache.plans:
        return cache.plans[key].for_copy(example.name, example.layout.source)
    plan = _planned(example, spec, packs, cache, idle)
    if key is not None:
        cache.plans[key] = plan
    return plan


def _planned(
    example: BlockExample, spec: CallSpec, packs: bool, cache: GraphCache, idle: frozenset[str]
) -> BlockPlan:
    block, name, layout, shape = example.block, example.name, example.layout, example.shape
    traces = [trace(block, spec, training, grid=layout.grid) for training in (False, True)]
    for traced, mode in zip(traces, ("eval", "train"), strict=True):
        log_stage(name, f"trace in {mode} mode", traced.graph)
    _require_stateless(traces)
    if not all(same_without_grad(block, traced) for traced in traces):
        raise Refused(
            "it asks torch.is_grad_enabled(), and does something else where gradients are off",
            "not traceable",
        )
    types = frozenset.intersection(*(same_types(block, traced) for traced in traces))
    streams = [_streams(traced, shape) for traced in traces]
    ranks = [_stream_rank(t, found) for t, found in zip(traces, streams, strict=True)]
    if ranks[0] != ranks[1]:
        raise Refused("its stream differs between eval and train mode", "train and eval differ")
    nodes = [found[rank] for found, rank in zip(streams, ranks, strict=True)]
    given = [n for n in traces[0].graph.nodes if n.op == "placeholder"]
    place, axis = given.index(nodes[0]), layout.axis("B")
    first = cache.rewrite(traces[0], nodes[0], layout, packs, name)
    second = cache.rewrite(traces[1], nodes[1], layout, packs, name, first)
    evaluated, trained = first.graph, second.graph
    guards = [
        guards_of(block, traced, place, made.graph.graph, types)
        for traced, made in zip(traces, (first, second), strict=True)
    ]
    return BlockPlan(
        name=name,
        layout=layout,
        channels=shape[layout.axis("C")],
        spec=dataclasses.replace(spec.without_example(), stream=place),
        rank=ranks[0],
        eval_code=GraphCode(evaluated.graph, name),
        train_code=GraphCode(trained.graph, f"{name} train"),
        constants=_joined_constants(first, second),
        guards=(guards[0], guards[1]),
        attributes=_kept_tensors(block, evaluated.graph, trained.graph),
        needs_grid_shape=evaluated.needs_grid_shape or trained.needs_grid_shape,
        windows=evaluated.windows,
        fixed_slots=evaluated.fixed_slots or trained.fixed_slots,
        stencils=evaluated.stencils | trained.stencils,
        exact_at_any_level=not (evaluated.positional or evaluated.mixing),
        tokens_apart=evaluated.tokens_apart,
        graphs_of=(first.owner, second.owner),
        types_asked=types_asked(traces[0]),
        functions=tuple(dict.fromkeys(traces[0].functions + traces[1].functions)),
        numbers_images=any(
            follows_batch(node, traced.values, stream, axis)
            for traced, stream in zip(traces, nodes, strict=True)
            for node in (*traced.decisions.numbers, *traced.decisions.branches)
        ),
        # of the traces: movement that a generated graph leaves out may stop gradients
        eval_calls_more=not _calls(traces[0].graph) <= _calls(traces[1].graph),
        reference=evaluated.reference if first.owner == name else None,
        signature=plan_signature((first.key, second.key), guards, block, spec, idle),
    )


def _joined_constants(first: Rewritten, second: Rewritten) -> dict[str, Tensor]:
    """Of both modes.

    Raises:
        Refused: these, or the windows, differ.
    """
    if first.graph.windows != second.graph.windows:
        raise Refused("its windows differ between eval and train mode", "train and eval differ")
    constants = dict(first.graph.constants)
    for name, value in second.graph.constants.items():
        if not constants.setdefault(name, value).equal(value):
            raise Refused(
                "its constants differ between eval and train mode", "train and eval differ"
            )
    return constants
