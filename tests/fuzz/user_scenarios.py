"""What is done with a converted model: modes, sizes, dtypes, later changes, threads, budgets."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dgefx
from tests.fuzz.user_errors import names_a_cause, told
from tests.fuzz.user_run import (
    Call,
    ToldDropout,
    Values,
    dtype_of,
    errors,
    forward,
    fresh,
    gathered,
    loss,
    set_mode,
)
from tests.fuzz.user_spec import Made
from tests.fuzz.user_trial import EXACT, Scenario, Verdict


def _later(made: Made, model: nn.Module) -> None:
    """The habits' changes after conversion, or a step of training where there are none."""
    if made.draft.code["later"]:
        made.module.later(model)
        return
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.blocks[0].requires_grad_(False)


def _cast(dtype: torch.dtype, model: nn.Module) -> None:
    model.to(dtype)


def scenarios(made: Made) -> list[Scenario]:
    spec, (usual, *others) = made.spec, made.draft.variants
    grid, turned = spec.grid, spec.grid[::-1]
    call = functools.partial(Call, grid, variant=usual)
    at = functools.partial(Call, variant=usual)
    other_calls = [Call(grid, 3, variant=variant) for variant in others]
    found = [
        Scenario("eval", [call(), call(kind="hot"), call(1), call(3), call(4, grad="none")]),
        Scenario("train", [call(training=True), call(3, training=True), call()]),
        Scenario("size", [at((9, 10)), at(turned, training=True), call(3)]),
        Scenario(
            "later", [call(), call(3, training=True), call()], functools.partial(_later, made)
        ),
        Scenario("inference", [call(grad="inference"), call(3, kind="hot", grad="none")]),
    ]
    if others:
        found.append(Scenario("arguments", other_calls))
    if made.draft.code["mode"] or made.draft.code["later"]:
        # with hooks and changes in place the other calls count as well
        change = functools.partial(_later, made)
        found.append(Scenario("later size", [at((9, 10), 1), call(kind="hot")], change))
    if spec.dtype == "float32":
        cast = functools.partial(_cast, getattr(torch, spec.cast))
        found.append(Scenario("cast", [call(), call(3, kind="hot"), call(3, training=True)], cast))
        found.append(
            Scenario("autocast", [call(autocast=True), call(3, autocast=True, training=True)])
        )
    return found


def _alone(made: Made, model: nn.Module, call: Call) -> Values:
    """Output and gradient of the images, leaving those of parameters alone."""
    x, output = forward(made, model, call)
    total, slope = loss(output), None
    if total.requires_grad:
        slope = torch.autograd.grad(total, x, allow_unused=True)[0]
    return {"output": output[0].detach(), "gradient of images": slope}


def _two_threads(made: Made, model: nn.Module, first: Call, second: Call) -> list[Values]:
    """Both calls at once: the first waits before its blocks until the second is done."""
    set_mode(made, model, False)
    reached, done = threading.Event(), threading.Event()
    values: dict[str, Values] = {}
    failures: list[BaseException] = []

    def wait(_module: nn.Module, _args: Any) -> None:
        if threading.current_thread().name == "first" and not reached.is_set():
            reached.set()
            done.wait(20)

    def work(name: str, call: Call) -> None:
        try:
            with torch.random.fork_rng():
                values[name] = _alone(made, model, call)
        except BaseException as error:
            failures.append(error)
        finally:
            (reached if name == "first" else done).set()

    handle = model.blocks[0].register_forward_pre_hook(wait)
    threads = [
        threading.Thread(target=work, args=pair, name=pair[0])
        for pair in (("first", first), ("second", second))
    ]
    threads[0].start()
    reached.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join(40)
    handle.remove()
    if failures:
        raise failures[0]
    return [values["first"], values["second"]]


def _one_by_one(made: Made, model: nn.Module, first: Call, second: Call) -> list[Values]:
    set_mode(made, model, False)
    return [_alone(made, model, call) for call in (first, second)]


def _interleaved(made: Made, model: nn.Module, first: Call, second: Call) -> list[Values]:
    """Both forward passes before both backward passes, which may run blocks again."""
    set_mode(made, model, True)
    model.zero_grad(set_to_none=True)
    with ToldDropout():
        one, two = forward(made, model, first), forward(made, model, second)
        (loss(one[1]) + 2 * loss(two[1])).backward()
    found = gathered(model, *one)
    return [{k: v for k, v in found.items() if not k.startswith("state")}, {"grad": two[0].grad}]


Play = Callable[[Made, nn.Module, Call, Call], list[Values]]


def _same(
    made: Made, name: str, wanted: tuple[Play, nn.Module], found: tuple[Play, nn.Module]
) -> Verdict:
    """Two ways to run two sizes give the same."""
    spec, usual = made.spec, made.draft.variants[0]
    other = spec.grid[::-1] if spec.grid[0] != spec.grid[1] else (10, 6)
    calls = (Call(spec.grid, variant=usual), Call(other, 3, variant=usual))
    try:
        right = wanted[0](made, fresh(wanted[1]), *calls)
    except Exception as error:
        if "budget" in name and not names_a_cause(error):
            return Verdict("wrong", f"{name}: crashes with {told(error)}")
        return EXACT
    try:
        values = found[0](made, fresh(found[1]), *calls)
    except Exception as error:
        if names_a_cause(error):
            return Verdict("raised", f"{name}: {error}")
        return Verdict("wrong", f"{name}: crashes with {told(error)}")
    # no rounding is measured here: a grid of another call is off by more than that
    floor = max(5e-5, 8 * torch.finfo(dtype_of(wanted[1])).eps)
    for index, (a, b) in enumerate(zip(values, right, strict=True)):
        off = {k: e for k, e in errors(a, b).items() if not e <= floor}
        if off:
            worst = max(off, key=lambda k: off[k])
            return Verdict("wrong", f"{name}: call {index + 1}, {worst} off by {off[worst]:.1e}")
    return EXACT


def _coarse(made: Made, converted: nn.Module) -> tuple[nn.Module | None, Verdict]:
    """At gamma 0.6, or the floor: finite in both modes, forward and backward."""
    coarse = fresh(converted)
    try:
        floor = dgefx.report(coarse).floor
        dgefx.set_budget(coarse, min(1.0, max(0.6, floor + 1e-6)))
        tensors: list[Tensor] = []
        for training in (False, True):
            set_mode(made, coarse, training)
            for grid in (made.spec.grid, made.spec.grid[::-1]):
                call = Call(grid, 3, variant=made.draft.variants[0])
                x, output = forward(made, coarse, call)
                total = loss(output)
                tensors += [total.detach()]
                if total.requires_grad:
                    total.backward()
                    tensors += [x.grad] if x.grad is not None else []
    except Exception as error:
        if names_a_cause(error):
            return None, Verdict("raised", f"budget: {error}")
        return None, Verdict("wrong", f"budget: crashes with {told(error)}")
    if not all(bool(t.isfinite().all()) for t in tensors):
        return coarse, Verdict("wrong", "budget: not finite")
    return coarse, EXACT


def extra_checks(made: Made, dense: nn.Module, converted: nn.Module) -> dict[str, Verdict]:
    """What is no row of calls: budgets, threads, two passes at once."""
    coarse, verdict = _coarse(made, converted)
    found = {"budget": verdict}
    if verdict.kind == "wrong":  # as the dense model does, where it does
        try:
            for training in (False, True):
                set_mode(made, again := fresh(dense), training)
                for grid in (made.spec.grid, made.spec.grid[::-1]):
                    loss(forward(made, again, Call(grid, 3, variant=made.draft.variants[0]))[1])
        except Exception:
            found["budget"] = EXACT
    if made.draft.shares_calls or made.draft.keeps_state:
        return found
    threads, serial, both = _two_threads, _one_by_one, _interleaved
    found["interleaved"] = _same(made, "interleaved", (both, dense), (both, converted))
    if "python_random" in made.spec.habits or "torch_random" in made.spec.habits:
        return found  # threads share the state of random numbers
    found["threads"] = _same(made, "threads", (serial, dense), (threads, converted))
    if coarse is not None:
        name = "threads at a budget"
        found[name] = _same(made, name, (serial, coarse), (threads, coarse))
    return found
