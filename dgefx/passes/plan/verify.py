"""Pass 6, verify: numbers, not trust. A block is used only if it equals the dense block.

Per block, on a copy with its constant-initialised parameters randomised: at the finest
granularity in eval and in train mode; at random granularities where an identity applies: on input
that is constant within every patch, and in tokens that are their own queries; and where the first
does not (tables, stencils, islands), once per structure, against un-pool, operation, pool
(`passes.plan.coarse_reference`). For the whole model: at the finest granularity on the example
input, with its real parameters.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgefx.config import DGEConfig
from dgefx.kernels.layout import from_tokens
from dgefx.kernels.routing import Routing
from dgefx.nn.block import DGEBlock
from dgefx.nn.capacity import region_count
from dgefx.nn.grid_shape import GridShape
from dgefx.nn.hierarchy import Grid, level_tables, nested_levels, parent_table
from dgefx.nn.router import Router
from dgefx.outputs import Call, output_tensors, relative_error
from dgefx.passes.errors import Refused
from dgefx.passes.layout import Layout
from dgefx.passes.plan.coarse_reference import Unknown
from dgefx.passes.plan.plan import BlockPlan, build_block
from dgefx.passes.randomise import randomise_constants
from dgefx.passes.trace.deterministic import Deterministic, seed_all
from dgefx.passes.trace.tracer import copy_block

#: of the block's update (its output less its input) or the model's output, in float32
TOLERANCE = 1e-5
#: rounding of the stream itself when the update is added to it, relative to the stream
_ROUNDING = 1e-6


def _run(
    module: nn.Module, call: Call, chance: TorchFunctionMode | None = None, seed: int = 0
) -> Tensor:
    seed_all(seed)
    # copies: a block may write its update into its input
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, call)
    with contextlib.nullcontext() if chance is None else chance:
        return output_tensors(module(*args, **kwargs))[0]


def _chance(plan: BlockPlan, config: DGEConfig) -> TorchFunctionMode | None:
    """What must not be left to chance, as converted and dense block draw it in another order.

    Inside windows everything. Packed queries draw what is per image in the images' order, but may
    lie otherwise in memory than tokens do.
    """
    if plan.windows is not None:
        return Deterministic()
    return Deterministic(per_element=True) if config.packs else None


def stream_leaf(leaves: list[Any], plan: BlockPlan, shape: tuple[int, ...]) -> int:
    """Where the stream, of this shape, stands among the leaves of a block's call."""
    fitting = (
        index
        for index, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and tuple(leaf.shape) == shape
    )
    found = next(itertools.islice(fitting, plan.stream_rank, None), None)
    if found is None:
        raise Refused(
            f"no argument of the block holds its stream of shape {shape}", "no block module"
        )
    return found


def replaced_stream(call: Call, plan: BlockPlan, shape: tuple[int, ...], stream: Tensor) -> Call:
    """The block's call with another stream."""
    leaves, spec = pytree.tree_flatten(call)
    leaves[stream_leaf(leaves, plan, shape)] = stream
    replaced: Call = pytree.tree_unflatten(leaves, spec)
    return replaced


def stream_of(call: Call, plan: BlockPlan, shape: tuple[int, ...]) -> Tensor:
    """The stream among the arguments of the block's call."""
    leaves = pytree.tree_leaves(call)
    found: Tensor = leaves[stream_leaf(leaves, plan, shape)]
    return found


def _distance(found: Tensor, wanted: Tensor, stream: Tensor) -> tuple[float, float]:
    """(distance of two outputs of a block, what rounding may make of it), as 2-norms."""
    update = (wanted - stream).double().norm().item()
    error = (found.double() - wanted.double()).norm().item()
    return error, TOLERANCE * update + _ROUNDING * stream.double().norm().item()


def is_close(found: Tensor, wanted: Tensor, stream: Tensor) -> bool:
    """Whether two outputs of a block are equal up to rounding, by the update of its stream."""
    if found.shape != wanted.shape:
        return False
    error, limit = _distance(found, wanted, stream)
    return error <= limit


def _require_equal(found: Tensor, wanted: Tensor, stream: Tensor, what: str) -> None:
    if not bool(torch.isfinite(wanted).all()):
        raise Refused("verification: the dense block yields NaN or infinity", "NaN or infinity")
    if is_close(found, wanted, stream):
        return
    if found.shape != wanted.shape:
        differs = f"is of shape {tuple(found.shape)}, the dense block's of {tuple(wanted.shape)}"
    elif not bool(torch.isfinite(found).all()):
        differs = "yields NaN or infinity where the dense block does not"
    else:
        error, limit = _distance(found, wanted, stream)
        differs = (
            f"differs from the dense block by {error:.1e}, where rounding is at most {limit:.1e} "
            f"(2-norms)"
        )
    raise Refused(f"verification: {what} {differs}", "verification failed")


def _compare(
    converted: nn.Module,
    dense: nn.Module,
    call: Call,
    chance: TorchFunctionMode | None,
    seed: int,
    stream: Tensor,
    what: str,
) -> None:
    wanted = _run(dense, call, chance, seed)
    _require_equal(_run(converted, call, chance, seed), wanted, stream, what)


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


def verify_block(
    dense: nn.Module,
    plan: BlockPlan,
    call: Call,
    shape: tuple[int, ...],
    config: DGEConfig,
    twin_passed: bool = False,
) -> None:
    """Compare the converted block with the dense one.

    Args:
        dense: not changed. call, shape: of its example run.
        twin_passed: a block that differs in its parameters only was verified in both modes; this
            one is in eval mode.

    Raises:
        Refused: with what differs.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        copied = copy_block(dense).eval()
        randomise_constants(copied)
        converted = converted_copy(copied, plan, config)
        images = plan.layout.images(shape)
        if twin_passed and not bool(_constant_images(plan, images, config).all()):
            verify_mixed(copied, converted, plan, call, shape, config, generator, finest=True)
            return
        example = stream_of(call, plan, shape)
        noise = torch.randn(example.shape, generator=generator).to(example)
        probe = replaced_stream(call, plan, shape, noise)
        for training in (False,) if twin_passed else (False, True):
            reference, compared = copied, converted
            if training:  # two copies: train mode may update running statistics
                reference, other = copy_block(copied, True), copy_block(copied, True)
                compared = converted_copy(other.train(), plan, config)
                reference.train()
            label = "train mode at the finest granularity" if training else "the finest granularity"
            # what is drawn once for two images is the same for both by chance
            for seed in range(3 if training and config.packs else 1):
                before = torch.zeros_like(noise) if plan.layout.update else noise
                try:
                    _compare(compared, reference, probe, _chance(plan, config), seed, before, label)
                except Refused:
                    if not training or _chance(plan, config) is not None:
                        raise
                    # a dropout that queries and keys both read is drawn for each of them
                    chance = Deterministic(per_element=True)
                    _compare(compared, reference, probe, chance, seed, before, label)
        # train mode draws dropout per query: its mixed queries are checked for being finite only
        if not plan.train_code.is_same(plan.eval_code) and not twin_passed:
            trained = converted_copy(copy_block(copied, True).train(), plan, config)
            verify_mixed(None, trained, plan, call, shape, config, generator)
        verify_mixed(copied, converted, plan, call, shape, config, generator)


def converted_copy(dense: nn.Module, plan: BlockPlan, config: DGEConfig) -> DGEBlock:
    """The converted block around a copy of the dense one, at the finest granularity."""
    return build_block(dense, plan.quiet(), config, grid_shape(plan))


def grid_shape(plan: BlockPlan) -> GridShape | None:
    return GridShape(plan.layout.grid) if plan.needs_grid_shape else None


def verify_mixed(
    dense: nn.Module | None,
    converted: DGEBlock,
    plan: BlockPlan,
    call: Call,
    shape: tuple[int, ...],
    config: DGEConfig,
    generator: torch.Generator,
    finest: bool = False,
) -> None:
    """Random granularities: shapes, finiteness and, with `dense`, two identities, in some of the
    images each: input that is constant within patches, and tokens that are their own queries.

    Args:
        finest: compare with `dense` at the finest granularity too, on the same input.
    """
    like = stream_of(call, plan, shape)
    images = plan.layout.images(tuple(like.shape))
    levels = random_levels(converted, images, generator).to(like.device)
    constant = _constant_images(plan, images, config).to(like.device)
    stream = _mixed_stream(plan, config, like, constant, generator)
    routings: list[Routing] = []

    def route(router: Router, inputs: tuple[Any, ...], _routing: Routing) -> Routing:
        routings.append(router.routing_for(inputs[0], levels, inputs[1]))
        return routings[0]

    probe = replaced_stream(call, plan, shape, stream)
    before = torch.zeros_like(stream) if plan.layout.update else stream
    identities = plan.exact_at_any_level or plan.tokens_apart
    wanted = None if dense is None or not (finest or identities) else _run(dense, probe)
    if wanted is not None and finest:
        _require_equal(_run(converted, probe), wanted, before, "the finest granularity")
    handle = converted.dge_router.register_forward_hook(route)
    try:
        found = _run(converted, probe)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise Refused(
            f"verification: fails at mixed granularities: {error}", "verification failed"
        ) from error
    finally:
        handle.remove()
    if not bool(torch.isfinite(found).all()):
        raise Refused("verification: NaN or infinity at mixed granularities", "verification failed")
    if dense is None:
        return
    if wanted is not None and identities:
        _compare_identities(found, wanted, converted, plan, constant, routings[0], before)
    if plan.reference is not None and not plan.exact_at_any_level:
        _compare_coarse(found, dense, converted, plan, probe, levels, before)


def _compare_identities(
    found: Tensor,
    wanted: Tensor,
    converted: DGEBlock,
    plan: BlockPlan,
    constant: Tensor,
    routing: Routing,
    before: Tensor,
) -> None:
    values = [
        converted.dge_router.tokens_of(value, plan.layout.grid) for value in (found, wanted, before)
    ]
    if plan.exact_at_any_level:
        own, dense, start = (value[constant] for value in values)
        _require_equal(own, dense, start, "mixed granularities on patch-constant input")
    if plan.tokens_apart and routing.ragged is None:  # else there is no slot per token
        alone = _own_queries(routing.token_slot) & ~constant[:, None]
        own, dense, start = (value[:, plan.layout.prefix :][alone] for value in values)
        _require_equal(own, dense, start, "fine tokens beside coarse ones")


def _compare_coarse(
    found: Tensor,
    dense: nn.Module,
    converted: DGEBlock,
    plan: BlockPlan,
    probe: Call,
    levels: Tensor,
    before: Tensor,
) -> None:
    """Against the dense block's own operations on all tokens. Not told: blocks that have values
    with images on no axis of their own (`Unknown`)."""
    assert plan.reference is not None
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, probe)
    patches = _patch_numbers(converted.dge_router, levels)
    try:
        wanted = plan.reference.run(dense, plan.spec.bind(args, kwargs), patches)
    except Unknown:
        return
    if not is_close(found, wanted, before):
        error = relative_error(found - before, wanted - before)
        raise Refused(
            f"verification: mixed granularities differ from un-pool, operation, pool by "
            f"{error:.1e} of the update",
            "verification failed",
        )


def _patch_numbers(router: Router, levels: Tensor) -> Tensor:
    """(B, H*W) the patch of every token at these levels, numbered over the batch."""
    tables = router.tables(router.grid, levels.device)
    first = [0, *itertools.accumulate(table.patch_region.numel() for table in tables)]
    patch = torch.stack([t.token_patch + n for t, n in zip(tables, first, strict=False)], 1)
    own = levels[:, tables[0].patch_region]
    number = patch.expand(len(levels), -1, -1).gather(2, own.unsqueeze(2)).squeeze(2)
    return number + first[-1] * torch.arange(len(levels), device=levels.device).unsqueeze(1)


def _constant_images(plan: BlockPlan, images: int, config: DGEConfig) -> Tensor:
    """(B,) in which images the input is constant within patches: where both identities hold, in
    every other one. Packed queries have no slot per token, so only this one can be looked at."""
    if not plan.exact_at_any_level:
        return torch.zeros(images, dtype=torch.bool)
    both = plan.tokens_apart and not config.packs and images > 1
    return torch.arange(images) % 2 == 0 if both else torch.ones(images, dtype=torch.bool)


def _mixed_stream(
    plan: BlockPlan,
    config: DGEConfig,
    like: Tensor,
    constant: Tensor,
    generator: torch.Generator,
) -> Tensor:
    layout = plan.layout
    patches = patch_constant_stream(layout, config, like, generator, plan.space(config))
    noise = torch.randn(like.shape, generator=generator).to(like)
    size = (len(constant), layout.tokens, like.shape[layout.axis("C")])
    chosen = from_tokens(constant[:, None, None].expand(size), layout.order, layout.grid)
    return torch.where(chosen, patches, noise)


def _own_queries(slot: Tensor) -> Tensor:
    """(B, N) which tokens share their slot with no other."""
    users = torch.zeros(slot.shape[0], int(slot.max()) + 1, dtype=torch.int64, device=slot.device)
    return users.scatter_add_(1, slot, torch.ones_like(slot)).gather(1, slot) == 1
