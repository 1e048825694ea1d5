"""`dgefx::attend` without Triton: group by group, offsets read on the host.

What the operator runs on the CPU, and for dtypes and devices that Triton does not take. The CPU
has a fused attention that also returns the log-sum-exp; other devices multiply matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    bias_row: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exp, as `dgefx::attend`: zeros in rows without a key."""
    out = q.new_zeros((q.shape[0], q.shape[1], v.shape[3]))
    lse = q.new_zeros(q.shape[:2], dtype=_wide(q.dtype))
    for group, rows in _groups(offsets):
        shift = _shift(bias, bias_row, rows, q.dtype)
        own = q[rows].transpose(0, 1)
        if _fused(q, v):
            made, level = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                own[None], k[group, None], v[group, None], attn_mask=shift, scale=scale
            )
            out[rows], lse[rows] = made[0].transpose(0, 1), level[0].t()
        else:
            share, level = _shares(own, k[group], shift, scale)
            out[rows] = (share @ v[group].to(share.dtype)).transpose(0, 1).to(q.dtype)
            lse[rows] = level.t()
    return out, lse


def attend_backward_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, where asked, of the scores, (T, H, M)."""
    grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros_like(k, memory_format=torch.contiguous_format)
    grad_v = torch.zeros_like(v, memory_format=torch.contiguous_format)
    grad_score = None
    if bias_grad:
        grad_score = lse.new_zeros((*q.shape[:2], k.shape[2]))
    for group, rows in _groups(offsets):
        shift = _shift(bias, bias_row, rows, q.dtype)
        own, slope, made = (t[rows].transpose(0, 1) for t in (q, grad, out))
        if grad_score is None and _fused(q, v):
            slopes = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                slope[None],
                own[None],
                k[group, None],
                v[group, None],
                made[None],
                lse[rows].t()[None],
                0.0,
                False,
                attn_mask=shift,
                scale=scale,
            )
            grad_q[rows] = slopes[0][0].transpose(0, 1)
            grad_k[group], grad_v[group] = slopes[1][0], slopes[2][0]
            continue
        share, _ = _shares(own, k[group], shift, scale)
        slope, made = slope.to(share.dtype), made.to(share.dtype)
        change = slope @ v[group].to(share.dtype).transpose(1, 2)
        change = share * (change - (slope * made).sum(-1, keepdim=True))
        grad_q[rows] = (change @ k[group].to(share.dtype) * scale).transpose(0, 1).to(q.dtype)
        grad_k[group] = change.transpose(1, 2) @ own.to(share.dtype) * scale
        grad_v[group] = share.transpose(1, 2) @ slope
        if grad_score is not None:
            grad_score[rows] = change.transpose(0, 1)
    return grad_q, grad_k, grad_v, grad_score


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Groups that have rows, and which."""
    bounds = offsets.tolist()
    for group, (begin, end) in enumerate(pairwise(bounds)):
        if end > begin:
            yield group, slice(begin, end)


def _fused(q: Tensor, v: Tensor) -> bool:
    """Whether the CPU's fused attention takes it."""
    return q.device.type == "cpu" and q.shape[2] == v.shape[3]


def _shift(
    bias: Tensor | None, bias_row: Tensor | None, rows: slice, dtype: torch.dtype
) -> Tensor | None:
    """(1, H or 1, rows, M) bias of a group's rows."""
    if bias is None or bias_row is None:
        return None
    return bias[bias_row[rows]].transpose(0, 1)[None].to(_wide(dtype))


def _shares(q: Tensor, k: Tensor, shift: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(H, rows, M) softmax, zeros where a bias rules out every key, and its log-sum-exp."""
    wide = _wide(q.dtype)
    score = q.to(wide) @ k.to(wide).transpose(1, 2) * scale
    if shift is not None:
        score = score + shift[0]
    level = score.logsumexp(-1)
    level = level.masked_fill(level == -torch.inf, 0.0)
    return torch.exp(score - level[..., None]), level
