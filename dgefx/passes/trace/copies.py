"""Copies of a block to trace and try things on. Used by `passes.trace` and `passes.plan`."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict, deque
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.copying import MODULE_ATTRIBUTES
from dgefx.nn.callspec import CallSpec
from dgefx.passes.trace.tensor_versions import tensors_of

#: marks modules of a traced copy that had hooks: they must be called, not bypassed
HOOKED = "_dgefx_hooked"


def copy_block(block: nn.Module, shares_parameters: bool = False) -> nn.Module:
    """A copy of a block, which shares its hooks: they may belong to all of the model.

    Args:
        shares_parameters: for what runs beside the block, and leaves its parameters as they are.
    """
    hooks = (hook for *_, hook in _user_hooks(block))
    kept = itertools.chain(hooks, block.parameters() if shares_parameters else ())
    return copy.deepcopy(block, {id(value): value for value in kept} | _empty_copies(block))


def _empty_copies(block: nn.Module) -> dict[int, Any]:
    """id -> copy of the empty dictionaries in attributes of modules, some twelve in every module,
    on which `deepcopy` would spend most of its time."""
    return {
        id(value): type(value)()
        for module in block.modules()
        for value in vars(module).values()
        if type(value) in (dict, OrderedDict) and not value
    }


def shadow(block: nn.Module) -> nn.Module:
    """A copy without the user's forward hooks, so that user code never sees a proxy.

    Those of torch itself (weight norm, spectral norm) compute parameters and stay.
    """
    root = copy_block(block)
    for module in root.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            setattr(module, HOOKED, True)
    for hooks, key, _ in _user_hooks(root):
        del hooks[key]
    return root


def _user_hooks(block: nn.Module) -> list[tuple[dict[int, Any], int, Any]]:
    """(where it is kept, its key there, the hook)"""
    return [
        (hooks, key, hook)
        for module in block.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for key, hook in hooks.items()
        if not str(getattr(hook, "__module__", type(hook).__module__)).startswith("torch.")
    ]


def containers(root: nn.Module) -> dict[str, Any]:
    """Lists, dictionaries and sets that modules keep, by the names of the attributes."""
    return {
        f"{part}.{name}" if part else name: value
        for part, module in root.named_modules()
        for name, value in vars(module).items()
        if name not in MODULE_ATTRIBUTES and isinstance(value, (list, dict, set, deque))
    }


def _tensor_dicts(root: nn.Module) -> list[dict[Any, Any]]:
    """Dictionaries of tensors that modules keep besides parameters and buffers."""
    return [
        held
        for held in containers(root).values()
        if isinstance(held, dict)
        and held
        and all(isinstance(v, Tensor) and not isinstance(v, nn.Parameter) for v in held.values())
    ]


def empty_caches(root: nn.Module, block: nn.Module, spec: CallSpec) -> None:
    """Empty the dictionaries of tensors of `root`, a copy, where `block` gives the same without
    what they hold: reading caches would fix what is a function of parameters."""
    caches = _tensor_dicts(root)
    if not caches:
        return
    outputs = []
    for forget in (False, True):
        probe = shadow(block).eval()
        for held in _tensor_dicts(probe) if forget else []:
            held.clear()
        try:
            outputs.append(tensors_of(_run_copied(probe, spec)))
        except Exception:  # whatever misses them
            return
    if all(torch.allclose(a, b, equal_nan=True) for a, b in zip(*outputs, strict=True)):
        for held in caches:
            held.clear()


def _run_copied(probe: nn.Module, spec: CallSpec) -> Any:
    """Runs on a copy of the example, which the block may change."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    return probe(**pytree.tree_map(copied, spec.example))
