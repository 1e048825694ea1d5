"""Which modules of a block treat every token alike, so that they stay calls in its trace.

A norm, an MLP, a layer scale of the user's own works on queries as it does on tokens: called, it
keeps its hooks, its settings, its autograd functions, its branches on types, whatever they are.
Only what mixes tokens, or is wanted by rows (a fused projection), is traced through. Asked by
`passes.trace.tracer`; found by trying the module on a few random tokens, not by its class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgefx.passes.ops import RANDOM
from dgefx.passes.trace.deterministic import Deterministic, random_numbers_kept, seed_all

_TRIED = 3  # tokens along the first token axis; one more along each other, or they could be swapped


def is_token_wise(module: nn.Module, value: Tensor) -> bool:
    """Whether `module`, on tensors like `value`, gives every token what it is alone.

    Its output has the token axes of its input and follows a permutation and a selection of the
    tokens; it may have fewer features, on the last axis or of images on axis 1. False for modules
    that hand on their input as it is, add to it or take a softmax (parts of the stream's path and
    of attention), and where the output has more features: of fused projections only some rows may
    be wanted.

    Args:
        module: of a copy of the model, in the mode it is traced in. value: floating point.
    """
    if not value.is_floating_point() or value.dim() < 3:
        return False
    with random_numbers_kept(), torch.no_grad(), _state_kept(module):
        # a module for (B, C, H, W) has its features on axis 1
        last = value.dim() - 1
        axes = (last, 1) if last > 2 else (last,)
        return any(_treats_alike(module, value, axis) for axis in axes)


@contextmanager
def _state_kept(module: nn.Module) -> Iterator[None]:
    """Forgets what forward keeps for the few tokens that are tried: the trace would read it."""
    own = [vars(part) for part in module.modules()]
    parts = list(module.modules())
    kept: list[Any] = [*own, *(p._buffers for p in parts), *(p._parameters for p in parts)]
    # those of a user's own class may do anything
    kept += [v for held in own for v in held.values() if type(v) in (dict, OrderedDict, list)]
    before = [held.copy() for held in kept]
    try:
        yield
    finally:
        for held, content in zip(kept, before, strict=True):
            held.clear()
            (held.extend if isinstance(held, list) else held.update)(content)


class _RefusePart(TorchFunctionMode):
    """Raises where a module is a part of what is looked for in a block: the residual add of its
    input, or the softmax of attention scores, which treats rows of scores alike."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in ("softmax", "exp"):
            raise ValueError("a softmax")
        if name in ("add", "iadd", "radd") and any(part is self.given for part in args):
            raise ValueError("a residual add")
        return func(*args, **(kwargs or {}))


class _Draws(TorchFunctionMode):
    """Says in `seen` whether random numbers were drawn, except for the dropout of single numbers,
    which it leaves out."""

    seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "dropout":
            return args[0] if args else (kwargs or {})["input"]
        self.seen |= name.rstrip("_") in RANDOM or "dropout" in name
        return func(*args, **(kwargs or {}))


def _draws_per_image(module: nn.Module, tokens: Tensor) -> bool:
    """Whether it draws more than what is dropped element by element, seen or by what comes out."""
    results, draws = [], _Draws()
    for number in (1, 2):
        seed_all(number)
        with draws:
            results.append(module(tokens.clone()))
    return draws.seen or not torch.equal(*results)


def _treats_alike(module: nn.Module, value: Tensor, features: int) -> bool:
    axes = [axis for axis in range(1, value.dim()) if axis != features]
    size = [2, *value.shape[1:]]
    for more, axis in enumerate(axes):
        size[axis] = _TRIED + more
    tokens = torch.randn(size, generator=torch.Generator().manual_seed(5)).to(value)

    def run(given: Tensor) -> Any:
        written = given.clone()
        with Deterministic(), _RefusePart(written):
            result = module(written)
        if result is written or not torch.equal(written, given):
            raise ValueError("hands on its input, or writes into it")
        return result

    try:
        found = run(tokens)
        if not _fits(found, tokens, features):
            return False
        chosen = torch.tensor([1, 0], device=value.device)

        def moved(whole: Tensor) -> Tensor:
            """One image of two, and two of three rows in another order on every token axis."""
            for axis in axes:
                whole = whole.index_select(axis, chosen)
            return whole[1:]

        if not _same(run(moved(tokens)), moved(found)):
            return False
        if module.training and _draws_per_image(module, tokens):
            return False
        return found.shape[features] <= tokens.shape[features]
    except Exception:  # user code may raise anything on another size
        return False


def _fits(found: Any, tokens: Tensor, features: int) -> bool:
    if not isinstance(found, Tensor) or found.dim() != tokens.dim():
        return False
    axes = [axis for axis in range(tokens.dim()) if axis != features]
    same = all(found.shape[axis] == tokens.shape[axis] for axis in axes)
    return same and bool(torch.isfinite(found).all())


def _same(found: Any, wanted: Tensor) -> bool:
    """Up to the rounding of other sizes of the same products."""
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    error = (found - wanted).double().norm()
    return bool(error <= 1e-4 * wanted.double().norm().clamp_min(1e-30))
