"""Pass 7, rewrite: a block and its generated graphs become a `DGEBlock` in the model's tree.

`plan_block` runs trace and split for both modes and holds everything that is needed to build the
converted block, apart from the model it is put into. `passes.plan.verify` decides whether it is
used.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from dgefx.config import DGEConfig
from dgefx.nn.block import DGEBlock
from dgefx.nn.call_form import CallForm
from dgefx.nn.callspec import CallSpec
from dgefx.nn.capacity import Plan, plans
from dgefx.nn.code import GraphCode
from dgefx.nn.grid_shape import GridShape, Size
from dgefx.nn.guards import Guards
from dgefx.nn.hierarchy import Grid
from dgefx.nn.router import Router
from dgefx.nn.router_tables import space_of
from dgefx.nn.windows import WindowRule
from dgefx.outputs import Call
from dgefx.passes.errors import Refused
from dgefx.passes.layout import Layout
from dgefx.passes.ops import op_name
from dgefx.passes.plan.block_signature import call_structure
from dgefx.passes.plan.coarse_reference import CoarseReference
from dgefx.passes.plan.graph_cache import GraphCache, Split
from dgefx.passes.sides.sides import KEEPS_STREAM
from dgefx.passes.trace.decisions import follows_batch
from dgefx.passes.trace.guards import guards_of, same_types, same_without_grad
from dgefx.passes.trace.tracer import Trace, attribute_of, trace
from dgefx.precision import floating_type


@dataclass(frozen=True)
class ImageSource:
    """The module whose input tells the grid; size, stride: see `ImageHook`."""

    module: str
    size: Size
    stride: Size | None


@dataclass
class BlockPlan:
    """Everything about one block that converts."""

    name: str
    layout: Layout
    channels: int
    spec: CallSpec
    eval_code: GraphCode
    train_code: GraphCode
    constants: dict[str, Tensor]
    needs_grid_shape: bool
    hook_source: str | None  # module that reports the running grid, if its output does
    exact_at_any_level: bool  # on patch-constant input: no positional tables, stencils, islands
    windows: WindowRule | None  # how its attention partitions the grid
    fixed_slots: bool  # see `dgefx.kernels.window`
    only_here: bool = False  # on another grid it is not what its dense block is
    tokens_apart: bool = False  # nothing but attention mixes its tokens
    stream_rank: int = 0  # of its arguments of the stream's shape, which one is the stream
    stencils: frozenset[int] = frozenset()  # kernel sizes of its depthwise convolutions
    owners: tuple[str, str] = (
        "",
        "",
    )  # blocks whose graphs these are, see `passes.plan.graph_cache`
    eval_key: Hashable | None = None  # equal for blocks that do the same at any size, in eval mode
    guards: tuple[Guards, Guards] = (Guards(), Guards())  # of eval and of train mode
    functions: tuple[str, ...] = ()  # autograd functions that the trace went through
    numbers_images: bool = False  # whether Python made a number of a batch size
    image_source: ImageSource | None = (
        None  # without `hook_source`, see `passes.locate.grid_source`
    )
    copy_of: str = ""  # the block that differs from it in its parameters only, if any
    forms: tuple[CallForm, ...] = ()  # other ways to call it, see `passes.plan.call_forms`
    #: buffers and plain attributes that it reads, as the example run left them
    attributes: dict[str, Tensor] = field(default_factory=dict)
    eval_calls_more: bool = False  # in eval mode it has calls that it has not in train mode
    reference: CoarseReference | None = None  # in eval mode; of blocks that were split themselves

    @property
    def twin(self) -> str:
        """The block of the same structure, in eval mode, whose graph it has; "" if its own."""
        return self.owners[0] if self.owners[0] != self.name else ""

    @property
    def gradient_key(self) -> Hashable | None:
        """Equal for blocks that run the same code but for the numbers in it, as probabilities of
        drop paths are; None where that cannot be told, or where a backward pass is not in it."""
        return None if self.eval_key is None or self.functions else (self.eval_key, self.owners)

    def runs_like(self, other: BlockPlan) -> bool:
        """Whether the blocks of both plans run the same code, in both modes."""
        return self.costs_like(other) and self.train_code.is_same(other.train_code)

    def costs_like(self, other: BlockPlan) -> bool:
        """Whether they run the same code in eval mode, given that they are twins."""
        return self.fixed_slots == other.fixed_slots and self.eval_code.is_same(other.eval_code)

    def held_like(self, other: BlockPlan) -> BlockPlan:
        """This plan, of a block that does the same at any size, bound to the sizes of `other`."""
        pairs = zip(self.guards, other.guards, strict=True)
        own, second = (mine.also_on(theirs.answers) for mine, theirs in pairs)
        return dataclasses.replace(
            self, windows=other.windows, only_here=other.only_here, guards=(own, second)
        )

    def _guarded(self, **changes: Any) -> BlockPlan:
        first, second = (dataclasses.replace(held, **changes) for held in self.guards)
        return dataclasses.replace(self, guards=(first, second))

    def quiet(self) -> BlockPlan:
        """This plan without warnings, for blocks that are only tried."""
        return self._guarded(bypassed=(), doubled=(), twice=())

    def unasked(self) -> BlockPlan:
        """A quiet plan without its questions about sizes."""
        return self.quiet()._guarded(questions=None)

    def renamed(self, name: str, source: str | None) -> BlockPlan:
        """The plan of another block that is called alike, with its grid from `source`."""
        return dataclasses.replace(
            self,
            name=name,
            copy_of=self.name,
            reference=None,
            layout=dataclasses.replace(self.layout, source=source),
            hook_source=source,
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
    front = next(n for n in traced.graph.nodes if n.op == "output").all_input_nodes
    kept = set(front)
    while front:
        node = front.pop()
        if not node.op.startswith("call_") or op_name(node, traced.root) not in KEEPS_STREAM:
            continue
        new = [n for n in node.all_input_nodes if n not in kept]
        kept.update(new)
        front += new
    return next((rank for rank, node in enumerate(found) if node in kept), 0)


def split_trace(
    traced: Trace,
    layout: Layout,
    shape: tuple[int, ...],
    packs: bool,
    name: str,
    twins: GraphCache,
    evaluated: Split | None = None,
) -> tuple[Split, int, int]:
    """The split, which argument of the stream's shape is the stream, and which of all inputs."""
    found = _streams(traced, shape)
    rank = _stream_rank(traced, found)
    place = [n for n in traced.graph.nodes if n.op == "placeholder"].index(found[rank])
    return twins.split(traced, found[rank], layout, packs, name, evaluated), rank, place


def _require_stateless(traces: list[Trace]) -> None:
    written = dict.fromkeys(name for traced in traces for name in traced.written)
    if written:
        raise Refused(
            f"its forward sets {', '.join(written)} on the module, which the converted block would "
            f"leave as it was",
            "keeps state",
        )


def _numbers_images(traced: Trace, layout: Layout, shape: tuple[int, ...], rank: int) -> bool:
    stream, axis = _streams(traced, shape)[rank], layout.axis("B")
    made = [*traced.decisions.numbers, *traced.decisions.branches]
    return any(follows_batch(node, traced.values, stream, axis) for node in made)


def _calls(graph: fx.Graph) -> Counter[tuple[str, ...]]:
    """What is called how often, attributes by their names."""
    return Counter(
        (node.op, str(node.target), *(str(a) for a in node.args if isinstance(a, str)))
        for node in graph.nodes
    )


def _kept(block: nn.Module, target: str) -> Tensor | None:
    """A buffer or a plain attribute."""
    try:
        return block.get_buffer(target)
    except AttributeError:
        return attribute_of(block, target)


def _attributes(block: nn.Module, *graphs: fx.Graph) -> dict[str, Tensor]:
    """The buffers and plain attributes that graphs read."""
    names = {str(n.target) for graph in graphs for n in graph.nodes if n.op == "get_attr"}
    found = ((name, _kept(block, name)) for name in sorted(names))
    return {name: value for name, value in found if value is not None}


def fill(dense: nn.Module, plan: BlockPlan) -> None:
    """Give a block of the user's model what its first call would leave in it: a cache that is
    filled once, a table that is made anew for another size, and the size it was made for.

    Raises:
        ValueError: in which type it would, cannot be told.
    """
    own = floating_type(dense)
    for target, value in plan.attributes.items():
        kept = _kept(dense, target)
        if kept is not None and kept.shape == value.shape and kept.to(value.dtype).equal(value):
            continue
        if value.is_floating_point() and own.itemsize < value.dtype.itemsize:
            raise ValueError(
                f"block {plan.name} makes {target} in its first call: call the model once with the "
                f"example input before converting it, or convert it before model.to({own})"
            )
        kind = own if value.is_floating_point() else value.dtype
        owner, _, name = target.rpartition(".")
        setattr(dense.get_submodule(owner), name, value.detach().to(kind, copy=True))
    for setting in itertools.chain.from_iterable(guards.settings for guards in plan.guards):
        module = dense.get_submodule(setting.module)
        # modes are the model's own: the example ran in eval mode
        if setting.name != "training" and not setting.is_now(getattr(module, setting.name, None)):
            setattr(module, setting.name, setting.value)


def plan_block(
    block: nn.Module,
    name: str,
    call: Call,
    layout: Layout,
    shape: tuple[int, ...],
    packs: bool = False,
    twins: GraphCache | None = None,
    idle: frozenset[str] = frozenset(),
) -> BlockPlan:
    """Trace and split one block in both modes.

    Args:
        block: not changed.
        name: for the report and the generated code's label.
        call: (args, kwargs) of the example run, at least two images.
        layout: of the block's stream. shape: of the block's stream.
        packs: whether the queries of a batch are packed, see `passes.emit.rewrite`.
        twins: blocks of the same model that were split before; none without.
        idle: parts of the block that do nothing in eval mode.

    Raises:
        Refused, TraceError: the reason why the block stays dense.
    """
    if "forward" in vars(block):
        raise Refused("its forward is patched on the instance", "forward signature")
    try:
        spec = CallSpec.of(block, *call)
    except ValueError as error:
        raise Refused(str(error), "forward signature") from error
    twins = GraphCache() if twins is None else twins
    key = call_structure(block, spec, shape, layout)
    if key is not None and key in twins.plans:
        return twins.plans[key].renamed(name, layout.source)
    traces = [trace(block, spec, training, grid=layout.grid) for training in (False, True)]
    _require_stateless(traces)
    if not all(same_without_grad(block, traced) for traced in traces):
        raise Refused(
            "it asks torch.is_grad_enabled(), and does something else where gradients are off",
            "not traceable",
        )
    types = frozenset.intersection(*(same_types(block, traced) for traced in traces))
    given = (layout, shape, packs, name, twins)
    first, rank, place = split_trace(traces[0], *given)
    second, other, _ = split_trace(traces[1], *given, first)
    evaluated, trained = first.block, second.block
    if rank != other:
        raise Refused("its stream differs between eval and train mode", "train and eval differ")
    if evaluated.windows != trained.windows:
        raise Refused("its windows differ between eval and train mode", "train and eval differ")
    constants = dict(evaluated.constants)
    for constant, value in trained.constants.items():
        if constant in constants and not constants[constant].equal(value):
            raise Refused(
                "its constants differ between eval and train mode", "train and eval differ"
            )
        constants[constant] = value
    plan = BlockPlan(
        name=name,
        layout=layout,
        channels=shape[layout.axis("C")],
        spec=dataclasses.replace(spec.without_example(), stream=place),
        eval_code=GraphCode(evaluated.graph, name),
        train_code=GraphCode(trained.graph, f"{name} train"),
        constants=constants,
        needs_grid_shape=evaluated.needs_grid_shape or trained.needs_grid_shape,
        hook_source=layout.source,
        exact_at_any_level=not (evaluated.positional or evaluated.mixing),
        tokens_apart=evaluated.tokens_apart,
        stream_rank=rank,
        windows=evaluated.windows,
        fixed_slots=evaluated.fixed_slots or trained.fixed_slots,
        stencils=evaluated.stencils | trained.stencils,
        eval_key=call_structure(block, spec, shape, layout, idle),
        owners=(first.owner, second.owner),
        guards=(
            guards_of(block, traces[0], place, evaluated.graph, types),
            guards_of(block, traces[1], place, trained.graph, types),
        ),
        functions=tuple(dict.fromkeys(traces[0].functions + traces[1].functions)),
        numbers_images=any(_numbers_images(t, layout, shape, rank) for t in traces),
        attributes=_attributes(block, evaluated.graph, trained.graph),
        # of the traces: movement that a generated graph leaves out may stop gradients
        eval_calls_more=not _calls(traces[0].graph) <= _calls(traces[1].graph),
        reference=evaluated.reference if first.owner == name else None,
    )
    if key is not None:
        twins.plans[key] = plan
    return plan


def build_block(
    dense: nn.Module,
    plan: BlockPlan,
    config: DGEConfig,
    grid_shape: GridShape | None,
    capacities: Plan | None = None,
) -> DGEBlock:
    """The converted block around `dense`, whose parameters it shares; finest unless told."""
    chosen = plans(plan.space(config), config)[-1] if capacities is None else capacities
    layout = plan.layout
    router = Router(
        config,
        layout.grid,
        layout.prefix,
        plan.channels,
        chosen,
        layout.order,
        plan.windows,
        plan.fixed_slots,
        plan.stencils,
        layout.places,
        plan.only_here,
    )
    router.train(dense.training)
    parameter = next(dense.parameters(), None)
    if parameter is not None:
        router.to(parameter.device)
        if router.gate is not None and parameter.is_floating_point():
            router.gate.to(parameter.dtype)
    constants = {name: value.clone() for name, value in plan.constants.items()}
    if parameter is not None:
        constants = {name: value.to(parameter.device) for name, value in constants.items()}
    shape = grid_shape if plan.needs_grid_shape else None
    forms = (CallForm(plan.spec, plan.eval_code, plan.train_code, plan.guards), *plan.forms)
    return DGEBlock(dense, router, forms, constants, shape)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule `name` of `model`, under every name that it has."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, found in parent._modules.items():
            if found is old:
                parent._modules[child] = module
