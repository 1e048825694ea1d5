"""What a converted model keeps of its conversion, and the budget it is set to.

Made by `convert` and `load`, completed by `calibrate`; `apply_budget` is the one place where a
budget becomes slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from dgefx.config import DGEConfig
from dgefx.nn.block import DGEBlock
from dgefx.nn.budget import BlockCost, Choices, floor_ratio, guess_losses, solve
from dgefx.nn.capacity import Plan
from dgefx.nn.router import Router
from dgefx.report import Report
from dgefx.rollback import undone_on_error


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
    """How a model was converted and what its blocks cost; kept by its blocks."""

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


@dataclass(frozen=True)
class Part:
    """A conversion found in a model: of the model itself, or of a part of it.

    name: of the module that was converted, "" for the model itself; None where only blocks of it
    are in the model. blocks: those that are, by their names in that module.
    """

    record: Record
    name: str | None
    blocks: dict[str, DGEBlock]


def set_record(model: nn.Module, record: Record) -> None:
    """Let the converted blocks lead to the record of their conversion, wherever they are moved.

    Copies of a model, pickled ones too, have one record of their own.
    """
    for name in record.costs:
        vars(model.get_submodule(name))["_dge_record"] = (record, name)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, torch's `checkpoint_wrapper`, DistributedDataParallel and
    DataParallel, however nested."""
    while True:
        inner = getattr(model, "_orig_mod", getattr(model, "_checkpoint_wrapped_module", model))
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is model or not isinstance(inner, nn.Module):
            return model
        model = inner


def _blocks_by_record(model: nn.Module) -> list[tuple[Record, dict[str, DGEBlock]]]:
    found: dict[int, tuple[Record, dict[str, DGEBlock]]] = {}
    for module in model.modules():
        if isinstance(module, DGEBlock) and module._dge_record is not None:
            record, name = module._dge_record
            found.setdefault(id(record), (record, {}))[1].setdefault(name, module)
    return list(found.values())


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return unwrap(model.get_submodule(path.removeprefix(".")))
    except AttributeError:
        return None


def _converted_at(model: nn.Module, blocks: Mapping[str, DGEBlock]) -> str | None:
    """The module of `model` in which `blocks` have their names."""
    first, block = next(iter(blocks.items()))
    for path, module in model.named_modules(remove_duplicate=False):
        if unwrap(module) is not block or not f".{path}".endswith(f".{first}"):
            continue
        at = path.removesuffix(first).removesuffix(".")
        if all(_module_at(model, f"{at}.{name}") is other for name, other in blocks.items()):
            return at
    return None


def find_parts(model: Any) -> list[Part]:
    """All conversions in `model`, also inside torch.compile and DistributedDataParallel.

    A copy of a block that stands in the block's place, with a copy of its record, is taken for it.

    Raises:
        TypeError, ValueError: not a model, or one without converted blocks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    inner = unwrap(model)
    parts: list[Part] = []
    taken: set[DGEBlock] = set()
    for record, found in sorted(_blocks_by_record(inner), key=lambda group: -len(group[1])):
        blocks = {name: block for name, block in found.items() if block not in taken}
        if not blocks:
            continue
        at = _converted_at(inner, blocks)
        for name in record.costs:
            other = None if at is None else _module_at(inner, f"{at}.{name}")
            if isinstance(other, DGEBlock) and (other._dge_record or ("", ""))[1] == name:
                blocks.setdefault(name, other)
        taken.update(blocks.values())
        parts.append(Part(record, at, blocks))
    if not parts:
        raise ValueError("model is not a converted one; call dgefx.convert(model) first")
    return parts


def conversion_record(model: Any) -> Record:
    """How `model` was converted, or the one part of it that was.

    Raises:
        TypeError, ValueError: not a model, not a converted one, or one with several such parts.
    """
    parts = find_parts(model)
    own = [part for part in parts if part.name == ""]
    if len(own) != 1 and len(parts) > 1:
        names = [repr(p.name) if p.name is not None else f"around {[*p.blocks]}" for p in parts]
        raise ValueError(
            f"model holds {len(parts)} parts that were converted apart, {', '.join(names)}, each "
            f"with a budget of its own; pass one of them, as model.get_submodule(name)"
        )
    return (own or parts)[0].record


def converted_blocks(model: nn.Module, record: Record) -> dict[str, DGEBlock]:
    """The blocks of a conversion by their names in the module that was converted, in the order
    they run, wherever in `model` they are.

    Raises:
        ValueError: a block was taken out or wrapped after the conversion.
    """
    part = next(part for part in find_parts(model) if part.record is record)
    if missing := [name for name in record.costs if name not in part.blocks]:
        at = None if part.name is None else _module_at(model, f"{part.name}.{missing[0]}")
        now = "not in the model" if at is None else f"now {type(at).__name__}"
        raise ValueError(
            f"block {missing[0]} was converted but is {now}; put the converted block back, or "
            f"convert the changed model again (dgefx.revert undoes a conversion)"
        )
    return {name: part.blocks[name] for name in record.costs}


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
        ValueError: gamma is under the floor. Whatever is raised, nothing is changed then.
    """
    choices = budget_choices(model, record)
    chosen = solve(choices, record.rest, record.macs_dense, gamma)
    with kept_on_error(model, record):
        apply_plans(model, record, chosen, gamma)


@contextmanager
def kept_on_error(model: nn.Module, record: Record) -> Iterator[None]:
    """Whatever is raised inside, the calibration and budget from before."""
    kept = record.calibration, record.gamma, record.report
    routers = [block.dge_router for block in converted_blocks(model, record).values()]
    try:
        with undone_on_error(*routers):
            yield
    except BaseException:
        record.calibration, record.gamma, record.report = kept
        raise


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
