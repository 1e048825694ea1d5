"""A block: norms, attention (in windows or not), MLP and residual adds, for any layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.attention import Attention
from tests.fuzz.parts import (
    DIM,
    DropPath,
    SqueezeExcite,
    from_tokens,
    make_mlp,
    make_norm,
    to_tokens,
)
from tests.fuzz.spec import Spec, WindowSpec
from tests.fuzz.special import Special


class Branch(nn.Module):
    """What is added to the stream: norm, then attention or MLP, on the stream's layout."""

    def __init__(self, inner: nn.Module, norm: nn.Module, layout: str) -> None:
        super().__init__()
        self.norm, self.inner, self.layout = norm, inner, layout

    def forward(self, x: Tensor, height: int, width: int, outside: Tensor | None = None) -> Tensor:
        more = () if outside is None else (outside,)
        y = self.inner(to_tokens(self.norm(x), self.layout), height, width, *more)
        return from_tokens(y, self.layout, height, width)


class Residual(nn.Module):
    """A branch together with its shortcut."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor, height: int, width: int, outside: Tensor | None = None) -> Tensor:
        return x + self.branch(x, height, width, outside)


class Windows(nn.Module):
    """Attention inside windows of (B, H*W, C) tokens."""

    def __init__(self, spec: WindowSpec, attention: nn.Module, shifted: bool) -> None:
        super().__init__()
        self.spec, self.attention = spec, attention
        tall, wide = spec.size
        self.shift = (tall // 2, wide // 2) if shifted else (0, 0)

    def _partition(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        tall, wide = self.spec.size
        if self.spec.kind == "grid":
            x = x.view(b, tall, h // tall, wide, w // wide, c).permute(0, 2, 4, 1, 3, 5)
        else:
            x = x.view(b, h // tall, tall, w // wide, wide, c).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, tall * wide, c)

    def _reverse(self, x: Tensor, h: int, w: int) -> Tensor:
        tall, wide = self.spec.size
        x = x.view(-1, h // tall, w // wide, tall, wide, x.shape[-1])
        x = x.permute(0, 3, 1, 4, 2, 5) if self.spec.kind == "grid" else x.transpose(2, 3)
        return x.reshape(-1, h, w, x.shape[-1])

    def _mask(self, b: int, h: int, w: int, like: Tensor) -> Tensor | None:
        if not self.spec.masked or self.shift == (0, 0):
            return None
        part = torch.zeros((1, h, w, 1), device=like.device)
        (tall, wide), (down, right), count = self.spec.size, self.shift, 0
        for rows in (slice(0, -tall), slice(-tall, -down), slice(-down, None)):
            for columns in (slice(0, -wide), slice(-wide, -right), slice(-right, None)):
                part[:, rows, columns] = count
                count += 1
        part = self._partition(part).squeeze(-1)
        apart = part.unsqueeze(1) - part.unsqueeze(2)
        apart = apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)
        return apart.unsqueeze(1).repeat(b, 1, 1, 1)

    def forward(self, x: Tensor, height: int, width: int, *more: Tensor | None) -> Tensor:
        b, _, c = x.shape
        tall, wide = self.spec.size
        x = x.view(b, height, width, c)
        down, right = (-height) % tall, (-width) % wide
        if down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        _, h, w, _ = x.shape
        if self.shift != (0, 0):
            x = torch.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        mask = self._mask(b, h, w, x)
        x = self._reverse(self.attention(self._partition(x), tall, wide, None, mask), h, w)
        if self.shift != (0, 0):
            x = torch.roll(x, self.shift, (1, 2))
        return x[:, :height, :width].reshape(b, height * width, c)


class Block(nn.Module):
    """Called as its spec says; see `tests.fuzz.model` for the caller."""

    def __init__(self, spec: Spec, grid: tuple[int, int], index: int) -> None:
        super().__init__()
        block = spec.block
        self.spec, self.grid, self.cache = spec, grid, {}
        tokens = spec.prefix + grid[0] * grid[1] + spec.suffix
        self.attention = self._branch(spec, grid, tokens, index)
        self.more = self._branch(spec, grid, tokens, index) if block.twice else None
        mlp = make_mlp(block.mlp, spec.prefix, spec.suffix)
        before = block.norm if block.place in ("pre", "sandwich") else "none"
        after = block.norm if block.place != "pre" else "none"
        inside, outside = (before, "none") if block.norm_inside else ("none", before)
        self.norm1, self.norm2 = make_norm(outside, spec.layout), make_norm(outside, spec.layout)
        self.mlp = None
        if mlp is not None:
            self.mlp = Branch(mlp, make_norm(inside, spec.layout), spec.layout)
        self.after1, self.after2 = make_norm(after, spec.layout), make_norm(after, spec.layout)
        self.wrapped = None
        if block.residual == "module" and self.mlp is not None:
            self.wrapped = nn.ModuleList([Residual(self.attention), Residual(self.mlp)])
        shape = (DIM, 1) if spec.layout == "BCN" else (DIM, 1, 1) if spec.channels_first else (DIM,)
        if block.scaling == "parameter":
            self.scale1 = nn.Parameter(torch.randn(shape))
            self.scale2 = nn.Parameter(torch.randn(shape))
        if block.scaling == "scalar":
            self.scale1, self.scale2 = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(1))
        self.drop_path = DropPath(block.drop_path, 1 if spec.layout == "NBC" else 0)
        self.squeeze = SqueezeExcite(DIM) if block.squeeze else None

    def _branch(self, spec: Spec, grid: tuple[int, int], tokens: int, index: int) -> Branch:
        block = spec.block
        make = Attention if block.attention.kind == "plain" else Special
        if block.window is None:
            inner: nn.Module = make(block.attention, DIM, grid, spec.prefix, tokens)
        else:
            tall, wide = block.window.size
            inner = make(block.attention, DIM, (tall, wide), 0, tall * wide)
            inner = Windows(block.window, inner, block.window.shift and index % 2 == 1)
        inside = block.norm_inside and block.place in ("pre", "sandwich")
        norm = make_norm(block.norm if inside else "none", spec.layout)
        return Branch(inner, norm, spec.layout)

    def _scaled(self, update: Tensor, which: int) -> Tensor:
        if self.spec.block.scaling != "none":
            update = update * (self.scale1 if which == 1 else self.scale2)
        return self.drop_path(update)

    def _add(self, x: Tensor, update: Tensor) -> Tensor:
        kind = self.spec.block.residual
        if kind == "iadd":
            x += update
            return x
        if kind == "torch_add":
            return torch.add(x, update)
        if kind == "add_":
            return x.add_(update)
        if kind == "scaled":
            return x * 0.7 + update
        return update + x if kind == "reversed" else x + update

    def _join(self, x: Tensor, update: Tensor, which: int) -> Tensor:
        """x with the update of attention (1) or MLP (2), norms behind the branch or the sum."""
        place = self.spec.block.place
        after = self.after1 if which == 1 else self.after2
        if place in ("post_branch", "sandwich"):
            update = after(update)
        x = self._add(x, self._scaled(update, which))
        return after(x) if place == "post" else x

    def _written(self, update: Tensor) -> Tensor:
        """The MLP's update in (B, N, C) order, through writes into parts of tensors."""
        kind, layout = self.spec.block.writing, self.spec.layout
        if kind == "rows" and layout == "BNC" and self.spec.prefix:
            kept = torch.zeros_like(update)
            kept[:, self.spec.prefix :] = update[:, self.spec.prefix :]
            return kept
        if kind in ("rows", "channels") and not self.spec.channels_first:
            update = update.clone()
            update[..., :4] = update[..., 4:8] * 2
            update[..., 8:] *= 0.5
        return update

    def _update(self, x: Tensor, height: int, width: int, outside: Tensor | None) -> Tensor:
        if self.wrapped is not None:
            attend, mlp = self.wrapped
            return mlp(attend(x, height, width, outside), height, width)
        if self.spec.block.mlp == "parallel" and self.mlp is not None:
            y = self.norm1(x)
            update = self.attention(y, height, width, outside) + self.mlp(y, height, width)
            return self._join(x, update, 1)
        x = self._join(x, self.attention(self.norm1(x), height, width, outside), 1)
        if self.more is not None:
            x = self._join(x, self.more(self.norm1(x), height, width, outside), 1)
        if self.mlp is not None:
            update = self._written(self.mlp(self.norm2(x), height, width))
            if self.squeeze is not None:
                layout = self.spec.layout
                update = self.squeeze(to_tokens(update, layout))
                update = from_tokens(update, layout, height, width)
            x = self._join(x, update, 2)
        return x

    def _size(self, x: Tensor, first: Any, second: Any, info: Any) -> tuple[int, int]:
        sizes = self.spec.block.sizes
        if sizes in ("ints", "keyword"):
            return first, second
        if sizes == "pair":
            return first
        if sizes == "dict":
            return info["size"]
        if self.spec.layout == "BHWC":
            return x.shape[1], x.shape[2]
        if self.spec.layout == "BCHW":
            return x.shape[2], x.shape[3]
        return self.grid

    def forward(
        self,
        x: Tensor,
        first: Any = None,
        second: Any = None,
        info: Any = None,
        height: int = 0,
        width: int = 0,
        outside: Tensor | None = None,
    ) -> Any:
        if self.spec.block.sizes == "keyword":
            first, second = height, width
        h, w = self._size(x, first, second, info)
        writing = self.spec.block.writing
        if writing == "guards":
            beside = self.spec.prefix + self.spec.suffix
            if x.numel() != x.numel() // DIM * DIM or h * w < 1:
                raise ValueError("sizes do not fit")
            assert x.numel() % ((h * w + beside) * DIM) == 0, f"{x.shape} is not {h} x {w}"
        if writing == "cache":
            key = (h, w, str(x.device))
            if key not in self.cache:
                self.cache[key] = torch.ones(1, device=x.device) * 0.9
            x = x * self.cache[key] if self.spec.block.residual == "scaled" else x
        x = self._update(x, h, w, outside)
        return (x, None) if self.spec.block.returns == "tuple" else x
