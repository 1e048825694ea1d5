"""Which implementation an operator takes: chosen by the device of its tensors, nothing to set.

CUDA takes Triton, everything else the PyTorch reference, which Inductor fuses with what is around
it. Read by the wrappers in this package that the generated code calls.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

#: what the Triton kernels read and write; all sums are in float32
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


#: asked for once: Dynamo does not trace the question
_FOUND = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether Triton can be imported at all (it has no wheels for some systems)."""
    return _FOUND


def takes_triton(tensor: Tensor) -> bool:
    """Whether `tensor`, the largest of an operator's arguments, is one for the Triton kernels."""
    return tensor.is_cuda and tensor.dtype in TRITON_DTYPES and has_triton()
