"""Gradients of a converted block against those of the dense one, once per code.

Outputs that are equal say nothing of a backward pass that was written by hand, or of gradients that
stop in the block. After `passes.plan.verify`. Next: `passes.plan.verify_types`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.config import DGEConfig
from dgefx.kernels.layout import has_parts
from dgefx.passes.errors import Refused
from dgefx.passes.plan.compare import converted_copy, randomised
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.plan.plan import BlockPlan
from dgefx.passes.plan.signature import has_backward_hooks
from dgefx.passes.trace.copies import copy_block
from dgefx.passes.trace.deterministic import Deterministic
from dgefx.precision import in_type

#: of a gradient, relative to its own norm and to that of all of them; float32 inside the block (a
#: norm that casts) leaves 1e-6 even in float64
_ALLOWED = {torch.float64: (1e-4, 1e-6), torch.float32: (1e-2, 1e-4)}
#: how many times what its types differ by a block may differ from itself in float64
_ROUNDINGS = 10
#: how much larger a second loss is
_LARGE = 1e4
#: side of a grid on which a backward pass is quick
_FEW = 4

#: what a type does not do, or an operation without a backward pass
_LACKING = (RuntimeError, TypeError, NotImplementedError)


def verify_gradients(example: BlockExample, plan: BlockPlan, config: DGEConfig) -> None:
    """Compare the gradients of the stream and of all parameters at the finest granularity, in train
    mode without random numbers and, where there is more in it then, in eval mode. In float64 or,
    where the block has float32 written into it or gives something else in float64 (SDPA takes a
    float32 mask for one of float64), in float32.

    Routed by detail, whatever `config` asks for: learned gates have gradients of their own.

    Raises:
        Refused: they differ.
    """
    config = DGEConfig(config.granularities, config.region, budget=config.budget)
    both = plan.eval_calls_more or bool(plan.functions)
    # a backward pass of the user's may do on all tokens what it does not on few
    seen = not plan.functions and not any(map(has_backward_hooks, example.block.modules()))
    for training in (True, False) if both else (True,):
        less = smaller_grids(example, plan) if seen else []
        if seen and not plan.numbers_images:
            less.append((example.of_images(torch.zeros(1, dtype=torch.int64)), plan))
        if not _equal_on_first(less, config, training):
            _Gradients(example, plan, config, training).compare()


def smaller_grids(example: BlockExample, plan: BlockPlan) -> list[tuple[BlockExample, BlockPlan]]:
    """Smaller grids on which a block runs the same code, if the dense block takes them, the
    smallest first: a backward pass in float64 on all tokens may take longer than all else."""
    layout = plan.layout
    grids = [layout.grid]
    movable = layout.token_order is None and not has_parts(layout.order)
    window = None if plan.windows is None else plan.windows.size
    if movable and window is not None:
        few = (2 * window[0], 3 * window[1])
        grids += [few] if 2 * few[0] * few[1] <= layout.grid[0] * layout.grid[1] else []
    elif movable and not plan.has_questions:
        while min(grids[-1]) > _FEW:
            height, width = grids[-1]
            grids.append((-(-height // 2), -(-width // 2)))
    tried = dataclasses.replace(plan.tried(False), reference=None)
    moved = map(example.at_grid, grids[:0:-1])
    return [(less, dataclasses.replace(tried, layout=less.layout)) for less in moved]


def _equal_on_first(
    smaller: list[tuple[BlockExample, BlockPlan]], config: DGEConfig, training: bool
) -> bool:
    """Whether the gradients were compared on the first of these that the block takes, and are
    equal there."""
    try:
        return any(_Gradients(*given, config, training).compare() for given in smaller)
    except Exception:  # the block may do something else there, or fail
        return False


@dataclass(frozen=True)
class _Gradients:
    """The gradients of one block and of its converted form on one example."""

    example: BlockExample
    plan: BlockPlan
    config: DGEConfig
    training: bool

    def compare(self) -> bool:
        """Whether there was anything to compare.

        Raises:
            Refused: they differ.
        """
        types = self.plan.guards[int(self.training)].types
        double = self._pairs(torch.float64) if torch.float64 in types else []
        refused = [self._difference(*pair, torch.float64) for pair in double]
        if double and not any(refused):
            return True
        single = self._pairs(torch.float32) if torch.float32 in types else []
        for pair in single:
            if (other := self._difference(*pair, torch.float32)) is not None:
                raise other
        # what float32 is too coarse to show is no rounding in float64, unless the block rounds
        for pair, (_, rounded) in zip(double, single, strict=False):
            if (other := self._difference(*pair, torch.float64, rounded)) is not None:
                raise other
        if any(refused) and not single:
            raise next(other for other in refused if other is not None)
        return bool(single)

    def _pairs(self, dtype: torch.dtype) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """(of the converted block, of the dense one) by name, in a type; none where the dense block
        has no gradients in it."""
        # a backward pass of the user's may clip
        scales = (1.0, _LARGE) if self.plan.functions else (1.0,)
        return [pair for scale in scales if (pair := self._both(dtype, scale)) is not None]

    def _difference(
        self,
        found: dict[str, Tensor],
        wanted: dict[str, Tensor],
        dtype: torch.dtype,
        rounded: dict[str, Tensor] | None = None,
    ) -> Refused | None:
        """What differs.

        Args:
            rounded: the dense block's in float32; some times what they differ by is allowed too.
        """
        own, whole = _ALLOWED[dtype]
        total = sum(float(g.norm()) ** 2 for g in wanted.values()) ** 0.5
        for name, gradient in wanted.items():
            error = float((found[name] - gradient).norm())
            allowed = own * float(gradient.norm()) + whole * total
            if rounded is not None:
                allowed += _ROUNDINGS * float((rounded[name] - gradient).norm())
            if not error <= allowed:
                return self._refusal(name, error, gradient)
        return None

    def _refusal(self, name: str, error: float, wanted: Tensor) -> Refused:
        if self.plan.functions:
            return Refused(
                f"its gradients would be others: {' and '.join(self.plan.functions)} has a "
                f"backward pass of its own, which the converted block would leave out",
                "other gradients",
            )
        if not float(wanted.norm()):
            return Refused(
                f"no gradient reaches {name} in it, and in the converted block one would: it stops "
                f"them with torch.no_grad() or detach()",
                "other gradients",
            )
        return Refused(
            f"verification: the gradient of {name} differs from the dense block's by {error:.1e}, "
            f"of {float(wanted.norm()):.1e}",
            "verification failed",
        )

    def _both(
        self, dtype: torch.dtype, scale: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """(of the converted block, of the dense one); None where the dense one has none.

        Args:
            scale: of the loss.
        """
        reference = randomised(self.example.block, self.training)
        try:
            reference = in_type(reference, dtype)
            other = copy_block(reference, True)
            wanted = self._of(reference, reference, dtype, scale)
        except _LACKING:
            return None
        converted = in_type(converted_copy(other, self.plan, self.config), dtype)
        try:
            return self._of(converted, other, dtype, scale), wanted
        except _LACKING as error:
            if dtype is torch.float64:
                return None
            if self.plan.functions:
                raise self._refusal("", 0.0, self.example.stream) from error
            raise Refused(
                f"verification: the backward pass of the converted block fails: {error}",
                "verification failed",
            ) from error

    def _of(
        self, module: nn.Module, holder: nn.Module, dtype: torch.dtype, scale: float
    ) -> dict[str, Tensor]:
        """Gradients by name; zeros where there is none.

        Args:
            holder: whose parameters are asked for; `module` runs on them.
        """
        parameters = holder.named_parameters()
        wanted: dict[str, Tensor] = {n: p for n, p in parameters if p.is_floating_point()}
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        noise = self.example.with_noise(torch.Generator().manual_seed(6)).stream
        stream = noise.to(dtype).requires_grad_(True)
        wanted["its input"] = stream
        given = self.example.with_stream(stream).in_type(dtype)
        for index, value in enumerate(pytree.tree_leaves(given.call)):
            if isinstance(value, Tensor) and value.is_floating_point() and value.is_leaf:
                wanted[f"input {index}"] = value.requires_grad_(True)
        random = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
        with torch.enable_grad(), random:
            # seeded, as `nn.MultiheadAttention` draws by itself
            output = given.run(module, Deterministic())
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
            loss = scale * (output * weights.to(output)).sum()
            gradients: tuple[Tensor | None, ...] = (None,) * len(wanted)
            if loss.requires_grad:  # not under `torch.no_grad()` in the block
                gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return {
            name: torch.zeros_like(value) if gradient is None else gradient
            for (name, value), gradient in zip(wanted.items(), gradients, strict=True)
        }
