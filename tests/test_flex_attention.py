"""`flex_attention`: without masks it converts, as `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as module
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import dgefx
from tests import test_attention_forms as forms
from tests.helpers import error, images, randomise
from tests.test_attention_forms import ViT


def by_name(block: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v)


def by_attribute(block: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return module.flex_attention(q, k, value=v, scale=0.3)


def with_score_mod(block: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + 0.01 * (i - j))


def with_block_mask(block: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 64, 64, "cpu")
    return flex_attention(q, k, v, block_mask=mask)


@pytest.mark.parametrize("budget", ["per_image", "average"])
@pytest.mark.parametrize("attend", [by_name, by_attribute])
def test_it_converts_without_masks(attend: Callable[..., Tensor], budget: Any) -> None:
    dense, x = randomise(ViT(attend)).eval(), images(2, 32)
    config = dgefx.DGEConfig(budget=budget)
    model = dgefx.convert(dense, 0.7, example_inputs=x, config=config)  # mixed, and verified
    assert [b.status for b in dgefx.report(model).blocks] == ["converted"] * 2
    model = dgefx.convert(dense, 1.0, example_inputs=x, config=config)
    with torch.no_grad():
        assert error(model(x), dense(x)) <= 1e-5
    model.train()(x).sum().backward()  # which the dense model cannot do on the CPU
    assert module.flex_attention is flex_attention and not hasattr(flex_attention, "__wrapped__")


def test_it_converts_beside_a_form_of_a_user() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(ViT(by_name).blocks[0], ViT(forms.by_name).blocks[0])
            self.patches = nn.Conv2d(3, 16, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.patches(x).flatten(2).transpose(1, 2))

    form = dgefx.register_attention(dgefx.AttentionForm("of a user", [forms.hidden]))
    try:
        model = dgefx.convert(Two().eval(), 0.7, example_inputs=images(2, 32))
    finally:
        dgefx.unregister_attention(form)
    assert [b.status for b in dgefx.report(model).blocks] == ["converted"] * 2
    assert not vars(forms.hidden)


@pytest.mark.parametrize("attend", [with_score_mod, with_block_mask])
def test_masks_are_refused_with_the_reason(attend: Callable[..., Tensor]) -> None:
    dense = ViT(attend).eval().requires_grad_(False)
    report = dgefx.explain(dense, 0.7, example_inputs=images(2, 32))
    for block in report.blocks:
        assert block.kind == "attention mask"
        assert "flex_attention with score_mod or block_mask" in str(block.reason)
