"""Pass 6c, gradients: those of a converted block against those of the dense one, once per code.

Outputs that are equal say nothing of a backward pass that was written by hand, or of gradients that
stop in the block. Called by `dgefx.passes.pipeline` after `passes.plan.verify`. Next:
`passes.plan.verify_types`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.config import DGEConfig
from dgefx.kernels.layout import has_parts
from dgefx.outputs import Call, output_tensors
from dgefx.passes.errors import Refused
from dgefx.passes.plan.block_signature import has_backward_hooks
from dgefx.passes.plan.example_calls import call_in_type, call_of_images
from dgefx.passes.plan.plan import BlockPlan
from dgefx.passes.plan.sizes import call_at
from dgefx.passes.plan.verify import converted_copy, replaced_stream, stream_of
from dgefx.passes.randomise import randomise_constants
from dgefx.passes.trace.deterministic import Deterministic, seed_all
from dgefx.passes.trace.tracer import copy_block
from dgefx.precision import in_type

#: of a gradient, relative to its own norm and to that of all of them; float32 inside the block (a
#: norm that casts) leaves 1e-6 even in float64
_OWN, _ALL = 1e-4, 1e-6
_OWN_FLOAT32, _ALL_FLOAT32 = 1e-2, 1e-4
#: how many times what its types differ by a block may differ from itself in float64
_ROUNDINGS = 10
#: how much larger a second loss is
_LARGE = 1e4
#: side of a grid on which a backward pass is quick
_FEW = 4

#: a block's plan, its call and the shape of its stream
_Asked = tuple[BlockPlan, Call, tuple[int, ...]]


def verify_gradients(
    dense: nn.Module, plan: BlockPlan, call: Call, shape: tuple[int, ...], config: DGEConfig
) -> None:
    """Compare the gradients of the stream and of all parameters at the finest granularity, in train
    mode without chance and, where there is more in it then, in eval mode. In float64 or, where the
    block has float32 written into it or gives something else in float64 (SDPA takes a float32 mask
    for one of float64), in float32.

    Routed by detail, whatever `config` asks for: learned gates have gradients of their own.

    Raises:
        Refused: they differ.
    """
    config = DGEConfig(config.granularities, config.region, budget=config.budget)
    both = plan.eval_calls_more or bool(plan.functions)
    # a backward pass of the user's may do on all tokens what it does not on few
    seen = not plan.functions and not any(map(has_backward_hooks, dense.modules()))
    for training in (True, False) if both else (True,):
        less = _on_less(plan, call, shape) if seen else iter(())
        if not _hold_on_one(dense, less, config, training):
            _verify_gradients(dense, (plan, call, shape), config, training)


def _on_less(plan: BlockPlan, call: Call, shape: tuple[int, ...]) -> Iterator[_Asked]:
    """Smaller grids, the smallest first, then one image: a backward pass in float64 on all tokens
    may take longer than all else."""
    layout = plan.layout
    grids = [layout.grid]
    asks = any(guards.questions for guards in plan.guards)
    movable = layout.places is None and not has_parts(layout.order)
    window = None if plan.windows is None else plan.windows.size
    if movable and window is not None:
        few = (2 * window[0], 3 * window[1])
        grids += [few] if 2 * few[0] * few[1] <= layout.grid[0] * layout.grid[1] else []
    elif movable and not asks:
        while min(grids[-1]) > _FEW:
            height, width = grids[-1]
            grids.append((-(-height // 2), -(-width // 2)))
    for grid in grids[:0:-1]:
        small = dataclasses.replace(layout, grid=grid)
        fewer = dataclasses.replace(plan.unasked(), layout=small, reference=None)
        yield fewer, call_at(call, plan, shape, grid)[0], layout.shape_at(shape, grid)
    if plan.numbers_images:
        return
    axis = layout.axis("B")
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    yield plan, call_of_images(call, plan, shape, torch.zeros(1, dtype=torch.int64)), one


def _hold_on_one(
    dense: nn.Module, asked: Iterator[_Asked], config: DGEConfig, training: bool
) -> bool:
    """Whether the gradients were compared on the first of these that the block takes, and are
    equal there."""
    try:
        for one in asked:
            if _verify_gradients(dense, one, config, training):
                return True
    except Exception:  # the block may do something else there, or fail
        return False
    return False


def _verify_gradients(dense: nn.Module, asked: _Asked, config: DGEConfig, training: bool) -> bool:
    """Whether there was anything to compare."""
    plan = asked[0]
    types = plan.guards[int(training)].types
    given = (dense, *asked, config, training)
    double = _pairs(*given, torch.float64) if torch.float64 in types else []
    refused = [_compared(plan, *pair, _OWN, _ALL) for pair in double]
    if double and not any(refused):
        return True
    single = _pairs(*given, torch.float32) if torch.float32 in types else []
    for pair in single:
        if (other := _compared(plan, *pair, _OWN_FLOAT32, _ALL_FLOAT32)) is not None:
            raise other
    # what float32 is too coarse to show is no rounding in float64, unless the block rounds there
    for pair, (_, rounded) in zip(double, single, strict=False):
        if (other := _compared(plan, *pair, _OWN, _ALL, rounded)) is not None:
            raise other
    if any(refused) and not single:
        raise next(other for other in refused if other is not None)
    return bool(single)


#: gradients by name, of the converted block and of the dense one
_Pair = tuple[dict[str, Tensor], dict[str, Tensor]]


def _pairs(
    dense: nn.Module,
    plan: BlockPlan,
    call: Call,
    shape: tuple[int, ...],
    config: DGEConfig,
    training: bool,
    dtype: torch.dtype,
) -> list[_Pair]:
    """In a type; none where the dense block has no gradients in it."""
    # a backward pass of the user's may clip
    scales = (1.0, _LARGE) if plan.functions else (1.0,)
    given = (dense, plan, call, shape, config, dtype, training)
    return [pair for scale in scales if (pair := _both_gradients(*given, scale)) is not None]


def _compared(
    plan: BlockPlan,
    found: dict[str, Tensor],
    wanted: dict[str, Tensor],
    own: float,
    whole: float,
    rounded: dict[str, Tensor] | None = None,
) -> Refused | None:
    """What differs.

    Args:
        own, whole: allowed, of a gradient itself and of all of them.
        rounded: the dense block's in float32; some times what they differ by is allowed too.
    """
    total = sum(float(g.norm()) ** 2 for g in wanted.values()) ** 0.5
    for name, gradient in wanted.items():
        error = float((found[name] - gradient).norm())
        allowed = own * float(gradient.norm()) + whole * total
        if rounded is not None:
            allowed += _ROUNDINGS * float((rounded[name] - gradient).norm())
        if not error <= allowed:
            return _other_gradient(plan, name, error, gradient)
    return None


def _other_gradient(plan: BlockPlan, name: str, error: float, wanted: Tensor) -> Refused:
    if plan.functions:
        return Refused(
            f"its gradients would be others: {' and '.join(plan.functions)} has a backward pass of "
            f"its own, which the converted block would leave out",
            "other gradients",
        )
    if not float(wanted.norm()):
        return Refused(
            f"no gradient reaches {name} in it, and in the converted block one would: it stops "
            f"them with torch.no_grad() or detach()",
            "other gradients",
        )
    return Refused(
        f"verification: the gradient of {name} differs from the dense block's by {error:.1e}, of "
        f"{float(wanted.norm()):.1e}",
        "verification failed",
    )


def _both_gradients(
    dense: nn.Module,
    plan: BlockPlan,
    call: Call,
    shape: tuple[int, ...],
    config: DGEConfig,
    dtype: torch.dtype,
    training: bool,
    scale: float,
) -> _Pair | None:
    """(of the converted block, of the dense one); None where the dense one has none.

    Args:
        scale: of the loss.
    """
    reference = copy_block(dense).train(training)
    randomise_constants(reference)
    noise = torch.randn(
        stream_of(call, plan, shape).shape, generator=torch.Generator().manual_seed(6)
    )
    try:
        reference = in_type(reference, dtype)
        other = copy_block(reference, True)
        wanted = _gradients(reference, reference, plan, call, shape, noise, dtype, scale)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    converted = in_type(converted_copy(other, plan, config), dtype)
    try:
        return _gradients(converted, other, plan, call, shape, noise, dtype, scale), wanted
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if dtype is torch.float64:
            return None
        if plan.functions:
            raise _other_gradient(plan, "", 0.0, noise) from error
        raise Refused(
            f"verification: the backward pass of the converted block fails: {error}",
            "verification failed",
        ) from error


def _gradients(
    module: nn.Module,
    holder: nn.Module,
    plan: BlockPlan,
    call: Call,
    shape: tuple[int, ...],
    noise: Tensor,
    dtype: torch.dtype,
    scale: float,
) -> dict[str, Tensor]:
    """Gradients by name; zeros where there is none.

    Args:
        holder: whose parameters are asked for; `module` runs on them.
    """
    wanted: dict[str, Tensor] = {
        n: p for n, p in holder.named_parameters() if p.is_floating_point()
    }
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    stream = noise.to(stream_of(call, plan, shape)).to(dtype).requires_grad_(True)
    wanted["its input"] = stream
    args, kwargs = call_in_type(replaced_stream(call, plan, shape, stream), dtype)
    for index, value in enumerate(pytree.tree_leaves((args, kwargs))):
        if isinstance(value, Tensor) and value.is_floating_point() and value.is_leaf:
            wanted[f"input {index}"] = value.requires_grad_(True)
    random = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    with torch.enable_grad(), Deterministic(), random:
        seed_all(0)  # `nn.MultiheadAttention` has chance of its own
        output = output_tensors(module(*args, **kwargs))[0]
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
        loss = scale * (output * weights.to(output)).sum()
        gradients: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if loss.requires_grad:  # not under `torch.no_grad()` in the block
            gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(wanted.items(), gradients, strict=True)
    }
