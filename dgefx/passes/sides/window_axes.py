"""Pass 4d', window forms: values that hold windows, and the movement between image and windows.

Data movement is run on token numbers, so that a value on its way is told from one that has
arrived, and the partition that it arrives at is read off (`passes.sides.window_partition`). Used by
`passes.sides.find_axes`, and by `passes.emit.rewrite` for the rule and for masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dgefx.nn.windows import WindowRule, borders_of, usual_step
from dgefx.passes.errors import Refused
from dgefx.passes.layout import Layout
from dgefx.passes.ops import op_name, run_node
from dgefx.passes.sides.sides import Sides
from dgefx.passes.sides.token_axes import MOVES, Probe, TokenAxes, size_inputs, stream_axes
from dgefx.passes.sides.window_partition import (
    Partition,
    candidate_rules,
    fits,
    fixed_rule,
    mask_cuts,
    read_partition,
)
from dgefx.passes.trace.block_trace import Trace


class WindowAxesFinder:
    """The windows of one traced block.

    Args:
        base: a value for every node; filled by the caller. forms: likewise, as far as judged.
        execute: runs one node: (node, args, kwargs, index).

    Attributes:
        partition: None where attention sees the whole image.
        cuts: per axis, slots before which patches end because a mask changes there.
    """

    def __init__(
        self,
        trace: Trace,
        sides: Sides,
        layout: Layout,
        base: dict[fx.Node, Any],
        forms: dict[fx.Node, TokenAxes],
        execute: Callable[[fx.Node, Any, Any, int], Any],
    ) -> None:
        self.trace, self.sides, self.layout = trace, sides, layout
        self.base, self.forms, self.execute = base, forms, execute
        #: how many tokens may attend to each other
        self.slots = {
            shape[axis]
            for core in sides.cores
            for shape in [trace.values[core.query].shape]
            for axis in core.query_axes
            if len(shape) >= -axis
        }
        self.partition: Partition | None = None
        self.landing: fx.Node | None = None
        self.cuts: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def moves_tokens(self, node: fx.Node) -> bool:
        """Whether `node` is data movement of a value that holds tokens."""
        if node.op == "call_module" or op_name(node, self.trace.root) not in MOVES:
            return False
        source = self._moved(node)
        return source in self.forms and self.forms[source].kind != "no_tokens"

    @staticmethod
    def _moved(node: fx.Node) -> fx.Node:
        """The value that a movement moves."""
        source = node.args[0] if node.args else next(iter(node.kwargs.values()))
        return source if isinstance(source, fx.Node) else node

    def lands(self, node: fx.Node) -> bool:
        """Whether anything but movement and sizes reads `node`, or it is taken into parts."""
        return any(
            isinstance(self.base.get(user), (Tensor, tuple, list))
            and not isinstance(self.base.get(user), torch.Size)
            and (
                user.op == "call_module"
                or op_name(user, self.trace.root) not in MOVES
                or isinstance(self.base.get(user), (tuple, list))
            )
            for user in node.users
        )

    def numbers(self, node: fx.Node, values: dict[fx.Node, Any], grid: tuple[int, int]) -> Tensor:
        """1 + image * H * W + token for every element of a moving value; 0 in padding.

        Args:
            values: of every node that `node` needs, on `grid`.
        """
        source = self._moved(node)
        # also through what moves nothing at this size: a padding of zero rows
        if self.moves_tokens(source):
            seed = self.numbers(source, values, grid)
        else:
            seed = self.seed(self.forms[source], values[source].shape, grid)
            if self.forms[source].inner > 1:
                # laid out as the value is: a view may join heads and channels
                seed = torch.empty_like(values[source], dtype=seed.dtype).copy_(seed)
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: seed if n is source else values[n]
        )
        found = run_node(node, self.trace.root, args, kwargs)
        assert isinstance(found, Tensor)
        return found

    def seed(self, form: TokenAxes, shape: torch.Size, grid: tuple[int, int]) -> Tensor:
        """Numbers of a value of this shape that has this form; ill-fitting shapes have none."""
        if form.batch is None or form.prefix or form.kind in ("no_tokens", "in_transit"):
            raise Refused("tokens are moved that are not in the image's order", "windows")
        if form.kind == "window":
            return self._window_seed(form, shape)
        count = grid[0] * grid[1]
        if form.kind == "batch_merged":
            line = [1] * len(shape)
            line[form.axes[0]] = shape[form.axes[0]]
            every = torch.arange(shape[form.axes[0]])
            if self.layout.token_order is not None and len(every) % count == 0:
                every = every // count * count + self.layout.numbers().repeat(len(every) // count)
            return (every + 1).view(line).expand(shape)
        sizes = [shape[axis] for axis in form.axes]
        if torch.Size(sizes).numel() != count:
            return torch.full(shape, -1)
        place = [1] * len(shape)
        for axis in form.axes:
            place[axis] = shape[axis]
        images = [1] * len(shape)
        images[form.batch] = shape[form.batch]
        first = torch.arange(shape[form.batch]).view(images) * count
        tokens = torch.arange(count)
        if self.layout.token_order is not None and form.kind == "tokens":
            tokens = self.layout.numbers()
        return (first + tokens.view(place) + 1).expand(shape)

    def _window_seed(self, form: TokenAxes, shape: torch.Size) -> Tensor:
        partition = self.partition or Partition.whole(self.layout.grid)
        numbers = partition.numbers(self._images(self.trace.values))
        if len(form.windows) < 2:
            numbers = numbers.flatten(1, 2)
        if len(form.axes) == 1:
            numbers = numbers.flatten(-2, -1)
        if form.merged:
            numbers = numbers.flatten(0, 1)
        elif not form.windows:  # one window that has no axis of its own
            numbers = numbers.squeeze(1)
        numbers = numbers.repeat_interleave(form.inner, 0)
        axes = [form.batch, *form.windows, *form.axes]
        place = [1] * len(shape)
        for axis, size in zip(axes, numbers.shape, strict=True):
            if axis is None or axis >= len(shape) or shape[axis] != size:
                return torch.full(shape, -1)
            place[axis] = size
        return numbers.view(place).expand(shape)

    def _images(self, values: dict[fx.Node, Any]) -> int:
        return int(values[self.sides.stream].shape[stream_axes(self.layout).batch or 0])

    def arrives(self, node: fx.Node) -> bool:
        """Whether tokens end a movement here: it came from somewhere in between, and `lands`."""
        if not self.moves_tokens(node) or self.layout.prefix or not self.lands(node):
            return False
        source = self._moved(node)
        while self.moves_tokens(source):
            if self.forms[source].kind == "in_transit":
                return True
            source = self._moved(source)
        return False

    def read(self, node: fx.Node) -> None:
        numbers = self.numbers(node, self.base, self.layout.grid)
        images = self._images(self.trace.values)
        permuted = self.layout.token_order is not None
        found = read_partition(numbers, images, self.layout.grid, self.slots, permuted)
        if self.partition is not None:
            if found is not None:
                raise Refused("the block has two different partitions into windows", "windows")
            return
        self.partition, self.landing = found, node if found else None

    def candidates(self, value: Tensor) -> list[TokenAxes]:
        """Every way in which a value of this shape could hold windows."""
        if self.layout.prefix:
            return []
        partition = self.partition or Partition.whole(self.layout.grid)
        images = self._images(self.trace.values)
        rows, columns = partition.windows
        shape, dim = value.shape, value.dim()
        found = []
        for batch, lead in enumerate(shape):
            options: list[tuple[int, tuple[int, ...], bool]] = []
            known = self.partition is not None
            if lead % (images * rows * columns) == 0:
                options.append((lead // (images * rows * columns), (), known))
            if lead == images and known:
                for axis in range(batch + 1, dim):
                    if shape[axis] == rows * columns:
                        options.append((1, (axis,), False))
                    if tuple(shape[axis : axis + 2]) == (rows, columns):
                        options.append((1, (axis, axis + 1), False))
            for inner, windows, merged in options:
                for axis in range(max((batch, *windows)) + 1, dim):
                    slots: list[tuple[int, ...]] = []
                    if shape[axis] == partition.size[0] * partition.size[1]:
                        slots.append((axis,))
                    if tuple(shape[axis : axis + 2]) == partition.size:
                        slots.append((axis, axis + 1))
                    for axes in slots:
                        found.append(
                            TokenAxes("window", axes, False, batch, False, windows, merged, inner)
                        )
        # of a single window, axes that count windows are 1: next to slot rows and columns they do
        return sorted(found, key=lambda f: (f.inner, -len(f.windows) * (len(f.axes) == 2)))

    def note_table(self, table: Tensor, form: TokenAxes, axes: list[int], rank: int) -> None:
        """Cut the windows where a mask changes that is added to a value of this form.

        Args:
            axes: slot axes of the table. rank: of the value.
        """
        if self.partition is None:
            return
        count = self.partition.windows[0] * self.partition.windows[1]
        leads = [form.batch] if form.merged else list(form.windows)
        leads = [a - (rank - table.dim()) for a in leads if a is not None]
        leads = [a for a in leads if a >= 0 and table.shape[a] > 1]
        if not leads or count == 1:
            return
        value = table.movedim((*leads, *axes), tuple(range(len(leads) + len(axes))))
        value = value.flatten(0, len(leads) - 1).flatten(1, len(axes))
        if form.merged:
            value = value.unflatten(0, (-1, count, form.inner)).transpose(0, 1).movedim(2, 1)
            value = value.movedim(3, 1)
        if self.partition.order is not None:
            windows, slots = (torch.tensor(numbers) for numbers in self.partition.order)
            value = value[windows][:, slots]
        maps = self.partition.rows, self.partition.columns
        known = [borders_of(tokens, usual_step(tokens)) for tokens in maps]
        found = mask_cuts(value, self.partition.size)
        rows, columns = (
            tuple(sorted(new.union(old) - set(border)))
            for new, old, border in zip(found, self.cuts, known, strict=True)
        )
        self.cuts = (rows, columns)

    def rule(self) -> WindowRule:
        """The rule of the block's windows; whether it holds on other sizes, `passes.plan.sizes`
        asks the dense block itself."""
        if self.partition is None or self.landing is None:
            return WindowRule()
        if any(self.cuts) or self.layout.token_order is not None:
            return fixed_rule(self.partition, self.cuts)
        rules = candidate_rules(self.partition)
        tall, wide = self.partition.size
        for grid in ((2 * tall, 3 * wide), (2 * tall + 1, 3 * wide - 1)):
            other = self._partition_at(grid)
            if other is not None:
                rules = [rule for rule in rules if fits(rule, other)]
        return rules[0] if rules else fixed_rule(self.partition)

    def _partition_at(self, grid: tuple[int, int]) -> Partition | None:
        """The partition of another grid, or None where the block does not take it."""
        assert self.landing is not None
        needed = {self.landing}
        front = [self.landing]
        while front:
            for source in front.pop().all_input_nodes:
                if source not in needed:
                    needed.add(source)
                    front.append(source)
        values = self._inputs_at(grid)
        try:
            with torch.no_grad():
                for index, node in enumerate(self.trace.graph.nodes):
                    if node in needed and node not in values:
                        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                        values[node] = self.execute(node, args, kwargs, index)
            numbers = self.numbers(self.landing, values, grid)
            return read_partition(numbers, self._images(values), grid, self.slots)
        except Exception:  # whatever the block raises, it does not take this size
            return None

    def _inputs_at(self, grid: tuple[int, int]) -> dict[fx.Node, Any]:
        """The block's inputs with a stream, and its sizes, for another grid."""
        stream = self.trace.values[self.sides.stream]
        shape = self.layout.shape_at(tuple(stream.shape), grid)
        values = {n: self.trace.values[n] for n in self.trace.graph.nodes if n.op == "placeholder"}
        values[self.sides.stream] = torch.zeros(shape, dtype=stream.dtype, device=stream.device)
        pair = size_inputs(self.trace, self.layout)
        if pair is not None:
            values[pair[0]], values[pair[1]] = grid
        return values

    def place(self, form: TokenAxes, probe: Probe) -> dict[int, range]:
        partition = self.partition or Partition.whole(self.layout.grid)
        window, slot = partition.place(probe.row, probe.column)
        count = partition.windows[0] * partition.windows[1]
        assert form.batch is not None
        lead = (probe.image * count + window if form.merged else probe.image) * form.inner
        found = {form.batch: range(lead, lead + form.inner)}
        pairs = [(form.windows, window, divmod(window, partition.windows[1]))]
        pairs.append((form.axes, slot, divmod(slot, partition.size[1])))
        for axes, joint, apart in pairs:
            indices = (joint,) if len(axes) == 1 else apart
            for axis, index in zip(axes, indices, strict=False):
                found[axis] = range(index, index + 1)
        return found
