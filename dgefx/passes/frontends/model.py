"""What `convert` and `explain` take for a model, and the copy of it that the passes work on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from dgefx.ambient import working_dtype
from dgefx.copying import deep_copy
from dgefx.nn.block import DGEBlock
from dgefx.passes.frontends.exported import is_exported_module
from dgefx.precision import in_type

#: what is passed for a model by mistake, and what to pass
_INSTEAD = (
    (
        (str, Path),
        "a path holds no architecture: build the model, load its weights into it and pass that; "
        "dgefx.load(folder, dense_model) reads what dgefx.save wrote",
    ),
    (
        Mapping,
        "if it is a state_dict, build the model, call model.load_state_dict(...) and pass the "
        "model; if the model is among its values, pass that one",
    ),
    ((tuple, list), "pass one model; what timm and others return beside it is not needed"),
    (type, "that is a class: pass an instance of it"),
    (Tensor, "pass the model first and the tensor as example_inputs="),
    (fx.Graph, "pass torch.fx.GraphModule(root, graph)"),
)


def check_model(model: Any) -> None:
    """Raise TypeError or ValueError where `model` cannot be converted at all."""
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise TypeError(
            f"model is a ScriptModule ({type(model).__name__}), which cannot be rewritten; convert "
            f"the nn.Module that it was made from"
        )
    if not isinstance(model, nn.Module):
        hints = [hint for kinds, hint in _INSTEAD if isinstance(model, kinds)]
        hint = hints[0] if hints else "an exported program and an fx.GraphModule are taken too"
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}: {hint}")
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model is wrapped by torch.compile; convert the model itself, then compile the result: "
            "torch.compile(dgefx.convert(model._orig_mod, ...))"
        )
    if any(isinstance(module, DGEBlock) for module in model.modules()):
        raise ValueError(
            "model is already converted; use dgefx.revert(model) first, then convert() with the "
            "new gamma"
        )
    for name, module in model.named_modules():
        if name and is_exported_module(module):
            raise ValueError(
                f"submodule {name} is the module of an exported program, which refuses eval(); "
                f"convert it alone, as dgefx.convert(model.{name}), and put the result in its place"
            )


def working_copy(model: nn.Module) -> nn.Module:
    """A copy in `working_dtype` and eval mode, without gradients. Hooks stay, as parts of it."""
    return in_type(deep_copy(model), working_dtype()).eval().requires_grad_(False)
