"""A block's optional masks in the forms in which other calls give them.

A form is the block planned for a call with a random mask (or with None), verified as any other.
Where the dense block takes other sizes, all but a comparison at the finest granularity is done on a
quarter of the tokens. Used by `passes.plan.call_forms`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dgefx.config import DGEConfig
from dgefx.kernels.layout import has_parts
from dgefx.nn.call_form import CallForm
from dgefx.nn.callspec import CallSpec, MaskInput
from dgefx.nn.guards import Guards
from dgefx.passes.errors import Refused
from dgefx.passes.plan.compare import randomised
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.plan.graph_cache import GraphCache
from dgefx.passes.plan.plan import BlockPlan, plan_block
from dgefx.passes.plan.sizes import agrees, other_grids
from dgefx.passes.plan.verify import verify_block
from dgefx.passes.trace.copies import shadow

#: elements of a mask that is tried out
_LARGEST = 2**25
#: the argument, the place of its shape in `_SHAPES` (None: left out), the grid it is planned on
HeldForm = tuple[str, int | None, tuple[int, int]]
#: the dense block's result for a call, None where it fails or is not finite
Gives = Callable[[BlockExample], Tensor | None]


@dataclass(frozen=True)
class _MaskShape:
    """A shape that a mask may have, by images and tokens. per_query: see `MaskInput`."""

    of: Callable[[int, int], tuple[int, ...]]
    per_query: bool | None


#: as SDPA takes a mask and as nn.MultiheadAttention does
_SHAPES = (
    _MaskShape(lambda images, tokens: (images, 1, tokens, tokens), True),
    _MaskShape(lambda images, tokens: (tokens, tokens), True),
    _MaskShape(lambda images, tokens: (images, tokens), None),
)


def _random_mask(size: tuple[int, ...], boolean: bool, like: Tensor) -> Tensor:
    """A mask that leaves any patch of queries keys in common, whatever True stands for."""
    generator = torch.Generator().manual_seed(5)
    seen = torch.rand(size, generator=generator) > 0.4
    if len(size) > 1 and size[-2] == size[-1]:
        by_all = torch.rand((*size[:-2], 1, size[-1]), generator=generator)
        seen = (seen | (by_all > 0.8)) & (by_all > 0.2)
    seen[..., 0], seen[..., -1] = True, False
    if boolean:
        return seen.to(like.device)
    noise = torch.randn(size, generator=generator)
    return torch.where(seen, noise, -torch.inf).to(like)


def _is_movable(plan: BlockPlan) -> bool:
    """Whether a block's stream can be one of another grid."""
    return plan.windows is None and not has_parts(plan.layout.order)


def smallest_call(
    example: BlockExample, plan: BlockPlan
) -> tuple[BlockExample, Gives, Tensor] | None:
    """The call on the smallest grid that the dense block takes, what that gives for calls, and what
    for this one; None if it takes none."""
    copied = shadow(example.block).eval()

    def gives(given: BlockExample) -> Tensor | None:
        try:
            with torch.no_grad():
                found = given.run(copied)
        except Exception:  # user code may raise anything on what it does not take
            return None
        return found if bool(torch.isfinite(found).all()) else None

    def calls() -> Iterator[BlockExample]:
        height, width = plan.layout.grid
        if plan.layout.token_order is None and _is_movable(plan):
            for grid in ((2, 3), (height // 2, width // 2)):
                if min(grid) > 1:
                    yield example.at_grid(grid)
        yield example

    tried = ((call, gives(call)) for call in calls())
    return next(((call, gives, found) for call, found in tried if found is not None), None)


class MaskForms:
    """Plans the forms of one block.

    Args:
        example, plan, config, cache: as `passes.plan.call_forms.with_forms`.
        spec: of the example's call.
        known: the forms that hold in a block that runs the same code but for numbers; None: they
            are to be found, and verified.

    Attributes:
        held: the forms that were planned.
    """

    def __init__(
        self,
        example: BlockExample,
        plan: BlockPlan,
        config: DGEConfig,
        cache: GraphCache,
        spec: CallSpec,
        known: frozenset[HeldForm] | None = None,
    ) -> None:
        self.example, self.plan, self.spec = example, plan, spec
        self.config, self.cache, self.known = config, cache, known
        self.held: list[HeldForm] = []
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
        found = smallest_call(self.example, self.plan) if _is_movable(self.plan) else None
        if found is None:
            return self.plan
        small, gives, _ = found
        height, width = self.plan.layout.grid
        half = (height // 2, width // 2)
        if small.layout.grid != (height, width) and min(half) > 1 and not self.plan.only_here:
            self.grids = [half, *self.grids]
        own = {name: self._own(name, small, gives) for name in names}
        for name, given in own.items():
            if given is not None and gives(self._with(small, name, None)) is not None:
                self._try(name, None, None, own)
            if given is not None and given.per_query:
                continue
            for shape in _SHAPES:
                mask = self._input(name, shape, small, gives)
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

    def _with(self, example: BlockExample, name: str, value: Tensor | None) -> BlockExample:
        return example.with_argument(self.spec.names, name, value)

    def _own(self, name: str, small: BlockExample, gives: Gives) -> MaskInput | None:
        """The mask of the example, None if it has none."""
        value = self.spec.example.get(name)
        if value is None:
            return None
        tokens, kinds = self.plan.layout.tokens, frozenset({value.dtype == torch.bool})
        if value.dim() == 4 and value.shape[-2:] == (1, tokens):
            return MaskInput(kinds, 4, False)
        given = MaskInput(kinds, 4, True)
        if value.dim() != 4 or value.shape[-2:] != (tokens, tokens):
            given = MaskInput(kinds, value.dim(), None)
        elif not self._broadcasts(name, given, _size(_SHAPES[0], small), small, gives):
            given = MaskInput(kinds, 4, None)
        return given

    def _input(
        self, name: str, shape: _MaskShape, small: BlockExample, gives: Gives
    ) -> MaskInput | None:
        """What masks of a shape the dense block takes, if any."""
        if torch.Size(_size(shape, self.example)).numel() > _LARGEST:
            return None
        size = _size(shape, small)
        kinds = [
            boolean
            for boolean in (True, False)
            if gives(self._with(small, name, _random_mask(size, boolean, small.stream))) is not None
        ]
        given = MaskInput(frozenset(kinds), len(size), shape.per_query)
        if not kinds or (shape.per_query and not self._broadcasts(name, given, size, small, gives)):
            return None
        return given

    def _broadcasts(
        self, name: str, given: MaskInput, size: tuple[int, ...], small: BlockExample, gives: Gives
    ) -> bool:
        """Whether masks with fewer axes, or with one entry for all queries, are to the dense block
        what they are once expanded."""
        for part in ((*size[:-2], 1, size[-1]), size[-2:]):
            mask = _random_mask(part, max(given.kinds), small.stream)
            whole = given.shaped(mask).expand(size)
            found, wanted = (gives(self._with(small, name, value)) for value in (mask, whole))
            if found is None or wanted is None or not torch.allclose(found, wanted, atol=1e-5):
                return False
        return True

    def _try(
        self,
        name: str,
        mask: MaskInput | None,
        shape: _MaskShape | None,
        own: dict[str, MaskInput | None],
    ) -> bool:
        """Plan and verify one form; whether it holds."""
        for grid in self.grids:
            form = (name, None if shape is None else _SHAPES.index(shape), grid)
            if self.known is not None and form not in self.known:
                continue
            try:
                example = self._call(name, mask, shape, grid, True)
                plan = self._planned(example)
                taken = mask
                if mask is not None and len(mask.kinds) > 1 and name in plan.types_asked:
                    taken = dataclasses.replace(mask, kinds=frozenset({True}))
                if self.known is None:
                    verify_block(example, plan, self.config)
                    self._require_elsewhere(plan, name, taken, shape)
            except Exception:  # without it, calls are told which forms there are
                continue
            self._keep(plan, {**own, name: taken})
            self.held.append(form)
            return True
        return False

    def _call(
        self,
        name: str,
        mask: MaskInput | None,
        shape: _MaskShape | None,
        grid: tuple[int, int],
        boolean: bool,
    ) -> BlockExample:
        """The block's call on a grid with a random mask, if it can be bool or not."""
        example, value = self.example.at_grid(grid), None
        if mask is not None and shape is not None:
            kind = boolean if boolean in mask.kinds else not boolean
            value = _random_mask(_size(shape, example), kind, example.stream)
        return self._with(example, name, value)

    def _planned(self, example: BlockExample) -> BlockPlan:
        """The block's plan for this form, on its grid."""
        own, made = self.plan, plan_block(example, self.config.packs, self.cache)
        unlike = made.rank != own.rank or made.windows is not None
        unlike = unlike or made.fixed_slots != own.fixed_slots
        if unlike or not made.stencils <= own.stencils:
            raise Refused("another form of its call needs another router", "forward signature")
        pairs = zip(made.guards, own.guards, strict=True)
        first, second = (_with_answers(held, known) for held, known in pairs)
        return dataclasses.replace(made, guards=(first, second), stencils=own.stencils)

    def _require_elsewhere(
        self, plan: BlockPlan, name: str, mask: MaskInput | None, shape: _MaskShape | None
    ) -> None:
        """Compare the form at the finest granularity on another grid than it was planned on, if
        there is one that the dense block takes.

        Raises:
            Refused: it differs.
        """
        whole, others = self.plan.layout, []
        if plan.layout.grid == whole.grid and whole.token_order is None and not self.plan.only_here:
            others = sorted(other_grids(whole.grid, self.example.images), key=lambda g: g[0] * g[1])
        plan = dataclasses.replace(plan.tried(), layout=whole)
        dense = randomised(self.example.block)
        for grid in (*others[:1], whole.grid):
            found = agrees(dense, self._call(name, mask, shape, grid, False), plan, self.config)
            if found is False:
                raise Refused("verification: another form of its call", "verification failed")
            if found:
                return
        raise Refused("verification: the dense block fails", "verification failed")

    def _keep(self, plan: BlockPlan, masks: dict[str, MaskInput | None]) -> None:
        codes, known = [plan.eval_code, plan.train_code], self.constants
        if any(n not in known or not known[n].equal(c) for n, c in plan.constants.items()):
            prefix = f"form{len(self.forms)}_"
            codes = [code.with_constants(prefix) for code in codes]
            known.update({prefix + n: c for n, c in plan.constants.items()})
        spec = dataclasses.replace(
            plan.spec, masks=tuple(masks.items()), alike=self.plan.spec.alike
        )
        self.forms.append(CallForm(spec, codes[0], codes[1], plan.guards))
        self.needs_grid_shape = self.needs_grid_shape or plan.needs_grid_shape


def _with_answers(guards: Guards, known: Guards) -> Guards:
    """Guards with what questions about sizes were answered on all grids that were tried, not only
    on the one that a form was planned on.

    Raises:
        Refused: these are other questions.
    """
    if guards.questions is None:
        return guards
    if known.questions is None or guards.questions.body != known.questions.body:
        raise Refused("another form of its call decides by other sizes", "forward signature")
    return dataclasses.replace(guards, answers=known.answers)


def _size(shape: _MaskShape, example: BlockExample) -> tuple[int, ...]:
    return shape.of(example.images, example.layout.tokens)
