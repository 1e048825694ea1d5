"""One timed call of `models.py`, in every mode, and when two modes agree."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import _common as common

EAGER, COMPILED, GRAPHS = "eager", "compiled", "graphs"
MODES = (EAGER, COMPILED, GRAPHS)


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference of compiled and eager output that rounding explains.

    In float32 sums are merely reordered. In half precision a compiler leaves out roundings between
    the operations that it fuses: they add up like a random walk, so 16 half units in the last place
    cover 256 of them, more than any model here has one after the other.
    """
    return 1e-4 if dtype == torch.float32 else 16 * common.ROUNDING[dtype]


def infer(run: nn.Module, x: Tensor, graphs: bool) -> Tensor:
    if graphs:
        torch.compiler.cudagraph_mark_step_begin()
    with torch.inference_mode():
        out: Tensor = run(x)
    return out


def train(run: nn.Module, x: Tensor, graphs: bool) -> Tensor:
    """Forward and backward of the mean of all outputs."""
    if graphs:
        torch.compiler.cudagraph_mark_step_begin()
    run.zero_grad(set_to_none=True)
    out: Tensor = run(x)
    out.float().mean().backward()
    return out.detach()


def outcome(model: nn.Module, out: Tensor, training: bool) -> Tensor:
    """What compiled and eager models are compared by: the output, in training the gradients."""
    if not training:
        return out.float().clone()  # CUDA graphs write over it
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([grad.float().flatten() for grad in grads])


def compiled(model: nn.Module, mode: str, whole: bool) -> nn.Module:
    """The model in one of the modes; `whole`: it must compile as one graph."""
    if mode == EAGER:
        return model
    how = "reduce-overhead" if mode == GRAPHS else None
    found: nn.Module = torch.compile(model, mode=how, fullgraph=whole, dynamic=False)
    return found
