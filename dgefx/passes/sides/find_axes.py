"""Sides, token axes: where every value of the query side holds tokens, and who mixes them.

An oracle by perturbation, not a list of layers: the block runs again with one token changed in
one image, keys and values held fixed. A value that changes only where that token lies has its
token axis there; a value that changes elsewhere mixes tokens, and its change is confined again
before going on, so that every node is judged by itself. Next: `passes.sides.facts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from dgefx.kernels.layout import to_tokens
from dgefx.passes.attention.registry import form_of
from dgefx.passes.errors import Refused
from dgefx.passes.layout import Layout
from dgefx.passes.ops import Op, map_sources, named, op_name, run_node
from dgefx.passes.randomise import randomise_constants
from dgefx.passes.sides.full_resolution import (
    is_scrambled,
    mixing_axes,
    reads_full_resolution,
)
from dgefx.passes.sides.sides import Sides
from dgefx.passes.sides.token_axes import Probe, TokenAxes, TokenFacts, stream_axes
from dgefx.passes.sides.window_axes import (
    arrives,
    find_rule,
    is_movement,
    labels_of,
    lands,
    partition_at,
    token_labels,
    window_candidates,
)
from dgefx.passes.sides.window_partition import Partition
from dgefx.passes.trace.block_trace import Trace
from dgefx.passes.trace.deterministic import Deterministic, seed_all

#: a change that counts, in units of the type's precision, relative to the value itself and to the
#: largest one. What did not change is put back after every node, so that only the rounding of one
#: operation adds up
_OWN_TOLERANCE, _TOLERANCE = 16, 8
#: scores as far down as this are of keys that are hidden
_HIDDEN = 1e8
_UNINITIALISED = named(Op.UNINITIALISED)


def find_token_axes(trace: Trace, sides: Sides, layout: Layout) -> TokenFacts:
    """How every tensor of the query side holds tokens.

    Raises:
        Refused: the block yields NaN or infinity on ordinary input, changes shapes with its data,
            or moves tokens in a way that is not followed.
    """
    randomise_constants(trace.root)
    search = AxesSearch(trace, sides, layout)
    search.run()
    if search.hidden:  # what a softmax or a large bias leaves of a probe may be below rounding
        precise = AxesSearch(trace, sides, layout)
        try:
            with _in_float64(trace.root):
                precise.run(torch.float64)
            search = precise
        except (RuntimeError, TypeError):  # a kernel without float64
            pass
    rule = find_rule(search)
    return TokenFacts(
        trace, layout, sides, search.token_axes, search.values, search.partition, rule
    )


@contextlib.contextmanager
def _in_float64(root: nn.Module) -> Iterator[None]:
    types = {name: t.dtype for name, t in [*root.named_parameters(), *root.named_buffers()]}
    try:
        root.double()
        yield
    finally:
        with torch.no_grad():
            for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
                tensor.data = tensor.data.to(types[name])


class AxesSearch:
    """Runs the probes over one traced block.

    Attributes:
        values: of all nodes, on random input. token_axes: of those that have been judged.
        partition: into windows, once one was read off. landing: the node that it was read off at.
        hidden: nodes on which no probe was seen, although the stream's data reaches them.
    """

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
        self.values: dict[fx.Node, Any] = {}
        self.token_axes: dict[fx.Node, TokenAxes] = {}
        self.partition: Partition | None = None
        self.landing: fx.Node | None = None
        self.hidden: list[fx.Node] = []

    @property
    def images(self) -> int:
        """Images in the example."""
        axis = stream_axes(self.layout).batch
        assert axis is not None
        return int(self.trace.values[self.sides.stream].shape[axis])

    @property
    def windows(self) -> Partition:
        """The whole image is one window where there are no others."""
        return self.partition or Partition.whole(self.layout.grid)

    def execute(self, node: fx.Node, args: Any, kwargs: Any, index: int) -> Any:
        """Run a node; the random numbers that it draws follow from its index."""
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
                self.values[node] = inputs[node]
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
            self.values[node] = self.execute(node, args, kwargs, index)

    def run(self, dtype: torch.dtype | None = None) -> None:
        """Find all token axes.

        Args:
            dtype: to compute in; None: that of the example.
        """
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
            result = self.values[self.sides.output]
            if not bool(torch.isfinite(result).all()):
                raise Refused("the block yields NaN or infinity on random input", "NaN or infinity")
            changed = [self._moved_stream(noise, probe) for probe in self.probes]
            self._judge(changed)

    def _moved_stream(self, base: Tensor, probe: Probe) -> Tensor:
        moved = base.clone()
        view = to_tokens(moved, self.layout.order)  # of the same memory
        token = probe.row * self.layout.grid[1] + probe.column
        token = self.layout.prefix + self.layout.position(token)
        generator = torch.Generator().manual_seed(2)
        # far enough to move attention that is nearly one-hot
        view[probe.image, token] += 3 * torch.randn(view.shape[-1], generator=generator).to(view)
        return moved

    def _judge(self, streams: list[Tensor]) -> None:
        moved: list[dict[fx.Node, Any]] = [{self.sides.stream: s} for s in streams]
        self.token_axes[self.sides.stream] = stream_axes(self.layout)
        judged = self.sides.query_side | self.sides.main
        for index, node in enumerate(self.trace.graph.nodes):
            if node not in judged or node is self.sides.stream:
                continue
            for values in moved:
                args, kwargs = self._arguments(node, values)
                values[node] = self.execute(node, args, kwargs, index)
            value = self.values[node]
            if isinstance(value, Tensor):
                self.token_axes[node] = self._axes_of(node, value, moved)

    def _arguments(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        judged = self.sides.query_side | self.sides.main

        def pick(source: fx.Node, crosses: bool) -> Any:
            outside = crosses or source not in judged
            return self.values[source] if outside else values.get(source, self.values[source])

        return map_sources(node, self.sides.edges, pick)

    def _axes_of(self, node: fx.Node, value: Tensor, moved: list[dict[fx.Node, Any]]) -> TokenAxes:
        if op_name(node, self.trace.root) in _UNINITIALISED:
            return TokenAxes("no_tokens")
        changes = []
        for values in moved:
            values[node], change = _keep_changes(value, values[node])
            changes.append(change)
        batch = _batch_axis(changes, self.probes)
        if not any(len(change) for change in changes):
            if any(held.kind != "no_tokens" for held in self._source_axes(node)):
                self.hidden.append(node)
            return TokenAxes("no_tokens", batch=batch)
        if reads_full_resolution(self, node):
            found = (
                f for f in self._all_candidates(value, batch) if self._changes_at(f, changes, value)
            )
            return mixing_axes(self, node, value, moved, next(found, None))
        if self.partition is None and arrives(self, node):
            back = self._raster_plane(node, changes, value, batch)
            if back is not None:
                return back
            self._read_partition(node)
            if self.landing is node:  # even if one window holds everything at this size
                for landed in window_candidates(self, value):
                    if self._is_at(landed, node, changes, value):
                        return landed
        held = self._matching(node, changes, value, batch)
        if held is None and is_movement(self, node):
            if lands(self, node):
                self._read_partition(node)
                held = self._matching(node, changes, value, batch)
            held = held or TokenAxes("in_transit")
        if held is not None and (self.partition is not None or not is_scrambled(self, node, held)):
            return held
        return mixing_axes(self, node, value, moved, held)

    def _read_partition(self, node: fx.Node) -> None:
        found = partition_at(self, node, self.values, self.layout.grid)
        if self.partition is not None and found is not None:
            raise Refused("the block has two different partitions into windows", "windows")
        if self.partition is None and found is not None:
            self.partition, self.landing = found, node

    def label(self, held: TokenAxes, probe: Probe) -> int:
        """Of the perturbed token, see `labels_of`."""
        height, width = self.layout.grid
        image = 0 if held.batch is None else probe.image
        return 1 + image * height * width + probe.row * width + probe.column

    def _changes_at(self, held: TokenAxes, changes: list[Tensor], value: Tensor) -> bool:
        """Whether what changed is where these token axes put the perturbed tokens."""
        labels = labels_of(self, held, value.shape, self.layout.grid)
        return all(
            bool((labels[change.unbind(1)] == self.label(held, probe)).all())
            for change, probe in zip(changes, self.probes, strict=True)
        )

    def _raster_plane(
        self, node: fx.Node, changes: list[Tensor], value: Tensor, batch: int | None
    ) -> TokenAxes | None:
        """The image's own grid, where movement puts the tokens of a stream in another order."""
        if self.layout.token_order is None:
            return None
        planes = [held for held in self.candidates(value, batch) if held.kind == "grid"]
        return next((held for held in planes if self._is_at(held, node, changes, value)), None)

    def _is_at(self, held: TokenAxes, node: fx.Node, changes: list[Tensor], value: Tensor) -> bool:
        """Whether what changed is exactly at these token axes; of data movement, whether the token
        numbers are those that the movement makes."""
        if not self._changes_at(held, changes, value):
            return False
        if held.batch is None or self.layout.prefix or not is_movement(self, node):
            return True
        grid = self.layout.grid
        labels = token_labels(self, node, self.values, grid)
        return torch.equal(labels, labels_of(self, held, value.shape, grid))

    def _matching(
        self, node: fx.Node, changes: list[Tensor], value: Tensor, batch: int | None
    ) -> TokenAxes | None:
        """The token axes that fit; those of a source, if they still do."""

        def fit(held: TokenAxes) -> bool:
            return self._is_at(held, node, changes, value)

        for source in node.all_input_nodes:
            held = self.token_axes.get(source)
            if held is None or held.batch is None or held.kind in ("no_tokens", "in_transit"):
                continue
            kept = dataclasses.replace(held, mixes=False)
            if fit(kept):
                return kept
        found = [next((f for f in self.candidates(value, batch) if fit(f)), None)]
        found.append(next((f for f in window_candidates(self, value) if fit(f)), None))
        # a single window holds every token too, but only at this size
        inside = any(held.kind == "window" for held in self._source_axes(node))
        plain, window = found
        if self.partition is not None and inside:
            return window or plain
        return plain if plain is not None and plain.batch is not None else window or plain

    def _source_axes(self, node: fx.Node) -> list[TokenAxes]:
        """Token axes of what a node reads, also of what a tuple that it reads was made of."""
        found = []
        for source in node.all_input_nodes:
            origins = [source] if source in self.token_axes else source.all_input_nodes
            found += [self.token_axes[n] for n in origins if n in self.token_axes]
        return found

    def _all_candidates(self, value: Tensor, batch: int | None) -> list[TokenAxes]:
        plain = [held for held in self.candidates(value, batch) if held.batch is not None]
        return plain + window_candidates(self, value)

    def candidates(self, value: Tensor, batch: int | None) -> list[TokenAxes]:
        """Token axes, other than of windows, that a value of this shape may have."""
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
    """The axis on which every change is of its probe's image."""
    for axis in range(changes[0].shape[1]):
        pairs = zip(changes, probes, strict=True)
        if all(len(c) and bool((c[:, axis] == probe.image).all()) for c, probe in pairs):
            return axis
    return None
