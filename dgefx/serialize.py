"""`save` and `load`: a converted model as config JSON + safetensors.

The files hold settings and weights, no code: `load` converts the dense model again and gives
every block the slots it had.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from dgefx.ambient import neutral
from dgefx.config import DGEConfig
from dgefx.convert import install_analysis
from dgefx.copying import deep_copy
from dgefx.example import describe_tensor
from dgefx.kernels.correction import Correction
from dgefx.nn.block import DGEBlock
from dgefx.nn.capacity import plan_of
from dgefx.nn.router import Router
from dgefx.passes.frontends.exported import as_module
from dgefx.passes.frontends.model import check_model
from dgefx.passes.pipeline import Analysis, analyse
from dgefx.record import (
    BlockTable,
    Calibration,
    Part,
    apply_plans,
    check_unsharded,
    conversion_record,
    converted_blocks,
    find_parts,
    train_corrections_like_block,
    unwrap,
)

_READABLE = (1, 3, 4)  # 1 had no calibration, 2 was never released, 4 has several parts
CONFIG_FILE = "dgefx.json"
WEIGHTS_FILE = "model.safetensors"


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a converted model, or a model with converted parts.

    Args:
        folder: made if missing; receives `dgefx.json` and `model.safetensors`.

    Raises:
        TypeError, ValueError: not a converted model, one with single modules wrapped, or blocks
            that were taken out of the model that was converted.
    """
    parts = find_parts(model)
    model = unwrap(model)
    check_unsharded(model, "save")
    if wrapped := [name for name, module in model.named_modules() if hasattr(module, "_orig_mod")]:
        raise ValueError(
            f"modules {wrapped} are wrapped by torch.compile, which changes the names of their "
            f"weights; save the model before it is compiled, or compile it with module.compile()"
        )
    # a model before its parts, as load() converts them in this order
    described = {_name(part): _describe_part(model, part) for part in sorted(parts, key=_name)}
    content = {"format": 4, "parts": described}
    if list(described) == [""]:  # as it was before there were parts
        content = {"format": 3, **described[""]}
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
    save_model(model, str(path / WEIGHTS_FILE))


def _name(part: Part) -> str:
    if part.name is None:
        raise ValueError(
            f"blocks {[*part.blocks]} were taken out of the model that they were converted in, "
            f"without which load() cannot convert them again; save a model that holds that one as "
            f"it was converted, or keep model.state_dict()"
        )
    return part.name


def _describe_part(model: nn.Module, part: Part) -> dict[str, Any]:
    """One conversion in JSON's terms."""
    record, blocks = part.record, converted_blocks(model, part.record)
    return {
        "config": record.config.to_dict(),
        "gamma": record.gamma,
        "example": record.example,
        "slots": {name: list(block.dge_router.plan.capacities) for name, block in blocks.items()},
        "calibration": _describe(record.calibration),
        "fitted": _describe_fitted(blocks),
    }


def _describe(calibration: Calibration | None) -> dict[str, Any] | None:
    """A calibration in JSON's terms."""
    if calibration is None:
        return None
    tables = {
        name: {
            "slots": [list(plan.capacities) for plan in table.plans],
            "losses": list(table.losses),
            "measured": [list(pair) for pair in table.measured],
        }
        for name, table in calibration.tables.items()
    }
    return {"distance": calibration.distance, "images": calibration.images, "tables": tables}


def _rebuild_calibration(
    described: dict[str, Any] | None, analysis: Analysis
) -> Calibration | None:
    """The inverse of `_describe`."""
    if described is None:
        return None
    tables = {}
    for name, table in described["tables"].items():
        grid = analysis.plans[name].space(analysis.config)
        tables[name] = BlockTable(
            tuple(plan_of(grid, analysis.config, tuple(slots)) for slots in table["slots"]),
            tuple(table["losses"]),
            tuple((int(slots), float(loss)) for slots, loss in table["measured"]),
        )
    return Calibration(described["distance"], described["images"], tables)


def _describe_fitted(blocks: dict[str, DGEBlock]) -> dict[str, dict[str, Any]]:
    """Shapes and types of what calibration fitted, per block; the values are among the weights."""
    described = {}
    for name, block in blocks.items():
        found = {
            key: describe_tensor(value)
            for key in ("importance", "correction_down", "correction_up")
            if isinstance(value := getattr(block.dge_router, key), torch.Tensor)
        }
        if found:
            described[name] = found
    return described


def _reserve(router: Router, described: dict[str, Any]) -> None:
    """Make room for fitted tensors, to be filled with the weights."""

    def room(key: str) -> torch.Tensor:
        value: torch.Tensor = _rebuild(described[key])
        return value

    if "importance" in described:
        router.set_importance(room("importance"))
    if "correction_down" in described:
        router.set_correction(Correction(room("correction_down"), room("correction_up")))


def _rebuild(described: Any) -> Any:
    if "shape" in described:
        dtype = getattr(torch, described["dtype"])
        if dtype.is_floating_point:
            generator = torch.Generator().manual_seed(0)
            return torch.randn(described["shape"], generator=generator).to(dtype)
        return torch.ones(described["shape"], dtype=dtype)
    if "value" in described:
        return described["value"]
    raise ValueError(
        f"the model was converted with an argument of type {described['unknown']}, which cannot be "
        f"rebuilt from the file; pass example_inputs= to load()"
    )


@neutral()
def load(folder: str | Path, dense_model: nn.Module, *, example_inputs: Any = None) -> nn.Module:
    """Read what `save` wrote.

    Args:
        folder: written by `save`.
        dense_model: of the architecture that was saved, dense; unchanged, its weights do not
            matter.
        example_inputs: only for models with arguments that JSON cannot describe.

    Returns:
        A new converted model, on the CPU or wherever `dense_model` is.

    Raises:
        FileNotFoundError: no such files.
        ValueError: another format, or `dense_model` does not fit.
    """
    path = Path(folder)
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{path} was not written by dgefx.save(): it has no {CONFIG_FILE}")
    content = json.loads((path / CONFIG_FILE).read_text())
    if content.get("format") not in _READABLE:
        raise ValueError(
            f"{path / CONFIG_FILE} has format {content.get('format')!r}, this dgefx reads "
            f"{_READABLE}"
        )
    dense = as_module(dense_model)
    check_model(dense)
    model = deep_copy(dense)
    for name, described in content.get("parts", {"": content}).items():
        try:
            part = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"dense_model does not fit {path}: {error}") from error
        _convert_again(part, described, example_inputs, path)
    try:
        missing, unexpected = load_model(model, str(path / WEIGHTS_FILE), strict=False)
    except RuntimeError as error:
        raise ValueError(f"dense_model does not fit {path}: {error}") from error
    if missing or unexpected:
        raise ValueError(
            f"dense_model does not fit {path}: missing keys {sorted(missing)}, unexpected keys "
            f"{sorted(unexpected)}"
        )
    return model


def _example(described: list[Any], model: nn.Module) -> Any:
    """Example inputs like those of a conversion."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def build(described: Any) -> Any:
        value = _rebuild(described)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    args, kwargs = described
    rebuilt = {k: build(v) for k, v in kwargs.items()}
    return rebuilt if rebuilt and not args else tuple(build(a) for a in args)


def _convert_again(
    model: nn.Module, content: dict[str, Any], example_inputs: Any, path: Path
) -> None:
    """Convert `model` itself as described, with room for the weights."""
    config, slots = DGEConfig.from_dict(content["config"]), content["slots"]
    inputs = _example(content["example"], model) if example_inputs is None else example_inputs
    analysis = analyse(model, inputs, config, lambda _module, name: name in slots)
    if set(analysis.plans) != set(slots):
        raise ValueError(
            f"dense_model does not fit {path}: blocks {sorted(set(slots) ^ set(analysis.plans))} "
            f"are converted in only one of the two"
        )
    chosen = {
        name: plan_of(plan.space(config), config, tuple(slots[name]))
        for name, plan in analysis.plans.items()
    }
    install_analysis(model, analysis, content["gamma"], chosen)
    record = conversion_record(model)
    record.calibration = _rebuild_calibration(content.get("calibration"), analysis)
    blocks = converted_blocks(model, record)
    for name, described in content.get("fitted", {}).items():
        _reserve(blocks[name].dge_router, described)
        train_corrections_like_block(blocks[name])
    apply_plans(model, record, chosen, content["gamma"])
