"""Converts a random transformer and judges the result: converted and right, or refused and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dgefx
from tests.fuzz.block import Block
from tests.fuzz.model import Model, build
from tests.fuzz.parts import from_tokens, to_tokens
from tests.fuzz.reference import has_reference, mixed, random_cells
from tests.fuzz.spec import NEVER, Spec
from tests.helpers import images

#: relative 2-norm error of the model's outputs, float32, at the finest granularity
EXACT = 1e-5
#: of a block's update at mixed granularities against `tests.fuzz.reference`, float32
MIXED = 2e-5
_RAISED = re.compile(r"^\w*(Error|Exception|Interrupt|StopIteration)\b")


class Wrong(AssertionError):
    """The library's result for a spec is wrong, or its refusal says nothing."""


@dataclass(frozen=True)
class Outcome:
    """converted: names of converted blocks. reasons: of attention blocks that stay dense.
    mixed: blocks compared with `tests.fuzz.reference`."""

    converted: tuple[str, ...]
    reasons: tuple[str, ...]
    mixed: int = 0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise Wrong(message)


def _worst(found: Any, wanted: Any) -> float:
    a, b = pytree.tree_leaves(found), pytree.tree_leaves(wanted)
    _require([t.shape for t in a] == [t.shape for t in b], "outputs have other shapes")
    return max(
        float((x.double() - y.double()).norm() / y.double().norm())
        for x, y in zip(a, b, strict=True)
    )


def _finite(output: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in pytree.tree_leaves(output))


def _macs(model: nn.Module, x: Tensor) -> int:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return counter.get_total_flops()


def _side(spec: Spec) -> tuple[int, int]:
    return spec.grid[0] * spec.patch, spec.grid[1] * spec.patch


def _has_one_key(spec: Spec) -> bool:
    """Whether keys are reduced to a single one, whose axis cannot be told from any other of 1."""
    height, width = spec.grid
    if spec.stage != "none":
        height, width = (height + 1) // 2, (width + 1) // 2
    return spec.block.attention.reduction == "conv" and max(height, width) < 4


def _projects_twice(spec: Spec) -> bool:
    """Whether queries need more than their own projection. Then the finest granularity costs more
    than the dense block: a convolution that makes queries, keys and values is not cut into rows,
    nor is a linear layer whose rows go head by head; values that are read beside the attention too
    are made of queries as well."""
    attention = spec.block.attention
    by_head = attention.projection == "fused_heads" and attention.heads > 1
    whole = by_head or attention.projection == "convolution"
    return attention.kind == "plain" and (attention.lepe or whole)


def _judge_reasons(reasons: list[str]) -> None:
    for reason in reasons:
        _require(bool(reason.strip()), "a block stays dense without a reason")
        _require(not _RAISED.match(reason), f"a bare exception is the reason: {reason}")
        _require("Please report" not in reason, f"the library calls it a bug: {reason}")


def _refused(error: ValueError, spec: Spec) -> Outcome:
    lines = str(error).splitlines()
    if lines[0].startswith("no attention blocks found"):
        linear = spec.block.attention.kind == "linear"
        _require(linear or _has_one_key(spec), f"no attention was seen: {lines[0]}")
        return Outcome((), ("no attention blocks found",))
    _require(lines[0].startswith("no attention block could be converted"), f"raised {error}")
    reasons = [line.strip().split(": ", 1)[-1] for line in lines[1:] if line.startswith("  ")]
    _require(bool(reasons), f"no block is named: {error}")
    _judge_reasons(reasons)
    return Outcome((), tuple(reasons))


@torch.no_grad()
def check(spec: Spec) -> Outcome:
    """Build, convert, compare.

    Raises:
        Wrong: with what is wrong. Anything else that is raised is a fault as well.
    """
    dense = build(spec)
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    x = images(2, _side(spec), seed=spec.seed)
    try:
        converted = dgefx.convert(dense, 1.0, example_inputs=x)
    except ValueError as error:
        return _refused(error, spec)
    finally:
        for name, value in dense.state_dict().items():
            _require(torch.equal(value, state[name]), f"convert changed {name} of the dense model")
    report = dgefx.report(converted)
    reasons = [b.reason for b in report.blocks if b.status == "dense"]
    _judge_reasons(reasons)
    names = tuple(b.name for b in report.converted)
    kind = spec.block.attention.kind
    _require(kind not in NEVER, f"{kind} attention was converted: {names}")
    # tokens that pad windows cost the dense model more
    if spec.block.window is None and not _projects_twice(spec):
        full = _macs(converted, x.clone()) / _macs(dense, x.clone())
        _require(full <= 1.01, f"ratio {full:.3f} at gamma 1")
    for count in (3, 1):
        other = images(count, _side(spec), seed=spec.seed + count)
        error = _worst(converted(other.clone()), dense(other.clone()))
        _require(error <= EXACT, f"{count} images at gamma 1: differs by {error:.1e}")
    compared = _check_blocks(spec, dense, converted, names) if has_reference(spec) else 0
    _check_budget(spec, dense, report.floor, x)
    return Outcome(names, tuple(reasons), compared)


def _train(model: nn.Module, x: Tensor) -> tuple[Any, list[Tensor]]:
    """(output, gradients) of one step in train mode."""
    with torch.enable_grad():
        output = model.train()(x.clone())
        sum(t.float().pow(2).mean() for t in pytree.tree_leaves(output)).backward()
    return output, [p.grad for p in model.parameters() if p.grad is not None]


def _check_budget(spec: Spec, dense: Model, floor: float, x: Tensor) -> None:
    gamma = min(1.0, max(floor + 1e-6, 0.6))
    converted = dgefx.convert(dense, gamma, example_inputs=x)
    ratio = _macs(converted, x.clone()) / _macs(dense, x.clone())
    _require(ratio <= gamma + 0.01, f"ratio {ratio:.4f} at gamma {gamma:.4f}")
    other = images(3, _side(spec), seed=spec.seed + 7)
    found, wanted = converted(other.clone()), dense(other.clone())
    _require(_finite(found), f"not finite at gamma {gamma:.3f}")
    shapes = [[t.shape for t in pytree.tree_leaves(o)] for o in (found, wanted)]
    _require(shapes[0] == shapes[1], f"other shapes at gamma {gamma:.3f}")
    alone = converted(other[1:2].clone())
    beside = pytree.tree_map(lambda t: t[1:2], found)
    _require(_worst(alone, beside) <= EXACT, "an image's result depends on its batch mates")
    try:
        _train(build(spec), other)
    except RuntimeError:  # writes into what its own backward pass needs
        return
    output, gradients = _train(converted, other)
    _require(_finite(output), "not finite in train mode")
    _require(_finite(gradients), "gradients are not finite in train mode")


def _check_blocks(spec: Spec, dense: Model, converted: nn.Module, names: tuple[str, ...]) -> int:
    """Every block converted as a whole, at random levels on a random stream."""
    generator = torch.Generator().manual_seed(spec.seed)
    compared = 0
    for name in names:
        block, other = dense.get_submodule(name), converted.get_submodule(name)
        if not isinstance(block, Block):
            continue  # a part of it was converted alone
        calls: list[Any] = []
        handle = block.register_forward_pre_hook(
            lambda _m, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True
        )
        dense(images(2, _side(spec)))
        handle.remove()
        (args, kwargs) = calls[0]
        height, width = block.grid
        count = spec.prefix + height * width
        tokens = torch.randn(2, count, 16, generator=generator)
        stream = from_tokens(tokens, spec.layout, height, width).contiguous()
        cells = [random_cells(block.grid, generator) for _ in range(2)]
        levels = torch.stack([c.flatten() for c in cells])
        handle = other.dge_router.register_forward_hook(
            lambda router, inputs, _o, levels=levels: router.routing_for(
                inputs[0], levels, inputs[1]
            )
        )
        found = other(stream.clone(), *args[1:], **kwargs)
        handle.remove()
        found = to_tokens(found[0] if isinstance(found, tuple) else found, spec.layout)
        wanted = mixed(block, kwargs.get("outside"), tokens, cells)
        error = float((found - wanted).norm() / (wanted - tokens).norm())
        _require(error <= MIXED, f"{name} at mixed granularities differs by {error:.1e}")
        compared += 1
    return compared
