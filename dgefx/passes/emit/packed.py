"""Pass 5c, emit for packed queries: `passes.emit.emitter` where images differ in their number of
queries.

The queries of a batch stand as one image with T queries (`dgefx.kernels.ragged`). Tokenwise work
does not notice. What does: sizes with the number of images, values with one entry per image (drop
path), tables read per query, and the attention, which is ragged.
"""

from __future__ import annotations

import operator
from typing import Any, NoReturn

from torch import Tensor, fx, nn

from dgefx.kernels.packed_attention import packed_attention, packed_multi_head_attention
from dgefx.kernels.packed_sampling import packed_grid_sample
from dgefx.kernels.ragged import (
    image_sizes,
    join_prefix,
    repeat_images,
    split_prefix,
    spread_images,
)
from dgefx.kernels.window import image_count
from dgefx.passes.attention.core import AttentionCore
from dgefx.passes.emit.emitter import QueryGraphEmitter, RewrittenGraph
from dgefx.passes.errors import Refused
from dgefx.passes.ops import Op, argument, named, op_name
from dgefx.passes.sides.prefix import BOTH, OTHER, REST, cut_part, joined_parts
from dgefx.passes.sides.token_axes import TokenAxes
from dgefx.passes.trace.tracer import HOOKED

_INSTEAD = 'use DGEConfig(budget="per_image")'
_CREATES = named(Op.CREATES)


class PackedQueryEmitter(QueryGraphEmitter):
    """Emits the graph of a block with packed queries."""

    def run(self) -> RewrittenGraph:
        for core in self.sides.cores:
            if core.kind == "matmul-softmax-matmul" and core.output not in self.in_slots:
                raise Refused(
                    f"{core.name}: packed queries of images of different numbers need fused "
                    f"attention (scaled_dot_product_attention, nn.MultiheadAttention), not "
                    f"matmul-softmax-matmul; switch the model's fused attention on, or {_INSTEAD}",
                    "packed queries",
                )
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
            if core.kind == "scaled_dot_product_attention":
                return self._attend(core)
            if core.kind == "grid_sample":
                return self._sample(core)
            return self._attend_module(core)
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
                f"different numbers do not allow; {_INSTEAD}",
                "packed queries",
            )
        for source in self._token_sources(node):
            if self.forms[source].prefix != form.prefix:
                self._refuse_apart(node)

    @staticmethod
    def _refuse_apart(node: fx.Node) -> NoReturn:
        raise Refused(
            f"{node.name} takes prefix tokens apart from the grid in a way that packed queries of "
            f"images of different numbers do not allow; {_INSTEAD}",
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

    # -- attention ---------------------------------------------------------------------------

    def _attend(self, core: AttentionCore) -> fx.Node:
        node = core.output
        form, rank = self.forms[core.query], len(self._shape(core.query))
        if form.axes != (rank - 2,) or form.batch != 0 or rank not in (3, 4):
            raise Refused(
                f"{node.name}: queries are not laid out as (images, heads, tokens, C)",
                "packed queries",
            )
        self._require_prefix(node, form)
        query = self._operand(core.query, False)
        mask = argument(node, 3, "attn_mask")
        options: dict[str, Any] = {}
        for place, name, default in ((4, "dropout_p", 0.0), (6, "scale", None)):
            given: Any = argument(node, place, name, default)
            options[name] = self._any(given) if isinstance(given, fx.Node) else given
        if argument(node, 7, "enable_gqa", False) is True:
            options["enable_gqa"] = True
        if isinstance(mask, fx.Node):
            if mask in self.sides.on_queries:
                raise Refused(
                    f"{node.name}: its mask is made of the queries; {_INSTEAD}", "packed queries"
                )
            if self._shape(mask)[-2:-1] != (1,):
                self.positional = True
            table = self.context[mask]
            if len(self._shape(mask)) > 1 and self._shape(mask)[-2] > 1:
                table = self._reordered(table, form, -2, raster=True)
            options["attn_mask"] = table
        return self.graph.create_node(
            "call_function",
            packed_attention,
            (query, self.context[core.key], self.context[core.value], self.routing),
            options,
            name=node.name,
        )

    def _any(self, node: fx.Node) -> Any:
        return self.context[node] if node in self.context else self.query[node]

    def _require_prefix(self, node: fx.Node, form: TokenAxes) -> None:
        if self.layout.prefix and not form.prefix:
            raise Refused(
                f"{node.name}: prefix tokens are not among its queries, which packed queries of "
                f"images of different numbers do not allow; {_INSTEAD}",
                "packed queries",
            )

    def _sample(self, core: AttentionCore) -> fx.Node:
        """Deformable attention: positions are packed queries, maps are of every image."""
        node, form = core.output, self.forms[core.query]
        if form.batch != 0 or form.axes[0] not in (1, 2) or len(self._shape(core.query)) != 4:
            raise Refused(
                f"{node.name}: it does not sample per image and token; {_INSTEAD}", "packed queries"
            )
        self._require_prefix(node, form)
        options: dict[str, Any] = {
            name: argument(node, place, name, default)
            for place, name, default in (
                (2, "mode", "bilinear"),
                (3, "padding_mode", "zeros"),
                (4, "align_corners", None),
            )
        }
        return self.graph.create_node(
            "call_function",
            packed_grid_sample,
            (
                self.context[core.value],
                self._operand(core.query, False),
                self.routing,
                form.axes[0],
            ),
            options,
            name=node.name,
        )

    def _attend_module(self, core: AttentionCore) -> fx.Node:
        """nn.MultiheadAttention, from its parameters."""
        node = core.output
        if node.op != "call_module":
            raise Refused(
                f"{node.name}: F.multi_head_attention_forward by itself; {_INSTEAD}",
                "packed queries",
            )
        module = self.trace.root.get_submodule(str(node.target))
        plain = (
            type(module) is nn.MultiheadAttention
            and not hasattr(module, HOOKED)
            and module._qkv_same_embed_dim
            and module.bias_k is None
            and not module.add_zero_attn
        )
        if not plain or argument(node, 3, "key_padding_mask") is not None:
            raise Refused(
                f"{node.name}: an nn.MultiheadAttention with extras; {_INSTEAD}", "packed queries"
            )
        assert isinstance(module, nn.MultiheadAttention)
        form = self.forms[core.query]
        if form.batch != (0 if module.batch_first else 1) or len(self._shape(core.query)) != 3:
            raise Refused(
                f"{node.name}: queries are not laid out as (images, tokens, C)", "packed queries"
            )
        self._require_prefix(node, form)
        weights = []
        for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
            owner, _, leaf = name.rpartition(".")
            there = getattr(module.get_submodule(owner), leaf) is not None
            weights.append(
                self.graph.create_node("get_attr", f"{node.target}.{name}") if there else None
            )
        return self.graph.create_node(
            "call_function",
            packed_multi_head_attention,
            (
                self._operand(core.query, False),
                self.context[core.key],
                self.context[core.value],
                self.routing,
                *weights,
                module.num_heads,
                module.batch_first,
                module.dropout if module.training else 0.0,
            ),
            name=node.name,
        )
