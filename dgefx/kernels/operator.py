"""`operator`: registers a function as an operator of this library.

Where Triton is installed that is `torch.library.triton_op`: a compiler traces through the
function, and so sees the kernel on CUDA and the plain PyTorch reference elsewhere. Without Triton
`triton_op` warns at every registration, and there is no kernel to see: an opaque operator then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch.library import CustomOpDef

from dgefx.kernels.dispatch import has_triton


def operator(name: str) -> Callable[[Callable[..., object]], CustomOpDef]:
    """Decorator for a function of tensors that picks its own implementation, mutates nothing and
    returns fresh tensors; traced with fake tensors it says the shapes of the results.

    Args:
        name: "dgefx::" and the operator's name.
    """

    def register(function: Callable[..., object]) -> CustomOpDef:
        if has_triton():
            visible = torch.library.triton_op(name, function, mutates_args=())
            return cast(CustomOpDef, visible)
        opaque = torch.library.custom_op(name, function, mutates_args=())
        opaque.register_fake(function)
        return opaque

    return register
