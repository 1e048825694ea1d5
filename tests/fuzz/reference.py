"""A block at mixed granularities, written by hand from the definition; nothing of the library.

x + U (path(P x; x) - P x): P averages the tokens of every patch, U gives every token its patch's
row, and keys and values are of all tokens. Only for blocks that work token by token apart from
their attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.fuzz.attention import Attention
from tests.fuzz.block import Block, Branch
from tests.fuzz.parts import from_tokens, to_tokens
from tests.fuzz.spec import Spec


def has_reference(spec: Spec) -> bool:
    """Whether `mixed` covers this transformer's blocks."""
    block, attention = spec.block, spec.block.attention
    by_token = block.norm != "group" or not spec.channels_first
    return (
        attention.kind == "plain"
        and block.window is None
        and by_token
        and block.residual != "module"
        and not (spec.suffix or attention.lepe or block.squeeze or block.twice)
        and block.mlp in ("plain", "gated", "none", "parallel")
        and (attention.bias == "none" or not attention.extra_key)
    )


def pooling(cells: Tensor, grid: tuple[int, int], prefix: int) -> tuple[Tensor, Tensor]:
    """(P, U) of one image.

    Args:
        cells: (rows, columns) of 2 x 2 tokens, 0: its tokens apart, 1: one patch, 2: part of a
            patch of 4 x 4.
    """
    patches: dict[tuple[int, ...], list[int]] = {}
    for i in range(prefix):
        patches[(-1, i)] = [i]
    for row in range(grid[0]):
        for column in range(grid[1]):
            side = 2 ** int(cells[row // 2, column // 2])
            key = (side, row // side, column // side)
            patches.setdefault(key, []).append(prefix + row * grid[1] + column)
    tokens = prefix + grid[0] * grid[1]
    pool, spread = torch.zeros(len(patches), tokens), torch.zeros(tokens, len(patches))
    for index, members in enumerate(patches.values()):
        pool[index, members] = 1 / len(members)
        spread[members, index] = 1
    return pool, spread


def random_cells(grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Levels per 2 x 2 cell; those of a 4 x 4 patch at level 2 agree."""
    rows, columns = -(-grid[0] // 2), -(-grid[1] // 2)
    cells = torch.randint(0, 2, (rows, columns), generator=generator)
    for row in range(0, rows, 2):
        for column in range(0, columns, 2):
            if float(torch.rand((), generator=generator)) < 0.4:
                cells[row : row + 2, column : column + 2] = 2
    return cells


def _norm(norm: nn.Module, branch: Branch, tokens: Tensor, layout: str) -> Tensor:
    """The block's and the branch's norm on (1, Q, C), as a stream of one row."""
    count = tokens.shape[1]
    y = branch.norm(norm(from_tokens(tokens, layout, 1, count)))
    return to_tokens(y, layout)


class _Reference:
    def __init__(self, block: Block, outside: Tensor | None) -> None:
        self.block, self.spec, self.outside = block, block.spec, outside

    def _after(self, module: nn.Module, tokens: Tensor) -> Tensor:
        layout, count = self.spec.layout, tokens.shape[1]
        return to_tokens(module(from_tokens(tokens, layout, 1, count)), layout)

    def _scaled(self, update: Tensor, which: int) -> Tensor:
        if self.spec.block.scaling == "none":
            return update
        scale = self.block.scale1 if which == 1 else self.block.scale2
        return update * scale.flatten()

    def _join(self, x: Tensor, update: Tensor, which: int) -> Tensor:
        place = self.spec.block.place
        after = self.block.after1 if which == 1 else self.block.after2
        if place in ("post_branch", "sandwich"):
            update = self._after(after, update)
        kept = 0.7 * x if self.spec.block.residual == "scaled" else x
        return kept + self._scaled(update, which)

    def _writes(self, update: Tensor, prefix: int) -> Tensor:
        spec = self.spec
        kind = spec.block.writing
        if kind == "rows" and spec.layout == "BNC" and prefix:
            update = update.clone()
            update[:, :prefix] = 0
            return update
        if kind in ("rows", "channels") and not spec.channels_first:
            first, rest = update[..., 4:8] * 2, update[..., 8:] * 0.5
            return torch.cat([first, update[..., 4:8], rest], -1)
        return update

    def _mlp(self, y: Tensor, prefix: int) -> Tensor:
        """The MLP's update of queries."""
        assert self.block.mlp is not None
        parallel = self.spec.block.mlp == "parallel"
        norm = self.block.norm1 if parallel else self.block.norm2
        update: Tensor = self.block.mlp.inner(
            _norm(norm, self.block.mlp, y, self.spec.layout), 0, 0
        )
        return update if parallel else self._writes(update, prefix)

    def run(self, x: Tensor, pool: Tensor, spread: Tensor) -> Tensor:
        """x: (1, N, C) of one image. Its stream after the block, (1, N, C).

        A norm on the sum belongs to the stream: it works on every token, and what comes after it
        pools afresh.
        """
        block, layout, spec = self.block, self.spec.layout, self.spec.block
        height, width = block.grid
        attention = block.attention.inner
        assert isinstance(attention, Attention)
        inner = x * 0.9 if (spec.writing, spec.residual) == ("cache", "scaled") else x
        q = pool @ inner
        asking = _norm(block.norm1, block.attention, q, layout)
        context = _norm(block.norm1, block.attention, inner, layout)
        update = attention.run(asking, context, height, width, self.outside, None, pool)
        if spec.mlp == "parallel":
            update = update + self._mlp(q, self.spec.prefix)
        post = spec.place == "post"
        y = self._join(q, update, 1)
        if post:
            inner = self._after(block.after1, inner + spread @ (y - q))
            y = q = pool @ inner
        if spec.mlp not in ("none", "parallel"):
            y = self._join(y, self._mlp(y, self.spec.prefix), 2)
            if post:
                return self._after(block.after2, inner + spread @ (y - q))
        return inner if post else x + spread @ (y - pool @ x)


def mixed(block: Block, outside: Tensor | None, stream: Tensor, cells: list[Tensor]) -> Tensor:
    """A dense block's result for (B, N, C), image i at `cells[i]`; (B, N, C)."""
    prefix = block.spec.prefix
    reference = _Reference(block, outside)
    results = []
    for image, levels in zip(stream.split(1), cells, strict=True):
        results.append(reference.run(image, *pooling(levels, block.grid, prefix)))
    return torch.cat(results)
