"""Small configurations of Hugging Face vision models, for `hf_cases`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dgefx.coverage.cases import Inputs, noise

#: of most plain vision transformers
_VIT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 112,
    "patch_size": 8,
}
_SWIN: dict[str, Any] = {
    "image_size": 112,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 7,
}
_DETR: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_queries": 10,
}
_QUERIES = (("*decoder*", "attention of a decoder's object queries"),)


@dataclass(frozen=True)
class Row:
    """name: on the command line. kind: of attention. needs: a class that the release must have.
    build: makes the model of the module `transformers`. side, channels: of its images."""

    name: str
    kind: str
    needs: str
    build: Callable[[Any], nn.Module]
    side: int = 112
    channels: int = 3
    note: str = ""
    over_grid: bool = True


def _plain(model: str, config: str, **changes: Any) -> Callable[[Any], nn.Module]:
    def build(hf: Any) -> nn.Module:
        made: nn.Module = getattr(hf, model)(getattr(hf, config)(**{**_VIT, **changes}))
        return made

    return build


def _made(model: str, config: str, **settings: Any) -> Callable[[Any], nn.Module]:
    def build(hf: Any) -> nn.Module:
        made: nn.Module = getattr(hf, model)(getattr(hf, config)(**settings))
        return made

    return build


def _resnet(hf: Any, *stages: str) -> Any:
    names = list(stages) or ["stage4"]
    return hf.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=names,
    )


def _dinov2(hf: Any, **changes: Any) -> Any:
    settings = {k: v for k, v in _VIT.items() if k != "intermediate_size"}
    settings |= {"num_hidden_layers": 4, "image_size": 112, "patch_size": 14}
    stages = [f"stage{i}" for i in range(1, 5)]
    settings |= {"out_features": stages, "reshape_hidden_states": False, **changes}
    return hf.Dinov2Config(**settings)


def _detr(hf: Any) -> nn.Module:
    config = hf.DetrConfig(backbone_config=_resnet(hf), **_DETR)
    made: nn.Module = hf.DetrForObjectDetection(config)
    return made


def _table(hf: Any) -> nn.Module:
    config = hf.TableTransformerConfig(backbone_config=_resnet(hf), **_DETR)
    made: nn.Module = hf.TableTransformerForObjectDetection(config)
    return made


def _conditional(hf: Any) -> nn.Module:
    config = hf.ConditionalDetrConfig(backbone_config=_resnet(hf), **_DETR)
    made: nn.Module = hf.ConditionalDetrForObjectDetection(config)
    return made


def _deformable(hf: Any) -> nn.Module:
    backbone = _resnet(hf, "stage2", "stage3", "stage4")
    config = hf.DeformableDetrConfig(backbone_config=backbone, **_DETR)
    made: nn.Module = hf.DeformableDetrForObjectDetection(config)
    return made


def _rt_detr(hf: Any, version: str = "") -> nn.Module:
    backbone = hf.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    settings: dict[str, Any] = {
        "backbone_config": backbone,
        "encoder_hidden_dim": 64,
        "encoder_in_channels": [32, 48, 64],
        "encoder_ffn_dim": 128,
        "encoder_attention_heads": 4,
        "d_model": 64,
        "num_queries": 10,
        "decoder_in_channels": [64, 64, 64],
        "decoder_ffn_dim": 128,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "anchor_image_size": None,
    }
    config = getattr(hf, f"RTDetr{version}Config")(**settings)
    made: nn.Module = getattr(hf, f"RTDetr{version}ForObjectDetection")(config)
    return made


def _swin_backbone(hf: Any) -> Any:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    four = {"depths": [2, 2, 2, 2], "num_heads": [2, 2, 4, 4], "embed_dim": 16}
    return hf.SwinConfig(**{**_SWIN, **four, "image_size": 224, "out_features": stages})


def _mask2former(hf: Any) -> nn.Module:
    config = hf.Mask2FormerConfig(
        backbone_config=_swin_backbone(hf),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=64,
        num_queries=10,
    )
    made: nn.Module = hf.Mask2FormerForUniversalSegmentation(config)
    return made


def _maskformer(hf: Any) -> nn.Module:
    decoder = hf.DetrConfig(backbone_config=_resnet(hf), **_DETR)
    config = hf.MaskFormerConfig(
        backbone_config=_swin_backbone(hf),
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
    )
    made: nn.Module = hf.MaskFormerForInstanceSegmentation(config)
    return made


def _upernet(hf: Any) -> nn.Module:
    config = hf.UperNetConfig(
        backbone_config=_swin_backbone(hf),
        hidden_size=32,
        auxiliary_in_channels=64,
        auxiliary_channels=16,
        num_labels=5,
    )
    made: nn.Module = hf.UperNetForSemanticSegmentation(config)
    return made


def _depth_anything(hf: Any) -> nn.Module:
    config = hf.DepthAnythingConfig(
        backbone_config=_dinov2(hf),
        patch_size=14,
        reassemble_hidden_size=64,
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
        head_hidden_size=16,
    )
    made: nn.Module = hf.DepthAnythingForDepthEstimation(config)
    return made


def _zoedepth(hf: Any) -> nn.Module:
    backbone = hf.BeitConfig(
        **{**_VIT, "num_hidden_layers": 4, "image_size": 128, "patch_size": 16},
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        use_relative_position_bias=True,
    )
    config = hf.ZoeDepthConfig(
        backbone_config=backbone,
        backbone_hidden_size=64,
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
        bottleneck_features=16,
        num_relative_features=8,
        bin_embedding_dim=16,
        num_attractors=[4, 4, 2, 1],
    )
    made: nn.Module = hf.ZoeDepthForDepthEstimation(config)
    return made


def _dpt(hf: Any) -> nn.Module:
    settings = {**_VIT, "num_hidden_layers": 4, "patch_size": 16, "image_size": 128}
    config = hf.DPTConfig(
        **settings,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
    )
    made: nn.Module = hf.DPTForDepthEstimation(config)
    return made


def _sam(hf: Any, kind: str = "Sam") -> nn.Module:
    settings = {**_VIT, "num_hidden_layers": 4, "patch_size": 16, "image_size": 256}
    settings |= {"global_attn_indexes": [1, 3], "window_size": 7, "mlp_dim": 128}
    settings.pop("intermediate_size")
    config = getattr(hf, f"{kind}VisionConfig")(**settings, output_channels=16)
    made: nn.Module = getattr(hf, f"{kind}VisionModel")(config)
    return made


def _sam2(hf: Any) -> nn.Module:
    backbone = hf.Sam2HieraDetConfig(
        hidden_size=32,
        num_attention_heads=1,
        image_size=[256, 256],
        blocks_per_stage=[1, 2, 2, 1],
        embed_dim_per_stage=[32, 64, 128, 256],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        global_attention_blocks=[4],
        window_positional_embedding_background_size=[7, 7],
    )
    sizes = [[64, 64], [32, 32], [16, 16]]
    config = hf.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[256, 128, 64, 32],
        backbone_feature_sizes=sizes,
        fpn_hidden_size=32,
    )
    made: nn.Module = hf.Sam2VisionModel(config)
    return made


def _vitmatte(hf: Any) -> nn.Module:
    backbone = hf.VitDetConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=128,
        pretrain_image_size=128,
        patch_size=16,
        num_channels=4,
        window_size=5,
        window_block_indices=[0],
        use_relative_position_embeddings=True,
        out_features=["stage2"],
    )
    config = hf.VitMatteConfig(
        backbone_config=backbone,
        hidden_size=64,
        convstream_hidden_sizes=[16, 32, 48],
        fusion_hidden_sizes=[64, 32, 32, 16],
    )
    made: nn.Module = hf.VitMatteForImageMatting(config)
    return made


def _vitpose(hf: Any) -> nn.Module:
    backbone = hf.VitPoseBackboneConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=[128, 96],
        patch_size=[16, 16],
        mlp_ratio=2,
        out_features=["stage2"],
    )
    made: nn.Module = hf.VitPoseForPoseEstimation(hf.VitPoseConfig(backbone_config=backbone))
    return made


def _levit(hf: Any) -> nn.Module:
    config = hf.LevitConfig(
        image_size=224,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[2, 2, 2],
        key_dim=[16, 16, 16],
    )
    made: nn.Module = hf.LevitForImageClassification(config)
    return made


def _clip_text_free(hf: Any) -> nn.Module:
    config = hf.CLIPSegVisionConfig(**_VIT)
    made: nn.Module = hf.CLIPSegVisionModel(config)
    return made


_SEGFORMER: dict[str, Any] = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 32, 48, 64],
    "num_attention_heads": [1, 2, 3, 4],
    "decoder_hidden_size": 32,
}

ROWS: tuple[Row, ...] = (
    Row("vit", "global", "ViTModel", _plain("ViTModel", "ViTConfig")),
    Row("deit", "global", "DeiTModel", _plain("DeiTModel", "DeiTConfig")),
    Row(
        "beit",
        "bias table",
        "BeitModel",
        _plain("BeitModel", "BeitConfig", use_relative_position_bias=True),
    ),
    Row(
        "data2vec_vision",
        "bias table",
        "Data2VecVisionModel",
        _plain("Data2VecVisionModel", "Data2VecVisionConfig", use_relative_position_bias=True),
    ),
    Row("dinov2", "global", "Dinov2Model", lambda hf: hf.Dinov2Model(_dinov2(hf))),
    Row(
        "dinov2_with_registers",
        "global",
        "Dinov2WithRegistersModel",
        _plain("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
    ),
    Row("dinov3_vit", "rotary", "DINOv3ViTModel", _plain("DINOv3ViTModel", "DINOv3ViTConfig")),
    Row("clip", "global", "CLIPVisionModel", _plain("CLIPVisionModel", "CLIPVisionConfig")),
    Row(
        "metaclip_2",
        "global",
        "MetaClip2VisionModel",
        _plain("MetaClip2VisionModel", "MetaClip2VisionConfig"),
    ),
    Row(
        "siglip",
        "global, pooling head",
        "SiglipVisionModel",
        _plain("SiglipVisionModel", "SiglipVisionConfig"),
    ),
    Row(
        "siglip2",
        "packed patches",
        "Siglip2VisionModel",
        _made(
            "Siglip2VisionModel",
            "Siglip2VisionConfig",
            **{k: v for k, v in _VIT.items() if k != "image_size"},
            num_patches=196,
        ),
    ),
    Row("aimv2", "global", "Aimv2VisionModel", _plain("Aimv2VisionModel", "Aimv2VisionConfig")),
    Row("ijepa", "global", "IJepaModel", _plain("IJepaModel", "IJepaConfig")),
    Row("vit_msn", "global", "ViTMSNModel", _plain("ViTMSNModel", "ViTMSNConfig")),
    Row(
        "vit_mae",
        "global, shuffled tokens",
        "ViTMAEModel",
        _plain("ViTMAEModel", "ViTMAEConfig"),
        note="masking on",
    ),
    Row("mlcd", "rotary", "MLCDVisionModel", _plain("MLCDVisionModel", "MLCDVisionConfig")),
    Row("pixio", "global", "PixioModel", _plain("PixioModel", "PixioConfig")),
    Row("swin", "shifted windows", "SwinModel", _made("SwinModel", "SwinConfig", **_SWIN)),
    Row(
        "swinv2",
        "shifted windows, cosine",
        "Swinv2Model",
        _made("Swinv2Model", "Swinv2Config", **_SWIN),
    ),
    Row(
        "swin2sr",
        "shifted windows, cosine",
        "Swin2SRModel",
        _made(
            "Swin2SRModel",
            "Swin2SRConfig",
            image_size=64,
            embed_dim=32,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=8,
        ),
        side=64,
    ),
    Row(
        "donut",
        "shifted windows",
        "DonutSwinModel",
        _made("DonutSwinModel", "DonutSwinConfig", **_SWIN),
    ),
    Row(
        "pvt",
        "spatial reduction",
        "PvtModel",
        _made(
            "PvtModel",
            "PvtConfig",
            image_size=128,
            depths=[1, 1, 1, 1],
            hidden_sizes=[16, 32, 48, 64],
            num_attention_heads=[1, 2, 3, 4],
        ),
        side=128,
    ),
    Row(
        "pvt_v2",
        "spatial reduction",
        "PvtV2Model",
        _made(
            "PvtV2Model",
            "PvtV2Config",
            image_size=128,
            depths=[1, 1, 1, 1],
            hidden_sizes=[16, 32, 48, 64],
            num_attention_heads=[1, 2, 3, 4],
        ),
        side=128,
    ),
    Row(
        "segformer",
        "spatial reduction",
        "SegformerForSemanticSegmentation",
        _made("SegformerForSemanticSegmentation", "SegformerConfig", **_SEGFORMER),
        side=128,
    ),
    Row(
        "glpn",
        "spatial reduction",
        "GLPNForDepthEstimation",
        _made("GLPNForDepthEstimation", "GLPNConfig", **_SEGFORMER),
        side=128,
    ),
    Row("dpt", "global", "DPTForDepthEstimation", _dpt, side=128),
    Row(
        "vitdet",
        "windows and global, decomposed bias",
        "VitDetModel",
        _made(
            "VitDetModel",
            "VitDetConfig",
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=224,
            pretrain_image_size=224,
            patch_size=16,
            window_size=7,
            window_block_indices=[0, 2],
            use_relative_position_embeddings=True,
        ),
        side=224,
    ),
    Row(
        "hiera",
        "mask units and global",
        "HieraModel",
        _made(
            "HieraModel",
            "HieraConfig",
            image_size=[224, 224],
            embed_dim=32,
            depths=[1, 2, 2, 1],
            num_heads=[1, 2, 4, 8],
        ),
        side=224,
    ),
    Row(
        "mobilevit",
        "unfolded patches",
        "MobileViTModel",
        _made(
            "MobileViTModel",
            "MobileViTConfig",
            image_size=256,
            hidden_sizes=[48, 60, 72],
            neck_hidden_sizes=[16, 16, 32, 32, 48, 64, 80],
        ),
        side=256,
    ),
    Row(
        "mobilevitv2",
        "no query-key attention: separable linear",
        "MobileViTV2Model",
        _made("MobileViTV2Model", "MobileViTV2Config", image_size=256, width_multiplier=0.5),
        side=256,
        over_grid=False,
    ),
    Row("sam", "windows and global, decomposed bias", "SamVisionModel", _sam, side=256),
    Row(
        "sam_hq",
        "windows and global, decomposed bias",
        "SamHQVisionModel",
        lambda hf: _sam(hf, "SamHQ"),
        side=256,
    ),
    Row("sam2", "windows, pooled queries", "Sam2VisionModel", _sam2, side=256),
    Row("detr", "encoder over the map", "DetrForObjectDetection", _detr, side=256),
    Row(
        "table_transformer",
        "encoder over the map",
        "TableTransformerForObjectDetection",
        _table,
        side=256,
    ),
    Row(
        "conditional_detr",
        "encoder over the map",
        "ConditionalDetrForObjectDetection",
        _conditional,
        side=256,
    ),
    Row(
        "deformable_detr",
        "no query-key attention: deformable sampling",
        "DeformableDetrForObjectDetection",
        _deformable,
        side=256,
        over_grid=False,
    ),
    Row("rt_detr", "AIFI encoder", "RTDetrForObjectDetection", _rt_detr, side=256),
    Row(
        "rt_detr_v2",
        "AIFI encoder",
        "RTDetrV2ForObjectDetection",
        lambda hf: _rt_detr(hf, "V2"),
        side=256,
    ),
    Row(
        "mask2former",
        "swin backbone",
        "Mask2FormerForUniversalSegmentation",
        _mask2former,
        side=224,
    ),
    Row("maskformer", "swin backbone", "MaskFormerForInstanceSegmentation", _maskformer, side=224),
    Row("upernet", "swin backbone", "UperNetForSemanticSegmentation", _upernet, side=224),
    Row(
        "yolos",
        "global, detection tokens last",
        "YolosModel",
        _plain("YolosModel", "YolosConfig", image_size=[112, 112], num_detection_tokens=10),
    ),
    Row(
        "cvt",
        "convolutional projections",
        "CvtModel",
        _made(
            "CvtModel",
            "CvtConfig",
            embed_dim=[16, 32, 48],
            num_heads=[1, 2, 3],
            depth=[1, 2, 3],  # more than its index: it looks its drop path up so
            cls_token=[False, False, True],
        ),
        side=224,
    ),
    Row("levit", "bias table, stages", "LevitForImageClassification", _levit, side=224),
    Row(
        "seggpt",
        "two images joined, decomposed bias",
        "SegGptModel",
        _made(
            "SegGptModel",
            "SegGptConfig",
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=[128, 64],
            patch_size=16,
            pretrain_image_size=64,
            mlp_dim=128,
            merge_index=0,
            intermediate_hidden_state_indices=[1, 2, 3],
            decoder_hidden_size=16,
        ),
        side=64,
    ),
    Row(
        "eomt",
        "global, queries join late",
        "EomtForUniversalSegmentation",
        _plain(
            "EomtForUniversalSegmentation",
            "EomtConfig",
            num_hidden_layers=4,
            num_blocks=2,
            num_queries=10,
            image_size=128,
            patch_size=16,
            num_labels=5,
        ),
        side=128,
    ),
    Row("depth_anything", "DINOv2", "DepthAnythingForDepthEstimation", _depth_anything),
    Row("zoedepth", "BEiT backbone", "ZoeDepthForDepthEstimation", _zoedepth, side=128),
    Row("vitmatte", "ViTDet backbone", "VitMatteForImageMatting", _vitmatte, side=128, channels=4),
    Row("vitpose", "global", "VitPoseForPoseEstimation", _vitpose),
    Row("clipseg", "global", "CLIPSegVisionModel", _clip_text_free),
    Row("owlvit", "global", "OwlViTVisionModel", _plain("OwlViTVisionModel", "OwlViTVisionConfig")),
    Row("blip", "global", "BlipVisionModel", _plain("BlipVisionModel", "BlipVisionConfig")),
    Row(
        "groupvit",
        "global and grouping",
        "GroupViTVisionModel",
        _plain(
            "GroupViTVisionModel",
            "GroupViTVisionConfig",
            depths=[2, 1, 1],
            num_group_tokens=[8, 4, 0],
            num_output_groups=[8, 4, 0],
        ),
    ),
    Row(
        "pixtral",
        "rotary, packed images",
        "PixtralVisionModel",
        _made(
            "PixtralVisionModel",
            "PixtralVisionConfig",
            **{**_VIT, "image_size": 112, "patch_size": 8},
        ),
    ),
)


def _packed(_model: nn.Module, seed: int) -> dict[str, Any]:
    """SigLIP 2: patches in a row, (2, 196, 8 * 8 * 3), with a mask and the grid's shape."""
    return {
        "pixel_values": noise((2, 196, 192), seed),
        "pixel_attention_mask": torch.ones(2, 196, dtype=torch.long),
        "spatial_shapes": torch.tensor([[14, 14], [14, 14]]),
    }


def _masked(_model: nn.Module, seed: int) -> dict[str, Any]:
    """ViTMAE: which patches are kept, given rather than drawn."""
    return {"pixel_values": noise((2, 3, 112, 112), seed), "noise": noise((2, 196), seed + 100)}


def _prompted(_model: nn.Module, seed: int) -> dict[str, Any]:
    """SegGPT: an image, a prompt image and its mask."""
    keys = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {key: noise((2, 3, 64, 64), seed + 10 * i) for i, key in enumerate(keys)}


def _portrait(_model: nn.Module, seed: int) -> torch.Tensor:
    return noise((2, 3, 128, 96), seed)


INPUTS: dict[str, Inputs] = {
    "siglip2": _packed,
    "vit_mae": _masked,
    "seggpt": _prompted,
    "vitpose": _portrait,
}

#: attention that is not over the image's tokens, by block names
ASIDE: dict[str, tuple[tuple[str, str], ...]] = {
    "vit_mae": (("encoder.*", "attention of a random subset of tokens, shuffled: no grid"),),
    **{
        name: _QUERIES
        for name in (
            "detr table_transformer conditional_detr deformable_detr rt_detr rt_detr_v2 "
            "mask2former maskformer"
        ).split()
    },
}
