"""torchao: quantised before the conversion or after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dgefx
from dgefx.nn import DGEBlock
from tests.helpers import TinyViT, error, images, randomise

quantization = pytest.importorskip("torchao.quantization")
X = images(2, 32)

KINDS: dict[str, Callable[[], Any]] = {
    "weights": quantization.Int8WeightOnlyConfig,
    "weights and activations": quantization.Int8DynamicActivationInt8WeightConfig,
}


def dense() -> nn.Module:
    return randomise(TinyViT(dim=32, prefix=1)).eval()


def quantised(model: nn.Module, kind: str) -> nn.Module:
    model = copy.deepcopy(model)
    quantization.quantize_(model, KINDS[kind]())
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_convert_then_quantise(kind: str) -> None:
    model = dense()
    wanted = quantised(model, kind)(X)
    noise = error(wanted, model(X))
    assert noise > 1e-4  # quantising does change it
    # an activation next to the middle of two steps may go either way, by the rounding of float32
    limit = noise if "activations" in kind else 1e-5
    finest = quantised(dgefx.convert(model, 1.0, example_inputs=X), kind)
    assert error(finest(X), wanted) < limit
    converted = dgefx.convert(model, 0.6, example_inputs=X)
    coarse = quantised(converted, kind)
    assert error(coarse(X), converted(X)) < 0.1
    dgefx.set_budget(coarse, 1.0)
    assert error(coarse(X), wanted) < limit


@torch.no_grad()
def test_quantised_weights_then_convert() -> None:
    model = quantised(dense(), "weights")
    kinds = [type(p.data) for p in model.parameters()]
    finest = dgefx.convert(model, 1.0, example_inputs=X)
    assert sum(type(m) is DGEBlock for m in finest.modules()) == 2
    assert [type(p.data) for p in finest.parameters()] == kinds
    assert error(finest(X), model(X)) < 1e-5
    converted = dgefx.convert(model, 0.6, example_inputs=X)
    assert 1e-3 < error(converted(X), model(X)) < 1


def test_quantised_activations_then_convert_says_the_order() -> None:
    """They round by the last bit of what they get, so a block may differ from its dense one."""
    model = quantised(dense(), "weights and activations")
    with pytest.raises(ValueError, match="convert the model first and quantise the converted one"):
        dgefx.convert(model, 0.6, example_inputs=X)
    report = dgefx.explain(model, 1.0, example_inputs=X)
    assert any("convert the model first" in block.reason for block in report.blocks)
