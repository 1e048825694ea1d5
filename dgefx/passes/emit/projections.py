"""Emit, projections: of a fused linear layer, each side computes the rows that it reads."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from dgefx.kernels.layout import has_parts
from dgefx.kernels.projection import arrange_projection, linear_rows, weight_rows
from dgefx.passes.emit.builder import GraphBuilder
from dgefx.passes.errors import Refused
from dgefx.passes.sides.projections import FusedProjection, Part, linear_operands


class ProjectionEmitter:
    """Emits the parts of fused projections; each projection once a side."""

    def __init__(self, build: GraphBuilder) -> None:
        self.build = build
        self.projected: dict[tuple[fx.Node, bool], tuple[fx.Node, int]] = {}

    def emit(self, node: fx.Node, context: bool) -> fx.Node | None:
        """A value of a side that is part of a projection; None if it is not."""
        for fused in self.build.facts.fused:
            if node in fused.parts(context):
                return self._part(node, fused, context)
        return None

    def _part(self, node: fx.Node, fused: FusedProjection, context: bool) -> fx.Node:
        parts = fused.parts(context)
        if (fused.linear, context) not in self.projected:
            first = min(p.start for p in parts.values())
            last = max(p.stop for p in parts.values())
            rows = self._rows(fused.linear, first, last, context)
            self.projected[fused.linear, context] = rows, first
        projected, offset = self.projected[fused.linear, context]
        part = parts[node]
        return self.build.call(
            arrange_projection,
            projected,
            part.start - offset,
            part.stop - offset,
            part.features,
            part.order,
            part.singles,
            self._positions(node, fused, part, context),
            part.merged,
        )

    def _positions(
        self, node: fx.Node, fused: FusedProjection, part: Part, context: bool
    ) -> tuple[int, ...]:
        """Windows and slots: one window of all queries, or as many as there are."""
        if len(part.positions) > 2:
            raise Refused(f"{fused.linear.name}: tokens on {len(part.positions)} axes", "windows")
        if not part.positions:
            return ()
        if context:
            return (-1, *part.positions[1:])
        facts = self.build.facts
        held = facts.token_axes.get(node)
        first = part.position_axis(0, len(facts.shape(node)))
        if held is not None and held.kind == "window" and first in held.axes:
            return (-1, 1)  # the stream counts the windows slot by slot
        return (part.positions[0] if has_parts(facts.layout.order) else 1, -1)

    def _rows(self, linear: fx.Node, first: int, last: int, context: bool) -> fx.Node:
        build = self.build
        source, weight, bias = linear_operands(linear)
        given: Any = build.context[source] if context else build.operand(source)
        if linear.op == "call_module":
            layer = build.attribute(str(linear.target))
            return build.call(linear_rows, layer, given, first, last)
        rows = [
            build.call(weight_rows, build.context[operand], first, last)
            if isinstance(operand, fx.Node)
            else None
            for operand in (weight, bias)
        ]
        return build.call(nn.functional.linear, given, *rows)
