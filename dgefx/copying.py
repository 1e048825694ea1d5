"""`deep_copy`: a model to work on, so that a failure leaves the user's as it was.

Used by `convert`, `revert`, `load` and for the working copy of `analysis`.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

#: what every module has, whatever its class
MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}


def deep_copy(model: nn.Module) -> nn.Module:
    """A copy. What a forward with gradients left in dictionaries, as the cached attention biases of
    LeViT, is copied without its gradient function.

    Raises:
        ValueError: it cannot be copied, and what to do.
    """
    try:
        copied = copy.deepcopy(model, _detached(model))
    except Exception as error:
        hint = _computed_tensor(model)
        raise ValueError(
            f"model cannot be deep-copied ({type(error).__name__}: {error}); convert() works on a "
            f"copy so that a failure leaves the model as it was{hint}"
        ) from error
    for name, module in copied.named_modules():
        training = model.get_submodule(name).training
        if module.training != training:  # copies of torchvision's feature extractors are trained
            module.train(training)
    return copied


def _is_computed(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_leaf


def _detached(model: nn.Module) -> dict[int, Any]:
    """id -> copy of the tensors in dictionaries that were computed with gradients, as `deepcopy`
    takes what is copied already."""
    return {
        id(value): value.detach().clone()
        for module in model.modules()
        for name, held in vars(module).items()
        if name not in MODULE_ATTRIBUTES and isinstance(held, dict)
        for value in held.values()
        if _is_computed(value)
    }


def _computed_tensor(model: nn.Module) -> str:
    """What to do about a tensor that was computed with gradients: a weight that a hook computes
    from others before every forward, or what a forward left behind."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not _is_computed(value):
                continue
            found = f". {name}.{key}".replace(" .", " ")
            if {f"{key}_orig", f"{key}_g"} & set(module._parameters):
                return (
                    f"{found} is computed from other parameters: make it one before, with "
                    f"torch.nn.utils.prune.remove(module, {key!r}) after pruning, "
                    f"torch.nn.utils.remove_weight_norm or remove_spectral_norm"
                )
            return f"{found} is left of a forward with gradients: set it to None before"
    return ""
