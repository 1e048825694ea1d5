"""torch.compile(fullgraph=True): one graph, equal to eager, one recompile for a new batch size."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import dgefx
from tests.helpers import TinyViT, error, images, randomise, slow


def _model(name: str) -> tuple[nn.Module, int]:
    if name == "tiny":
        return TinyViT(dim=32, prefix=1), 56
    if name == "pvt":
        return timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)), 96
    return timm.create_model("vit_tiny_patch16_224", depth=1, img_size=96), 96


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiny", "pvt"))]
)
def test_inductor_equals_eager(name: str) -> None:
    dense, side = _model(name)
    model = dgefx.convert(randomise(dense), 0.6, example_inputs=images(2, side)).eval()
    x = images(2, side, seed=3)
    with torch.no_grad():
        wanted = model(x)
        found = torch.compile(model, fullgraph=True)(x)
    assert error(found, wanted) <= 1e-5


@pytest.mark.parametrize(
    ("name", "training"),
    [
        slow("tiny", False),
        ("tiny", True),
        slow("pvt", True),
        slow("vit", False),
        slow("pvt", False),
        slow("vit", True),
    ],
)
def test_one_graph_and_one_recompile(name: str, training: bool) -> None:
    dense, side = _model(name)
    model = dgefx.convert(randomise(dense), 0.6, example_inputs=images(2, side)).train(training)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for count in (2, 4, 7, 3):
        x = images(count, side, seed=count)
        assert compiled(x).shape[0] == count
        if not training:
            assert error(compiled(x), model(x)) <= 1e-5
    assert counter.frame_count <= 2


def test_compiled_training_step() -> None:
    model = dgefx.convert(randomise(TinyViT(32, 1)), 0.6, example_inputs=images(2, 32)).train()
    x = images(2, 32)
    output = model(x)
    output.square().mean().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    found = torch.compile(model, fullgraph=True)(x)
    assert error(found, output) <= 1e-5
    found.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, wanted[name]) <= 1e-4, name
