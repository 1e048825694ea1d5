"""Pass 6c, masks: a block's optional masks in the forms in which other calls give them.

A form has a graph of its own, traced with a random mask (or with None), split as any other and
compared with the dense block. Where that takes other sizes, all but the comparison at the finest
granularity is done on a quarter of the tokens. Used by `passes.plan.call_forms`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import networkx as nx
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.config import DGEConfig
from dgefx.kernels.layout import has_parts
from dgefx.nn.call_form import CallForm
from dgefx.nn.callspec import CallSpec, MaskInput
from dgefx.nn.capacity import plan_from_fractions
from dgefx.nn.code import GraphCode
from dgefx.nn.guards import Guards
from dgefx.outputs import Call
from dgefx.passes.emit.rewrite import RewrittenGraph
from dgefx.passes.errors import Refused
from dgefx.passes.ops import Op, named, op_name
from dgefx.passes.plan.call_probe import (
    MASK_SHAPES,
    MaskShape,
    probe,
    random_mask,
    run_quietly,
    with_value,
)
from dgefx.passes.plan.graph_cache import GraphCache
from dgefx.passes.plan.plan import BlockPlan, build_block, split_trace
from dgefx.passes.plan.sizes import agrees, call_at, other_grids
from dgefx.passes.plan.verify import grid_shape, verify_block, verify_mixed
from dgefx.passes.randomise import randomise_constants
from dgefx.passes.sides.sides import block_flow
from dgefx.passes.trace.guards import guards_of
from dgefx.passes.trace.tracer import Trace, copy_block, trace

#: elements of a mask that is tried out
_LARGEST = 2**25
#: the dense block's result with a value for the argument of a name, None if it takes none such
_Takes = Callable[[str, Tensor | None], Tensor | None]
#: the argument, the place of its shape in `MASK_SHAPES` (None: left out), the grid it is planned on
Held = tuple[str, int | None, tuple[int, int]]
#: what tells the type of a tensor
_READS_DTYPE = named(Op.READS_TYPE)


class MaskForms:
    """Plans the forms of one block.

    Args:
        block, plan, call, shape, config, twins: as `passes.plan.call_forms.with_forms`.
        example: the spec of `call`.
        known: the forms that hold in a block that runs the same code but for numbers; None: they
            are to be found, and verified.
    """

    def __init__(
        self,
        block: nn.Module,
        plan: BlockPlan,
        call: Call,
        shape: tuple[int, ...],
        config: DGEConfig,
        twins: GraphCache,
        example: CallSpec,
        known: frozenset[Held] | None = None,
    ) -> None:
        self.block, self.plan, self.call, self.shape = block, plan, call, shape
        self.config, self.twins, self.example = config, twins, example
        self.known = known
        self.held: set[Held] = set()
        self.images = plan.layout.images(shape)
        self.like = next(
            leaf
            for leaf in pytree.tree_leaves(call)
            if isinstance(leaf, Tensor) and tuple(leaf.shape) == shape
        )
        #: grids to plan on, the next one where a form does not hold
        self.grids = [plan.layout.grid]
        self.forms: list[CallForm] = []
        self.constants = dict(plan.constants)
        self.needs_grid_shape = plan.needs_grid_shape

    def run(self, names: list[str]) -> BlockPlan:
        """The plan with its forms.

        Args:
            names: of arguments that are a mask, or None where one could be.
        """
        whole = has_parts(self.plan.layout.order) or self.plan.windows is not None
        found = None if whole else probe(self.block, self.plan, self.call, self.shape)
        if found is None:
            return self.plan
        copied, small, grid, _ = found
        height, width = self.plan.layout.grid
        half = (height // 2, width // 2)
        if grid != (height, width) and min(half) > 1 and not self.plan.only_here:
            self.grids = [half, *self.grids]

        def takes(name: str, value: Tensor | None) -> Tensor | None:
            return run_quietly(copied, with_value(small, self.example, name, value))

        own = {name: self._own(name, grid, takes) for name in names}
        for name, given in own.items():
            if given is not None and takes(name, None) is not None:
                self._try(name, None, None, own)
            if given is not None and given.per_query:
                continue
            for shape in MASK_SHAPES:
                mask = self._input(name, shape, grid, takes)
                if mask is not None and self._try(name, mask, shape, own):
                    break
        if not self.forms:
            return self.plan
        return dataclasses.replace(
            self.plan,
            spec=dataclasses.replace(self.plan.spec, masks=tuple(own.items())),
            forms=tuple(self.forms),
            constants=self.constants,
            needs_grid_shape=self.needs_grid_shape,
        )

    def _own(self, name: str, grid: tuple[int, int], takes: _Takes) -> MaskInput | None:
        """The mask of the example, None if it has none."""
        value = self.example.example.get(name)
        if value is None:
            return None
        tokens, kinds = self.plan.layout.tokens, frozenset({value.dtype == torch.bool})
        if value.dim() == 4 and value.shape[-2:] == (1, tokens):
            return MaskInput(kinds, 4, False)
        given = MaskInput(kinds, 4, True)
        if value.dim() != 4 or value.shape[-2:] != (tokens, tokens):
            given = MaskInput(kinds, value.dim(), None)
        elif not self._broadcasts(name, given, self._size(MASK_SHAPES[0], grid), takes):
            given = MaskInput(kinds, 4, None)
        return given

    def _size(self, shape: MaskShape, grid: tuple[int, int]) -> tuple[int, ...]:
        return shape.of(self.images, self.plan.layout.prefix + grid[0] * grid[1])

    def _input(
        self, name: str, shape: MaskShape, grid: tuple[int, int], takes: _Takes
    ) -> MaskInput | None:
        """What masks of a shape the dense block takes, if any."""
        if torch.Size(self._size(shape, self.plan.layout.grid)).numel() > _LARGEST:
            return None
        size = self._size(shape, grid)
        kinds = [
            boolean
            for boolean in (True, False)
            if takes(name, random_mask(size, boolean, self.like)) is not None
        ]
        given = MaskInput(frozenset(kinds), len(size), shape.per_query)
        if not kinds or (shape.per_query and not self._broadcasts(name, given, size, takes)):
            return None
        return given

    def _broadcasts(
        self, name: str, given: MaskInput, size: tuple[int, ...], takes: _Takes
    ) -> bool:
        """Whether masks with fewer axes, or with one entry for all queries, are to the dense block
        what they are once expanded."""
        for part in ((*size[:-2], 1, size[-1]), size[-2:]):
            mask = random_mask(part, max(given.kinds), self.like)
            found, wanted = takes(name, mask), takes(name, given.shaped(mask).expand(size))
            if found is None or wanted is None or not torch.allclose(found, wanted, atol=1e-5):
                return False
        return True

    def _try(
        self,
        name: str,
        mask: MaskInput | None,
        shape: MaskShape | None,
        own: dict[str, MaskInput | None],
    ) -> bool:
        """Plan and verify one form; whether it holds."""
        for grid in self.grids:
            form = (name, None if shape is None else MASK_SHAPES.index(shape), grid)
            if self.known is not None and form not in self.known:
                continue
            try:
                plan, taken = self._planned(name, mask, shape, grid)
                if self.known is None:
                    self._verify(plan, name, taken, shape)
            except Exception:  # without it, calls are told which forms there are
                continue
            self._keep(plan, {**own, name: taken})
            self.held.add(form)
            return True
        return False

    def _keep(self, plan: BlockPlan, masks: dict[str, MaskInput | None]) -> None:
        codes = [plan.eval_code, plan.train_code]
        known = self.constants
        if any(n not in known or not known[n].equal(c) for n, c in plan.constants.items()):
            prefix = f"form{len(self.forms)}_"
            codes = [code.with_constants(prefix) for code in codes]
            known.update({prefix + n: c for n, c in plan.constants.items()})
        spec = dataclasses.replace(
            plan.spec, masks=tuple(masks.items()), alike=self.plan.spec.alike
        )
        self.forms.append(CallForm(spec, codes[0], codes[1], plan.guards))
        self.needs_grid_shape = self.needs_grid_shape or plan.needs_grid_shape

    def _call(
        self,
        name: str,
        mask: MaskInput | None,
        shape: MaskShape | None,
        grid: tuple[int, int],
        boolean: bool,
    ) -> tuple[Call, Tensor]:
        """The block's call on a grid with a random mask, if it can be bool or not; its stream."""
        call, stream = call_at(self.call, self.plan, self.shape, grid)
        value = None
        if mask is not None and shape is not None:
            kind = boolean if boolean in mask.kinds else not boolean
            value = random_mask(self._size(shape, grid), kind, self.like)
        return with_value(call, self.example, name, value), stream

    def _planned(
        self, name: str, mask: MaskInput | None, shape: MaskShape | None, grid: tuple[int, int]
    ) -> tuple[BlockPlan, MaskInput | None]:
        """The block's plan for this form, on a grid; and the mask as its trace takes it."""
        own = self.plan
        layout = dataclasses.replace(own.layout, grid=grid)
        size = layout.shape_at(self.shape, grid)
        given = (layout, size, self.config.packs, own.name, self.twins)
        spec = CallSpec.of(self.block, *self._call(name, mask, shape, grid, True)[0])
        traced = trace(self.block, spec, False, grid=grid)
        if mask is not None and len(mask.kinds) > 1 and _reads_dtype(traced, name):
            mask = dataclasses.replace(mask, kinds=frozenset({True}))
        first, rank, place = split_trace(traced, *given)
        splits, traces = [first], [traced]
        if not own.train_code.is_same(own.eval_code):
            traces.append(trace(self.block, spec, True, grid=grid))
            splits.append(split_trace(traces[1], *given, first)[0])
        parts = [split.block for split in splits]
        unlike = rank != own.stream_rank
        constants: dict[str, Tensor] = {}
        for part in parts:
            unlike = unlike or part.windows is not None or part.fixed_slots != own.fixed_slots
            unlike = unlike or not part.stencils <= own.stencils
            for key, value in part.constants.items():
                unlike = unlike or not constants.setdefault(key, value).equal(value)
        if unlike:
            raise Refused("another form of its call needs another router", "forward signature")
        return dataclasses.replace(
            own,
            layout=layout,
            spec=dataclasses.replace(spec.without_example(), stream=place),
            eval_code=GraphCode(parts[0].graph, own.name),
            train_code=GraphCode(parts[-1].graph, f"{own.name} train"),
            constants=constants,
            guards=self._guards(traces, place, parts),
            needs_grid_shape=any(part.needs_grid_shape for part in parts),
            exact_at_any_level=not any(part.positional or part.mixing for part in parts),
            tokens_apart=all(part.tokens_apart for part in parts),
            forms=(),
        ), mask

    def _guards(
        self, traces: list[Trace], place: int, parts: list[RewrittenGraph]
    ) -> tuple[Guards, Guards]:
        """Without questions about sizes, which were answered on another grid."""
        own = self.plan.guards
        made = [
            dataclasses.replace(
                guards_of(self.block, traced, place, part.graph, held.types), questions=None
            )
            for traced, part, held in zip(traces, parts, own, strict=False)
        ]
        # in train mode it is gone through as in the form of the example
        trained = made[1] if len(made) > 1 else dataclasses.replace(own[1], questions=None)
        return made[0], trained

    def _verify(
        self, plan: BlockPlan, name: str, mask: MaskInput | None, shape: MaskShape | None
    ) -> None:
        """Compare the form with the dense block: at mixed granularities on the grid that it was
        planned on, at the finest on another one if there is one.

        Raises:
            Refused: it differs.
        """
        grid, whole = plan.layout.grid, self.plan.layout
        size = plan.layout.shape_at(self.shape, grid)
        call, _ = self._call(name, mask, shape, grid, True)
        copied = copy_block(self.block).eval()
        randomise_constants(copied)
        if not plan.train_code.is_same(plan.eval_code):
            verify_block(self.block, plan, call, size, self.config)
        else:
            # not by `plans`, which would find all others of this grid as well
            fine = (1.0, *(0.0,) * (self.config.levels - 1))
            finest = plan_from_fractions(plan.space(self.config), self.config, fine)
            converted = build_block(copied, plan, self.config, grid_shape(plan), finest)
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
                generator = torch.Generator().manual_seed(3)
                verify_mixed(copied, converted, plan, call, size, self.config, generator)
        others = []
        if grid == whole.grid and whole.places is None and not plan.only_here:
            others = sorted(other_grids(grid, self.images), key=lambda g: g[0] * g[1])[:1]
        plan = dataclasses.replace(plan, layout=whole)
        for other in (*others, whole.grid):
            moved, stream = self._call(name, mask, shape, other, False)
            found = agrees(copied, plan, moved, stream, self.config, other)
            if found is False:
                raise Refused("verification: another form of its call", "verification failed")
            if found:
                return
        raise Refused("verification: the dense block fails", "verification failed")


def _reads_dtype(traced: Trace, name: str) -> bool:
    """Whether a trace asked for the type of a bool mask, and may have decided something by it."""
    nodes = traced.graph.nodes
    start = next(n for n in nodes if n.op == "placeholder" and n.target == name)
    reached = nx.descendants(block_flow(traced.graph), start)

    def is_bool(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == torch.bool

    for node in reached:
        asked = node.args[1] if node.target is getattr else op_name(node, traced.root)
        of = [n for n in node.all_input_nodes if n is start or n in reached]
        if asked in _READS_DTYPE and any(is_bool(traced.values.get(n)) for n in of):
            return True
    return False
