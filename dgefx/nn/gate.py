"""The paper's learned gate: one linear layer from a region's mean token to its granularity.

Child `gate` of a `dgefx.nn.router.Router` with the linear router. In training it also says what
carries its gradient; `dgefx.training` sets how it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FINEST_PROBABILITY = 0.95

#: "sparse": only the chosen queries are computed; "dense": all of them, see `Gate.path`
Path = Literal["sparse", "dense"]


class Decision(NamedTuple):
    """Logits that levels are decided by, and in training the probabilities of every level."""

    logits: Tensor  # (B, R, L)
    chances: Tensor | None  # (B, R, L) softmax at the gate's temperature; None: no gradients


class Gate(nn.Linear):
    """Logits of L granularities (arXiv 2301.03831, section 3.2, equations 1 to 6).

    Args:
        channels: C of the residual stream.
        levels: L.

    Attributes:
        temperature: of the (Gumbel) softmax in training, a 0-dim tensor, so that a schedule does
            not make a compiled model recompile.
        noise: whether training draws levels with Gumbel noise rather than by arg max (equation 5).
        path: in training, "sparse" computes the chosen queries only, and a gate's gradient is that
            of the level that it chose; "dense" computes the queries of all levels, and every
            level's probability has its gradient (the paper's). The output is the same.
        demand: queries per image that the gate asked for in the last training forward, prefix
            tokens not counted, a 0-dim float32 tensor with gradient; None before.
    """

    temperature: Tensor

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__(channels, levels)
        self.register_buffer("temperature", torch.tensor(1.0), persistent=False)
        self.noise = False
        self.path: Path = "sparse"
        self.demand: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Small weights; bias such that the finest level starts at p = 0.95 (section 4.1)."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        others = max(self.out_features - 1, 1)
        odds = FINEST_PROBABILITY * others / (1.0 - FINEST_PROBABILITY)
        with torch.no_grad():
            self.bias[0] = torch.tensor(odds).log()

    def __getstate__(self) -> dict[str, Any]:
        # a tensor with a graph behind it can neither be copied nor pickled
        return {**self.__dict__, "demand": None}

    @property
    def learns(self) -> bool:
        """Whether this forward is one that gradients will be taken of."""
        return self.training and torch.is_grad_enabled()

    def decide(self, logits: Tensor) -> Decision:
        """What to decide by: the logits, in training with noise if it is on (equation 5)."""
        if not self.learns:
            return Decision(logits, None)
        wide = logits.float() if logits.dtype != torch.float64 else logits
        if self.noise:
            wide = wide - torch.empty_like(wide).exponential_().log()  # + Gumbel(0, 1)
        return Decision(wide, (wide / self.temperature.to(wide.dtype)).softmax(-1))

    def ask(self, chances: Tensor | None, levels: Tensor, costs: Sequence[Tensor]) -> None:
        """Keep how many queries were asked for, as `demand`.

        Args:
            chances: (B, R, L), see `Decision`; None in a forward without gradients.
            levels: (B, R) int64.
            costs: per level (R,), queries of a region.
        """
        if chances is None:
            if self.training:  # what an earlier forward asked for is not what this one does
                self.demand = None
            return
        price = torch.stack(list(costs), -1).to(chances.dtype)  # (R, L)
        self.demand = (one_hot(chances, levels) * price).sum((1, 2)).mean().float()


def one_hot(chances: Tensor, levels: Tensor) -> Tensor:
    """(B, R, L): exactly 0 or 1, with the gradient of the probabilities (straight through)."""
    hard = F.one_hot(levels, chances.shape[-1]).to(chances.dtype)
    return hard + (chances - chances.detach())


def certainty(chances: Tensor, levels: Tensor) -> Tensor:
    """(B, R) ones whose gradient is that of the chosen level's probability (equation 6)."""
    chosen = chances.gather(2, levels.unsqueeze(-1)).squeeze(-1)
    return 1.0 + (chosen - chosen.detach())  # in this order exactly 1 in half precision too
