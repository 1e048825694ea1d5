"""`attend`: queries packed image after image attend to the dense keys and values of their image.

Called from the converted block's graph, where images have different numbers of queries. Two
operators, opaque to torch.compile, as the compiled graph must not depend on how many queries each
image has: `dgefx::attend` and `dgefx::attend_backward`. Triton runs them on CUDA, without reading
anything on the host; `attend_reference` elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from dgefx.kernels.attend_reference import attend_backward_reference, attend_reference
from dgefx.kernels.autocast import autocast_dtype
from dgefx.kernels.dispatch import takes_triton

__all__ = ["attend"]

_FUSED_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    bias_row: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q kᵀ + bias) v, every query over the keys of its own group.

    Under autocast q, k and v are cast as `F.scaled_dot_product_attention` casts its own.

    Args:
        q: (T, H, D) queries, those of group g in rows offsets[g] to offsets[g + 1] - 1. Rows in
            front of offsets[0] and from offsets[G] on are idle: they are not read.
        k: (G, H, M, D). v: (G, H, M, E). Like q with any strides, best with dense rows.
        offsets: (G + 1,) int64, not decreasing, 0 <= offsets[0], offsets[G] <= T.
        bias: (P, H or 1, M) floating point, rows to add to the scores; -inf rules a key out.
        bias_row: (T,) int64, the row of `bias` of every query; idle rows: any valid row.
        scale: D ** -0.5 if None.

    Returns:
        (T, H, E) in q's dtype, contiguous; zeros in idle rows and where every key is ruled out.
        Differentiable, once, in q, k, v and bias.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    dtype = autocast_dtype(q.device.type)
    if dtype is not None:
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    _check(q, k, v, offsets)
    _check_bias(q, k, bias, bias_row)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    out: Tensor = torch.ops.dgefx.attend(q, k, v, offsets, bias, bias_row, scale)[0]
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> None:
    if q.dim() != 3 or not q.is_floating_point():
        raise ValueError(f"q must be (T, H, D) floating point, is {_describe(q)}")
    if k.dim() != 4 or k.shape[1] != q.shape[1] or k.shape[3] != q.shape[2]:
        raise ValueError(f"k must be (G, H, M, D) for q {_describe(q)}, is {_describe(k)}")
    if k.shape[2] == 0:
        raise ValueError("k must have at least one key")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be (G, H, M, E) for k {_describe(k)}, is {_describe(v)}")
    for name, other in (("k", k), ("v", v)):
        if other.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, has {other.dtype}")
    if offsets.shape != (k.shape[0] + 1,) or offsets.dtype != torch.int64:
        raise ValueError(
            f"offsets must be ({k.shape[0] + 1},) int64, one more than groups in k, "
            f"is {_describe(offsets)}"
        )


def _check_bias(q: Tensor, k: Tensor, bias: Tensor | None, bias_row: Tensor | None) -> None:
    if bias is None:
        if bias_row is not None:
            raise ValueError("bias_row without a bias")
        return
    if (
        bias.dim() != 3
        or bias.shape[1] not in (1, q.shape[1])
        or bias.shape[2] != k.shape[2]
        or not bias.is_floating_point()
    ):
        raise ValueError(
            f"bias must be (P, {q.shape[1]} or 1, {k.shape[2]}) floating point, "
            f"is {_describe(bias)}"
        )
    if bias_row is None:
        raise ValueError("bias_row is needed with a bias")
    if bias_row.shape != q.shape[:1] or bias_row.dtype != torch.int64:
        raise ValueError(
            f"bias_row must be ({q.shape[0]},) int64, a row for every query, "
            f"is {_describe(bias_row)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


@torch.library.custom_op("dgefx::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    bias_row: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attend` and its log-sum-exp: (T, H), float32, float64 for float64; 0 where out is zeros."""
    if not takes_triton(q):
        return attend_reference(q, k, v, offsets, bias, bias_row, scale)
    from dgefx.kernels.gpu.attend_forward import launch_attend_forward

    with torch.cuda.device_of(q):
        return launch_attend_forward(q, k, v, offsets, bias, bias_row, scale)


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    bias_row: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[3]))
    return out, q.new_empty(q.shape[:2], dtype=wide)


@torch.library.custom_op("dgefx::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    bias_row: Tensor | None,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias, contiguous; that of bias is empty unless `bias_grad`."""
    arguments = (grad, q, k, v, out, lse, offsets, bias, bias_row, scale, bias_grad)
    if takes_triton(q):
        from dgefx.kernels.gpu.attend_backward import launch_attend_backward

        with torch.cuda.device_of(q):
            *found, grad_score = launch_attend_backward(*arguments)
    else:
        *found, grad_score = attend_backward_reference(*arguments)
    return found[0], found[1], found[2], _sum_rows(grad_score, bias, bias_row, q)


def _sum_rows(
    grad_score: Tensor | None, bias: Tensor | None, bias_row: Tensor | None, q: Tensor
) -> Tensor:
    """(T, H, M) gradients of scores to those of the bias rows, in the same order every time."""
    if grad_score is None or bias is None or bias_row is None:
        return q.new_empty(0)
    if bias.shape[1] == 1:
        grad_score = grad_score.sum(1, keepdim=True)
    total = grad_score.new_zeros(bias.shape)
    if total.is_cuda:  # sorts first; index_add_ would be atomic
        total.index_put_((bias_row,), grad_score, accumulate=True)
    else:  # row after row; index_put_ would be atomic
        total.index_add_(0, bias_row, grad_score)
    return total.to(bias.dtype)


@_attend_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    bias_row: Tensor | None,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = bias.new_empty(bias.shape) if bias_grad and bias is not None else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, bias, bias_row, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, offsets, bias, bias_row)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    bias_grad = ctx.needs_input_grad[4]
    *found, grad_bias = torch.ops.dgefx.attend_backward(grad, *saved, ctx.scale, bias_grad)
    return *found, None, grad_bias if bias_grad else None, None, None


_attend.register_autograd(_differentiate, setup_context=_save)


def _counts(q: Tensor, v: Tensor) -> bool:
    """Whether torch counts `scaled_dot_product_attention` on this device: of the fused one on the
    CPU it (2.14) knows no formula, and a ratio to a dense model must count both or neither."""
    fused_on_cpu = q.device.type == "cpu" and q.shape[2] == v.shape[3]
    return not fused_on_cpu or _FUSED_ON_CPU in flop_registry


@register_flop_formula(torch.ops.dgefx.attend, get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> int:
    """As T queries of one image; idle rows count, since which are idle is on the device."""
    return sdpa_flop_count(*_as_one(q, k, v)) if _counts(q, v) else 0


@register_flop_formula(torch.ops.dgefx.attend_backward, get_raw=True)
def _backward_flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> int:
    if not _counts(q, v):
        return 0
    return sdpa_backward_flop_count(
        (1, grad.shape[1], grad.shape[0], grad.shape[2]), *_as_one(q, k, v)
    )


def _as_one(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[int, ...]]:
    """Shapes (1, H, ., .) of a dense attention with as many products."""
    rows, heads, head = q.shape
    return [(1, heads, rows, head), (1, *k.shape[1:]), (1, *v.shape[1:])]
