"""One model, measured: what converts, whether it is exact, compiles, and meets its budget.

Runs in a process of its own, see `worker`; the tests call it directly.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dgefx
from dgefx.coverage.cases import Case
from dgefx.coverage.softmaxes import softmax_modules, unseen
from dgefx.coverage.verdict import rightly_refused
from dgefx.outputs import clone_call
from dgefx.passes.frontends.inputs import given_call
from dgefx.precision import in_float64
from dgefx.report import BlockReport, Report

GAMMA = 0.5
TOLERANCE = 1e-5


@dataclass
class Block:
    """One attention block. verdict: "converted", "refused" (rightly) or "left" (counts against the
    library). what: the attention that was rightly refused. reason: the library's."""

    name: str
    verdict: str
    what: str = ""
    reason: str = ""


@dataclass
class Result:
    """What was found about one model; None where it was not measured.

    status: "converted" (some block), "refused" (none), "no attention" (none found, and none is
    there), "unseen" (none found, although the model takes softmaxes), "error" (see `error`),
    "timeout" or "crash". parameters: count. unseen: modules that take a softmax and that no block
    of the report holds. exact: relative error of the whole model at the finest granularity on
    images that it was not converted with. moved: how much coarse queries (at `gamma`) move that
    output; if that were nothing, `exact` would say nothing. ratio: MACs over the dense model's, by
    the report; counted: the same by torch's counter, here. gamma: asked for, the floor where that
    is over 0.5. compiled: whether Dynamo takes it as one graph, with compile_error else;
    compile_difference: relative, between compiled and eager model. seconds: of one convert call.
    peak: GiB of the whole process.
    """

    name: str
    family: str
    note: str = ""
    over_grid: bool = True
    status: str = "error"
    error: str = ""
    parameters: int | None = None
    blocks: list[Block] = field(default_factory=list)
    softmaxes: int | None = None
    unseen: list[str] = field(default_factory=list)
    exact: float | None = None
    moved: float | None = None
    gamma: float | None = None
    floor: float | None = None
    ratio: float | None = None
    counted: float | None = None
    compiled: bool | None = None
    compile_error: str = ""
    compile_difference: float | None = None
    seconds: float | None = None
    peak: float | None = None

    def count(self, verdict: str) -> int:
        """Blocks with a verdict; what the passes did not see counts as "left"."""
        more = len(self.unseen) if verdict == "left" and self.over_grid else 0
        return sum(block.verdict == verdict for block in self.blocks) + more

    @property
    def wrong(self) -> bool:
        """Whether a conversion was handed out that does not equal the dense model."""
        return self.exact is not None and not self.exact <= TOLERANCE


def randomise(model: nn.Module) -> nn.Module:
    """Weights with which an error in any part of a block shows in the output. In place.

    Linear layers keep the size of what they are given (initial weights of std 0.02 make attention
    uniform in narrow models), and constant parameters (layer scale, biases, tables) get random
    values.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight.numel():
                module.weight.normal_(std=module.in_features**-0.5, generator=generator)
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            if parameter.max() - parameter.min() < 1e-6:
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return model


def difference(found: Any, wanted: Any) -> float:
    """Largest relative error (2-norm, float64) over the tensors of two outputs.

    Infinite where they differ in number, shape or type, or are not finite.
    """
    a, b = _tensors(found), _tensors(wanted)
    if len(a) != len(b) or not a:
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return math.inf
        x, y = x.double(), y.double()
        error = float((x - y).norm() / y.norm().clamp_min(1e-30))
        if not math.isfinite(error):
            return math.inf
        worst = max(worst, error)
    return worst


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, dict):  # Hugging Face's outputs are not all known to pytree
        output = dict(output)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@torch.no_grad()
def run(model: Callable[..., Any], example: Any) -> Any:
    """The output for example inputs; what is drawn at random is the same every time."""
    args, kwargs = clone_call(given_call(example))
    torch.manual_seed(0)
    return model(*args, **kwargs)


def prepare(case: Case) -> nn.Module:
    """The case's model with random parameters, in eval mode."""
    torch.manual_seed(0)
    return randomise(case.build()).eval()


def measure(case: Case, backend: str = "eager") -> Result:
    """Everything about one model.

    Args:
        backend: of `torch.compile`; "eager" shows that Dynamo sees one graph.

    Raises:
        whatever building the model raises; failures of the library are in the result.
    """
    result = Result(case.name, case.family, case.note, case.over_grid)
    model = prepare(case)
    result.parameters = sum(parameter.numel() for parameter in model.parameters())
    example, other = case.inputs(model, 0), case.inputs(model, 1)
    softmaxes = softmax_modules(model, lambda m: run(m, example))
    result.softmaxes = len(softmaxes)
    finest: nn.Module | None = None
    try:
        try:
            finest = dgefx.convert(model, 1.0, example_inputs=example)
            report = dgefx.report(finest)
        except ValueError as error:
            if "no attention block could be converted" not in str(error):
                raise
            report = dgefx.explain(model, 1.0, example_inputs=example)
    except Exception as error:  # models are anybody's code: whatever happens is the result
        if "no attention blocks found in" in str(error):
            result.unseen = _counted(case, softmaxes, [])
            result.status = "unseen" if result.unseen and case.over_grid else "no attention"
        else:
            result.error = first_line(error)
        return result
    result.blocks = [_judged(case, block) for block in report.blocks]
    result.unseen = _counted(case, softmaxes, [block.name for block in report.blocks])
    result.status = "refused" if finest is None else "converted"
    if finest is not None:
        try:
            result.exact = difference(run(finest, other), run(model, other))
            if not result.exact <= TOLERANCE:
                _compare_in_float64(result, finest, model, other)
            _at_budget(result, model, report, example, other, backend)
        except Exception as error:
            result.status, result.error = "error", first_line(error)
    return result


def _compare_in_float64(result: Result, finest: nn.Module, model: nn.Module, other: Any) -> None:
    """Replace `exact` where the dense model's own rounding in float32 is as large."""
    wide = in_float64(other)
    dense = run(copy.deepcopy(model).double(), wide)
    own = difference(in_float64(run(model, other)), dense)
    if result.exact is not None and own >= result.exact / 3:
        result.note = f"{result.note} float64 (float32 rounds by {own:.0e})".strip()
        result.exact = difference(run(copy.deepcopy(finest).double(), wide), dense)


def _judged(case: Case, block: BlockReport) -> Block:
    if not block.reason:
        return Block(block.name, "converted")
    what = case.beside(block.name) or rightly_refused(block.kind)
    verdict = "left" if what is None else "refused"
    return Block(block.name, verdict, what or "", block.reason)


def _counted(case: Case, softmaxes: list[str], blocks: list[str]) -> list[str]:
    return [name for name in unseen(softmaxes, blocks) if case.beside(name) is None]


def reachable(floor: float) -> float:
    """The budget to ask for: 0.5, or the floor where that is higher, rounded up to two digits (to
    four, where two would leave nothing to save)."""
    if floor <= GAMMA:
        return GAMMA
    rounded = math.ceil(floor * 100) / 100
    return rounded if rounded < 1 else min(1.0, math.ceil(floor * 10000) / 10000)


def _at_budget(
    result: Result, model: nn.Module, report: Report, example: Any, other: Any, backend: str
) -> None:
    result.floor, result.gamma = report.floor, reachable(report.floor)
    start = time.perf_counter()
    half = dgefx.convert(model, result.gamma, example_inputs=example)
    result.seconds = time.perf_counter() - start
    result.ratio = dgefx.report(half).ratio
    result.moved = difference(run(half, other), run(model, other))
    result.counted = _flops(half, example) / _flops(model, example)
    result.compiled, result.compile_error, result.compile_difference = _compile(
        half, other, backend
    )
    if not result.compiled and not _compile(model, other, backend)[0]:
        result.compile_error = f"nor is the dense model: {result.compile_error}"


def _flops(model: nn.Module, example: Any) -> int:
    # the counter fails where a view of a parameter that requires gradients enters a module (CaiT)
    model = copy.deepcopy(model).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        run(model, example)
    return counter.get_total_flops()


def _compile(model: nn.Module, example: Any, backend: str) -> tuple[bool, str, float | None]:
    """(whether it is one graph, first line of the error, difference from the eager model)."""
    torch._dynamo.reset()
    wanted = run(model, example)
    try:
        found = run(torch.compile(model, fullgraph=True, backend=backend), example)
    except Exception as error:
        return False, first_line(error), None
    finally:
        torch._dynamo.reset()
    return True, "", difference(found, wanted)


def first_line(error: BaseException) -> str:
    """Type and first line of an error (and Dynamo's explanation), shortened to fit a table."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    said = [*lines[:1], *(line for line in lines[1:] if line.startswith("Explanation: "))]
    text = f"{type(error).__name__}: {'. '.join(said)}"
    return text if len(text) <= 300 else text[:297] + "..."


def time_convert(case: Case) -> Result:
    """Only how long `convert` takes at gamma 0.5, or at the floor."""
    result = Result(case.name, case.family, case.note, case.over_grid)
    model = prepare(case)
    result.parameters = sum(parameter.numel() for parameter in model.parameters())
    example = case.inputs(model, 0)
    try:
        result.gamma = GAMMA
        start = time.perf_counter()
        try:
            converted = dgefx.convert(model, result.gamma, example_inputs=example)
        except ValueError as error:
            if "floor" not in str(error):
                raise
            floor = dgefx.explain(model, 1.0, example_inputs=example).floor
            result.gamma = reachable(floor)
            start = time.perf_counter()
            converted = dgefx.convert(model, result.gamma, example_inputs=example)
        result.seconds = time.perf_counter() - start
        report = dgefx.report(converted)
    except Exception as error:
        result.error = first_line(error)
        return result
    result.status, result.ratio, result.floor = "converted", report.ratio, report.floor
    result.blocks = [_judged(case, block) for block in report.blocks]
    return result
