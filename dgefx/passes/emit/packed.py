"""Pass 5c, emit for packed queries: `passes.emit.emitter` where images differ in their number of
queries.

The queries of a batch stand as one image with T queries (`dgefx.kernels.ragged`). Tokenwise work
does not notice. What does: sizes with the number of images, values with one entry per image (drop
path), tables read per query, and the attention, which is ragged.
"""

from __future__ import annotations

import operator
from typing import Any, NoReturn

from torch import Tensor, fx

from dgefx.kernels.ragged import (
    image_sizes,
    join_prefix,
    repeat_images,
    split_prefix,
    spread_images,
)
from dgefx.kernels.window import image_count
from dgefx.passes.attention.core import PER_IMAGE
from dgefx.passes.emit.emitter import QueryGraphEmitter, RewrittenGraph
from dgefx.passes.errors import Refused
from dgefx.passes.ops import Op, named, op_name
from dgefx.passes.sides.prefix import BOTH, OTHER, REST, cut_part, joined_parts
from dgefx.passes.sides.token_axes import TokenAxes

_CREATES = named(Op.CREATES)


class PackedQueryEmitter(QueryGraphEmitter):
    """Emits the graph of a block with packed queries."""

    def run(self) -> RewrittenGraph:
        for core in self.sides.cores:
            if not core.form.packs and core.output not in self.in_slots:
                core.form.emit_packed(core, self)  # says why not
        return super().run()

    @property
    def _images(self) -> int:
        value = self.trace.values[self.sides.stream]
        return int(value.shape[self.layout.axis("B")])

    def _axis_size(self, form: TokenAxes, axis: int, size: Any, slots: bool) -> Any:
        if axis == form.batch and form.kind in ("tokens", "grid"):
            return self.graph.call_function(image_count, (self.queries, form.inner))
        return super()._axis_size(form, axis, size, slots)

    def _emit_query(self, node: fx.Node) -> Any:
        form = self.forms.get(node)
        apart = self._prefix_apart(node, form)
        if apart is not None:
            return apart
        if form is not None and form.kind in ("tokens", "grid"):
            self._require_whole(node, form)
        core = self.sides.core_at(node)
        if core is not None and node not in self.in_slots:
            return core.form.emit_packed(core, self)
        if self._creates_per_image(node):
            return self._create_per_image(node)
        return super()._emit_query(node)

    def _emit_context(self, node: fx.Node) -> Any:
        # made from nothing, it belongs to the context, but its size may be read off queries
        if self._creates_per_image(node) and any(
            s in self.sides.query_side for s in node.all_input_nodes
        ):
            return self._create_per_image(node)
        return super()._emit_context(node)

    def _require_whole(self, node: fx.Node, form: TokenAxes) -> None:
        if form.batch is None or form.merged or form.inner > 1:
            raise Refused(
                f"{node.name} merges images with another axis, which packed queries of images of "
                f"different numbers do not allow; {PER_IMAGE}",
                "packed queries",
            )
        for source in self._token_sources(node):
            if self.forms[source].prefix != form.prefix:
                self._refuse_apart(node)

    @staticmethod
    def _refuse_apart(node: fx.Node) -> NoReturn:
        raise Refused(
            f"{node.name} takes prefix tokens apart from the grid in a way that packed queries of "
            f"images of different numbers do not allow; {PER_IMAGE}",
            "packed queries",
        )

    def _token_sources(self, node: fx.Node) -> list[fx.Node]:
        return [
            source
            for source, crosses in self.sides.sources(node)
            if not crosses
            and source in self.forms
            and self.forms[source].kind in ("tokens", "grid")
        ]

    def _prefix_apart(self, node: fx.Node, form: TokenAxes | None) -> Any:
        """Prefix tokens taken out of the queries or put back."""
        sources = self._token_sources(node)
        if not self.layout.prefix or not sources:
            return None
        source, call = sources[0], self.graph.call_function
        held = self.forms[source]
        axis = held.axes[0]
        if form is not None and form.prefix and not held.prefix:
            front = joined_parts(node, source) if op_name(node, self.trace.root) == "cat" else None
            if front is None or self._shape(front)[axis] != self.layout.prefix:
                self._refuse_apart(node)
            given = self._operand(front, False)
            if front not in self.sides.on_queries:
                given = call(repeat_images, (given, self.tokens, axis))
            return call(join_prefix, (given, self._operand(source, False), self.routing, axis))
        if not held.prefix:
            return None
        part = cut_part(node, source, axis, self.layout.prefix, self.trace)
        if part is None:
            return None
        if part == OTHER:
            self._refuse_apart(node)
        both = call(split_prefix, (self._operand(source, False), self.routing, axis))
        return both if part == BOTH else call(operator.getitem, (both, int(part == REST)))

    # -- values with an entry per image ------------------------------------------------------

    def _creates_per_image(self, node: fx.Node) -> bool:
        value, form = self.trace.values.get(node), self.forms.get(node)
        return (
            node.op != "call_module"
            and op_name(node, self.trace.root) in _CREATES
            and isinstance(value, Tensor)
            and value.dim() > 0
            and value.shape[0] == self._images
            and (form is None or form.kind == "no_tokens")
            and self._size_argument(node) is not None
        )

    def _size_argument(self, node: fx.Node) -> int | None:
        """Position of the size that `node` makes a tensor of, if it was read off something."""
        first = 1 if op_name(node, self.trace.root).startswith("new_") else 0
        if len(node.args) <= first:
            return None
        read: list[fx.Node] = []
        fx.map_arg(node.args[first], read.append)
        return first if read else None

    def _create_per_image(self, node: fx.Node) -> fx.Node:
        """Sizes are read off queries, which stand as one image: there are as many as of tokens."""
        first = self._size_argument(node)
        assert first is not None
        args = list(fx.map_arg(node.args, lambda source: self._operand(source, False)))
        size: Any = node.args[first]
        size = self.trace.values[size] if isinstance(size, fx.Node) else size
        if isinstance(size, int):
            args[first] = self.graph.call_function(image_count, (self.tokens, 1))
        else:
            args[first] = self.graph.call_function(image_sizes, (args[first], self.tokens))
        kwargs = fx.map_arg(node.kwargs, lambda source: self._operand(source, False))
        return self._create(node, tuple(args), kwargs)

    def _per_image(self, original: fx.Node, emitted: Any, form: TokenAxes, rank: int) -> Any:
        value, held = self.trace.values.get(original), self.forms.get(original)
        if not isinstance(value, Tensor) or form.kind not in ("tokens", "grid", "window"):
            return emitted
        if held is not None and held.kind != "no_tokens":
            return emitted
        axis = None if form.batch is None else form.batch - (rank - value.dim())
        if axis is None or axis < 0 or value.shape[axis] != self._images:
            return emitted
        if form.kind == "window" and (form.merged or form.inner > 1 or original in self.in_slots):
            raise Refused(
                f"{original.name} has an entry per image where windows are packed", "packed queries"
            )
        return self.graph.call_function(
            spread_images, (emitted, self.routing, rank, form.batch, form.axes)
        )
