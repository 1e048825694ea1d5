"""The stages in order: from a model to plans for its blocks, without touching the model.

    frontends   the user's model as a working copy, its example call, blocks cut out of flat graphs
    capture     one run as a flat graph of torch calls
    locate      attention cores, and the blocks that own them
    trace       every block as its own symbolic graph          \\
    sides       what runs on queries, what on the dense context  | per block, see
    emit        the block's graph rewritten for mixed queries    | `plan.convert_block`
    verify      compared with the dense block, on which sizes  /
    price       MACs of every block, dense and converted
    install     converted blocks in the place of dense ones; the whole model compared

`convert` and `explain` both stand on `analyse`; they differ in whether the result is installed in
the user's model.
"""

from __future__ import annotations

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
from dgefx.outputs import Call, output_tensors
from dgefx.passes.attention.registry import form_names
from dgefx.passes.capture import capture, idle_modules, recording
from dgefx.passes.diagnosis.refusals import refusal_reasons
from dgefx.passes.diagnosis.unequal import why_unequal
from dgefx.passes.errors import Refused, TraceError
from dgefx.passes.frontends.block_extraction import Extraction, outline
from dgefx.passes.frontends.inputs import batch_size, resolve_inputs
from dgefx.passes.frontends.model import check_model, working_copy
from dgefx.passes.locate.grid_source import GridSource, find_sources
from dgefx.passes.locate.sites import Block, Located, Site, locate
from dgefx.passes.plan.convert_block import BlocksBefore, convert_block
from dgefx.passes.plan.cost import count_macs, price
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.plan.graph_cache import GraphCache
from dgefx.passes.plan.plan import BlockPlan
from dgefx.passes.plan.verify_model import install_and_verify
from dgefx.passes.reasons import ADVICE, Reason, advice_lines
from dgefx.passes.stage_log import log_stage
from dgefx.passes.trace.wrapped_functions import stand_ins_run
from dgefx.passes.user_code import own_code_fails
from dgefx.precision import floating_type, full_float32
from dgefx.reason_lines import reason_lines
from dgefx.report import BlockReport, Report

FilterFn = Callable[[nn.Module, str], bool]

_QUANTISED = (
    "Its weights are of type {}, as quantised ones are, and may round otherwise in the converted "
    "block: convert the model first and quantise the converted one"
)
_COMPILED = Reason(
    "it is itself wrapped by torch.compile(block); put block._orig_mod back in its place and "
    "compile it after the conversion, or compile it with block.compile()",
    "compiled",
)
_FILTERED = Reason("left out by filter_fn", "left out by filter")
_RECOGNISED = (
    "If the model has attention, it is spelled otherwise: a custom kernel (flash_attn, xformers) "
    "is not seen, switch to torch.nn.functional.scaled_dot_product_attention, or register it "
    "(dgefx.register_attention). Convolutional, state-space and linear-attention models have "
    "nothing to convert"
)


Reasons = dict[Block, Reason]


@dataclass
class Analysis:
    """A verified conversion of a float32 copy (`work`), ready to be priced and installed.

    blocks: of all attentions. reasons: why some of them stay dense. sources: who tells others their
    grid.
    """

    work: nn.Module
    call: Call
    images: int
    blocks: tuple[Block, ...]
    reasons: Reasons
    sources: dict[str, GridSource]
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
        return Report(
            gamma=gamma,
            ratio=macs / self.macs_dense,
            macs=macs / self.images,
            macs_dense=self.macs_dense / self.images,
            floor=self.floor,
            blocks=tuple(
                self._block_report(block, chosen.get(block.name)) for block in self.blocks
            ),
            held=self.config.capacity is not None,
        )

    def _block_report(self, block: Block, plan: Plan | None) -> BlockReport:
        name = block.name
        if plan is None:
            why = self.reasons[block]
            return BlockReport(name, "dense", why.text, 1.0, kind=why.kind, advice=ADVICE[why.kind])
        cost, layout = self.costs[name], self.plans[name].layout
        ratio = cost.macs(plan) / max(cost.dense, 1)
        shape = (plan.capacities, layout.grid, layout.prefix)
        return BlockReport(name, "converted", "", ratio, *shape)


@dataclass(frozen=True)
class Observed:
    """One run of the dense model on its example. calls: of the blocks, by name. idle: modules that
    hand on what they get."""

    calls: Mapping[str, Call]
    idle: set[str]
    macs: int


def observe(work: nn.Module, call: Call, names: set[str]) -> Observed:
    """Run the model once and look at its blocks."""
    with recording(work, names) as calls, idle_modules(work) as idle:
        macs = count_macs(work, *call)
    return Observed(calls, idle, macs)


def analyse(
    model: nn.Module,
    example_inputs: Any,
    config: DGEConfig,
    filter_fn: FilterFn | None,
    must_convert: bool = True,
) -> Analysis:
    """All stages.

    Args:
        must_convert: raise if no block converts.

    Raises:
        TypeError, ValueError: nothing to convert, or the model or its inputs are unusable.
    """
    check_model(model)
    work = working_copy(model)
    random = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    with eager(), random, full_float32(), stand_ins_run(work):
        call, output = resolve_inputs(work, example_inputs)
        _require_finite(output)
        extractions = outline(work, call)
        captured = capture(work, *call)
        located = locate(captured)
        if not located.blocks and must_convert:
            raise ValueError(
                f"no attention blocks found in {type(model).__name__}: looked for "
                f"{', '.join(form_names())} among {len(captured.graph.nodes)} operations of one "
                f"forward pass. {_RECOGNISED}"
            )
        reasons: Reasons = refusal_reasons(located)
        sites = [site for site in located.sites if site not in reasons]
        reasons |= _left_out(sites, model, work, filter_fn)
        for block in located.blocks:
            why = reasons.get(block)
            decided = block.layout if isinstance(block, Site) else None
            log_stage(block.name, "located", decided if why is None else why.text)
        sites = [site for site in sites if site not in reasons]
        observed = observe(work, call, {site.name for site in sites})
        plans, refused = _convert_blocks(model, work, sites, observed, config)
        costs = price(work, plans, observed.calls, config.bounded())
        for name, cost in costs.items():
            coarsest = cost.macs(cost.plans[0])
            log_stage(name, "price in MACs", f"dense {cost.dense:.0f}, coarsest {coarsest:.0f}")
        refused |= _without_gain(sites, costs)
        reasons |= _of_weights(work, refused, must_convert)
        plans = {site.name: plans[site.name] for site in sites if site not in refused}
        costs = {name: costs[name] for name in plans}
        if not plans and must_convert:
            raise ValueError(_nothing_converts(located, reasons))
        asking = {name for name, plan in plans.items() if plan.needs_grid_shape}
        sources = find_sources(located, plans, asking, work, call)
        if plans:
            install_and_verify(work, plans, sources, call, output, config.bounded())
    images, macs = batch_size(call), observed.macs
    found = (located.blocks, reasons, sources, extractions, plans, costs)
    return Analysis(work, call, images, *found, macs, config)


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


def _left_out(
    sites: list[Site], model: nn.Module, work: nn.Module, filter_fn: FilterFn | None
) -> Reasons:
    """Of blocks that cannot be replaced, and of those that the user wants dense."""
    reasons: Reasons = {}
    for site in sites:
        # the wrapper would go on calling the module that it was given
        if site.name.rpartition(".")[2] == "_orig_mod":
            reasons[site] = _COMPILED
        elif filter_fn is not None and not filter_fn(_named(model, work, site.name), site.name):
            reasons[site] = _FILTERED
    return reasons


def _convert_blocks(
    model: nn.Module,
    work: nn.Module,
    sites: list[Site],
    observed: Observed,
    config: DGEConfig,
) -> tuple[dict[str, BlockPlan], Reasons]:
    """Plans of all blocks that equal their dense ones, and why the others do not."""
    reasons: Reasons = {}
    plans: dict[str, BlockPlan] = {}
    types: dict[str, torch.dtype] = {}
    before = BlocksBefore(plans, types, GraphCache())
    for site in sites:
        block, shape = work.get_submodule(site.name), site.stream.meta["shape"]
        example = BlockExample(site.name, block, observed.calls[site.name], site.layout, shape)
        prefix = f"{site.name}."
        idle = {name.removeprefix(prefix) for name in observed.idle if name.startswith(prefix)}
        try:
            # caches that the example run filled, without gradients, are emptied by train()
            block.train().eval()
            types[site.name] = floating_type(_named(model, work, site.name))
            plan = convert_block(example, frozenset(idle), types[site.name], config, before)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a block is user code: whatever it raises is its reason
            reasons[site] = _reason(example, error)
            log_stage(site.name, "refused", reasons[site].text)
        else:
            plans[site.name] = plan
    return plans, reasons


def _reason(example: BlockExample, error: Exception) -> Reason:
    """Why a block stays dense, of what was raised on the way."""
    if isinstance(error, Refused):
        known = None
        if error.kind == "verification failed":
            known = why_unequal(example, "patch-constant" in str(error))
        return known or Reason(str(error), error.kind)
    if isinstance(error, TraceError):
        return Reason(str(error), "not traceable")
    # operations that the type of quantised weights lacks are nobody's fault
    if _foreign_weights(example.block):
        return Reason(f"{type(error).__name__}: {error}", "quantised")
    return own_code_fails(error, example.name)


def _without_gain(sites: list[Site], costs: Mapping[str, BlockCost]) -> Reasons:
    """Of blocks that cost as much as the dense one even at their coarsest."""
    reasons: Reasons = {}
    for site in sites:
        cost = costs.get(site.name)
        if cost is not None and cost.macs(cost.plans[0]) >= cost.dense:
            share = cost.macs(cost.plans[0]) / max(cost.dense, 1)
            text = f"nothing to save: even at its coarsest it costs {share:.2f} of the dense one"
            reasons[site] = Reason(text, "nothing to save")
    return reasons


def _of_weights(work: nn.Module, refused: Reasons, must_convert: bool) -> Reasons:
    """The reasons of blocks that were tried: where a block's weights are of a type that is not
    torch's own, that is why.

    Raises:
        ValueError: there is such a block, and something must convert.
    """
    reasons: Reasons = {}
    for block, why in refused.items():
        types = _foreign_weights(work.get_submodule(block.name))
        if types:
            names = " and ".join(sorted(types))
            why = Reason(f"{why.text}. {_QUANTISED.format(names)}", "quantised")
            if must_convert:
                raise ValueError(f"block {block.name} cannot be converted: {why.text}")
        reasons[block] = why
    return reasons


def _nothing_converts(located: Located, reasons: Reasons) -> str:
    told = [(block.name, " ".join(reasons[block].text.split())) for block in located.blocks]
    looked = "\n".join(f"  {line}" for line in reason_lines(told))
    kinds = (reasons[block].kind for block in located.blocks)
    advice = "\n".join(f"- {line}" for line in advice_lines(kinds))
    return f"no attention block could be converted; looked at\n{looked}\nwhat to do:\n{advice}"


def _foreign_weights(block: nn.Module) -> set[str]:
    """Types of a block's weights that are not torch's own."""
    weights = (parameter.data for parameter in block.parameters())
    types = {type(weight).__name__ for weight in weights if type(weight) is not Tensor}
    # packed weights, as of torch.ao's quantize_dynamic, are no parameters
    for module in block.modules():
        for value in vars(module).values():
            if type(value) is torch.ScriptObject:
                kind: Any = value._type()
                types.add(kind.name())
    return types
