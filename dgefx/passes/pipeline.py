"""The passes in order: from a model to plans for its blocks, without touching the model.

`convert` and `explain` both stand on `analyse`; they differ in whether the result is installed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgefx.ambient import eager
from dgefx.config import DGEConfig
from dgefx.nn.block import DGEBlock
from dgefx.nn.budget import BlockCost
from dgefx.nn.capacity import Plan
from dgefx.nn.grid_shape import GridShape, Size
from dgefx.nn.image_hook import ImageHook, watch_images
from dgefx.outputs import Call, output_tensors, relative_error
from dgefx.passes.capture import capture, idle_modules, recording
from dgefx.passes.diagnosis.reason_lines import reason_lines
from dgefx.passes.diagnosis.unequal import why_unequal
from dgefx.passes.errors import Refused, TraceError
from dgefx.passes.frontends.block_extraction import Extraction, outline
from dgefx.passes.frontends.inputs import batch_size, resolve_inputs, run_example
from dgefx.passes.frontends.model import check_model, working_copy
from dgefx.passes.locate.grid_source import find_sources, watching_sizes
from dgefx.passes.locate.sites import Site, locate
from dgefx.passes.plan.call_forms import with_forms
from dgefx.passes.plan.cost import block_cost, count_macs
from dgefx.passes.plan.graph_cache import GraphCache
from dgefx.passes.plan.plan import BlockPlan, ImageSource, build_block, fill, plan_block, put
from dgefx.passes.plan.sizes import bound
from dgefx.passes.plan.verify import TOLERANCE, verify_block
from dgefx.passes.plan.verify_gradients import verify_gradients
from dgefx.passes.plan.verify_types import verify_images, verify_type
from dgefx.passes.reasons import KINDS, Reason, advice_lines
from dgefx.passes.user_code import own_code_fails
from dgefx.precision import floating_type, full_float32, in_float64
from dgefx.report import BlockReport, Report

FilterFn = Callable[[nn.Module, str], bool]


@dataclass
class Analysis:
    """A verified conversion of a float32 copy (`work`), ready to be priced and installed."""

    work: nn.Module
    call: Call
    images: int
    sites: list[Site]
    extractions: list[Extraction]
    plans: dict[str, BlockPlan]
    costs: dict[str, BlockCost]
    macs_dense: int
    config: DGEConfig

    @property
    def floor(self) -> float:
        saved = sum(c.dense - c.macs(c.plans[0]) for c in self.costs.values())
        return 1.0 - saved / self.macs_dense

    def predicted_ratio(self, chosen: dict[str, Plan]) -> float:
        """MAC ratio of the whole model with `chosen` plans, from the blocks' costs."""
        saved = sum(self.costs[n].dense - self.costs[n].macs(plan) for n, plan in chosen.items())
        return 1.0 - saved / self.macs_dense

    def set_plans(self, chosen: dict[str, Plan]) -> None:
        """Give the converted blocks of the working copy their slots."""
        for name, plan in chosen.items():
            block = self.work.get_submodule(name)
            assert isinstance(block, DGEBlock)
            block.dge_router.plan = plan

    def report(self, gamma: float, chosen: dict[str, Plan]) -> Report:
        """Figures with `chosen` plans, counted on the working copy."""
        self.set_plans(chosen)
        macs = count_macs(self.work, *self.call)
        blocks = []
        for site in self.sites:
            if site.name not in chosen:
                kind = site.kind or "other"
                advice = KINDS[kind].advice
                reason = site.reason or ""
                blocks.append(
                    BlockReport(site.name, "dense", reason, 1.0, kind=kind, advice=advice)
                )
                continue
            cost, plan = self.costs[site.name], chosen[site.name]
            layout = self.plans[site.name].layout
            ratio = cost.macs(plan) / max(cost.dense, 1)
            blocks.append(
                BlockReport(
                    site.name, "converted", "", ratio, plan.capacities, layout.grid, layout.prefix
                )
            )
        return Report(
            gamma=gamma,
            ratio=macs / self.macs_dense,
            macs=macs / self.images,
            macs_dense=self.macs_dense / self.images,
            floor=self.floor,
            blocks=tuple(blocks),
            held=self.config.capacity is not None,
        )


_QUANTISED = (
    "Its weights are of type {}, as quantised ones are, and may round otherwise in the converted "
    "block: convert the model first and quantise the converted one"
)
_FAILED = "verification failed"
_COMPILED = Reason(
    "it is itself wrapped by torch.compile(block); put block._orig_mod back in its place and "
    "compile it after the conversion, or compile it with block.compile()",
    "compiled",
)
_FILTERED = Reason("left out by filter_fn", "left out by filter")
_RECOGNISED = (
    "If the model has attention, it is spelled otherwise: a custom kernel (flash_attn, xformers) "
    "is not seen, switch to torch.nn.functional.scaled_dot_product_attention. Convolutional, "
    "state-space and linear-attention models have nothing to convert"
)


def install(
    model: nn.Module,
    plans: dict[str, BlockPlan],
    chosen: dict[str, Plan] | None,
    config: DGEConfig,
) -> None:
    """Replace the planned blocks of `model` by converted ones; finest unless `chosen`."""
    shapes: dict[tuple[str | ImageSource | None, Size], GridShape] = {}
    for name, plan in plans.items():
        source = (plan.hook_source or plan.image_source, plan.layout.grid)
        if plan.needs_grid_shape and source not in shapes:
            shapes[source] = _grid_shape(model, plan)
        dense = model.get_submodule(name)
        fill(dense, plan)
        block = build_block(
            dense,
            plan,
            config,
            shapes.get(source),
            None if chosen is None else chosen[name],
        )
        put(model, name, block)


def _grid_shape(model: nn.Module, plan: BlockPlan) -> GridShape:
    """The grid of a block and of those like it, told by a hook on `model`."""
    source, image = plan.hook_source, plan.image_source
    shape = GridShape(plan.layout.grid, None if image is None else image.module)
    if source is not None:
        model.get_submodule(source).register_forward_hook(shape)
    elif image is not None:
        hook = ImageHook(shape, image.size, image.stride)
        watch_images(model.get_submodule(image.module), hook)
    return shape


def analyse(
    model: nn.Module,
    example_inputs: Any,
    config: DGEConfig,
    filter_fn: FilterFn | None,
    must_convert: bool = True,
) -> Analysis:
    """Capture, locate, trace, split, legalise, verify and price.

    Args:
        must_convert: raise if no block converts.

    Raises:
        TypeError, ValueError: nothing to convert, or the model or its inputs are unusable.
    """
    check_model(model)
    work = working_copy(model)
    random = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    with eager(), random, full_float32():
        call, output = resolve_inputs(work, example_inputs)
        _require_finite(output)
        extractions = outline(work, call)
        captured = capture(work, *call)
        sites = locate(captured, batch_size(call))
        if not sites and must_convert:
            raise ValueError(
                f"no attention blocks found in {type(model).__name__}: looked for "
                f"scaled_dot_product_attention, multi_head_attention_forward, matmul-softmax-"
                f"matmul and grid_sample weighed by a softmax among {len(captured.graph.nodes)} "
                f"operations of one forward pass. {_RECOGNISED}"
            )
        for site in sites:
            # the wrapper would go on calling the module that it was given
            if site.reason is None and site.name.rpartition(".")[2] == "_orig_mod":
                site.refuse(_COMPILED)
        if filter_fn is not None:
            for site in sites:
                if site.reason is None and not filter_fn(_named(model, work, site.name), site.name):
                    site.refuse(_FILTERED)
        names = {site.name for site in sites if site.reason is None}
        looking = watching_sizes(work, call, names)
        with recording(work, names) as calls, idle_modules(work) as idle, looking as sizes:
            macs_dense = count_macs(work, *call)
        types = {name: floating_type(_named(model, work, name)) for name in names}
        plans = _plan_sites(work, sites, calls, types, idle, config, must_convert)
        costs = _price(work, plans, calls, config.bounded())
        del calls
        _drop_without_gain(work, sites, plans, costs, must_convert)
        if plans:
            plans = find_sources(plans, sizes, work, call)
            _install_and_verify(work, plans, call, output, config.bounded())
    images = batch_size(call)
    return Analysis(work, call, images, sites, extractions, plans, costs, macs_dense, config)


def _named(model: nn.Module, work: nn.Module, name: str) -> nn.Module:
    """A block in the user's model, or where that is a graph without it, in its copy."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return work.get_submodule(name)


def _require_finite(output: Any) -> None:
    tensors = output_tensors(output)
    if not tensors:
        raise ValueError("the model returns no floating point tensor that could be verified")
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise ValueError(
            "the dense model yields NaN or infinity on the example input, so a conversion could "
            "not be verified; pass other example_inputs or mend the model"
        )


def _plan_sites(
    work: nn.Module,
    sites: list[Site],
    calls: Mapping[str, Call],
    types: Mapping[str, torch.dtype],
    idle: set[str],
    config: DGEConfig,
    must_convert: bool,
) -> dict[str, BlockPlan]:
    """Trace, split and verify every site that may convert; failures become reasons.

    Args:
        calls, types: of these sites, by name; types as in the user's model. idle: modules of the
            model that do nothing in eval mode.
    """
    plans: dict[str, BlockPlan] = {}
    twins = GraphCache()
    for site in sites:
        if site.reason is not None:
            continue
        try:
            # caches that the example run filled, without gradients, are emptied by train()
            work.get_submodule(site.name).train().eval()
            plan = _plan_site(work, site, calls[site.name], idle, config, twins, plans)
            if plan.copy_of not in plans or types[plan.copy_of] != types[site.name]:
                assert site.stream is not None
                given = (work.get_submodule(site.name), plan, calls[site.name])
                verify_type(*given, site.stream.meta["shape"], config, types[site.name])
        except Refused as error:
            known = None
            if error.kind == _FAILED:
                known = _why(work, site, calls[site.name], "patch-constant" in str(error))
            site.refuse(known or Reason(str(error), error.kind))
            continue
        except TraceError as error:
            site.refuse(Reason(str(error), "not traceable"))
            continue
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a block is user code: whatever it raises is its reason
            # operations that the type of quantised weights lacks are nobody's fault
            lacking = Reason(f"{type(error).__name__}: {error}", "quantised")
            foreign = _foreign_weights(work, site)
            site.refuse(lacking if foreign else own_code_fails(error, site.name))
            continue
        plans[site.name] = plan
    for site in sites:
        if site.name in calls and site.reason is not None:
            _tell_quantised(work, site, must_convert)
    _require_plans(sites, plans, must_convert)
    return plans


def _plan_site(
    work: nn.Module,
    site: Site,
    call: Call,
    idle: set[str],
    config: DGEConfig,
    twins: GraphCache,
    plans: Mapping[str, BlockPlan],
) -> BlockPlan:
    """Trace, split and verify one block.

    Args:
        twins, plans: of the blocks before it.
    """
    assert site.layout is not None and site.stream is not None
    block, shape = work.get_submodule(site.name), site.stream.meta["shape"]
    prefix = f"{site.name}."
    inside = frozenset(n.removeprefix(prefix) for n in idle if n.startswith(prefix))
    given = (block, site.name, call, site.layout, shape, config.packs)
    plan = plan_block(*given, twins, inside)
    if plan.twin and plan.twin not in plans and not plan.exact_at_any_level:
        plan = plan_block(*given)  # its coarse levels were not compared where its graph comes from
    try:
        _verify_once(block, plan, call, shape, config, twins, plans.get(plan.copy_of))
    except Exception:
        if set(plan.owners) == {site.name}:
            raise
        plan = plan_block(*given)
        _verify_once(block, plan, call, shape, config, twins)
    plan = dataclasses.replace(plan, reference=None)
    first = twins.bound.get(plan.eval_key)
    if first is not None and first.costs_like(plan):
        plan = plan.held_like(first)
    else:
        plan = bound(block, plan, call, shape, config)
        if plan.eval_key is not None:
            twins.bound[plan.eval_key] = plan
    return with_forms(block, plan, call, shape, config, twins, plans.get(plan.copy_of))


def _verify_once(
    block: nn.Module,
    plan: BlockPlan,
    call: Call,
    shape: tuple[int, ...],
    config: DGEConfig,
    twins: GraphCache,
    first: BlockPlan | None = None,
) -> None:
    """Verify a block in all that was not verified for those before it.

    Args:
        first: the plan of a block that differs in its parameters only, if any.
    """
    passed = first is not None and plan.runs_like(first)
    verify_block(block, plan, call, shape, config, twin_passed=passed)
    if passed or plan.gradient_key in twins.compared:
        return
    verify_gradients(block, plan, call, shape, config)
    if plan.numbers_images:
        verify_images(block, plan, call, shape, config)
    if plan.gradient_key is not None:
        twins.compared.add(plan.gradient_key)


def _why(work: nn.Module, site: Site, call: Call, constant: bool) -> Reason | None:
    assert site.layout is not None and site.stream is not None
    block, shape = work.get_submodule(site.name), site.stream.meta["shape"]
    return why_unequal(block, call, site.layout, shape, constant)


def _require_plans(sites: list[Site], plans: dict[str, BlockPlan], must_convert: bool) -> None:
    if not plans and must_convert:
        reasons = [(site.name, " ".join((site.reason or "").split())) for site in sites]
        looked = "\n".join(f"  {line}" for line in reason_lines(reasons))
        advice = "\n".join(f"- {line}" for line in advice_lines(site.kind or "" for site in sites))
        raise ValueError(
            f"no attention block could be converted; looked at\n{looked}\nwhat to do:\n{advice}"
        )


def _drop_without_gain(
    work: nn.Module,
    sites: list[Site],
    plans: dict[str, BlockPlan],
    costs: dict[str, BlockCost],
    must_convert: bool,
) -> None:
    """Blocks that cost as much as the dense one even at their coarsest stay dense."""
    for site in sites:
        cost = costs.get(site.name)
        if cost is None or cost.macs(cost.plans[0]) < cost.dense:
            continue
        share = cost.macs(cost.plans[0]) / max(cost.dense, 1)
        costs_more = f"nothing to save: even at its coarsest it costs {share:.2f} of the dense one"
        site.refuse(Reason(costs_more, "nothing to save"))
        _tell_quantised(work, site, must_convert)
        del plans[site.name], costs[site.name]
    _require_plans(sites, plans, must_convert)


def _tell_quantised(work: nn.Module, site: Site, must_convert: bool) -> None:
    """Where a refused block's weights are of a type that is not torch's own, that is why."""
    types = _foreign_weights(work, site)
    if types:
        names = " and ".join(sorted(types))
        site.refuse(Reason(f"{site.reason}. {_QUANTISED.format(names)}", "quantised"))
        if must_convert:
            raise ValueError(f"block {site.name} cannot be converted: {site.reason}")


def _foreign_weights(work: nn.Module, site: Site) -> set[str]:
    """Types of a block's weights that are not torch's own."""
    block = work.get_submodule(site.name)
    weights = (parameter.data for parameter in block.parameters())
    types = {type(weight).__name__ for weight in weights if type(weight) is not Tensor}
    # packed weights, as of torch.ao's quantize_dynamic, are no parameters
    for module in block.modules():
        for value in vars(module).values():
            if type(value) is torch.ScriptObject:
                kind: Any = value._type()
                types.add(kind.name())
    return types


def _price(
    work: nn.Module,
    plans: dict[str, BlockPlan],
    calls: Mapping[str, Call],
    config: DGEConfig,
) -> dict[str, BlockCost]:
    costs: dict[str, BlockCost] = {}
    for name, plan in plans.items():
        if plan.twin in costs and plan.costs_like(plans[plan.twin]):
            costs[name] = costs[plan.twin]
            continue
        dense = work.get_submodule(name)
        shape = GridShape(plan.layout.grid) if plan.needs_grid_shape else None
        converted = build_block(dense, plan, config, shape)
        costs[name] = block_cost(dense, converted, calls[name], config)
    return costs


def _require_equal_in_float64(
    work: nn.Module, plans: dict[str, BlockPlan], call: Call, difference: float
) -> None:
    """The converted model has to equal the dense one in float64: some models, at random weights
    above all, amplify the rounding of float32 beyond the tolerance, whatever is converted, and
    others draw random numbers, which come out the same from one seed.

    Args:
        difference: found in float32.
    """
    converted = copy.deepcopy(work).double()
    dense = copy.deepcopy(converted)
    for name in plans:
        block = dense.get_submodule(name)
        assert isinstance(block, DGEBlock)
        put(dense, name, block.dense_block())
    wide: Call = in_float64(call)

    def run(model: nn.Module) -> Any:
        torch.manual_seed(0)
        return run_example(model, wide)

    repeats = True
    try:
        wanted = run(dense)
        # a model that changes from call to call differs from itself as well
        repeats = relative_error(run(dense), wanted) <= TOLERANCE
        if repeats and relative_error(run(converted), wanted) <= TOLERANCE:
            return
    except (RuntimeError, TypeError, ValueError):  # it has float32 written into it
        pass
    if not repeats:
        raise ValueError(
            "verification: the dense model gives another output each time it runs on the example "
            "input, from the same seed of torch, so that nothing can be compared: something in it "
            "counts its calls, or draws random numbers from elsewhere (random, numpy). Switch that "
            "off for the conversion"
        )
    how = f"differs from the dense one by {difference:.1e}, where {TOLERANCE:.0e} is allowed"
    if difference == float("inf"):
        how = "yields outputs of other number or shape, or NaN or infinity"
    raise ValueError(
        f"verification: every block equals its dense block, but the whole model at the finest "
        f"granularity {how} (relative); it is not converted. Please report this model"
    )


def _install_and_verify(
    work: nn.Module, plans: dict[str, BlockPlan], call: Call, output: Any, config: DGEConfig
) -> None:
    """The whole model at the finest granularity against the dense model's output."""
    install(work, plans, None, config)
    ran: set[str] = set()
    handles = [
        work.get_submodule(f"{name}.dge_router").register_forward_hook(
            lambda _m, _a, _o, name=name: ran.add(name)
        )
        for name in plans
    ]
    try:
        found = run_example(work, call)
    except Exception as error:
        raise ValueError(
            f"verification: the model fails with its blocks converted, so something reads more of "
            f"them than their output: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if missing := sorted(set(plans) - ran):
        raise ValueError(
            f"verification: blocks {missing} do not run when the model does, although they were "
            f"converted: the model holds them outside its module tree"
        )
    difference = relative_error(found, output)
    if not difference <= TOLERANCE:
        _require_equal_in_float64(work, plans, call, difference)
