"""Types of a `DGEBlock` beside its own: for a block that is called in its own way, and mixins.

Made when a block is built, and when a library assigns a class to it. One type per class, as without
this library: torch.compile guards on types.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

#: by these names transformers tells a layer that it is to be checkpointed, and with what
SWITCH, FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


@functools.cache
def called_like(dense: type, block: type[nn.Module]) -> type[Any]:
    """`block`, or where `dense` is called in its own way a subclass that is called so too.

    It derives from the class that overrides `__call__`, so that `super()` in there works.
    """
    owners = [
        owner
        for owner in _own_classes(dense)
        if "__call__" in vars(owner) and owner.__module__.split(".")[0] != "torch"
    ]
    if not owners:
        return block
    codes = [getattr(vars(owner)["__call__"], "__code__", None) for owner in owners]
    heeds = any(code is not None and SWITCH in code.co_names for code in codes)
    return type(block.__name__, (block, owners[0]), {"_dge_call_heeds_switch": heeds})


def _own_classes(dense: type) -> tuple[type, ...]:
    """`dense` and what it derives from, up to `nn.Module`."""
    return dense.__mro__[: dense.__mro__.index(nn.Module)]


def plain_values(dense: type) -> dict[str, Any]:
    """What `dense` keeps for its instances as plain values: flags that parents ask for."""
    found: dict[str, Any] = {}
    for owner in reversed(_own_classes(dense)):
        found.update(vars(owner))
    kinds = (bool, int, float, str, type(None))
    return {k: v for k, v in found.items() if isinstance(v, kinds) and not k.startswith("__")}


def _own(assigned: type, answered: type) -> dict[str, Any]:
    """What `assigned` adds itself; not a `forward` that the base put around the dense one, as
    transformers does with every subclass of its layers."""
    own = {k: v for k, v in vars(assigned).items() if k not in ("__dict__", "__weakref__")}
    forward = own.pop("forward", None)
    if forward is not None and inspect.unwrap(forward) is not inspect.unwrap(answered.forward):  # type: ignore[attr-defined]
        raise TypeError(
            f"a converted block in the place of {answered.__name__} cannot be given the forward of "
            f"{assigned.__name__}, which is written for the dense block"
        )
    return own


@functools.cache
def mixed_type(assigned: type, answered: type, real: type) -> type:
    """`assigned` with `real` as its base in the place of `answered`.

    Raises:
        TypeError: `assigned` adds no mixin to `answered`, or overrides its forward.
    """
    if answered not in assigned.__bases__ or len(assigned.__bases__) < 2:
        raise TypeError(
            f"a converted block in the place of {answered.__name__} can only be given mixins "
            f"(as fully_shard does), a class with {answered.__name__} and others as bases; found "
            f"{assigned.__name__} with bases {[base.__name__ for base in assigned.__bases__]}"
        )
    bases = tuple(real if base is answered else base for base in assigned.__bases__)
    return type(assigned.__name__, bases, {**_own(assigned, answered), "_dge_class": assigned})
