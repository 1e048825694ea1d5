"""Converts a user's model as its spec says, and looks whether that changed the model itself."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import nn

from tests.fuzz.user_errors import blunt, is_the_librarys, names_a_cause, told
from tests.fuzz.user_run import state
from tests.fuzz.user_spec import Made


def _everything(model: nn.Module) -> dict[str, object]:
    """What `convert` must leave as it is."""
    found: dict[str, object] = dict(state(model))
    for name, parameter in model.named_parameters():
        found[f"{name} itself"] = parameter.detach().clone()
        found[f"{name} kept"] = id(parameter)
        found[f"{name} learns"] = parameter.requires_grad
        found[f"{name} grad"] = parameter.grad is None
    for name, module in model.named_modules():
        found[f"{name} is"] = (id(module), type(module).__name__, module.training)
        found[f"{name} hooks"] = str(
            [len(v) for k, v in sorted(vars(module).items()) if k.endswith("_hooks")]
        )
        found[f"{name} attributes"] = str(sorted(vars(module)))
    return found


def _changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    def same(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return torch.equal(a, b)
        return type(a) is type(b) and a == b

    names = {**before, **after}
    return [n for n in names if n not in before or n not in after or not same(before[n], after[n])]


def _around(ambient: str) -> contextlib.AbstractContextManager[object]:
    if ambient == "autocast":
        return torch.autocast("cpu", dtype=torch.bfloat16)
    if ambient == "inference":
        return torch.inference_mode()
    return torch.no_grad() if ambient == "no_grad" else contextlib.nullcontext()


def converted_as(
    made: Made, convert: Callable[..., nn.Module], example: dict[str, object]
) -> tuple[nn.Module | None, str, str]:
    """(converted model, kind of what is said otherwise, and its words): refused, blunt, wrong."""
    spec = made.spec
    given = copy.deepcopy(made.model) if spec.inplace else made.model
    before = _everything(given)
    converted, kind, what = None, "exact", ""
    try:
        with _around(spec.ambient):
            arguments = {"inplace": True} if spec.inplace else {}
            converted = convert(given, 1.0, example_inputs=example, **arguments)
    except Exception as error:
        bare = blunt(error)
        if bare is not None and is_the_librarys(error):
            reasons = [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
            kind, what = "blunt", f"convert: {bare[:80]} {'; '.join(reasons[:1])}"
        elif names_a_cause(error):
            kind, what = "refused", str(error)
        else:
            kind, what = "wrong", f"convert: crashes with {told(error)}"
    rewritten = converted is not None and spec.inplace
    changes = [] if rewritten else _changes(before, _everything(given))
    if changes:
        return None, "wrong", f"convert changes the user's model: {changes[:3]}"
    return converted, kind, what
