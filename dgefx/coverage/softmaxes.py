"""Where a model takes softmaxes, by torch's dispatcher: independent of the passes' own search.

Used by `measure` to find attention that the passes did not see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = [""]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "softmax" in name or "scaled_dot_product" in name or "multi_head_attention" in name:
            self.found.append(self.stack[-1])
        return func(*args, **(kwargs or {}))


def softmax_modules(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[str]:
    """The innermost module of every softmax (also those in fused attention) while `run` runs."""
    watch = _Watch()
    handles = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(lambda _m, _a, name=name: watch.stack.append(name))
        )
        handles.append(
            module.register_forward_hook(lambda _m, _a, _o: _pop(watch.stack), always_call=True)
        )
    try:
        with torch.no_grad(), watch:
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return watch.found


def _pop(stack: list[str]) -> None:
    stack.pop()


def unseen(modules: list[str], blocks: list[str]) -> list[str]:
    """Those of `modules` (of `softmax_modules`) that no reported block holds, each once."""
    found = []
    for module in modules:
        inside = any(module == b or module.startswith(f"{b}.") or not b for b in blocks)
        around = bool(module) and any(b.startswith(f"{module}.") for b in blocks)
        if not inside and not around and module not in found:
            found.append(module)
    return found
