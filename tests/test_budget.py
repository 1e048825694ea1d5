"""Acceptance 2: the measured MAC ratio lies in its band, whatever the model."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from torch import nn

import dgefx
from tests.helpers import Attention, TinyViT, images, macs, randomise, slow


def _models() -> dict[str, nn.Module]:
    config = transformers.ViTConfig(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=384,
        image_size=112,
        patch_size=8,
    )
    return {
        "vit": timm.create_model("vit_tiny_patch16_224"),
        "pvt": timm.create_model("pvt_v2_b0"),
        "hf vit": transformers.ViTForImageClassification(config),
    }


@pytest.mark.parametrize(
    ("name", "gamma", "routing"),
    [
        slow("vit", 0.4, "region"),
        ("vit", 0.5, "region"),
        slow("vit", 0.7, "region"),
        slow("pvt", 0.4, "region"),
        ("pvt", 0.5, "region"),
        slow("pvt", 0.7, "region"),
        slow("hf vit", 0.4, "region"),
        ("hf vit", 0.5, "region"),
        slow("hf vit", 0.7, "region"),
        # with one granularity per layer only few ratios exist; many layers come close to any
        ("vit", 0.5, "layer"),
        slow("pvt", 0.5, "layer"),
    ],
)
def test_ratio_in_band(name: str, gamma: float, routing: str) -> None:
    model = _models()[name].eval()
    x = images(2, 112 if name == "hf vit" else 224)
    config = dgefx.DGEConfig(routing=routing)
    converted = dgefx.convert(model, gamma, example_inputs=x, config=config)
    ratio = macs(converted, x) / macs(model, x)
    assert gamma - 0.02 <= ratio <= gamma + 0.005
    report = dgefx.report(converted)
    assert report.ratio == pytest.approx(ratio, abs=1e-6)
    assert report.macs_dense == macs(model, x) / 2
    assert report.floor < gamma
    # and it holds per block: the report adds up to the whole
    assert all(b.status == "converted" and 0 < b.ratio <= 1 for b in report.blocks)


def test_floor_is_reachable_and_named() -> None:
    model, x = TinyViT(dim=32), images(2, 64)
    floor = dgefx.explain(model, 1.0, example_inputs=x).floor
    assert dgefx.report(
        dgefx.convert(model, floor + 1e-6, example_inputs=x)
    ).ratio == pytest.approx(floor, abs=1e-3)
    with pytest.raises(ValueError, match=f"floor of {floor:.3f}.*coarsest"):
        dgefx.convert(model, floor - 0.01, example_inputs=x)
    report = dgefx.explain(model, floor / 2, example_inputs=x)
    assert report.ratio == pytest.approx(floor, abs=1e-3) and report.gamma == floor / 2
    assert "under the floor" in str(report)


def test_linear_gate_size_is_the_papers() -> None:
    """PVT-Small: 12 480 gate weights for {1, 2, 4}, 8 320 for {1, 2}, plus biases."""
    from dgefx.nn.capacity import plans
    from dgefx.nn.router import Router

    for sides, wanted in (((1, 2, 4), 12480), ((1, 2), 8320)):
        config = dgefx.DGEConfig(granularities=sides, router="linear")
        weights = biases = 0
        for width, depth, side in ((64, 3, 56), (128, 4, 28), (320, 6, 14), (512, 3, 7)):
            for _ in range(depth):
                router = Router(config, (side, side), 0, width, plans((side, side), config)[-1])
                assert router.gate is not None
                weights += router.gate.weight.numel()
                biases += router.gate.bias.numel()
        assert (weights, biases) == (wanted, 16 * len(sides))


def test_linear_gate_starts_at_the_finest_level() -> None:
    x = images(2, 64)
    model = dgefx.convert(TinyViT(), 0.7, example_inputs=x, config=dgefx.DGEConfig(router="linear"))
    for block in model.blocks:
        probability = block.dge_router.gate.bias.softmax(0)
        assert probability[0].item() == pytest.approx(0.95, abs=1e-3)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_a_mask_of_any_shape_leaves_attention_counted_alike(axes: int) -> None:
    """On the CPU the counter sees attention with a mask of three axes, and no other (2.14)."""
    mask = torch.randn(1, 2, 144, 144).reshape(-1, 144, 144)
    mask = {2: mask[0], 3: mask, 4: mask.unsqueeze(0)}[axes]
    dense = randomise(TinyViT(depth=1, make=lambda dim: Attention(dim, 2, mask))).eval()
    x = images(2, 48)
    assert dgefx.report(dgefx.convert(dense, 1.0, example_inputs=x)).ratio == pytest.approx(1.0)
    coarse = dgefx.report(dgefx.convert(dense, 0.6, example_inputs=x))
    assert coarse.ratio <= 0.6 and coarse.blocks[0].ratio < 1.0
