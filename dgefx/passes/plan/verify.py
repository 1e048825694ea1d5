"""Numbers, not trust: a block is used only if it equals the dense block.

Per block, on a copy with its constant parameters randomised: at the finest granularity in eval and
in train mode; at random granularities where an identity applies: on input that is constant within
every patch, and in tokens that are their own queries; and where the first does not (tables,
stencils, full-resolution operations), once per graph, against un-pool, operation, pool
(`passes.emit.coarse_reference`). The whole model is compared by `passes.pipeline`. Next:
`passes.plan.verify_gradients`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgefx.config import DGEConfig
from dgefx.kernels.layout import from_tokens
from dgefx.kernels.routing import Routing
from dgefx.nn.block import DGEBlock
from dgefx.nn.capacity import region_count
from dgefx.nn.hierarchy import Grid, level_tables, nested_levels, parent_table
from dgefx.nn.router import Router
from dgefx.outputs import relative_error
from dgefx.passes.emit.coarse_reference import Unknown
from dgefx.passes.errors import Refused
from dgefx.passes.layout import Layout
from dgefx.passes.plan.compare import converted_copy, is_close, randomised, require_equal
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.plan.plan import BlockPlan
from dgefx.passes.trace.copies import copy_block
from dgefx.passes.trace.deterministic import Deterministic


def patch_constant_stream(
    layout: Layout,
    config: DGEConfig,
    like: Tensor,
    generator: torch.Generator,
    space: Grid | None = None,
) -> Tensor:
    """A random stream, equal for all tokens of a coarsest patch.

    Args:
        space: what the patches are of, if not of the grid itself.
    """
    space = layout.grid if space is None else space
    tables = level_tables(space, config.granularities[-1], config.region_side, torch.device("cpu"))
    patches = tables.patch_region.numel()
    images = layout.images(tuple(like.shape))
    size = (images, patches + layout.prefix, like.shape[layout.axis("C")])
    values = torch.randn(size, generator=generator)
    body = values[:, layout.prefix :][:, tables.token_patch]
    tokens = torch.cat([values[:, : layout.prefix], body[:, layout.numbers()]], 1)
    return from_tokens(tokens, layout.order, layout.grid).contiguous().to(like)


def random_levels(block: DGEBlock, images: int, generator: torch.Generator) -> Tensor:
    """(B, R) random granularities for a block; in even images the first region is as coarse as can
    be, in odd ones the last region is fine, beside what is as coarse as its neighbours allow."""
    router = block.dge_router
    space = router.space(router.grid)
    regions = region_count(space, router.config.region_side)
    levels = torch.randint(0, router.config.levels, (images, regions), generator=generator)
    sides = router.config.granularities
    costs = router.tables(router.grid, levels.device)[0].region_cost
    live = costs.nonzero().flatten()  # others lie in the padding of windows
    first, last = int(live[0]), int(live[-1])
    levels[::2, first] = router.config.levels - 1
    levels[1::2, last] = 0
    if first != last:
        levels[1::2, first].clamp_(min=1)
    if router.config.routing_mode != "nested" or router.config.levels == 1:
        return levels
    for side in sides[2:]:  # a coarse patch has its first region's level
        parent = parent_table(space, sides[1], side, levels.device)[last]
        head = int(level_tables(space, side, sides[1], levels.device).patch_region[parent])
        levels[1::2, head] = min(1, last - head)
    return nested_levels(levels, space, sides)


@dataclass(frozen=True)
class Mixed:
    """What a block is given and gives at random granularities.

    constant: (B,) in which images the input is constant within patches: where both identities hold,
    in every other one. Packed queries have no slot per token, so only that one can be looked at.
    """

    plan: BlockPlan
    config: DGEConfig
    example: BlockExample
    constant: Tensor
    levels: Tensor

    @classmethod
    def of(
        cls,
        example: BlockExample,
        converted: DGEBlock,
        plan: BlockPlan,
        config: DGEConfig,
        generator: torch.Generator,
    ) -> Mixed:
        """Random levels of `converted`, and a random stream for them."""
        layout, like = plan.layout, example.stream
        levels = random_levels(converted, example.images, generator).to(like.device)
        constant = constant_images(plan, example.images, config).to(like.device)
        patches = patch_constant_stream(layout, config, like, generator, plan.space(config))
        noise = torch.randn(like.shape, generator=generator).to(like)
        size = (len(constant), layout.tokens, like.shape[layout.axis("C")])
        chosen = from_tokens(constant[:, None, None].expand(size), layout.order, layout.grid)
        stream = torch.where(chosen, patches, noise)
        return cls(plan, config, example.with_stream(stream), constant, levels)

    def run(self, converted: DGEBlock) -> tuple[Tensor, Routing]:
        """The converted block's output, and how it was routed.

        Raises:
            Refused: it fails, or its output is not finite.
        """
        routings: list[Routing] = []

        def route(router: Router, inputs: tuple[Any, ...], _routing: Routing) -> Routing:
            routings.append(router.routing_for(inputs[0], self.levels, inputs[1]))
            return routings[0]

        handle = converted.dge_router.register_forward_hook(route)
        try:
            found = self.example.run(converted)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise Refused(
                f"verification: fails at mixed granularities: {error}", "verification failed"
            ) from error
        finally:
            handle.remove()
        if not bool(torch.isfinite(found).all()):
            raise Refused(
                "verification: NaN or infinity at mixed granularities", "verification failed"
            )
        return found, routings[0]

    def require_identities(
        self, found: Tensor, wanted: Tensor, router: Router, routing: Routing
    ) -> None:
        """Compare where the dense block's output is known at mixed granularities too."""
        plan, grid = self.plan, self.plan.layout.grid
        values = [router.tokens_of(v, grid) for v in (found, wanted, self.example.before)]
        if plan.exact_at_any_level:
            own, dense, start = (value[self.constant] for value in values)
            require_equal(own, dense, start, "mixed granularities on patch-constant input")
        if plan.tokens_apart and routing.ragged is None:  # else there is no slot per token
            alone = _own_queries(routing.token_slot) & ~self.constant[:, None]
            own, dense, start = (value[:, plan.layout.prefix :][alone] for value in values)
            require_equal(own, dense, start, "fine tokens beside coarse ones")

    def require_coarse(self, found: Tensor, dense: nn.Module, router: Router) -> None:
        """Compare with the dense block's own operations on all tokens. Not told: blocks that have
        values with images on no axis of their own (`Unknown`)."""
        assert self.plan.reference is not None
        args, kwargs = self.example.copied()
        patches = _patch_numbers(router, self.levels)
        try:
            wanted = self.plan.reference.run(dense, self.plan.spec.bind(args, kwargs), patches)
        except Unknown:
            return
        before = self.example.before
        if not is_close(found, wanted, before):
            error = relative_error(found - before, wanted - before)
            raise Refused(
                f"verification: mixed granularities differ from un-pool, operation, pool by "
                f"{error:.1e} of the update",
                "verification failed",
            )


def constant_images(plan: BlockPlan, images: int, config: DGEConfig) -> Tensor:
    """(B,) see `Mixed`."""
    if not plan.exact_at_any_level:
        return torch.zeros(images, dtype=torch.bool)
    both = plan.tokens_apart and not config.packs and images > 1
    return torch.arange(images) % 2 == 0 if both else torch.ones(images, dtype=torch.bool)


def verify_mixed(
    dense: nn.Module | None,
    converted: DGEBlock,
    plan: BlockPlan,
    example: BlockExample,
    config: DGEConfig,
    generator: torch.Generator,
    finest: bool = False,
) -> None:
    """Random granularities: shapes, finiteness and, with `dense`, what is known of the result.

    Args:
        finest: compare with `dense` at the finest granularity too, on the same input.

    Raises:
        Refused: with what differs.
    """
    mixed = Mixed.of(example, converted, plan, config, generator)
    identities = plan.exact_at_any_level or plan.tokens_apart
    wanted = None
    if dense is not None and (finest or identities):
        wanted = mixed.example.run(dense)
    if wanted is not None and finest:
        found = mixed.example.run(converted)
        require_equal(found, wanted, mixed.example.before, "the finest granularity")
    found, routing = mixed.run(converted)
    if wanted is not None and identities:
        mixed.require_identities(found, wanted, converted.dge_router, routing)
    if dense is not None and plan.reference is not None and not plan.exact_at_any_level:
        mixed.require_coarse(found, dense, converted.dge_router)


def verify_block(
    example: BlockExample, plan: BlockPlan, config: DGEConfig, copy_passed: bool = False
) -> None:
    """Compare the converted block with the dense one.

    Args:
        copy_passed: a block that differs in its parameters only was verified in both modes; this
            one is in eval mode.

    Raises:
        Refused: with what differs.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        dense = randomised(example.block)
        converted = converted_copy(dense, plan, config)
        given = (plan, example, config, generator)
        if copy_passed and not bool(constant_images(plan, example.images, config).all()):
            verify_mixed(dense, converted, *given, finest=True)
            return
        noise = example.with_noise(generator)
        _require_finest(noise, converted, dense, plan, config)
        if not copy_passed:
            # two copies: train mode may update running statistics
            other, reference = copy_block(dense, True).train(), copy_block(dense, True).train()
            _require_finest(noise, converted_copy(other, plan, config), reference, plan, config)
            # dropout is drawn per query: mixed queries are checked for being finite only
            if not plan.train_code.is_same(plan.eval_code):
                trained = converted_copy(copy_block(dense, True).train(), plan, config)
                verify_mixed(None, trained, *given)
        verify_mixed(dense, converted, *given)


def _require_finest(
    example: BlockExample,
    converted: DGEBlock,
    dense: nn.Module,
    plan: BlockPlan,
    config: DGEConfig,
) -> None:
    """Compare at the finest granularity, in the mode that both blocks are in."""
    training = dense.training
    what = "train mode at the finest granularity" if training else "the finest granularity"
    undrawn = _undrawn(plan, config)

    def compare(mode: TorchFunctionMode | None, seed: int) -> None:
        wanted = example.run(dense, mode, seed)
        require_equal(example.run(converted, mode, seed), wanted, example.before, what)

    # what is drawn once for two images is the same for both by chance
    for seed in range(3 if training and config.packs else 1):
        try:
            compare(undrawn, seed)
        except Refused:
            if not training or undrawn is not None:
                raise
            # a dropout that queries and keys both read is drawn for each of them
            compare(Deterministic(per_element=True), seed)


def _undrawn(plan: BlockPlan, config: DGEConfig) -> TorchFunctionMode | None:
    """What must not be drawn, as converted and dense block draw it in another order.

    Inside windows everything. Packed queries draw what is per image in the images' order, but may
    lie otherwise in memory than tokens do.
    """
    if plan.windows is not None:
        return Deterministic()
    return Deterministic(per_element=True) if config.packs else None


def _patch_numbers(router: Router, levels: Tensor) -> Tensor:
    """(B, H*W) the patch of every token at these levels, numbered over the batch."""
    tables = router.tables(router.grid, levels.device)
    first = [0, *itertools.accumulate(table.patch_region.numel() for table in tables)]
    patch = torch.stack([t.token_patch + n for t, n in zip(tables, first, strict=False)], 1)
    own = levels[:, tables[0].patch_region]
    number = patch.expand(len(levels), -1, -1).gather(2, own.unsqueeze(2)).squeeze(2)
    return number + first[-1] * torch.arange(len(levels), device=levels.device).unsqueeze(1)


def _own_queries(slot: Tensor) -> Tensor:
    """(B, N) which tokens share their slot with no other."""
    users = torch.zeros(slot.shape[0], int(slot.max()) + 1, dtype=torch.int64, device=slot.device)
    return users.scatter_add_(1, slot, torch.ones_like(slot)).gather(1, slot) == 1
