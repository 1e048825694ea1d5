"""The whole model with its blocks converted, against the dense model's output.

Once per conversion, with the real parameters, at the finest granularity, on the example input.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dgefx.config import DGEConfig
from dgefx.nn.block import DGEBlock
from dgefx.nn.module_tree import put
from dgefx.outputs import Call, relative_error
from dgefx.passes.frontends.inputs import run_example
from dgefx.passes.locate.grid_source import GridSource
from dgefx.passes.plan.compare import TOLERANCE
from dgefx.passes.plan.install import install
from dgefx.passes.plan.plan import BlockPlan
from dgefx.precision import in_float64


def install_and_verify(
    work: nn.Module,
    plans: Mapping[str, BlockPlan],
    sources: Mapping[str, GridSource],
    call: Call,
    output: Any,
    config: DGEConfig,
) -> None:
    """Convert the blocks of the working copy and compare it.

    Args:
        sources: see `install`. output: the dense model's.

    Raises:
        ValueError: it fails, does not run the blocks, or yields something else.
    """
    install(work, plans, sources, None, config)
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


def _require_equal_in_float64(
    work: nn.Module, plans: Mapping[str, BlockPlan], call: Call, difference: float
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
