"""Acceptance 1: at gamma 1.0 the converted model equals the dense one, on real architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from timm.models.nest import Nest
from torch import Tensor, nn

import dgefx
from tests.helpers import Attention, TinyViT, error, images, randomise, slow

#: depth or stage depths that keep CI short; the slow test takes the models whole
TIMM_SHORT: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2},
    "deit_tiny_distilled_patch16_224": {"depth": 2},
    "deit3_small_patch16_224": {"depth": 2},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "img_size": 140},
    "vit_base_patch16_siglip_224": {"depth": 2},
    "eva02_tiny_patch14_224": {"depth": 2},
    "vit_small_patch16_dinov3": {"depth": 2, "img_size": 112},
    "beit_base_patch16_224": {"depth": 2},
    "pvt_v2_b0": {},
    "pvt_v2_b2": {"depths": (1, 1, 1, 1)},
    "twins_pcpvt_small": {"depths": (2, 1, 2, 1)},
}
#: of a kind with "pvt_v2_b0", with the plain ones, and with BEiT of transformers
_DOUBLE = (
    "pvt_v2_b2",
    "twins_pcpvt_small",
    "vit_base_patch16_siglip_224",
    "beit_base_patch16_224",
)
#: pooling heads ask with one learned query: rightly refused
REFUSED = {"vit_base_patch16_siglip_224": ["attn_pool"]}


def check_exact(model: nn.Module, refused: list[str], **options: Any) -> None:
    randomise(model).eval()
    converted = dgefx.convert(model, 1.0, **options)
    report = dgefx.report(converted)
    assert [b.name for b in report.blocks if b.status == "dense"] == refused
    assert all(b.reason for b in report.blocks if b.status == "dense")
    x = options["example_inputs"]
    with torch.no_grad():
        found, wanted = converted(x), model(x)
    if not isinstance(wanted, torch.Tensor):
        found, wanted = found[0], wanted[0]
    assert error(found, wanted) <= 1e-5


@pytest.mark.parametrize("name", [slow(name) if name in _DOUBLE else name for name in TIMM_SHORT])
def test_timm(name: str) -> None:
    options = TIMM_SHORT[name]
    model = timm.create_model(name, **options)
    side = options.get("img_size", 224)
    check_exact(model, REFUSED.get(name, []), example_inputs=images(2, side, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM_SHORT)
def test_timm_whole(name: str) -> None:
    model = timm.create_model(name)
    side = getattr(getattr(model, "patch_embed", None), "img_size", None) or (224, 224)
    check_exact(model, REFUSED.get(name, []), example_inputs=images(2, tuple(side), seed=1))


def test_torchvision_vit() -> None:
    model = torchvision.models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # torchvision zeroes it
    check_exact(model, [], example_inputs=images(2, 64))


@pytest.mark.slow
def test_torchvision_vit_b_16() -> None:
    model = torchvision.models.vit_b_16()
    nn.init.normal_(model.heads.head.weight)
    check_exact(model, [], example_inputs=images(2, 224))


COLUMN = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 72,
    "patch_size": 8,
}
PYRAMID = {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4]}
WIDTHS = {"hidden_sizes": [16, 32, 64, 64]}


def _hugging_face() -> dict[str, Callable[[], nn.Module]]:
    t = transformers
    return {
        "vit": lambda: t.ViTModel(t.ViTConfig(**COLUMN)),
        "deit": lambda: t.DeiTModel(t.DeiTConfig(**COLUMN)),
        "beit": lambda: t.BeitModel(t.BeitConfig(**COLUMN, use_relative_position_bias=True)),
        "beit shared": lambda: t.BeitModel(
            t.BeitConfig(**COLUMN, use_shared_relative_position_bias=True)
        ),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**COLUMN)),
        "dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**COLUMN, num_register_tokens=2)),
        "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**COLUMN)),
        "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**COLUMN)),
        "pvt": lambda: t.PvtModel(t.PvtConfig(image_size=96, **PYRAMID, **WIDTHS)),
        "pvt v2": lambda: t.PvtV2Model(t.PvtV2Config(image_size=96, **PYRAMID, **WIDTHS)),
        "segformer": lambda: t.SegformerForSemanticSegmentation(
            t.SegformerConfig(**PYRAMID, **WIDTHS)
        ),
    }


@pytest.mark.parametrize(
    "name", [slow(name) if name in ("pvt", "deit") else name for name in _hugging_face()]
)
def test_hugging_face(name: str) -> None:
    torch.manual_seed(0)
    model = _hugging_face()[name]()
    pyramid = name in ("pvt", "pvt v2", "segformer")
    refused = []
    if name == "siglip":
        randomise(model)
        refused = [b.name for b in dgefx.explain(model, 1.0).blocks if "head" in b.name]
        assert len(refused) == 1
    check_exact(model, refused, example_inputs=images(2, 96 if pyramid else 72))


@pytest.mark.parametrize("order", ["BNC", "BHWC", "BCHW"])
@pytest.mark.parametrize("size", [(32, 32), (28, 44)])
def test_layouts(order: str, size: tuple[int, int]) -> None:
    check_exact(TinyViT(order=order), [], example_inputs=images(3, size))


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_prefix_tokens_are_found(prefix: int) -> None:
    model = TinyViT(prefix=prefix)
    check_exact(model, [], example_inputs=images(2, 36))
    report = dgefx.explain(model, 0.9, example_inputs=images(2, 36))
    assert {b.prefix for b in report.converted} == {prefix}


def test_multihead_attention_sequence_first() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Conv2d(3, 16, 4, stride=4)
            self.layers = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1), 2, enable_nested_tensor=False
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(self.embed(x).flatten(2).permute(2, 0, 1)).mean(0)

    check_exact(SequenceFirst(), [], example_inputs=images(2, 32))  # post-norm
    model = SequenceFirst()
    for layer in model.layers.layers:
        layer.norm_first = True
    check_exact(model, [], example_inputs=images(2, 32))


def test_low_precision_settings_do_not_fail_the_verification() -> None:
    """On CPUs with bfloat16 units "medium" rounds as TF32 does on GPUs; elsewhere it is ignored."""
    model, x = randomise(TinyViT(dim=64, prefix=1)).eval(), images(2, 32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        converted = dgefx.convert(model, 1.0, example_inputs=x)
        assert len(dgefx.report(converted).converted) == 2
        with pytest.raises(ValueError):
            dgefx.convert(nn.Linear(4, 4), 1.0, example_inputs=torch.randn(2, 4))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


class Amplified(nn.Module):
    """Its result keeps few digits of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = TinyViT(dim=32, prefix=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # a sine of many turns: what is left of its angle is the last digits of float32
        return torch.sin(self.backbone(x) * 1e4)


def test_rounding_that_the_model_amplifies_is_no_difference() -> None:
    model, x = randomise(Amplified()).eval(), images(2, 32)
    converted = dgefx.convert(model, 1.0, example_inputs=x)
    assert len(dgefx.report(converted).converted) == 2
    with torch.no_grad():
        assert error(converted(x), model(x)) > 1e-5
        assert error(converted.double()(x.double()), model.double()(x.double())) < 1e-10


@pytest.mark.parametrize("spelling", ["list", "tuple", "operands"])
def test_attention_in_einsum(spelling: str) -> None:
    class InEinsum(Attention):
        def forward(self, x: Tensor) -> Tensor:
            def einsum(equation: str, *operands: Tensor) -> Tensor:
                if spelling == "operands":
                    return torch.einsum(equation, *operands)
                return torch.einsum(equation, list(operands) if spelling == "list" else operands)

            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
            scores = einsum("bqhc,bkhc->bhqk", q, k) * q.shape[-1] ** -0.5
            return self.proj(einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v).flatten(2))

    check_exact(TinyViT(make=lambda dim: InEinsum(dim, 2)), [], example_inputs=images(2, 32))


def test_scores_whose_keys_are_cut_into_rows_and_columns() -> None:
    """VitDet adds the rows' and the columns' part of its position bias to scores of
    (B, rows, columns, rows, columns)."""
    config = transformers.VitDetConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        pretrain_image_size=64,
        patch_size=8,
        window_size=4,
        window_block_indices=[0],
        use_relative_position_embeddings=True,
    )
    model, x = randomise(transformers.VitDetModel(config)).eval(), images(2, 64)
    converted = dgefx.convert(model, 1.0, example_inputs=x)
    assert len(dgefx.report(converted).converted) == 2
    with torch.no_grad():
        assert error(converted(x).last_hidden_state, model(x).last_hidden_state) < 1e-5
    assert dgefx.report(dgefx.convert(model, 0.6, example_inputs=x)).ratio <= 0.605


def test_parts_of_an_image_that_count_as_images() -> None:
    """NesT: 16, 4 and 1 parts, on an axis of their own."""
    model = Nest(
        img_size=64, num_levels=3, embed_dims=(16, 32, 64), num_heads=(2, 2, 2), depths=(1, 1, 1)
    )
    model = randomise(model).eval()
    converted = dgefx.convert(model, 1.0, example_inputs=images(2, 64))
    assert len(dgefx.report(converted).converted) == 3
    with torch.no_grad():
        for count in (1, 2, 3):
            x = images(count, 64)
            assert error(converted(x), model(x)) < 1e-5
    dgefx.convert(model, 0.7, example_inputs=images(2, 64))(images(3, 64))
