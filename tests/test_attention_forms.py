"""Attention in forms that users register: operators and functions of their own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dgefx
from dgefx import AttentionForm
from dgefx.passes.attention.core import AttentionCore, SearchedGraph
from dgefx.passes.reasons import Reason
from tests.helpers import error, images, randomise

NAME = "form of a test"


def hidden(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention that nothing finds by itself: a softmax without its name."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    weights = (scores if bias is None else scores + bias).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ value


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`hidden` of (images, tokens, heads, C)."""
    return hidden(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)


@torch.library.custom_op("dgefx_tests::hidden", mutates_args=())
def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(q, k, v)


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def _backward(context: Any, gradient: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        parts = [tensor.detach().requires_grad_() for tensor in context.saved_tensors]
        return torch.autograd.grad(hidden(*parts), parts, gradient)


operator.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Block(nn.Module):
    """attend: (block, q, k, v), of (images, heads, tokens, C) each."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.bias = nn.Parameter(torch.zeros(1, 2, 64, 64))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = self.attend(self, *parts.unbind(0))
        x = x + self.proj(y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A grid of 8 x 8 tokens of an image of 32 x 32 pixels."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(Block(attend), Block(attend))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.fixture
def register() -> Iterator[Callable[..., AttentionForm]]:
    before = dgefx.passes.attention.registry.form_names()
    yield lambda *args, **options: dgefx.register_attention(AttentionForm(NAME, *args, **options))
    for name in set(dgefx.passes.attention.registry.form_names()) - set(before):
        dgefx.unregister_attention(name)


def by_name(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(q, k, v)


def by_keyword(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(value=v, key=k, query=q)


def by_attribute(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sys.modules[__name__].hidden(q, k, v)


def by_operator(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return operator(q, k, v)


def with_bias(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(q, k, v, block.bias)


def with_tokens_first(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return tokens_first(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)


CASES: list[tuple[Any, list[Any], dict[str, Any]]] = [
    (by_name, [hidden], {}),
    (by_keyword, [f"{__name__}.hidden"], {}),
    (by_attribute, [hidden], {}),
    (by_operator, [operator], {"operands": ("q", "k", "v")}),
    (by_operator, ["dgefx_tests::hidden"], {}),
    (with_bias, [hidden], {"gathers_mask": True}),
    (with_tokens_first, [tokens_first], {"query_axis": -3}),
]


@pytest.mark.parametrize(("attend", "functions", "options"), CASES)
def test_a_registered_form_converts(
    register: Callable[..., AttentionForm], attend: Any, functions: Any, options: Any
) -> None:
    dense, x = randomise(ViT(attend)).eval(), images(2, 32)
    with pytest.raises(ValueError, match=r"no attention blocks found.*dgefx\.register_att"):
        dgefx.convert(dense, example_inputs=x)
    register(functions, **options)
    model = dgefx.convert(dense, 0.7, example_inputs=x)  # mixed, and verified
    report = dgefx.report(model)
    assert [b.status for b in report.blocks] == ["converted"] * 2 and report.ratio <= 0.7
    dgefx.set_budget(model, 1.0)
    with torch.no_grad():
        assert error(model(x), dense(x)) <= 1e-5
    # a conversion leaves the function where it was, and the model goes on without the form
    assert sys.modules[__name__].hidden is hidden
    dgefx.unregister_attention(NAME)
    model.train()(x).sum().backward()


def test_a_function_that_a_module_holds(register: Callable[..., AttentionForm]) -> None:
    dense = ViT(by_name)
    for block in dense.blocks:
        block.function = hidden
        block.attend = lambda block, q, k, v: block.function(q, k, v)
    register([hidden])
    model = dgefx.convert(dense.eval(), 0.7, example_inputs=images(2, 32))
    assert all(block.status == "converted" for block in dgefx.report(model).blocks)
    assert all(block.function is hidden for block in dense.blocks)


@pytest.mark.parametrize("bound", [{}, {"bias": torch.zeros(64, 64)}])
def test_a_function_that_a_module_holds_with_some_arguments(
    register: Callable[..., AttentionForm], bound: dict[str, Any]
) -> None:
    dense, x = ViT(lambda block, q, k, v: block.function(q, k, v)).eval(), images(2, 32)
    held = functools.partial(hidden, **bound)
    for block in dense.blocks:
        block.function = held
    register([hidden], gathers_mask=True)
    model = dgefx.convert(dense, 0.7, example_inputs=x)
    assert all(block.status == "converted" for block in dgefx.report(model).blocks)
    assert all(block.function is held for block in dense.blocks)
    dgefx.set_budget(model, 1.0)
    with torch.no_grad():
        assert error(model(x), dense(x)) <= 1e-5


def test_a_form_may_be_registered_while_another_thread_converts(
    register: Callable[..., AttentionForm],
) -> None:
    class Changing(AttentionForm):
        """As if somebody registered a form in the midst of a search."""

        def find(self, searched: SearchedGraph) -> list[AttentionCore]:
            if "another" not in dgefx.passes.attention.registry.form_names():
                dgefx.register_attention(AttentionForm("another", [tokens_first]))
            return super().find(searched)

    dgefx.register_attention(Changing("changing", [operator]))
    register([hidden])
    model = dgefx.convert(ViT(by_name).eval(), 0.7, example_inputs=images(2, 32))
    assert all(block.status == "converted" for block in dgefx.report(model).blocks)


def test_another_function_of_that_name_is_none_of_the_form(
    register: Callable[..., AttentionForm],
) -> None:
    register(["elsewhere.hidden", "elsewhere::hidden", "elsewhere.softmax"])
    for attend in (by_name, by_operator):
        with pytest.raises(ValueError, match="no attention blocks found"):
            dgefx.convert(ViT(attend).eval(), example_inputs=images(2, 32))


def test_packed_queries_are_refused_with_the_reason(register: Callable[..., AttentionForm]) -> None:
    register([hidden])
    config = dgefx.DGEConfig(budget="average")
    report = dgefx.explain(ViT(by_name).eval(), 0.7, example_inputs=images(2, 32), config=config)
    for block in report.blocks:
        assert block.kind == "packed queries" and NAME in str(block.reason)


def test_a_form_refuses_calls(register: Callable[..., AttentionForm]) -> None:
    class Unbiased(AttentionForm):
        def refusal(self, node: torch.fx.Node) -> Reason | None:
            return Reason("it has a bias", "attention mask") if len(node.args) > 3 else None

    form = dgefx.register_attention(Unbiased("unbiased", [hidden]))
    report = dgefx.explain(ViT(with_bias).eval(), 0.7, example_inputs=images(2, 32))
    assert [b.reason for b in report.blocks] == ["it has a bias"] * 2
    dgefx.unregister_attention(form)


def test_what_cannot_be_registered(register: Callable[..., AttentionForm]) -> None:
    for wrong in (AttentionForm, "hidden", hidden):
        with pytest.raises(TypeError, match=r"takes an instance of dgefx\.AttentionForm"):
            dgefx.register_attention(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="functions must be callables"):
        register([3])
    with pytest.raises(TypeError, match="operands must name"):
        register([hidden], operands=("q", "k"))
    with pytest.raises(ValueError, match="query_axis is negative"):
        register([hidden], query_axis=2)
    with pytest.raises(ValueError, match="lists no functions"):
        register()
    with pytest.raises(ValueError, match="no attention form 'other'"):
        dgefx.unregister_attention("other")
    register([hidden])
    with pytest.raises(ValueError, match="is registered already; choose another name"):
        register([tokens_first])
    with pytest.raises(ValueError, match="hidden belongs to the attention form"):
        dgefx.register_attention(AttentionForm("other", [hidden]))
