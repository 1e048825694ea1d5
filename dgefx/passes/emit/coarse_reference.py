"""Verify, coarse reference: what a block must yield at mixed granularities, on all tokens.

The traced dense block runs node by node at its own size, with none of the generated code and no
kernel: a value of the query side has an entry per token, equal within a patch. It is averaged over
patches where the stream enters, after what mixes tokens (convolutions, products with tables), and
so are tables with an entry per token before they meet it. Attention takes keys and values from the
dense stream. Asked by `passes.plan.verify`.

Of the passes it trusts the trace, the two sides and which axis of a value holds tokens. It knows
no answer (`Unknown`) where a value that has to be averaged holds images on no axis of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from dgefx.passes.layout import Layout
from dgefx.passes.ops import ELEMENTWISE, map_sources, op_name, run_node
from dgefx.passes.sides.sides import Sides
from dgefx.passes.sides.token_axes import TokenAxes, needed_share
from dgefx.passes.sides.window_partition import Partition
from dgefx.passes.trace.block_trace import Trace

#: what does not follow the data, and is the same in both sides at the traced size
_FIXED = (int, float, bool, str, torch.dtype, torch.device, type(None))
_TOKEN_KINDS = ("tokens", "grid", "batch_merged", "window")


class Unknown(Exception):
    """The reference cannot be computed for this block."""


@dataclass(frozen=True)
class CoarseReference:
    """A traced block and what the split found out about it; see the module docstring.

    forms: of the values of the query side. partition: its windows, if any. constants: tensors of
    the trace that are no parameter or buffer. fixed: values of nodes that hold no tensor.
    """

    graph: fx.Graph
    sides: Sides
    forms: Mapping[fx.Node, TokenAxes]
    layout: Layout
    partition: Partition | None
    constants: Mapping[str, Tensor]
    fixed: Mapping[fx.Node, Any] = field(repr=False)

    @classmethod
    def of(
        cls,
        trace: Trace,
        sides: Sides,
        forms: Mapping[fx.Node, TokenAxes],
        layout: Layout,
        partition: Partition | None,
    ) -> CoarseReference:
        """From a trace whose values may be dropped."""
        fixed = {
            node: value
            for node, value in trace.values.items()
            if node.op.startswith("call_")
            and all(isinstance(leaf, _FIXED) for leaf in pytree.tree_leaves(value))
        }
        constants = {name: value.detach().clone() for name, value in trace.constants.items()}
        return cls(trace.graph, sides, dict(forms), layout, partition, constants, fixed)

    def run(self, dense: nn.Module, leaves: Sequence[Any], patches: Tensor) -> Tensor:
        """The block's result.

        Args:
            dense: the block or one of its structure. leaves: of its call, as it was traced.
            patches: (images, H*W) int64, the patch of every grid token in raster order, numbered
                over the batch.

        Returns:
            As the block's stream is laid out.

        Raises:
            Unknown: see the module docstring.
        """
        return _Run(self, dense, patches).run(leaves)


class _Run:
    """One evaluation, in the order of the graph."""

    def __init__(self, reference: CoarseReference, dense: nn.Module, patches: Tensor) -> None:
        self.given, self.dense = reference, dense
        self.sides, self.forms, self.layout = reference.sides, reference.forms, reference.layout
        first = int(patches.max()) + 1
        count = patches.shape[0] * self.layout.prefix
        prefix = torch.arange(first, first + count, device=patches.device)
        self.prefix = prefix.view(patches.shape[0], -1)
        self.patches = patches
        self.context: dict[fx.Node, Any] = {}
        self.query: dict[fx.Node, Any] = {}
        #: what updates add up on: all tokens, and their patches' means
        self.base: tuple[Tensor, Tensor]

    def run(self, leaves: Sequence[Any]) -> Tensor:
        inputs = iter(leaves)
        for node in self.given.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                self.context[node] = next(inputs)
                if node is self.sides.stream:
                    self._enter(node)
            elif node in self.given.fixed:
                self.context[node] = self.query[node] = self.given.fixed[node]
            else:
                self._visit(node)
        output = self.sides.output
        result = self.context[output] if self.sides.output_is_dense else self._updated(output)
        assert isinstance(result, Tensor)
        return result

    def _visit(self, node: fx.Node) -> None:
        if node in self.sides.context_side:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.context.__getitem__)
            self.context[node] = self._execute(node, args, kwargs)
        if node in self.sides.pooled:
            self._enter(node)
        elif node in self.sides.query_side:
            self.query[node] = self._ask(node)
        if node in self.sides.materialised:
            self.context[node] = self._updated(node)

    def _execute(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "get_attr" and str(node.target) in self.given.constants:
            return self.given.constants[str(node.target)]
        if node.op == "call_method" and str(node.target).endswith("_"):
            args = (args[0].clone(), *args[1:])  # the fill of a fresh tensor
        return run_node(node, self.dense, args, kwargs)

    # -- the query side ---------------------------------------------------------------------

    def _enter(self, node: fx.Node) -> None:
        """The query side goes on from a dense value of the main path."""
        value, form = self.context[node], self.forms[node]
        self.query[node] = self._averaged(value, form)
        rows = (self._rows(value, form), self._rows(self.query[node], form))
        if self.layout.update:
            rows = (torch.zeros_like(rows[0]), torch.zeros_like(rows[1]))
        self.base = rows

    def _updated(self, node: fx.Node) -> Tensor:
        """A main path value on all tokens: what it was before, plus the update of every patch."""
        value, form = self.query[node], self.forms[node]
        tokens, means = self.base
        rows = tokens + (self._rows(value, form) - means)
        if form.kind == "tokens":
            rows = rows[:, self._raster(form).argsort()]
        order = _order(value, self._tokens(form)[0])
        rows = rows.reshape([value.shape[axis] for axis in order])
        return rows.permute([order.index(axis) for axis in range(value.dim())])

    def _ask(self, node: fx.Node) -> Any:
        """The value of a node in the query side."""

        def pick(source: fx.Node, crosses: bool) -> Any:
            asks = source in self.sides.on_queries and not crosses
            return self.query[source] if asks else self.context[source]

        args, kwargs = map_sources(node, self.sides.edges, pick)
        form, name = self.forms.get(node), op_name(node, self.dense)
        core = self.sides.core_at(node)
        if core is not None and core.form.gathers_mask:
            like = self.query[core.query]
            args, kwargs = self._tables(node, args, kwargs, self.forms[core.query], like.shape)
        elif form is not None and name in ELEMENTWISE and not form.mixes:
            shapes = [v.shape for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            args, kwargs = self._tables(node, args, kwargs, form, torch.broadcast_shapes(*shapes))
        value = self._execute(node, args, kwargs)
        if form is None or form.kind not in _TOKEN_KINDS:
            return value
        return self._averaged(value, form) if form.mixes or name == "einsum" else value

    def _tables(
        self, node: fx.Node, args: Any, kwargs: Any, form: TokenAxes, shape: torch.Size
    ) -> tuple[Any, Any]:
        """Operands that do not come from the stream but have an entry per token, averaged.

        Args:
            form, shape: of the value that they are broadcast with.
        """
        if form.kind not in _TOKEN_KINDS:
            return args, kwargs

        def average(source: Any, value: Any, place: int | str) -> Any:
            table = isinstance(source, fx.Node) and source not in self.sides.on_queries
            if not table or (node, place) in self.sides.edges or not isinstance(value, Tensor):
                return value
            value = value.reshape((1,) * (len(shape) - value.dim()) + tuple(value.shape))
            sizes = [value.shape[axis] for axis in form.axes]
            if sizes != [shape[axis] for axis in form.axes] or max(sizes) == 1:
                return value
            held = self._tokens(form)[0]
            wide = value.expand([shape[a] if a in held else s for a, s in enumerate(value.shape)])
            if value.dtype != torch.bool:
                return self._averaged(wide, form)
            share = needed_share(node, op_name(node, self.dense), place, self.sides.on_queries)
            return self._averaged(wide.float(), form) > share

        args = tuple(average(s, v, i) for i, (s, v) in enumerate(zip(node.args, args, strict=True)))
        return args, {k: average(node.kwargs[k], v, k) for k, v in kwargs.items()}

    # -- patches -----------------------------------------------------------------------------

    def _raster(self, form: TokenAxes) -> Tensor:
        """Where the tokens of a "tokens" form, in raster order behind the prefix, are."""
        front = self.layout.prefix if form.prefix else 0
        places = self.layout.numbers().argsort() + front
        return torch.cat([torch.arange(front), places]).to(self.patches.device)

    def _tokens(self, form: TokenAxes) -> tuple[list[int], Tensor]:
        """The axes that hold images and tokens, and the patch of every element along them; -1 where
        there is no token.

        Raises:
            Unknown: images have no axis of their own.
        """
        if form.batch is None:
            raise Unknown("images are merged with another axis")
        patches = torch.cat([self.prefix, self.patches], 1) if form.prefix else self.patches
        axes = [form.batch, *form.windows, *form.axes]
        if form.kind in ("tokens", "batch_merged"):
            patches = patches[:, self._raster(form).argsort()]
        if form.kind == "batch_merged":
            patches, axes = patches.flatten(), [form.batch]
        elif form.kind == "grid":
            patches = patches.unflatten(1, self.layout.grid)
        elif form.kind == "window":
            patches = self._in_windows(form)
        if form.inner > 1:
            inner = torch.arange(form.inner, device=patches.device).repeat(patches.shape[0])
            inner = inner.view(-1, *[1] * (patches.dim() - 1))
            patches = patches.repeat_interleave(form.inner, 0)
            patches = torch.where(patches < 0, -1, patches * form.inner + inner)
        return axes, patches

    def _in_windows(self, form: TokenAxes) -> Tensor:
        partition = self.given.partition or Partition.whole(self.layout.grid)
        numbers = partition.numbers(self.patches.shape[0]).to(self.patches.device)
        padding = torch.full((1,), -1, device=self.patches.device)
        patches = torch.cat([padding, self.patches.flatten()])[numbers]
        if len(form.axes) == 1:
            patches = patches.flatten(3, 4)
        if len(form.windows) < 2:
            patches = patches.flatten(1, 2)
        if form.merged or not form.windows:
            patches = patches.flatten(0, 1)
        return patches

    def _rows(self, value: Tensor, form: TokenAxes) -> Tensor:
        """(images, tokens, F) in raster order of a main path value."""
        axes, patches = self._tokens(form)
        rows = value.permute(_order(value, axes)).reshape(patches.shape[0], patches[0].numel(), -1)
        return rows[:, self._raster(form)] if form.kind == "tokens" else rows

    def _averaged(self, value: Tensor, form: TokenAxes) -> Tensor:
        """A value with every token's entries replaced by the means over its patch."""
        axes, patches = self._tokens(form)
        if [value.shape[axis] for axis in axes] != list(patches.shape):
            raise Unknown("a value holds tokens otherwise than was found")
        order = _order(value, axes)
        moved = value.permute(order)
        rows, patch = moved.flatten(0, len(axes) - 1), patches.flatten()
        held = patch >= 0
        kept = patch.clamp(min=0)
        wide = rows.reshape(len(rows), -1)
        sums = wide.new_zeros((int(patch.max()) + 1, wide.shape[1]))
        sums.index_add_(0, patch[held], wide[held])
        counts = torch.bincount(patch[held], minlength=len(sums)).clamp(min=1).unsqueeze(1)
        means = torch.where(held.unsqueeze(1), (sums / counts)[kept], wide)
        return means.view(moved.shape).permute([order.index(a) for a in range(value.dim())])


def _order(value: Tensor, axes: list[int]) -> list[int]:
    """All axes of a value, these first."""
    return [*axes, *(axis for axis in range(value.dim()) if axis not in axes)]
