"""Emit, full resolution: operations that mix tokens, in the query side.

A plain depthwise convolution is a stencil on the mixed grid (`dgefx.kernels.stencil`). Any other
runs on all tokens, between un-pooling and pooling (`dgefx.kernels.full_resolution`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from dgefx.kernels.full_resolution import pool_flat, pool_value, unpool_flat, unpool_value
from dgefx.kernels.stencil import stencil_conv
from dgefx.passes.emit.builder import GraphBuilder
from dgefx.passes.errors import Refused
from dgefx.passes.ops import argument, map_sources
from dgefx.passes.sides.sides import is_size
from dgefx.passes.sides.token_axes import TokenAxes, size_read
from dgefx.passes.trace.copies import HOOKED


class MixingEmitter:
    """Emits operations that mix tokens; every value is un-pooled once."""

    def __init__(self, build: GraphBuilder) -> None:
        self.build = build
        self.unpooled: dict[fx.Node, fx.Node] = {}

    def emit(self, node: fx.Node, held: TokenAxes) -> fx.Node:
        """A node that mixes tokens, or reads what is un-pooled."""
        build, facts = self.build, self.build.facts
        sources = [facts.token_axes.get(source) for source, _ in facts.sides.sources(node)]
        if facts.windowed and any(f and f.kind == "window" for f in (held, *sources)):
            raise Refused(f"{node.name} mixes tokens inside windows", "windows")
        build.mixing = True
        return self._stencil(node) or self._at_full_resolution(node, held)

    def _stencil(self, node: fx.Node) -> fx.Node | None:
        build = self.build
        source = argument(node, 0, "input")
        held = build.facts.token_axes.get(source) if isinstance(source, fx.Node) else None
        if node.op != "call_module" or held is None or held.axes != (2, 3):
            return None
        conv = build.facts.trace.root.get_submodule(str(node.target))
        if type(conv) is not nn.Conv2d or hasattr(conv, HOOKED):
            return None
        kernel = conv.kernel_size[0]
        plain = (
            conv.groups == conv.in_channels == conv.out_channels
            and conv.kernel_size == (kernel, kernel)
            and kernel % 2 == 1
            and conv.stride == (1, 1)
            and conv.dilation == (1, 1)
            and conv.padding in ((kernel // 2, kernel // 2), "same")
            and conv.padding_mode == "zeros"
        )
        if not plain:
            return None
        assert isinstance(source, fx.Node)
        build.stencils.add(kernel)
        weight = build.attribute(f"{node.target}.weight")
        bias = None if conv.bias is None else build.attribute(f"{node.target}.bias")
        operands = (build.operand(source), weight, bias, build.routing, held.inner)
        return build.call(stencil_conv, *operands)

    def _at_full_resolution(self, node: fx.Node, held: TokenAxes) -> fx.Node:
        """Un-pool, the operation as it is, pool."""
        build, facts = self.build, self.build.facts

        def dense(source: fx.Node, crosses: bool) -> Any:
            if is_size(facts.trace, source):
                return self._size(source)
            return build.operand(source, True) if crosses else self._unpooled(source, node)

        args, kwargs = map_sources(node, facts.sides.edges, dense)
        result = build.create(node, args, kwargs)
        if held.kind in ("no_tokens", "full_resolution"):
            if not isinstance(facts.trace.values[node], Tensor):
                raise Refused(f"{node.name} mixes tokens", "mixes tokens")
            return result
        self._require_images_apart(node, held)
        result = build.reordered(result, held, held.axes[0], raster=True)
        if held.kind == "batch_merged":
            return build.call(pool_flat, result, build.routing, held.prefix)
        return build.call(pool_value, result, build.routing, held.axes, held.prefix, held.inner)

    def _unpooled(self, source: fx.Node, reader: fx.Node) -> Any:
        """A value of the query side on all tokens."""
        build = self.build
        emitted, held = build.operand(source), build.facts.token_axes.get(source)
        on_queries = source in build.facts.sides.on_queries
        if held is None or not on_queries or not held.holds_tokens:
            return emitted
        if source not in self.unpooled:
            self._require_images_apart(reader, held)
            if held.kind == "batch_merged":
                found = build.call(unpool_flat, emitted, build.routing, held.prefix)
            else:
                place = (held.axes, held.prefix, held.inner)
                found = build.call(unpool_value, emitted, build.routing, *place)
            self.unpooled[source] = build.reordered(found, held, held.axes[0], raster=False)
        return self.unpooled[source]

    def _size(self, size: fx.Node) -> Any:
        """A size computed from those of un-pooled values: they may be several for an image, see
        `dgefx.kernels.full_resolution`."""
        build, trace = self.build, self.build.facts.trace
        read = size_read(size, trace)
        if read is not None and read[0] in build.facts.sides.on_queries:
            return build.size(self._unpooled(read[0], size), read[1])
        sources = size.all_input_nodes
        if sources and all(is_size(trace, source) for source in sources) and read is None:
            args, kwargs = fx.map_arg((size.args, size.kwargs), self._size)
            return build.create(size, args, kwargs)
        return build.operand(size)

    def _require_images_apart(self, node: fx.Node, held: TokenAxes) -> None:
        """Merged with images, tokens in another order than raster are not gathered."""
        merged = held.kind == "batch_merged" and self.build.facts.layout.token_order is not None
        if held.batch != 0 or merged:
            raise Refused(
                f"{node.name} mixes tokens with images merged into another axis", "mixes tokens"
            )
