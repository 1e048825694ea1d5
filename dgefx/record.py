"""What a converted model keeps of its conversion, and the budget it is set to.

Made by `convert` and `load`, completed by `calibrate`; `apply_budget` is the one place where a
budget becomes slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from dgefx.analysis import is_converted
from dgefx.config import DGEConfig
from dgefx.nn.block import DGEBlock
from dgefx.nn.budget import BlockCost, Choices, floor_ratio, guess_losses, solve
from dgefx.nn.capacity import Plan
from dgefx.nn.router import Router
from dgefx.passes.capture import Call
from dgefx.report import Report

RECORD = "dgefx_record"


@dataclass(frozen=True)
class BlockTable:
    """One block's calibration.

    plans: candidates by rising slots. losses: of each, interpolated. measured: (slots, loss) pairs.
    """

    plans: tuple[Plan, ...]
    losses: tuple[float, ...]
    measured: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Calibration:
    """distance: "kl" (nats per image) or "relative" (squared). images: how many were used."""

    distance: str
    images: int
    tables: dict[str, BlockTable]


@dataclass
class Record:
    """Kept on a converted model: how it was made and what its blocks cost."""

    config: DGEConfig
    gamma: float
    report: Report
    example: list[Any]  # shapes of the example call, see `describe_call`
    costs: dict[str, BlockCost]  # of the whole example batch, in the order the blocks run
    macs_dense: int
    images: int  # in the example batch
    calibration: Calibration | None = None

    @property
    def rest(self) -> float:
        """MACs outside the converted blocks."""
        return self.macs_dense - sum(cost.dense for cost in self.costs.values())


def set_record(model: nn.Module, record: Record | None) -> None:
    """Keep `record` on a converted model; None takes it away.

    Copies of a graph module keep its `meta` and no other attribute, pickled ones all but `meta`.
    """
    kept: list[dict[str, Any]] = [vars(model)]
    if isinstance(model, fx.GraphModule):
        kept.append(model.meta)
    for attributes in kept:
        attributes.pop(RECORD, None)
        if record is not None:
            attributes[RECORD] = record


def _record_on(model: Any) -> Any:
    record = getattr(model, RECORD, None)
    if record is None and isinstance(model, fx.GraphModule):
        return model.meta.get(RECORD)
    return record


def conversion_record(model: Any) -> Record:
    """How `model` was converted.

    Raises:
        TypeError, ValueError: not a model, or not a converted one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    record = _record_on(unwrap(model))
    inner = getattr(model, "module", None)
    if record is None and isinstance(_record_on(inner), Record):
        raise ValueError(f"model wraps a converted one in {type(model).__name__}; pass its .module")
    if not isinstance(record, Record) or not is_converted(model):
        raise ValueError("model is not a converted one; call dgefx.convert(model) first")
    return record


def unwrap(model: nn.Module) -> nn.Module:
    """The model that torch.compile or torch's `checkpoint_wrapper` wraps, or the model itself."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        inner = getattr(model, name, model)
        model = inner if isinstance(inner, nn.Module) else model
    return model


def converted_blocks(model: nn.Module, record: Record) -> dict[str, DGEBlock]:
    """The converted blocks by name, in the order they run; also those in `torch.compile`.

    Raises:
        ValueError: a block was taken out or wrapped after the conversion.
    """
    found = {}
    for name in record.costs:
        try:
            block = unwrap(model.get_submodule(name))
        except AttributeError:
            block = None
        if not isinstance(block, DGEBlock):  # sharded blocks are of a type derived from it
            raise ValueError(
                f"block {name} was converted but is now {type(block).__name__}; put the converted "
                f"block back, or convert the changed model again (dgefx.revert undoes a conversion)"
            )
        found[name] = block
    return found


def check_unsharded(model: nn.Module, call: str) -> None:
    """Raise ValueError where converted blocks hold shards of their weights (FSDP2).

    Args:
        call: what cannot be done with such a model.
    """
    for name, module in model.named_modules():
        if isinstance(module, DGEBlock) and module.dge_mixed:
            raise ValueError(
                f"model is sharded (block {name} is {type(module).__name__}), which {call} does "
                f"not know; call it before sharding, or load the weights that "
                f"dgefx.training.save_checkpoint wrote into an unsharded converted model"
            )


def set_plans(blocks: Mapping[str, DGEBlock], chosen: Mapping[str, Plan]) -> None:
    """Give converted blocks their slots, and nothing else."""
    for name, plan in chosen.items():
        blocks[name].dge_router.plan = plan


def train_corrections_like_block(block: DGEBlock) -> None:
    """Corrections are trained later exactly where anything else of their block is."""
    fitted = [p for p in block.dge_router.correction or () if isinstance(p, nn.Parameter)]
    known = {id(parameter) for parameter in fitted}
    trained = any(p.requires_grad for p in block.parameters() if id(p) not in known)
    for parameter in fitted:
        parameter.requires_grad_(trained)


def block_macs(cost: BlockCost, router: Router, plan: Plan, images: int) -> float:
    """MACs of a converted block for the example batch, with its correction if it has one."""
    return cost.macs(plan) + images * router.correction_macs(plan)


def guessed_choices(costs: dict[str, BlockCost]) -> dict[str, Choices]:
    """Choices of blocks that were not calibrated."""
    choices = {}
    for index, (name, cost) in enumerate(costs.items()):
        macs = tuple(cost.macs(plan) for plan in cost.plans)
        choices[name] = Choices(cost.plans, macs, guess_losses(cost.plans, index, len(costs)))
    return choices


def budget_choices(model: nn.Module, record: Record) -> dict[str, Choices]:
    """What every block of `model` can be set to."""
    if record.calibration is None:
        return guessed_choices(record.costs)
    choices = {}
    for name, block in converted_blocks(model, record).items():
        table, cost = record.calibration.tables[name], record.costs[name]
        macs = tuple(block_macs(cost, block.dge_router, p, record.images) for p in table.plans)
        choices[name] = Choices(table.plans, macs, table.losses)
    return choices


def apply_budget(model: nn.Module, record: Record, gamma: float) -> None:
    """Solve for `gamma` and give every block its slots; updates the record's report.

    Raises:
        ValueError: gamma is under the floor; nothing is changed then.
    """
    choices = budget_choices(model, record)
    chosen = solve(choices, record.rest, record.macs_dense, gamma)
    apply_plans(model, record, chosen, gamma)


def open_gates(blocks: Mapping[str, DGEBlock], gamma: float) -> None:
    """Gates without a capacity ask in every block, unless all of the model is to be dense."""
    for block in blocks.values():
        block.dge_router.open = gamma < 1.0


def apply_plans(model: nn.Module, record: Record, chosen: dict[str, Plan], gamma: float) -> None:
    """Give every block its slots and update the report, from the blocks' costs."""
    blocks = converted_blocks(model, record)
    spent, reports = record.rest, {block.name: block for block in record.report.blocks}
    for name, plan in chosen.items():
        router, cost = blocks[name].dge_router, record.costs[name]
        router.plan = plan
        macs = block_macs(cost, router, plan, record.images)
        spent += macs
        reports[name] = dataclasses.replace(
            reports[name], ratio=macs / max(cost.dense, 1), slots=plan.capacities
        )
    open_gates(blocks, gamma)
    choices = budget_choices(model, record)
    record.gamma = gamma
    record.report = dataclasses.replace(
        record.report,
        gamma=gamma,
        ratio=spent / record.macs_dense,
        macs=spent / record.images,
        floor=floor_ratio(choices, record.rest, record.macs_dense),
        blocks=tuple(reports.values()),
        calibrated=record.calibration is not None,
    )


def describe_tensor(value: Tensor) -> dict[str, Any]:
    """Shape and dtype in JSON's terms; see `dgefx.serialize`."""
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def describe_call(call: Call) -> list[Any]:
    """Shapes of an example call in JSON's terms; see `dgefx.serialize`."""

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return describe_tensor(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        return {"unknown": type(value).__name__}

    args, kwargs = call
    return [[describe(a) for a in args], {k: describe(v) for k, v in kwargs.items()}]
