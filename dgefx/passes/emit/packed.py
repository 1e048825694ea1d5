"""Emit, the average budget: images differ in their number of queries, which are packed.

The queries of a batch stand as one image with T queries (`dgefx.kernels.ragged`). Tokenwise work
does not notice. What does: prefix tokens, which are in front of every image, values with one entry
per image (drop path), and the attention, which is ragged.
"""

from __future__ import annotations

import operator
from typing import Any, NoReturn

from torch import Tensor, fx

from dgefx.kernels.ragged import join_prefix, repeat_images, split_prefix, spread_images
from dgefx.passes.attention.core import PER_IMAGE
from dgefx.passes.emit.builder import GraphBuilder
from dgefx.passes.emit.per_image import PerImageQueries
from dgefx.passes.errors import Refused
from dgefx.passes.sides.prefix import BOTH, OTHER, REST, cut_part, joined_parts
from dgefx.passes.sides.token_axes import TokenAxes


class PackedQueries(PerImageQueries):
    """The queries of a batch as one image."""

    def check(self, build: GraphBuilder) -> None:
        for core in self.facts.sides.cores:
            if not core.form.packs and core.output not in self.facts.in_slots:
                core.form.emit_packed(core, build)  # says why not

    def emit(self, build: GraphBuilder, node: fx.Node) -> Any:
        held = self.facts.token_axes.get(node)
        apart = self._prefix_apart(build, node, held)
        if apart is not None:
            return apart
        if held is not None and held.kind in ("tokens", "grid"):
            self._require_whole(node, held)
        core = self.facts.sides.core_at(node)
        if core is None or node in self.facts.in_slots:
            return None
        return core.form.emit_packed(core, build)

    def _require_whole(self, node: fx.Node, held: TokenAxes) -> None:
        if held.batch is None or held.merged or held.inner > 1:
            raise Refused(
                f"{node.name} merges images with another axis, which packed queries of images of "
                f"different numbers do not allow; {PER_IMAGE}",
                "packed queries",
            )
        for source in self._token_sources(node):
            if self.facts.token_axes[source].prefix != held.prefix:
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
            for source, crosses in self.facts.sides.sources(node)
            if not crosses
            and source in self.facts.token_axes
            and self.facts.token_axes[source].kind in ("tokens", "grid")
        ]

    def _prefix_apart(self, build: GraphBuilder, node: fx.Node, held: TokenAxes | None) -> Any:
        """Prefix tokens taken out of the queries or put back."""
        sources, prefix = self._token_sources(node), self.facts.layout.prefix
        if not prefix or not sources:
            return None
        source = sources[0]
        before = self.facts.token_axes[source]
        axis = before.axes[0]
        if held is not None and held.prefix and not before.prefix:
            front = joined_parts(node, source) if self.facts.name(node) == "cat" else None
            if front is None or self.facts.shape(front)[axis] != prefix:
                self._refuse_apart(node)
            given = build.operand(front)
            if front not in self.facts.sides.on_queries:
                given = build.call(repeat_images, given, build.tokens, axis)
            return build.call(join_prefix, given, build.operand(source), build.routing, axis)
        if not before.prefix:
            return None
        part = cut_part(node, source, axis, prefix, self.facts.trace)
        if part is None:
            return None
        if part == OTHER:
            self._refuse_apart(node)
        both = build.call(split_prefix, build.operand(source), build.routing, axis)
        return both if part == BOTH else build.call(operator.getitem, both, int(part == REST))

    def broadcast(
        self, build: GraphBuilder, original: fx.Node, emitted: Any, held: TokenAxes, rank: int
    ) -> Any:
        """A value with an entry per image, for every query of the image."""
        value, own = self.facts.values.get(original), self.facts.token_axes.get(original)
        if not isinstance(value, Tensor) or held.kind not in ("tokens", "grid", "window"):
            return emitted
        if own is not None and own.kind != "no_tokens":
            return emitted
        axis = None if held.batch is None else held.batch - (rank - value.dim())
        if axis is None or axis < 0 or value.shape[axis] != self._images():
            return emitted
        if held.kind == "window" and (
            held.merged or held.inner > 1 or original in self.facts.in_slots
        ):
            raise Refused(
                f"{original.name} has an entry per image where windows are packed", "packed queries"
            )
        return build.call(spread_images, emitted, build.routing, rank, held.batch, held.axes)

    def _images(self) -> int:
        """In the example."""
        return self.facts.shape(self.facts.sides.stream)[self.facts.layout.axis("B")]
