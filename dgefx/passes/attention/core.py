"""Attention cores, and the forms in which they are written.

A core is one place where queries meet keys, in a flat or a traced graph. Its form knows all that
depends on how that is written: which nodes it matches, what it refuses, and how it is written for
queries that stand for several tokens. `passes.attention.registry` holds the forms and finds the
cores; `passes.locate.sites`, `passes.sides.sides` and `passes.emit` ask them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn
from torch.fx import Graph, Node

from dgefx.passes.errors import Refused
from dgefx.passes.ops import argument, full_name, op_name
from dgefx.passes.reasons import Reason

if TYPE_CHECKING:
    from dgefx.passes.emit.builder import GraphBuilder
    from dgefx.passes.sides.token_axes import TokenFacts

#: the value of a node that is no tensor, and a tensor of the right shape for one that is
Values = Callable[[Node], Any]

PER_IMAGE = 'use DGEConfig(budget="per_image")'


@dataclass(frozen=True)
class AttentionCore:
    """One attention.

    context_edges: (consumer, position or keyword of the argument) where the context enters the
    query path. An argument, not a producer: query, key and value may be one and the same value.
    query_axes: axes of `query`, negative, on which its tokens may lie.
    key_axes: of attention written out, values and their axis, negative, on which the keys lie: of
        the same size whatever the queries are.
    """

    form: AttentionForm
    query: Node
    key: Node
    value: Node
    output: Node
    context_edges: frozenset[tuple[Node, int | str]]
    query_axes: tuple[int, ...] = (-2,)
    key_axes: frozenset[tuple[Node, int]] = frozenset()

    @property
    def name(self) -> str:
        return str(self.output.name)


@dataclass(frozen=True)
class SearchedGraph:
    """A flat capture or a traced block, and what its calls do.

    values: see `Values`. root: the module that call_module targets belong to.
    """

    graph: Graph
    values: Values
    root: nn.Module | None = None

    @cached_property
    def calls(self) -> dict[str, list[Node]]:
        """The calls of every operation, in order."""
        found: dict[str, list[Node]] = {}
        for node in self.graph.nodes:
            if node.op.startswith("call_"):
                found.setdefault(self.name(node), []).append(node)
        return found

    def name(self, node: Node) -> str:
        return op_name(node, self.root)

    def rank(self, node: Node) -> int:
        """The number of axes of a value; 0 of what is no tensor."""
        value = self.values(node)
        return value.dim() if isinstance(value, Tensor) else 0


class AttentionForm:
    """One way to write attention. By itself it is a function `f(query, key, value, ...)` whose
    result has a row for every row of `query`, whatever their number; subclasses are less plain.

    Args:
        name: in messages; unique.
        functions: what calls it: operators of `torch.library`, Python functions, each of which
            then is one node of every graph, or their full names ("namespace::operator",
            "package.module.function" where it is defined), so that nothing need be imported. Their
            first three parameters are queries, keys, values.
        operands: the names of these three, for calls by keyword.
        query_axis: the axis of the queries on which their tokens lie, negative: -2 of
            (images, heads, tokens, C), -3 of (images, tokens, heads, C).
        gathers_mask: whether further operands are broadcast against scores of (..., queries, keys),
            as masks and biases, and are to be read per query.

    Raises:
        TypeError: a function that is neither callable nor a name, or operands that are not three
            names.
        ValueError: an empty name, or a query axis that is not negative.

    Attributes:
        levels: whether several of them in one module are the levels of one attention.
        stand_in: runs in place of the functions while a model is looked at, and in converted
            blocks. Called with whether it is enough to count the same FLOPs, and the arguments;
            `NotImplemented` where it is not the same.
    """

    levels: bool = False
    stand_in: Callable[..., Any] | None = None

    def __init__(
        self,
        name: str,
        functions: Sequence[Callable[..., Any] | str] = (),
        operands: tuple[str, str, str] = ("query", "key", "value"),
        query_axis: int = -2,
        gathers_mask: bool = False,
    ) -> None:
        if not all(isinstance(f, str) or callable(f) for f in functions):
            raise TypeError(f"functions must be callables or their full names, not {functions!r}")
        if len(operands) != 3 or not all(isinstance(part, str) for part in operands):
            raise TypeError(f"operands must name queries, keys and values, not {operands!r}")
        if not name or query_axis >= 0:
            raise ValueError(
                "name must not be empty, and query_axis is negative (-2: last but one)"
            )
        self.functions = tuple(f if isinstance(f, str) else full_name(f) for f in functions)
        self.name, self.operands = name, operands
        self.query_axis, self.gathers_mask = query_axis, gathers_mask

    @property
    def operation(self) -> str:
        """What its calls are called in `passes.ops`: no name that another operation has."""
        return self.functions[0] if self.functions else self.name

    @property
    def packs(self) -> bool:
        """Whether it can be written for queries of images that differ in their number."""
        return type(self).emit_packed is not AttentionForm.emit_packed

    def find(self, searched: SearchedGraph) -> list[AttentionCore]:
        """All attentions of this form in a graph."""
        matched = (
            self.match(node, searched.root) for node in searched.calls.get(self.operation, ())
        )
        return [core for core in matched if core is not None]

    def match(self, node: Node, root: nn.Module | None) -> AttentionCore | None:
        """The attention that a call of one of its functions is; None if it is none after all."""
        places = [i if len(node.args) > i else name for i, name in enumerate(self.operands)]
        query, key, value = (argument(node, i, name) for i, name in enumerate(self.operands))
        if not (isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)):
            return None
        edges = frozenset((node, place) for place in places[1:])
        return AttentionCore(self, query, key, value, node, edges, (self.query_axis,))

    def refusal(self, node: Node) -> Reason | None:
        """Why a call cannot convert, by the arguments it is given; None if it can."""
        return None

    def check(self, core: AttentionCore, facts: TokenFacts) -> None:
        """Whether an attention of a traced block can be written for queries.

        Raises:
            Refused: its call is refused, or its result does not follow the tokens of its queries.
        """
        reason = self.refusal(core.output)
        if reason is not None:
            raise Refused.because(reason)
        self.check_axes(core, facts)

    def check_axes(self, core: AttentionCore, facts: TokenFacts) -> None:
        """The part of `check` that asks for the tokens."""
        axes = facts.token_axes.get(core.output)
        if axes is not None and axes.kind == "full_resolution":
            # queries that are fewer than the tokens were refused before (`passes.locate.sites`)
            raise Refused(
                "its queries reach the attention in an order of tokens that is not followed "
                "(windows, strides)",
                "windows",
            )
        if axes is None or axes.kind in ("no_tokens", "in_transit") or axes.mixes:
            self._refuse_unfollowed()

    def _refuse_unfollowed(self) -> NoReturn:
        raise Refused(
            "its output does not follow the tokens of its queries",
            "output does not follow queries",
        )

    def emit(self, core: AttentionCore, build: GraphBuilder, args: Any, kwargs: Any) -> Node:
        """Write the attention into the new graph.

        Args:
            args, kwargs: of the call, on queries; masks, if it gathers them, per query.
        """
        return build.create(core.output, args, kwargs)

    def emit_packed(self, core: AttentionCore, build: GraphBuilder) -> Node:
        """Write it for a batch whose images differ in their number of queries, which stand one
        after another; only where `packs`."""
        raise Refused(
            f"{core.name}: packed queries of images of different numbers need fused attention "
            f"(scaled_dot_product_attention, nn.MultiheadAttention), not {self.name}; switch the "
            f"model's fused attention on, or {PER_IMAGE}",
            "packed queries",
        )

    @staticmethod
    def require_prefix(core: AttentionCore, build: GraphBuilder) -> None:
        """Packed queries of an image have its prefix tokens in front."""
        if build.facts.layout.prefix and not build.facts.token_axes[core.query].prefix:
            raise Refused(
                f"{core.name}: prefix tokens are not among its queries, which packed queries of "
                f"images of different numbers do not allow; {PER_IMAGE}",
                "packed queries",
            )
