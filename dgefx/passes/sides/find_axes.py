"""Pass 4b, forms: along which axes every value of the query side holds tokens, and who mixes them.

An oracle by perturbation, not a list of layers: the block runs again with one token changed in
one image, keys and values held fixed. A value that changes only where that token lies has its
token axis there; a value that changes elsewhere mixes tokens, and its change is confined again
before going on, so that every node is judged by itself. Next: `passes.emit.rewrite`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from dgefx.kernels.layout import has_parts
from dgefx.passes.attention.registry import form_of
from dgefx.passes.errors import Refused
from dgefx.passes.layout import Layout
from dgefx.passes.ops import Op, map_sources, named, op_name, run_node
from dgefx.passes.randomise import randomise_constants
from dgefx.passes.sides.full_resolution import FullResolution
from dgefx.passes.sides.sides import Sides
from dgefx.passes.sides.token_axes import Probe, TokenAxes, stream_axes
from dgefx.passes.sides.window_axes import WindowAxesFinder
from dgefx.passes.trace.block_trace import Trace
from dgefx.passes.trace.deterministic import Deterministic, seed_all

#: a change that counts, in units of the type's precision, relative to the value itself and to the
#: largest one. What did not change is put back after every node, so that only the rounding of one
#: operation adds up
_OWN_TOLERANCE, _TOLERANCE = 16, 8
#: scores as far down as this are of keys that are hidden
_HIDDEN = 1e8
_UNINITIALISED = named(Op.UNINITIALISED)


class TokenAxesFinder:
    """Runs the probes over one traced block."""

    def __init__(self, trace: Trace, sides: Sides, layout: Layout) -> None:
        self.trace = trace
        self.sides = sides
        self.layout = layout
        height, width = layout.grid
        # off the centre, where position tables are often zero; other rows and columns each
        self.probes = (
            Probe(0, height // 3, (2 * width) // 3),
            Probe(1, (2 * height) // 3, width // 3),
        )
        self._start()

    def _start(self) -> None:
        self.base: dict[fx.Node, Any] = {}
        self.forms: dict[fx.Node, TokenAxes] = {}
        #: nodes on which no probe was seen, although the stream's data reaches them
        self.hidden: list[fx.Node] = []
        self.windows = WindowAxesFinder(
            self.trace, self.sides, self.layout, self.base, self.forms, self._execute
        )
        self.islands = FullResolution(self)

    @property
    def images(self) -> int:
        """Images in the example."""
        axis = stream_axes(self.layout).batch
        assert axis is not None
        return int(self.trace.values[self.sides.stream].shape[axis])

    @property
    def windowed(self) -> bool:
        """Whether attention sees parts of the image only."""
        return self.windows.partition is not None

    def _execute(self, node: fx.Node, args: Any, kwargs: Any, index: int) -> Any:
        if node.op == "call_method" and str(node.target).endswith("_"):
            args = (args[0].clone(), *args[1:])  # the fill of a fresh tensor
        if form_of(node, self.trace.root) is not None:
            # some compute otherwise, and round otherwise, where query and key are one tensor
            args = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, args)
        if not self.trace.root.training:
            return run_node(node, self.trace.root, args, kwargs)
        seed_all(index)
        with Deterministic():
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

    def find(self) -> dict[fx.Node, TokenAxes]:
        """The form of every tensor of the query side.

        Raises:
            Refused: the block yields NaN or infinity on ordinary input.
        """
        randomise_constants(self.trace.root)
        forms = self._find()
        if self.hidden:  # what a softmax or a large bias leaves of a probe may be below rounding
            try:
                forms = self._find_precisely()
            except (RuntimeError, TypeError):  # a kernel without float64
                self._start()
                forms = self._find()
        return forms

    def _find_precisely(self) -> dict[fx.Node, TokenAxes]:
        """In float64."""
        root = self.trace.root
        types = {name: t.dtype for name, t in [*root.named_parameters(), *root.named_buffers()]}
        self._start()
        try:
            root.double()
            return self._find(torch.float64)
        finally:
            with torch.no_grad():
                for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
                    tensor.data = tensor.data.to(types[name])

    def _find(self, dtype: torch.dtype | None = None) -> dict[fx.Node, TokenAxes]:
        stream = self.sides.stream
        generator = torch.Generator().manual_seed(1)
        example: Tensor = self.trace.values[stream]
        noise = torch.randn(example.shape, generator=generator).to(example)
        inputs = {n: self.trace.values[n] for n in self.trace.graph.nodes if n.op == "placeholder"}
        inputs[stream] = noise
        for node, value in inputs.items():
            if dtype is not None and isinstance(value, Tensor) and value.is_floating_point():
                inputs[node] = value.to(dtype)
        noise = inputs[stream]
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            self._run_base(inputs)
            result = self.base[self.sides.output]
            if not bool(torch.isfinite(result).all()):
                raise Refused("the block yields NaN or infinity on random input", "NaN or infinity")
            changed = [self._moved_stream(noise, probe) for probe in self.probes]
            return self._judge(changed)

    def _moved_stream(self, base: Tensor, probe: Probe) -> Tensor:
        moved = base.clone()
        view = self._canonical(moved)
        token = probe.row * self.layout.grid[1] + probe.column
        token = self.layout.prefix + self.layout.position(token)
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
        if has_parts(order):
            return stream.view(-1, *stream.shape[2:])
        return {
            "BNC": lambda s: s,
            "NBC": lambda s: s.transpose(0, 1),
            "BCN": lambda s: s.transpose(1, 2),
        }[order](stream)

    def _judge(self, streams: list[Tensor]) -> dict[fx.Node, TokenAxes]:
        forms = self.forms
        moved: list[dict[fx.Node, Any]] = [{self.sides.stream: s} for s in streams]
        forms[self.sides.stream] = stream_axes(self.layout)
        judged = self.sides.query_side | self.sides.main
        for index, node in enumerate(self.trace.graph.nodes):
            if node not in judged or node is self.sides.stream:
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
        judged = self.sides.query_side | self.sides.main

        def pick(source: fx.Node, crosses: bool) -> Any:
            outside = crosses or source not in judged
            return self.base[source] if outside else values.get(source, self.base[source])

        return map_sources(node, self.sides.edges, pick)

    def _form(
        self,
        node: fx.Node,
        value: Tensor,
        moved: list[dict[fx.Node, Any]],
        forms: dict[fx.Node, TokenAxes],
    ) -> TokenAxes:
        if op_name(node, self.trace.root) in _UNINITIALISED:
            return TokenAxes("no_tokens")
        changes = []
        for values in moved:
            values[node], change = _keep_changes(value, values[node])
            changes.append(change)

        def fits(form: TokenAxes) -> bool:
            pairs = zip(changes, self.probes, strict=True)
            return all(_only_at(c, self.place(form, p)) for c, p in pairs)

        if not any(len(change) for change in changes):
            if any(form.kind != "no_tokens" for form in self._source_forms(node)):
                self.hidden.append(node)
            return TokenAxes("no_tokens", batch=_batch_axis(changes, self.probes))
        batch = _batch_axis(changes, self.probes)
        if self.islands.is_inside(node):
            found = next((f for f in self._all_candidates(value, batch) if fits(f)), None)
            return self.islands.leave(node, value, moved, found)
        if self.windows.partition is None and self.windows.arrives(node):
            back = self._raster_plane(node, changes, value, batch)
            if back is not None:
                return back
            self.windows.read(node)
            if self.windows.landing is node:  # even if one window holds everything at this size
                for landed in self.windows.candidates(value):
                    if self._is_at(landed, node, changes, value):
                        return landed
        form = self._matching(node, changes, value, batch)
        if form is None and self.windows.moves_tokens(node):
            if self.windows.lands(node):
                self.windows.read(node)
                form = self._matching(node, changes, value, batch)
            form = form or TokenAxes("in_transit")
        if form is not None and not self.windowed and self.islands.is_scrambled(node, form):
            return self.islands.leave(node, value, moved, form)
        return form or self.islands.leave(node, value, moved, None)

    def _raster_plane(
        self, node: fx.Node, changes: list[Tensor], value: Tensor, batch: int | None
    ) -> TokenAxes | None:
        """The image's own grid, where movement puts the tokens of a stream in another order."""
        if self.layout.token_order is None:
            return None
        planes = [form for form in self.candidates(value, batch) if form.kind == "grid"]
        return next((form for form in planes if self._is_at(form, node, changes, value)), None)

    def _is_at(self, form: TokenAxes, node: fx.Node, changes: list[Tensor], value: Tensor) -> bool:
        """Whether what changed is exactly where the form says; of data movement, whether the token
        numbers are those that the movement makes."""
        pairs = zip(changes, self.probes, strict=True)
        if not all(_only_at(c, self.place(form, p)) for c, p in pairs):
            return False
        if form.batch is None or self.layout.prefix or not self.windows.moves_tokens(node):
            return True
        grid = self.layout.grid
        numbers = self.windows.numbers(node, self.base, grid)
        return torch.equal(numbers, self.windows.seed(form, value.shape, grid))

    def _matching(
        self, node: fx.Node, changes: list[Tensor], value: Tensor, batch: int | None
    ) -> TokenAxes | None:
        """The form that fits; the form of a source, if it still does."""

        def fit(form: TokenAxes) -> bool:
            return self._is_at(form, node, changes, value)

        for source in node.all_input_nodes:
            form = self.forms.get(source)
            if form is None or form.batch is None or form.kind in ("no_tokens", "in_transit"):
                continue
            kept = dataclasses.replace(form, mixes=False)
            if max(kept.axes) < value.dim() and fit(kept):
                return kept
        found = [next((f for f in self.candidates(value, batch) if fit(f)), None)]
        found.append(next((f for f in self.windows.candidates(value) if fit(f)), None))
        # a single window holds every token too, but only at this size
        inside = any(form.kind == "window" for form in self._source_forms(node))
        plain, window = found
        if self.windowed and inside:
            return window or plain
        return plain if plain is not None and plain.batch is not None else window or plain

    def _source_forms(self, node: fx.Node) -> list[TokenAxes]:
        """Forms of what a node reads, also of what a tuple that it reads was made of."""
        found = []
        for source in node.all_input_nodes:
            origins = [source] if source in self.forms else source.all_input_nodes
            found += [self.forms[n] for n in origins if n in self.forms]
        return found

    def _all_candidates(self, value: Tensor, batch: int | None) -> list[TokenAxes]:
        plain = [form for form in self.candidates(value, batch) if form.batch is not None]
        return plain + self.windows.candidates(value)

    def candidates(self, value: Tensor, batch: int | None) -> list[TokenAxes]:
        """Forms, other than of windows, that a value of this shape may have."""
        shape = value.shape
        height, width = self.layout.grid
        found = []
        for axis, size in enumerate(shape):
            if size == self.layout.tokens and self.layout.prefix:
                found.append(TokenAxes("tokens", (axis,), True, batch))
            if size == height * width:
                found.append(TokenAxes("tokens", (axis,), False, batch))
            for prefix in {self.layout.prefix, 0}:
                if size == self.images * (height * width + prefix):
                    found.append(TokenAxes("batch_merged", (axis,), prefix > 0, axis))
        for axis in range(len(shape) - 1):
            if tuple(shape[axis : axis + 2]) == (height, width):
                found.append(TokenAxes("grid", (axis, axis + 1), False, batch))
        return found

    def place(self, form: TokenAxes, probe: Probe) -> dict[int, range]:
        """Axis -> indices of the perturbed token in a value of this form."""
        if form.kind == "window":
            return self.windows.place(form, probe)
        if form.kind == "grid":
            found = {form.axes[0]: probe.row, form.axes[1]: probe.column}
        else:
            offset = self.layout.prefix if form.prefix else 0
            index = offset + self.layout.position(probe.row * self.layout.grid[1] + probe.column)
            if form.kind == "batch_merged":
                index += probe.image * (offset + self.layout.grid[0] * self.layout.grid[1])
            found = {form.axes[0]: index}
        return {axis: range(index, index + 1) for axis, index in found.items()}


def _keep_changes(base: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """What changed by more than rounding: the value with the rest put back, and (K, axes) indices
    of the elements."""
    if base.shape != moved.shape:
        raise Refused(
            "a value of the block changes its shape with the data", "shapes follow the data"
        )
    different = (base != moved).nonzero()
    if not base.is_floating_point() or not len(different):
        return moved, different
    sizes = base.abs()
    scale = torch.nan_to_num(sizes.amax(), nan=0.0, posinf=0.0)
    if bool(scale >= _HIDDEN):  # what hides keys, as -inf does; it says nothing of rounding
        scale = torch.where(sizes < _HIDDEN, sizes, 0.0).amax()
    place = different.unbind(1)
    before, after = base[place], moved[place]
    allowed = _OWN_TOLERANCE * before.abs() + _TOLERANCE * scale
    counts = (after - before).abs() > torch.finfo(base.dtype).eps * allowed
    if bool(counts.all()):
        return moved, different
    if not bool(counts.any()):
        return base, different[:0]
    different, kept = different[counts], base.clone()
    kept[different.unbind(1)] = after[counts]
    return kept, different


def _batch_axis(changes: list[Tensor], probes: tuple[Probe, ...]) -> int | None:
    for axis in range(changes[0].shape[1]):
        if all(
            len(c) and _only_at(c, {axis: range(p.image, p.image + 1)})
            for c, p in zip(changes, probes, strict=True)
        ):
            return axis
    return None


def _only_at(change: Tensor, place: dict[int, range]) -> bool:
    """Whether all of these elements have the given indices on the given axes."""
    return all(
        bool(((change[:, axis] >= index.start) & (change[:, axis] < index.stop)).all())
        for axis, index in place.items()
    )
