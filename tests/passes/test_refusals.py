"""Every kind of refusal: a small model that meets it, its reason and its advice."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgefx
from dgefx import BlockReport, DGEConfig, Report
from dgefx.passes.reasons import ADVICE, KindName, advice_lines
from tests.helpers import Attention, error, images, randomise

DIM, SIDE = 16, 8
X = images(2, 4 * SIDE)


class Model(nn.Module):
    """Embeds 8 x 8 tokens, then runs its blocks."""

    def __init__(self, *blocks: nn.Module, prefix: int = 0) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, prefix, DIM)) if prefix else None
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


def block(update: Callable[..., Tensor], **more: nn.Module) -> nn.Module:
    """x + update(block, norm(x)), with an attention, a few linear layers and `more`."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(DIM), Attention(DIM, 2)
            self.linear, self.other = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
            self.learned = nn.Parameter(torch.randn(1, SIDE * SIDE, DIM))
            for name, module in more.items():
                self.add_module(name, module)

        def forward(self, x: Tensor) -> Tensor:
            return x + update(self, self.norm(x))

    return Block()


def plain() -> nn.Module:
    return block(lambda b, y: b.attn(y))


def sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    parts = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(*parts, **options).transpose(1, 2).flatten(2)


def mha(b: nn.Module, y: Tensor, **options: Any) -> Tensor:
    return b.module(y, y, y, need_weights=False, **options)[0]


def module() -> nn.Module:
    return nn.MultiheadAttention(DIM, 2, batch_first=True)


MASK = torch.rand(SIDE * SIDE, SIDE * SIDE).sort(-1)[1] < 32


def kept(y: Tensor) -> Tensor:
    return y.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2)


def pooled(y: Tensor) -> Tensor:
    return F.avg_pool2d(kept(y), 2).flatten(2).transpose(1, 2)


def in_windows(b: nn.Module, y: Tensor, side: int) -> Tensor:
    n = SIDE // side
    y = y.view(-1, n, side, n, side, DIM).transpose(2, 3).reshape(-1, side * side, DIM)
    y = mha(b, y) if hasattr(b, "module") else b.attn(y)
    return y.view(-1, n, n, side, side, DIM).transpose(2, 3).reshape(-1, SIDE * SIDE, DIM)


def channels(b: nn.Module, y: Tensor) -> Tensor:
    t = y.transpose(1, 2)
    return ((t @ t.transpose(1, 2)).softmax(-1) @ t).transpose(1, 2)


def linear_attention(b: nn.Module, y: Tensor) -> Tensor:
    return b.linear(y).softmax(-1) @ (b.other(y).softmax(1).transpose(1, 2) @ y)


def class_only(b: nn.Module, y: Tensor) -> Tensor:
    return torch.cat([sdpa(y[:, :1], y, y), y[:, 1:]], 1)


def halves(b: nn.Module, y: Tensor) -> Tensor:
    upper, lower = b.attn(y).split([SIDE * SIDE // 2] * 2, 1)
    return torch.cat([lower, upper], 1)


def written(b: nn.Module, y: Tensor) -> Tensor:
    return torch.add(b.attn(y), 1, out=torch.empty_like(y))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.inner = Attention(DIM, 2), plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.attn(x))


class Star(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(DIM, 2)

    def forward(self, *args: Tensor) -> Tensor:
        return args[0] + self.attn(args[0])


class Two(nn.Module):
    """Hands out its input's mean as well."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(DIM, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + sdpa(x, x, x), x.mean()


class Reads(Model):
    def forward(self, x: Tensor) -> Tensor:
        x, mean = self.blocks[0](self.embed(x).flatten(2).transpose(1, 2))
        return x * mean


class Head(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sdpa(x[:, :1] * 0 + 1, x, x)


class Cross(nn.Module):
    """Keys and values of another stream."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.randn(1, 9, DIM))

    def forward(self, x: Tensor) -> Tensor:
        other = self.other.expand(len(x), -1, -1)
        return x + sdpa(x, other, other)


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.linear = Attention(DIM, 2), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.attn(x)


class Modes(nn.Module):
    """Windows of another size in training."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + in_windows(self, x, 2 if self.training else 4)


class Bare(nn.Module):
    """All of it in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Conv2d(3, DIM, 4, stride=4), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.linear(x + sdpa(x, x, x))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Linear(DIM, DIM), plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.embed(x))


class Behind(Model):
    """An extra token behind the grid."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.blocks[0](torch.cat([x, x.new_zeros(x.shape[0], 1, DIM)], 1))


def patched() -> nn.Module:
    model = Model(plain())
    made = model.blocks[0]
    made.forward = lambda x: x + made.attn(x)  # type: ignore[method-assign]
    return model


def compiled() -> nn.Module:
    return Model(torch.compile(plain(), backend="eager"))  # type: ignore[arg-type]


#: kind: (model, words of its reason, further arguments)
CASES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "class attention": (
        lambda: Model(block(class_only), prefix=1),
        "prefix tokens alone",
        {},
    ),
    "channel attention": (lambda: Model(block(channels)), "queries are channels", {}),
    "pooling head or learned queries": (lambda: Model(Head()), "no residual add", {}),
    "cross attention": (lambda: Model(Cross()), "its keys do not come", {}),
    "foreign queries": (
        lambda: Model(block(lambda b, y: sdpa(b.learned.expand(2, -1, -1), y, y))),
        "foreign or learned queries",
        {},
    ),
    "pooled or projected shortcut": (lambda: Model(Shortcut()), "pooled or projected", {}),
    "queries on another grid": (
        lambda: Model(block(lambda b, y: sdpa(pooled(y), y, y).repeat(1, 4, 1))),
        "16 queries against 64 tokens",
        {},
    ),
    "nothing to pool": (
        lambda: Model(plain()),
        "a grid of 1 x 3",
        {"example_inputs": images(2, (4, 12))},
    ),
    "causal attention": (
        lambda: Model(block(lambda b, y: sdpa(y, y, y, is_causal=True))),
        "no place in the order",
        {},
    ),
    "no query-key scores": (
        lambda: Model(block(linear_attention)),
        "no product of queries and keys",
        {},
    ),
    "attention mask": (
        lambda: Model(block(lambda b, y: mha(b, y, attn_mask=MASK), module=module())),
        "with an attention mask",
        {},
    ),
    "nn.MultiheadAttention in windows": (
        lambda: Model(block(lambda b, y: in_windows(b, y, 4), module=module())),
        "inside windows",
        {},
    ),
    "layout unknown": (Tokens, "grid not found", {"example_inputs": torch.randn(2, 64, DIM)}),
    "token order": (lambda: Behind(plain()), "followed by every token of the grid", {}),
    "no block module": (Bare, "no module takes the residual stream", {}),
    "shared module": (lambda: Model(*[plain()] * 2), "runs 2 times per forward", {}),
    "outer block": (lambda: Model(Outer()), "also holds the block blocks.0.inner", {}),
    "forward signature": (lambda: Model(Star()), "takes *args", {}),
    "further results": (lambda: Reads(Two()), "hands out 2 values", {}),
    "not traceable": (lambda: Model(block(written)), "given as out=", {}),
    "train and eval differ": (lambda: Model(Modes()), "windows differ between eval and train", {}),
    "mixes tokens": (lambda: Model(block(halves)), "splits the grid's tokens", {}),
    "windows": (
        lambda: Model(block(lambda b, y: in_windows(b, y, 4) + in_windows(b, y, 2))),
        "two different partitions",
        {},
    ),
    "packed queries": (
        lambda: Model(
            block(lambda b, y: (b.linear(y) @ b.other(y).transpose(1, 2)).softmax(-1) @ y)
        ),
        "fused attention",
        {"config": DGEConfig(budget="average")},
    ),
    "left out by filter": (lambda: Model(plain()), "filter_fn", {"filter_fn": lambda m, n: False}),
    "compiled": (compiled, "wrapped by torch.compile", {}),
}


def explain(model: nn.Module, **more: Any) -> Report:
    return dgefx.explain(randomise(model).eval(), 1.0, **{"example_inputs": X, **more})


@pytest.mark.parametrize("kind", CASES)
def test_each_kind_has_its_reason_and_advice(kind: str) -> None:
    make, words, more = CASES[kind]
    report = explain(make(), **more)
    found, *others = (b for b in report.blocks if b.status == "dense")
    assert all(b.kind == kind for b in others)
    assert (found.kind, words in found.reason) == (kind, True), found
    assert found.advice == ADVICE[kind]  # type: ignore[index]
    assert f"{kind}: {found.advice}" in " ".join(str(report).split())
    assert all(b.kind == b.advice == "" for b in report.converted)


def test_refusals_are_listed_with_their_advice_once() -> None:
    model = Model(block(outlook), block(outlook), Head())
    with pytest.raises(ValueError, match="no attention block could be converted") as caught:
        dgefx.convert(randomise(model).eval(), 0.5, example_inputs=X)
    lines = str(caught.value).splitlines()
    kinds = ("no query-key scores", "pooling head or learned queries")
    assert [line.split(":")[0] for line in lines[1:4]] == [
        "  blocks.0 and blocks.1",
        "  blocks.2",
        "what to do",
    ]
    assert lines[4:] == [f"- {kind}: {ADVICE[kind]}" for kind in kinds]


def test_nothing_found_says_what_is_recognised() -> None:
    with pytest.raises(ValueError, match=r"flash_attn, xformers.*scaled_dot_product_attention"):
        dgefx.convert(nn.Conv2d(3, 4, 4), example_inputs=X)


# -- softmaxes that weigh other tokens ------------------------------------------------------------


def outlook(b: nn.Module, y: Tensor) -> Tensor:
    """Weights of the 3 x 3 neighbours, by a linear layer."""
    near = F.unfold(kept(b.linear(y)), 3, padding=1).view(-1, DIM, 9, SIDE * SIDE)
    weights = b.other(y)[..., :9].softmax(-1)
    return (weights[:, :, None] @ near.permute(0, 3, 2, 1)).squeeze(2)


def experts(b: nn.Module, y: Tensor) -> Tensor:
    """Two experts, gated by a softmax."""
    both = torch.stack([b.linear(y), b.other(y)], 2)
    return torch.einsum("bne,bnec->bnc", b.linear(y)[..., :2].softmax(-1), both)


def features(b: nn.Module, y: Tensor) -> Tensor:
    """A softmax over parts of one token's features."""
    return (b.linear(y)[..., None, :4].softmax(-1) @ b.other(y).unflatten(-1, (4, -1))).repeat(
        1, 1, 1, 4
    )[:, :, 0]


def classes(b: nn.Module, y: Tensor) -> Tensor:
    """Class embeddings weighed by class probabilities."""
    return b.linear(y).softmax(-1) @ b.other.weight


@pytest.mark.parametrize("update", [outlook, linear_attention])
def test_other_attention_is_reported_and_left_alone(update: Callable[..., Tensor]) -> None:
    dense = randomise(Model(block(update), plain())).eval()
    model = dgefx.convert(dense, 1.0, example_inputs=X)
    other, whole = dgefx.report(model).blocks
    assert (other.name, other.kind) == ("blocks.0", "no query-key scores")
    assert (whole.name, whole.status) == ("blocks.1", "converted")
    with torch.no_grad():
        assert error(model(X), dense(X)) <= 1e-5


@pytest.mark.parametrize("update", [experts, features, classes])
def test_other_softmaxes_are_no_attention(update: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="no attention blocks found"):
        dgefx.convert(randomise(Model(block(update))).eval(), example_inputs=X)


# -- what the advice promises ----------------------------------------------------------------------


def test_a_mask_converts_with_fused_attention() -> None:
    model = Model(block(lambda b, y: sdpa(b.linear(y), y, y, attn_mask=MASK)))
    assert [(b.status, b.reason) for b in explain(model).blocks] == [("converted", "")]


def test_modules_that_share_parameters_convert() -> None:
    first = plain()
    second = copy.deepcopy(first)
    second.attn = first.attn
    for name, parameter in first.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(second.get_submodule(owner), leaf, parameter)
    second.attn = Attention(DIM, 2)
    for ours, theirs in zip(second.attn.children(), first.attn.children(), strict=True):
        ours.weight, ours.bias = theirs.weight, theirs.bias
    assert [b.status for b in explain(Model(first, second)).blocks] == ["converted"] * 2


def test_written_attention_converts_with_a_budget_per_image() -> None:
    make, _, _ = CASES["packed queries"]
    assert [b.status for b in explain(make()).blocks] == ["converted"]


# -- the vocabulary --------------------------------------------------------------------------------


def test_vocabulary() -> None:
    assert set(get_args(KindName)) == set(ADVICE)
    assert all(advice and advice[0].islower() for advice in ADVICE.values())
    assert advice_lines(["windows", "", "compiled", "windows"]) == [
        f"windows: {ADVICE['windows']}",
        f"compiled: {ADVICE['compiled']}",
    ]
    assert BlockReport("a", "dense", "why", 1.0).kind == ""  # records of earlier versions


def test_every_refusal_in_the_source_has_a_kind() -> None:
    seen = 0
    for path in Path(dgefx.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "Refused":
                continue
            seen += 1
            (kind,) = node.args[1:] or (None,)
            found = isinstance(kind, ast.Constant) and kind.value in ADVICE
            assert found, f"{path.name}, line {node.lineno}"
    assert seen > 20


def test_class_attention_in_blocks_of_its_own() -> None:
    """CaiT: a stream of class tokens alone, which ask with nothing but themselves."""
    model = timm.create_model("cait_xxs24_224", depth=1, img_size=64)
    first, *others = explain(model, example_inputs=torch.randn(2, 3, 64, 64)).blocks
    assert first.status == "converted" and len(others) == 2
    assert {block.kind for block in others} == {"class attention"}
