"""Replacing modules in the tree of a model."""

from __future__ import annotations

from torch import nn


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule `name` of `model`, under every name that it has."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, found in parent._modules.items():
            if found is old:
                parent._modules[child] = module
