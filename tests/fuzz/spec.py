"""What a random transformer is: frozen dataclasses that print readably, and their strategies.

The first entry of every choice is the plainest one, so that hypothesis shrinks towards it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")

#: attention that cannot have pooled queries; converting it would be wrong
NEVER = ("channel", "class", "cross", "pooled", "foreign", "linear")
#: softmax attention of a block's own tokens, written in some other way
SPECIAL = ("mha", "mha_sequence", "axial", *NEVER)


@dataclass(frozen=True)
class AttentionSpec:
    """kind: "plain" or one of `SPECIAL`; the other fields speak of plain ones."""

    kind: str = "plain"
    heads: int = 2
    projection: str = "fused_permute"
    core: str = "sdpa"
    scale: str = "scores"
    float32: bool = False
    bias: str = "none"
    qk_norm: str = "none"
    position: str = "none"
    talking: str = "none"
    gate: bool = False
    lepe: bool = False
    reduction: str = "none"
    extra_key: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class WindowSpec:
    """kind: "block" or "grid". masked: whether tokens of both sides of the seam are kept apart."""

    kind: str = "block"
    size: tuple[int, int] = (4, 4)
    shift: bool = False
    masked: bool = True


@dataclass(frozen=True)
class BlockSpec:
    """How a block puts its parts together, and how it is called."""

    attention: AttentionSpec = AttentionSpec()
    window: WindowSpec | None = None
    norm: str = "layer"
    place: str = "pre"
    norm_inside: bool = False
    mlp: str = "plain"
    scaling: str = "none"
    drop_path: float = 0.0
    squeeze: bool = False
    twice: bool = False
    residual: str = "plus"
    returns: str = "tensor"
    sizes: str = "own"
    writing: str = "none"


@dataclass(frozen=True)
class Spec:
    """One random transformer."""

    layout: str = "BNC"
    grid: tuple[int, int] = (6, 6)
    patch: int = 2
    prefix: int = 0
    suffix: int = 0
    embed: str = "conv"
    position: bool = False
    depth: int = 1
    stage: str = "none"
    head: str = "mean"
    block: BlockSpec = BlockSpec()
    seed: int = 0

    def __repr__(self) -> str:
        return _brief(self)

    @property
    def channels_first(self) -> bool:
        return self.layout in ("BCN", "BCHW")

    @property
    def in_tokens(self) -> bool:
        return "N" in self.layout


def _brief(value: Any) -> str:
    """A dataclass as the call that makes it, without what is as by default."""
    if not hasattr(value, "__dataclass_fields__"):
        return repr(value)
    told = [
        f"{f.name}={_brief(getattr(value, f.name))}"
        for f in fields(value)
        if getattr(value, f.name) != f.default
    ]
    return f"{type(value).__name__}({', '.join(told)})"


def _mostly(plain: T, *others: T, weight: int = 1) -> st.SearchStrategy[T]:
    """`plain` as often as all others together, times `weight`."""
    return st.sampled_from([plain] * (weight * len(others)) + list(others))


def _rarely() -> st.SearchStrategy[bool]:
    return st.sampled_from([False] * 6 + [True])


@st.composite
def attentions(
    draw: Callable[..., Any], windowed: bool, token_grid: bool, suffix: bool
) -> AttentionSpec:
    """Args: windowed: inside windows. token_grid: no tokens beside the grid. suffix: tokens after
    the grid."""
    kinds = st.sampled_from(["plain"] * 36 + ["mha"] * 3 + ["mha_sequence"] * 3 + list(SPECIAL[2:]))
    kind = "plain" if windowed and draw(st.integers(0, 9)) else draw(kinds)
    if windowed and kind not in ("plain", "mha", "channel"):
        kind = "plain"
    heads = draw(st.sampled_from([2, 1, 4]))
    if kind != "plain":
        return AttentionSpec(kind, heads, dropout=draw(_mostly(0.0, 0.1)))
    reduction = "none"
    if not windowed and not suffix:
        reduction = draw(_mostly("none", "conv", "average", "adaptive", weight=2))
    whole = not windowed and reduction == "none"
    biases = ["param", "gathered"] + (["outside", "coordinates"] if whole else [])
    core = draw(
        st.sampled_from(
            ["sdpa", "at", "matmul", "bmm", "einsum_ij", "einsum_nm", "einsum_bnhd", "values_left"]
            + ["transposed_softmax", "einsum_dots", "bmm_sizes"]
        )
    )
    written_out = core != "sdpa"
    return AttentionSpec(
        heads=heads,
        projection=draw(
            _mostly(
                "fused_permute",
                "fused_chunk",
                "fused_split",
                "fused_heads",
                "separate",
                "key_value",
                "multi_query",
                "grouped_query",
                "convolution",
            )
        ),
        core=core,
        scale=draw(st.sampled_from(["scores", "q", "k", "temperature", "cosine"])),
        float32=written_out and draw(_rarely()),
        bias=draw(_mostly("none", *biases)) if reduction == "none" else "none",
        qk_norm=draw(_mostly("none", "layer", "rms", weight=2)),
        position=draw(_mostly("none", "absolute", "rope", "rope_pairs", weight=2))
        if whole
        else "none",
        talking=draw(_mostly("none", "linear", "conv", "before", weight=3))
        if written_out
        else "none",
        gate=draw(_rarely()),
        lepe=token_grid and draw(_rarely()),
        reduction=reduction,
        extra_key=not windowed and reduction == "none" and draw(_rarely()),
        dropout=draw(_mostly(0.0, 0.1)),
    )


@st.composite
def blocks(draw: Callable[..., Any], layout: str, token_grid: bool, suffix: bool) -> BlockSpec:
    window = None
    if token_grid and layout in ("BNC", "BHWC", "BCHW") and draw(st.integers(0, 2)) == 2:
        size = draw(st.tuples(st.integers(2, 5), st.integers(2, 5)))
        kind = draw(st.sampled_from(["block", "block", "grid"]))
        shift = kind == "block" and draw(st.booleans())
        window = WindowSpec(kind, size, shift, draw(_mostly(True, False)))
    first = layout in ("BCN", "BCHW")
    norms = ["channel", "group", "batch"] if first else ["rms", "rms_written", "batch"]
    mlps = ["gated", "none", "parallel", "depthwise3", "depthwise5", "convolution"]
    return BlockSpec(
        attention=draw(attentions(window is not None, token_grid, suffix)),
        window=window,
        norm=draw(_mostly("layer", *norms, "none")),
        place=draw(_mostly("pre", "post", "post_branch", "sandwich")),
        norm_inside=draw(_rarely()),
        mlp=draw(_mostly("plain", *mlps)),
        scaling=draw(_mostly("none", "parameter", "scalar")),
        drop_path=draw(_mostly(0.0, 0.1)),
        squeeze=draw(_rarely()),
        twice=window is None and draw(_rarely()),
        residual=draw(_mostly("plus", "iadd", "torch_add", "add_", "scaled", "reversed", "module")),
        returns=draw(_mostly("tensor", "tuple")),
        sizes=draw(_mostly("own", "ints", "pair", "dict", "keyword")),
        writing=draw(_mostly("none", "rows", "channels", "guards", "cache", weight=2)),
    )


def _one_of(draw: Callable[..., Any], options: Sequence[Any]) -> Any:
    return draw(st.sampled_from(list(options)))


@st.composite
def specs(draw: Callable[..., Any]) -> Spec:
    """Any random transformer."""
    layout = _one_of(draw, ["BNC", "BNC", "BHWC", "BCHW", "BNC", "NBC", "BCN"])
    in_tokens = "N" in layout
    prefix = draw(st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5])) if in_tokens else 0
    suffix = draw(st.sampled_from([0] * 11 + [1, 2])) if in_tokens else 0
    token_grid = not prefix and not suffix
    stage = draw(_mostly("none", "convolution", "merging", weight=2)) if token_grid else "none"
    block = draw(blocks(layout, token_grid, suffix > 0))
    side = st.integers(3, 11)
    grid = (draw(side), draw(side))
    heads = ["mean", "map", "dict"] + (["class"] if prefix else [])
    return Spec(
        layout,
        grid,
        draw(st.sampled_from([2, 3])),
        prefix,
        suffix,
        draw(st.sampled_from(["conv", "conv", "stem", "cut", "unfold"])),
        draw(st.booleans()),
        draw(st.sampled_from([1, 2, 3])),
        stage,
        _one_of(draw, heads),
        block,
        draw(st.integers(0, 1000)),
    )
