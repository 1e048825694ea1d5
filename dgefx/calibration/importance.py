"""Importance: a linear score of how much the model's output depends on a region's tokens.

Detail alone does not say whether anything later looks at it. The squared gradient of the output
with respect to a block's output tokens does (it is the diagonal of the Fisher information, or of
its Gauss-Newton counterpart where there are no logits), but needs a backward pass. So its logarithm
is regressed, per block and in closed form, on the region's layer-normalised mean token, which the
router has at hand anyway. No labels are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.calibration.distance import Kind, probe
from dgefx.calibration.gradients import gradients, run_with_gradients
from dgefx.nn.block import DGEBlock
from dgefx.nn.router import Router
from dgefx.outputs import Call

#: backward passes per batch
PROBES = 4
#: of the features' mean variance; the fit has C coefficients and hundreds of correlated regions
RIDGE = 0.1


class _Regression:
    """Normal equations of one block, accumulated over batches."""

    def __init__(self) -> None:
        self.left: Tensor | None = None
        self.right: Tensor | None = None

    def add(self, features: Tensor, target: Tensor) -> None:
        """features (B, R, C), target (B, R); both are centred within their image."""
        x = (features - features.mean(1, keepdim=True)).flatten(0, 1).double()
        y = (target - target.mean(1, keepdim=True)).flatten().double()
        left, right = x.t() @ x, x.t() @ y
        self.left = left if self.left is None else self.left + left
        self.right = right if self.right is None else self.right + right

    def solve(self) -> Tensor | None:
        """(C,) float32, or None where nothing was learned."""
        if self.left is None or self.right is None or not bool(self.right.abs().max() > 0):
            return None
        scale = self.left.diagonal().mean()
        eye = torch.eye(len(self.right), dtype=torch.float64, device=self.right.device)
        weight = torch.linalg.solve(self.left + RIDGE * scale * eye, self.right).float()
        return weight if bool(torch.isfinite(weight).all()) else None


class _Recorder:
    """Hooks on one block: the router's region means, and the block's output tokens."""

    def __init__(self, block: DGEBlock) -> None:
        self.router: Router = block.dge_router
        self.seen: list[tuple[Tensor, tuple[int, int]]] = []
        self.outputs: list[Tensor] = []
        self.handles = [
            self.router.register_forward_hook(self._keep_cells),
            block.register_forward_hook(self._keep_output),
        ]

    def _keep_cells(self, router: nn.Module, args: Any, _routing: Any) -> None:
        tokens, grid = args
        with torch.no_grad():
            self.seen.append((self.router.region_means(tokens.detach(), grid), grid))

    def _keep_output(self, _block: nn.Module, _args: Any, output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() >= 3:
                if not leaf.requires_grad:
                    # not the leaf itself: the model may go on in place
                    leaf = leaf.detach().requires_grad_().clone()
                    leaves[index] = leaf
                self.outputs.append(leaf)
                return pytree.tree_unflatten(leaves, spec)
        return output

    def regions(self, gradient: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, R) sum of squares of a gradient with respect to the block's output."""
        tokens = self.router.tokens_of(gradient, grid)[:, self.router.prefix :]
        table = self.router.tables(grid, tokens.device)[0]
        squares = tokens.float().square().sum(-1)
        total = squares.new_zeros(squares.shape[0], table.region_cost.shape[0])
        return total.index_add_(1, table.patch_region, squares)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def _recording(blocks: dict[str, DGEBlock]) -> Iterator[dict[str, _Recorder]]:
    recorders = {name: _Recorder(block) for name, block in blocks.items()}
    try:
        yield recorders
    finally:
        for recorder in recorders.values():
            recorder.remove()


class ImportanceFit:
    """Accumulates over batches; `weights` ends it.

    Args:
        blocks: the converted blocks, at their finest plans.
    """

    def __init__(self, blocks: dict[str, DGEBlock], kind: Kind, seed: int) -> None:
        self.blocks = blocks
        self.kind = kind
        self.generator = torch.Generator().manual_seed(seed)
        self.fits = {name: _Regression() for name in blocks}

    def add(self, model: nn.Module, call: Call, images: int) -> None:
        """One batch of `images`: a forward pass and a few backward passes to the blocks' outputs.

        Raises:
            NoGradientsError: the model's output does not carry gradients.
        """
        with torch.enable_grad(), _recording(self.blocks) as recorders:
            output = run_with_gradients(model, call)
            places = [(n, i) for n, r in recorders.items() for i in range(len(r.outputs))]
            tensors = [recorders[name].outputs[i] for name, i in places]
            sums: list[Tensor | None] = [None] * len(places)
            for _ in range(PROBES):
                scalar = probe(output, self.kind, images, self.generator)
                found_gradients = gradients(scalar, tensors, retain_graph=True)
                pairs = zip(places, found_gradients, strict=True)
                for index, ((name, i), gradient) in enumerate(pairs):
                    if gradient is None or i >= len(recorders[name].seen):
                        continue
                    found = recorders[name].regions(gradient, recorders[name].seen[i][1])
                    known = sums[index]
                    sums[index] = found if known is None else known + found
        for (name, i), total in zip(places, sums, strict=True):
            if total is None or not bool(total.max() > 0):
                continue
            cells, grid = recorders[name].seen[i]
            # windows may leave regions without tokens
            held = recorders[name].router.tables(grid, total.device)[0].region_cost > 0
            cells, total = cells.flatten(1, 2)[:, held], total[:, held]
            least = total.mean(1, keepdim=True) * 1e-6 + 1e-30
            features = F.layer_norm(cells.float(), cells.shape[-1:])
            self.fits[name].add(features, 0.5 * (total + least).log())

    def weights(self) -> dict[str, Tensor | None]:
        """Per block (C,), or None where the output does not depend on its grid tokens."""
        return {name: fit.solve() for name, fit in self.fits.items()}
