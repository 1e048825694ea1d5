"""The attention contest of `kernels.py`: `attend` against the other ways to do ragged attention.

Images have different numbers of queries and equally many keys. Keys and values are stored as a
model's projection leaves them, (images, keys, heads, channels), which every contestant can read
without a copy; numbers that a contestant needs on the host, such as the longest image's, are given
to it for free.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from _kernel_cases import BASELINE, BOTH, EAGER, FORWARD, OWN, Contest, Shape, compiled, draw, label
from dgefx.kernels.attend import attend
from dgefx.kernels.attend_reference import attend_reference

PADDED = f"{BASELINE} (padded SDPA)"
LOOP = "reference, image by image"
EQUAL = "SDPA, equal queries"
VARLEN, FLEX = "varlen_attn", "flex attention"


def attend_contest(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> Contest:
    """The reference itself loops over images and reads the host, so it cannot be compiled as one
    graph: what is compiled is the padded form, gathers included. `EQUAL` has as many queries in
    all, the same in every image, and so another result: it is no alternative, but a yardstick."""
    drawn = draw(shape, batch, device)
    ragged, images, heads = drawn.ragged, drawn.images, shape.heads
    offsets, keys, width = ragged.offsets, shape.tokens, shape.channels // shape.heads
    count = ragged.patch.shape[0]
    longest = int(offsets.diff().max())
    q = torch.randn(count, heads, width, device=device).to(dtype).requires_grad_()
    k, v = (
        torch.randn(images, keys, heads, width, device=device)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(2)
    )
    own_row = torch.arange(count, device=device) - offsets[ragged.image]
    place = offsets[:-1, None] + torch.arange(longest, device=device)
    place = place.clamp(max=count - 1).flatten()
    back = ragged.image * longest + own_row

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, offsets)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_reference(q, k, v, offsets, None, None, width**-0.5)[0]

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.index_select(0, place).unflatten(0, (images, longest)).transpose(1, 2)
        out = F.scaled_dot_product_attention(rows, k, v)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, back)

    def equal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q[: count // images * images].unflatten(0, (images, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(rows, k, v).transpose(1, 2).flatten(0, 1)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Image by image, as plain SDPA."""
        parts = []
        bounds = offsets.tolist()
        for image in range(images):
            rows = q[bounds[image] : bounds[image + 1]].transpose(0, 1)
            score = rows @ k[image].transpose(1, 2) * width**-0.5
            parts.append((score.softmax(-1) @ v[image]).transpose(0, 1))
        return torch.cat(parts)

    calls: dict[str, Any] = {
        OWN: compiled(own),
        PADDED: compiled(padded),
        EQUAL: compiled(equal),
        LOOP: loop,
        EAGER: own,
    }
    missing = {}
    try:
        calls[VARLEN] = _varlen(offsets, images, keys, longest, device, dtype)
    except Exception as error:
        missing[VARLEN] = str(error)
    try:
        calls[FLEX] = _flex(ragged.image, images, keys, device)
    except Exception as error:
        missing[FLEX] = str(error)
    flops = 4.0 * count * heads * keys * width
    return Contest(
        "attend",
        label(shape, drawn, f"{heads} heads x {width}"),
        (q, k, v),
        calls,
        exact,
        {FORWARD: flops, BOTH: 3.5 * flops},
        # in half precision the weights are rounded before they meet the values, and the result is;
        # gradients also use the rounded result and the rounded gradient of the scores. Roundings of
        # single weights are as random as the values, hence no larger than the sum's own: 2 and 4
        # would do, and are doubled
        {FORWARD: 4, BOTH: 8},
        {FORWARD: 1024, BOTH: 4096},
        limit="FLOPs",
        unlike=(EQUAL,),
        missing=missing,
    )


def _varlen(
    offsets: Tensor, images: int, keys: int, longest: int, device: torch.device, dtype: torch.dtype
) -> Any:
    """`torch.nn.attention.varlen.varlen_attn`, by the arguments that all its versions share."""
    if device.type != "cuda" or dtype == torch.float32:
        raise RuntimeError("half precision on CUDA only")
    attention = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    begin = offsets.to(torch.int32)
    key_begin = torch.arange(images + 1, dtype=torch.int32, device=device) * keys

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))
        return attention(q, k, v, begin, key_begin, longest, keys)

    return varlen


def _flex(image: Tensor, images: int, keys: int, device: torch.device) -> Any:
    """All images as one, a query seeing the keys of its own: the blocks that a tile of queries sees
    are those of the images that it touches, which a generic mask builder would look for in a table
    of queries times keys."""
    if device.type != "cuda":
        raise RuntimeError("not differentiable on the CPU; CUDA only")
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    side, count, last = 128, image.shape[0], images * keys - 1
    begin = torch.arange(0, count, side, device=device)
    end = (begin + side - 1).clamp(max=count - 1)
    low = image[begin] * keys // side
    high = ((image[end] + 1) * keys - 1).clamp(max=last) // side
    blocks = torch.arange(last // side + 1, device=device)
    seen = (low[:, None] + blocks).clamp(max=int(blocks[-1])).to(torch.int32)
    owner = image.to(torch.int32)

    def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return owner[query] == key // keys

    mask = flex.BlockMask.from_kv_blocks(
        (high - low + 1).to(torch.int32)[None, None],
        seen[None, None],
        BLOCK_SIZE=side,
        mask_mod=same,
        seq_lengths=(count, images * keys),
    )

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for t in (k, v))
        out = flex.flex_attention(q.transpose(0, 1)[None], k, v, block_mask=mask)
        return out.squeeze(0).transpose(0, 1)

    return compiled(attention)
