"""Pass 4b, forms: along which axes every value of the query world holds tokens, and who mixes them.

An oracle by perturbation, not a list of layers: the block runs again with one token changed in
one image, keys and values held fixed. A value that changes only where that token lies has its
token axis there; a value that changes elsewhere mixes tokens, and its change is confined again
before going on, so that every node is judged by itself. Next: `passes.split`.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dgefx.kernels.window import WindowAxes
from dgefx.nn.windows import WindowRule, borders_of, usual_step
from dgefx.passes.cores import map_sources
from dgefx.passes.grid import Layout
from dgefx.passes.ops import MOVEMENT, op_name
from dgefx.passes.trace import Trace, run_node
from dgefx.passes.windows import (
    Partition,
    candidate_rules,
    fits,
    fixed_rule,
    mask_cuts,
    read_partition,
)
from dgefx.passes.worlds import Refused, Worlds

#: relative size of a change that counts; float32 noise of unaffected rows is below 1e-6
_TOLERANCE = 1e-5
_UNINITIALISED = frozenset({"new_empty", "empty_like", "empty"})


@dataclass(frozen=True)
class Form:
    """How a value of the query world holds tokens.

    kind: "tokens" (one axis, raster), "grid" (two axes, H and W), "window" (slots of windows),
        "moving" (on the way between two of these) or "free" (no token axis).
    axes: the token axis or axes. prefix: whether prefix tokens are on the axis too.
    batch: the image axis, None where images are merged with something else.
    mixes: whether the node lets tokens see each other.
    windows, merged, inner: of a "window", see `dgefx.kernels.window.WindowAxes`.
    """

    kind: str
    axes: tuple[int, ...] = ()
    prefix: bool = False
    batch: int | None = None
    mixes: bool = False
    windows: tuple[int, ...] = ()
    merged: bool = False
    inner: int = 1

    @property
    def window_axes(self) -> WindowAxes:
        """For the kernels; a plain form counts as one window."""
        assert self.batch is not None
        return WindowAxes(self.batch, self.merged, self.inner, self.windows, self.axes)


#: moves tokens and changes none; padding is zero
MOVES = MOVEMENT | {"roll", "pad"}


@dataclass(frozen=True)
class _Probe:
    """One perturbation: `image` and grid token `token` at (row, column)."""

    image: int
    row: int
    column: int


def randomise_constants(module: nn.Module) -> None:
    """Add noise, in place, to parameters that are constant (zeros, ones, layer scales of 1e-6).

    They would hide from the oracle, and from verification, what they multiply.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.numel():
                spread = parameter.max() - parameter.min()
                if spread <= 1e-3 * parameter.abs().max():
                    noise = torch.rand(parameter.shape, generator=generator) - 0.5
                    parameter.add_(noise.to(parameter))


def size_inputs(trace: Trace, layout: Layout) -> tuple[fx.Node, fx.Node] | None:
    """The block's arguments that hold the grid's rows and columns, if it takes them."""
    sizes = [
        n for n in trace.graph.nodes if n.op == "placeholder" and isinstance(trace.values[n], int)
    ]
    for rows, columns in itertools.pairwise(sizes):
        if (trace.values[rows], trace.values[columns]) == layout.grid:
            return rows, columns
    return None


class FormFinder:
    """Runs the probes over one traced block."""

    def __init__(self, trace: Trace, worlds: Worlds, layout: Layout) -> None:
        self.trace = trace
        self.worlds = worlds
        self.layout = layout
        height, width = layout.grid
        # off the centre, where position tables are often zero; other rows and columns each
        self.probes = (
            _Probe(0, height // 3, (2 * width) // 3),
            _Probe(1, (2 * height) // 3, width // 3),
        )
        self.base: dict[fx.Node, Any] = {}
        self.forms: dict[fx.Node, Form] = {}
        shapes = [trace.values[core.query].shape for core in worlds.cores]
        self.slots = {shape[-2] for shape in shapes if len(shape) > 1}  # tokens that attend
        self.partition: Partition | None = None
        self.landing: fx.Node | None = None
        self.cuts: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @property
    def windowed(self) -> bool:
        """Whether attention sees parts of the image only."""
        return self.partition is not None

    def _execute(self, node: fx.Node, args: Any, kwargs: Any, index: int) -> Any:
        if self.trace.root.training:
            torch.manual_seed(index)  # dropout draws the same mask in every run
        if node.op == "call_method" and str(node.target).endswith("_"):
            args = (args[0].clone(), *args[1:])  # the fill of a fresh tensor
        return run_node(node, self.trace.root, args, kwargs)

    def _run_base(self, inputs: dict[fx.Node, Any]) -> None:
        for index, node in enumerate(self.trace.graph.nodes):
            if node.op == "output":
                break
            if node.op == "placeholder":
                self.base[node] = inputs[node]
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.base.__getitem__)
            self.base[node] = self._execute(node, args, kwargs, index)

    def find(self) -> dict[fx.Node, Form]:
        """The form of every tensor of the query world.

        Raises:
            Refused: the block yields NaN or infinity on ordinary input.
        """
        stream = self.worlds.stream
        generator = torch.Generator().manual_seed(1)
        example: Tensor = self.trace.values[stream]
        noise = torch.randn(example.shape, generator=generator).to(example)
        inputs = {n: self.trace.values[n] for n in self.trace.graph.nodes if n.op == "placeholder"}
        inputs[stream] = noise
        randomise_constants(self.trace.root)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            self._run_base(inputs)
            result = self.base[self.worlds.output]
            if not bool(torch.isfinite(result).all()):
                raise Refused("the block yields NaN or infinity on random input")
            changed = [self._moved_stream(noise, probe) for probe in self.probes]
            return self._judge(changed)

    def _moved_stream(self, base: Tensor, probe: _Probe) -> Tensor:
        moved = base.clone()
        view = self._canonical(moved)
        token = self.layout.prefix + probe.row * self.layout.grid[1] + probe.column
        generator = torch.Generator().manual_seed(2)
        # far enough to move attention that is nearly one-hot
        view[probe.image, token] += 3 * torch.randn(view.shape[-1], generator=generator).to(view)
        return moved

    def _canonical(self, stream: Tensor) -> Tensor:
        """A (B, N, C)-indexed view that writes through to the stream."""
        order = self.layout.order
        if order == "BHWC":
            return stream.view(stream.shape[0], -1, stream.shape[-1])
        if order == "BCHW":
            return stream.view(*stream.shape[:2], -1).transpose(1, 2)
        return {
            "BNC": lambda s: s,
            "NBC": lambda s: s.transpose(0, 1),
            "BCN": lambda s: s.transpose(1, 2),
        }[order](stream)

    def _judge(self, streams: list[Tensor]) -> dict[fx.Node, Form]:
        forms = self.forms
        moved: list[dict[fx.Node, Any]] = [{self.worlds.stream: s} for s in streams]
        forms[self.worlds.stream] = self._stream_form()
        judged = self.worlds.query | self.worlds.main
        for index, node in enumerate(self.trace.graph.nodes):
            if node not in judged or node is self.worlds.stream:
                continue
            for values in moved:
                args, kwargs = self._arguments(node, values)
                values[node] = self._execute(node, args, kwargs, index)
            value = self.base[node]
            if not isinstance(value, Tensor):
                continue
            forms[node] = self._form(node, value, moved, forms)
        return forms

    def _arguments(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        judged = self.worlds.query | self.worlds.main

        def pick(source: fx.Node, crosses: bool) -> Any:
            outside = crosses or source not in judged
            return self.base[source] if outside else values.get(source, self.base[source])

        return map_sources(node, self.worlds.edges, pick)

    def _stream_form(self) -> Form:
        order = self.layout.order
        prefix = self.layout.prefix > 0
        if order in ("BHWC", "BCHW"):
            return Form("grid", (order.index("H"), order.index("W")), False, 0)
        return Form("tokens", (order.index("N"),), prefix, order.index("B"))

    def _form(
        self,
        node: fx.Node,
        value: Tensor,
        moved: list[dict[fx.Node, Any]],
        forms: dict[fx.Node, Form],
    ) -> Form:
        if op_name(node, self.trace.root) in _UNINITIALISED:
            return Form("free")
        masks = [_changed(value, values[node]) for values in moved]
        if not any(bool(mask.any()) for mask in masks):
            return Form("free", batch=_batch_axis(masks, self.probes))
        batch = _batch_axis(masks, self.probes)
        form = self._matching(node, masks, value, batch)
        if form is None and self._moves_tokens(node):
            if self._lands(node):
                self._read_windows(node)
                form = self._matching(node, masks, value, batch)
            form = form or Form("moving")
        return form or self._confine(node, value, moved, forms)

    def _matching(
        self, node: fx.Node, masks: list[Tensor], value: Tensor, batch: int | None
    ) -> Form | None:
        """The form whose places are exactly those that changed; of data movement, the form whose
        token numbers are those that the movement makes."""
        numbers = None
        if self._moves_tokens(node) and not self.layout.prefix:
            numbers = self.numbers(node, self.base, self.layout.grid)

        def fit(form: Form) -> bool:
            pairs = zip(masks, self.probes, strict=True)
            if not all(_only_at(m, self._place(form, p)) for m, p in pairs):
                return False
            if numbers is None or form.batch is None:
                return True
            return torch.equal(numbers, self._seed(form, value.shape, self.layout.grid))

        for source in node.all_input_nodes:
            form = self.forms.get(source)
            if form is None or form.batch is None or form.kind in ("free", "moving"):
                continue
            kept = dataclasses.replace(form, mixes=False)
            if max(kept.axes) < value.dim() and fit(kept):
                return kept
        plain = next((form for form in self._candidates(value, batch) if fit(form)), None)
        if plain is not None and plain.batch is not None:
            return plain
        return next((form for form in self._window_candidates(value) if fit(form)), plain)

    # -- windows -----------------------------------------------------------------------------

    def _moves_tokens(self, node: fx.Node) -> bool:
        """Whether `node` is data movement of a value that holds tokens."""
        if node.op == "call_module" or op_name(node, self.trace.root) not in MOVES:
            return False
        source = self._moved(node)
        return source in self.forms and self.forms[source].kind != "free"

    @staticmethod
    def _moved(node: fx.Node) -> fx.Node:
        """The value that a movement moves."""
        source = node.args[0] if node.args else next(iter(node.kwargs.values()))
        return source if isinstance(source, fx.Node) else node

    def _lands(self, node: fx.Node) -> bool:
        """Whether anything but movement and sizes reads `node`."""
        return any(
            isinstance(self.base.get(user), (Tensor, tuple, list))
            and not isinstance(self.base.get(user), torch.Size)
            and (user.op == "call_module" or op_name(user, self.trace.root) not in MOVES)
            for user in node.users
        )

    def numbers(self, node: fx.Node, values: dict[fx.Node, Any], grid: tuple[int, int]) -> Tensor:
        """1 + image * H * W + token for every element of a moving value; 0 in padding.

        Args:
            values: of every node that `node` needs, on `grid`.
        """
        source = self._moved(node)
        # also through what moves nothing at this size: a padding of zero rows
        if self._moves_tokens(source):
            seed = self.numbers(source, values, grid)
        else:
            seed = self._seed(self.forms[source], values[source].shape, grid)
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: seed if n is source else values[n]
        )
        found = run_node(node, self.trace.root, args, kwargs)
        assert isinstance(found, Tensor)
        return found

    def _seed(self, form: Form, shape: torch.Size, grid: tuple[int, int]) -> Tensor:
        """Numbers of a value of this shape that has this form; ill-fitting shapes have none."""
        if form.batch is None or form.prefix or form.kind in ("free", "moving"):
            raise Refused("tokens are moved that are not in the image's order")
        if form.kind == "window":
            return self._window_seed(form, shape)
        sizes = [shape[axis] for axis in form.axes]
        if torch.Size(sizes).numel() != grid[0] * grid[1]:
            return torch.full(shape, -1)
        place = [1] * len(shape)
        for axis in form.axes:
            place[axis] = shape[axis]
        images = [1] * len(shape)
        images[form.batch] = shape[form.batch]
        first = torch.arange(shape[form.batch]).view(images) * (grid[0] * grid[1])
        tokens = torch.arange(grid[0] * grid[1]).view(place)
        return (first + tokens + 1).expand(shape)

    def _window_seed(self, form: Form, shape: torch.Size) -> Tensor:
        partition = self.partition or Partition.whole(self.layout.grid)
        numbers = partition.numbers(self._images(self.trace.values))
        if len(form.windows) < 2:
            numbers = numbers.flatten(1, 2)
        if len(form.axes) == 1:
            numbers = numbers.flatten(-2, -1)
        if form.merged:
            numbers = numbers.flatten(0, 1)
        elif not form.windows:
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
        return int(values[self.worlds.stream].shape[self._stream_form().batch or 0])

    def _read_windows(self, node: fx.Node) -> None:
        numbers = self.numbers(node, self.base, self.layout.grid)
        images = self._images(self.trace.values)
        found = read_partition(numbers, images, self.layout.grid, self.slots)
        if self.partition is not None:
            if found is not None:
                raise Refused("the block has two different partitions into windows")
            return
        self.partition, self.landing = found, node if found else None

    def _window_candidates(self, value: Tensor) -> list[Form]:
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
            if lead % (images * rows * columns) == 0:
                options.append((lead // (images * rows * columns), (), rows * columns > 1))
            if lead == images and rows * columns > 1:
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
                            Form("window", axes, False, batch, False, windows, merged, inner)
                        )
        return sorted(found, key=lambda form: form.inner)

    def note_table(self, table: Tensor, form: Form, axes: list[int], rank: int) -> None:
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
        maps = self.partition.rows, self.partition.columns
        known = [borders_of(tokens, usual_step(tokens)) for tokens in maps]
        found = mask_cuts(value, self.partition.size)
        rows, columns = (
            tuple(sorted(new.union(old) - set(border)))
            for new, old, border in zip(found, self.cuts, known, strict=True)
        )
        self.cuts = (rows, columns)

    def window_rule(self) -> WindowRule:
        """The rule of the block's windows, checked on other grid sizes."""
        if self.partition is None or self.landing is None:
            return WindowRule()
        if any(self.cuts):
            return fixed_rule(self.partition, self.cuts)
        rules = candidate_rules(self.partition)
        height, width = self.layout.grid
        tall, wide = self.partition.size
        checked = False
        for grid in ((height + tall, width + 2 * wide), (height + tall + 1, width + wide - 1)):
            other = self._partition_at(grid)
            if other is not None:
                checked = True
                rules = [rule for rule in rules if fits(rule, other)]
        return rules[0] if rules and checked else fixed_rule(self.partition)

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
                        values[node] = self._execute(node, args, kwargs, index)
            numbers = self.numbers(self.landing, values, grid)
            return read_partition(numbers, self._images(values), grid, self.slots)
        except Exception:  # whatever the block raises, it does not take this size
            return None

    def _inputs_at(self, grid: tuple[int, int]) -> dict[fx.Node, Any]:
        """The block's inputs with a stream, and its sizes, for another grid."""
        stream = self.trace.values[self.worlds.stream]
        order = self.layout.order
        shape = list(stream.shape)
        if order in ("BHWC", "BCHW"):
            shape[order.index("H")], shape[order.index("W")] = grid
        else:
            shape[order.index("N")] = grid[0] * grid[1]
        values = {n: self.trace.values[n] for n in self.trace.graph.nodes if n.op == "placeholder"}
        values[self.worlds.stream] = torch.zeros(shape, dtype=stream.dtype, device=stream.device)
        pair = size_inputs(self.trace, self.layout)
        if pair is not None:
            values[pair[0]], values[pair[1]] = grid
        return values

    def _candidates(self, value: Tensor, batch: int | None) -> list[Form]:
        shape = value.shape
        height, width = self.layout.grid
        found = []
        for axis, size in enumerate(shape):
            if size == self.layout.tokens and self.layout.prefix:
                found.append(Form("tokens", (axis,), True, batch))
            if size == height * width:
                found.append(Form("tokens", (axis,), False, batch))
        for axis in range(len(shape) - 1):
            if tuple(shape[axis : axis + 2]) == (height, width):
                found.append(Form("grid", (axis, axis + 1), False, batch))
        return found

    def _place(self, form: Form, probe: _Probe) -> dict[int, range]:
        """Axis -> indices of the perturbed token in a value of this form."""
        if form.kind == "window":
            return self._window_place(form, probe)
        if form.kind == "grid":
            found = {form.axes[0]: probe.row, form.axes[1]: probe.column}
        else:
            offset = self.layout.prefix if form.prefix else 0
            found = {form.axes[0]: offset + probe.row * self.layout.grid[1] + probe.column}
        return {axis: range(index, index + 1) for axis, index in found.items()}

    def _window_place(self, form: Form, probe: _Probe) -> dict[int, range]:
        partition = self.partition or Partition.whole(self.layout.grid)
        row, column, slot_row, slot_column = partition.place(probe.row, probe.column)
        count = partition.windows[0] * partition.windows[1]
        window = row * partition.windows[1] + column
        assert form.batch is not None
        lead = (probe.image * count + window if form.merged else probe.image) * form.inner
        found = {form.batch: range(lead, lead + form.inner)}
        pairs = [(form.windows, window, (row, column))]
        pairs.append(
            (form.axes, slot_row * partition.size[1] + slot_column, (slot_row, slot_column))
        )
        for axes, joint, apart in pairs:
            indices = (joint,) if len(axes) == 1 else apart
            for axis, index in zip(axes, indices, strict=False):
                found[axis] = range(index, index + 1)
        return found

    def _confine(
        self,
        node: fx.Node,
        value: Tensor,
        moved: list[dict[fx.Node, Any]],
        forms: dict[fx.Node, Form],
    ) -> Form:
        """A node that mixes tokens: keep its grid if it does, and judge what follows afresh."""
        sources = [
            forms[s]
            for s, crosses in self.worlds.sources(node)
            if s in forms
            and (not crosses or s in self.worlds.main)
            and forms[s].kind not in ("free", "moving")
        ]
        for source in sources:
            candidates = self._candidates(value, source.batch)
            if source.kind == "window":
                candidates = [f for f in self._window_candidates(value) if f == source]
            for form in candidates:
                if form.kind == source.kind and form.axes == source.axes:
                    for values, probe in zip(moved, self.probes, strict=True):
                        inside = _box(value, self._place(form, probe), form.batch, probe.image)
                        values[node] = torch.where(inside, values[node], value)
                    return dataclasses.replace(form, mixes=True)
        for values in moved:
            values[node] = value
        return Form("free", mixes=True)


def _changed(base: Tensor, moved: Tensor) -> Tensor:
    if base.shape != moved.shape:
        raise Refused("a value of the block changes its shape with the data")
    if not base.is_floating_point():
        return base != moved
    scale = base.abs().amax() if base.numel() else base.new_zeros(())
    scale = torch.nan_to_num(scale, nan=0.0, posinf=0.0)
    return (moved - base).abs() > _TOLERANCE * scale


def _batch_axis(masks: list[Tensor], probes: tuple[_Probe, ...]) -> int | None:
    for axis in range(masks[0].dim()):
        if all(
            bool(m.any()) and _only_at(m, {axis: range(p.image, p.image + 1)})
            for m, p in zip(masks, probes, strict=True)
        ):
            return axis
    return None


def _only_at(mask: Tensor, place: dict[int, range]) -> bool:
    """Whether every True of `mask` has the given indices on the given axes."""
    rest = mask
    for axis, index in place.items():
        fits = index.stop <= rest.shape[axis]
        rest = rest.narrow(axis, index.start, len(index)) if fits else rest[:0]
    return int(rest.sum()) == int(mask.sum())


def _box(value: Tensor, place: dict[int, range], batch: int | None, image: int) -> Tensor:
    inside = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    where = dict(place)
    if batch is not None:
        where.setdefault(batch, range(image, image + 1))
    for axis, index in where.items():
        line = torch.arange(value.shape[axis], device=value.device)
        line = (line >= index.start) & (line < index.stop)
        inside = inside & line.view([-1 if a == axis else 1 for a in range(value.dim())])
    return inside
