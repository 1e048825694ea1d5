"""timm: one or a few small representatives of every module and kind of attention.

Another timm release may bring modules that are in neither list; a test of the registry fails then
and says so. See `cases` for how they are chosen from.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from dgefx.coverage.cases import Case, library, noise

_TWO: dict[str, Any] = {"depth": 2}
_NONE = "no query-key attention: "

# (module, kind of attention, ((model, keyword arguments), ...)); a kind that starts with _NONE has
# no softmax of query-key products over tokens, whatever its name
_Models = tuple[tuple[str, dict[str, Any]], ...]
_LIST: tuple[tuple[str, str, _Models], ...] = (
    ("beit", "relative position bias", (("beit_base_patch16_224", _TWO),)),
    ("beit", "relative position bias", (("beitv2_base_patch16_224", _TWO),)),
    ("byoanet", "botnet", (("botnet26t_256", {}), ("eca_botnext26ts_256", {}))),
    ("byoanet", "botnet", (("sebotnet33ts_256", {}),)),
    ("byoanet", "halo windows", (("halonet26t", {}), ("haloregnetz_b", {}))),
    ("byoanet", "halo windows", (("halo2botnet50ts_256", {}),)),
    ("byoanet", _NONE + "lambda layers", (("lambda_resnet26rpt_256", {}),)),
    ("byobnet", _NONE + "bilinear transform (BAT)", (("bat_resnext26ts", {}),)),
    ("byobnet", "attention pooling head", (("resnet50_clip", {}),)),
    ("cait", "talking heads, class attention", (("cait_xxs24_224", _TWO),)),
    ("coat", _NONE + "factorised linear attention", (("coat_lite_tiny", {}), ("coat_tiny", {}))),
    ("convit", "gated positional", (("convit_tiny", {}),)),
    ("cpubone", "pooled queries, convolutions", (("cpubone_b0_bfrobust", {}),)),
    ("crossvit", "two streams", (("crossvit_9_240", {}), ("crossvit_9_dagger_240", {}))),
    ("csatv2", "channel and global", (("csatv2", {}),)),
    ("davit", "windows and channels", (("davit_tiny", {"depths": (1, 1, 1, 1)}),)),
    ("deepseek_vit", "windows and global", (("deepseek_vit_412m", {"depth": 2, "_side": 280}),)),
    ("deit", "global", (("deit3_small_patch16_224", _TWO),)),
    ("deit", "global", (("deit_tiny_distilled_patch16_224", _TWO),)),
    ("edgenext", "channel attention", (("edgenext_xx_small", {}),)),
    ("efficientformer", "global, bias table", (("efficientformer_l1", {}),)),
    ("efficientformer_v2", "talking heads, strided", (("efficientformerv2_s0", {}),)),
    ("efficientvim", _NONE + "state space", (("efficientvim_m1", {}),)),
    ("efficientvit_mit", _NONE + "linear attention", (("efficientvit_b0", {}),)),
    ("efficientvit_msra", "cascaded groups, windows", (("efficientvit_m0", {}),)),
    ("eva", "rotary", (("eva02_tiny_patch14_224", _TWO),)),
    ("eva", "rotary", (("vit_medium_patch16_rope_reg1_gap_256", _TWO),)),
    (
        "eva",
        "rotary, DINOv3",
        (("vit_small_plus_patch16_dinov3", {"depth": 2, "img_size": 112}),),
    ),
    ("fastvit", "late global", (("fastvit_sa12", {}), ("fastvit_mci0", {}))),
    ("gcvit", "windows and global queries", (("gcvit_xxtiny", {}),)),
    ("gemma4_vit", "rotary, packed patches", (("gemma4_vit_167m", {"depth": 2, "_side": 256}),)),
    ("hiera", "mask units and global", (("hiera_tiny_224", {}),)),
    ("hieradet_sam2", "windows, pooled queries", (("hieradet_small", {}),)),
    ("hieradet_sam2", "windows, pooled queries", (("sam2_hiera_tiny", {"_side": 256}),)),
    ("iformer", "single head modulation", (("iformer_t", {}),)),
    ("levit", "bias table, stages", (("levit_128s", {}), ("levit_conv_128s", {}))),
    ("lowformer", "convolutions around attention", (("lowformer_b0", {}),)),
    ("maxxvit", "coatnet: global", (("coatnet_pico_rw_224", {}), ("coatnext_nano_rw_224", {}))),
    ("maxxvit", "coatnet: global", (("coatnet_rmlp_nano_rw_224", {}),)),
    ("maxxvit", "maxvit: windows and grid", (("maxvit_rmlp_pico_rw_256", {}),)),
    (
        "maxxvit",
        "maxvit: windows and grid",
        (("maxvit_tiny_tf_224", {"depths": (1, 1, 1, 1)}), ("maxxvit_rmlp_nano_rw_256", {})),
    ),
    ("maxxvit", "maxvit: windows and grid", (("maxxvitv2_nano_rw_256", {}),)),
    ("metaformer", "late global", (("caformer_s18", {}),)),
    ("mobilenetv3", "multi-query (MobileNetV4)", (("mobilenetv4_hybrid_medium", {}),)),
    ("mobilenetv5", "multi-query", (("mobilenetv5_base", {"_side": 256}),)),
    ("mobilevit", "unfolded patches", (("mobilevit_xxs", {}),)),
    ("mobilevit", _NONE + "separable linear (v2)", (("mobilevitv2_050", {}),)),
    ("mvitv2", "pooled queries and keys", (("mvitv2_tiny", {}),)),
    ("naflexvit", "global", (("naflexvit_base_patch16_gap", {"depth": 2, "_side": 224}),)),
    ("nest", "nested windows", (("nest_tiny", {}), ("nest_tiny_jx", {}))),
    ("nextvit", "pooled keys beside convolutions", (("nextvit_small", {}),)),
    ("pit", "stages", (("pit_ti_224", {}), ("pit_ti_distilled_224", {}))),
    ("pvt_v2", "spatial reduction", (("pvt_v2_b0", {}), ("pvt_v2_b2_li", {}))),
    ("qwen3_vit", "rotary", (("qwen3_vit_88m", {"depth": 2, "_side": 256}),)),
    ("shvit", "single head", (("shvit_s1", {}),)),
    ("swiftformer", _NONE + "additive attention", (("swiftformer_xs", {}),)),
    (
        "swin_transformer",
        "shifted windows",
        (("swin_tiny_patch4_window7_224", {"depths": (2, 2, 2, 2)}),),
    ),
    (
        "swin_transformer_v2",
        "shifted windows, cosine",
        (("swinv2_tiny_window8_256", {"depths": (2, 2, 2, 2)}),),
    ),
    (
        "swin_transformer_v2_cr",
        "shifted windows, cosine",
        (("swinv2_cr_tiny_224", {"depths": (2, 2, 2, 2)}),),
    ),
    ("tiny_vit", "windows, bias table", (("tiny_vit_5m_224", {}),)),
    ("tnt", "inner and outer tokens", (("tnt_s_patch16_224", _TWO),)),
    ("tnt", "inner and outer tokens", (("tnt_s_legacy_patch16_224", _TWO),)),
    ("twins", "spatial reduction", (("twins_pcpvt_small", {"depths": (1, 1, 1, 1)}),)),
    (
        "twins",
        "windows and spatial reduction",
        (("twins_svt_small", {"depths": (2, 2, 2, 2)}),),
    ),
    ("visformer", "global, NCHW", (("visformer_tiny", {}),)),
    ("vision_transformer", "global", (("vit_tiny_patch16_224", _TWO),)),
    ("vision_transformer", "global", (("flexivit_small", _TWO), ("test_vit", {}))),
    ("vision_transformer", "global", (("vit_base_patch32_clip_224", _TWO),)),
    ("vision_transformer", "global", (("beit3_base_patch16_224", _TWO),)),
    ("vision_transformer", "global", (("eva_large_patch14_196", _TWO),)),
    ("vision_transformer", "global, pooling head", (("vit_base_patch16_siglip_224", _TWO),)),
    (
        "vision_transformer",
        "global, registers (DINOv2)",
        (("vit_small_patch14_reg4_dinov2", {"depth": 2, "img_size": 112}),),
    ),
    (
        "vision_transformer",
        "global, registers (DINOv2)",
        (("vit_giant_patch14_reg4_dinov2", {"depth": 2, "img_size": 112}),),
    ),
    ("vision_transformer", "global, RMS norm, no biases", (("aimv2_large_patch14_224", _TWO),)),
    ("vision_transformer", "parallel branches", (("vit_small_patch16_18x2_224", _TWO),)),
    ("vision_transformer", "residual post-norm", (("vit_base_patch16_rpn_224", _TWO),)),
    ("vision_transformer", "global", (("vit_so150m_patch16_reg4_gap_256", _TWO),)),
    ("vision_transformer", "global", (("vit_small_patch16_36x1_224", _TWO),)),
    ("vision_transformer", "global", (("vit_base_patch16_xp_224", _TWO),)),
    ("vision_transformer_hybrid", "global", (("vit_tiny_r_s16_p8_224", _TWO),)),
    ("vision_transformer_hybrid", "global", (("vit_base_mci_224", {}),)),
    ("vision_transformer_relpos", "bias", (("vit_relpos_small_patch16_224", _TWO),)),
    ("vision_transformer_relpos", "bias", (("vit_srelpos_small_patch16_224", _TWO),)),
    (
        "vision_transformer_relpos",
        "bias",
        (("vit_relpos_base_patch32_plus_rpn_256", _TWO), ("test_vit_relpos", {})),
    ),
    (
        "vision_transformer_sam",
        "windows and global, decomposed bias",
        (("samvit_base_patch16_224", _TWO),),
    ),
    ("vitamin", "global after convolutions", (("vitamin_small_224", {}),)),
    ("volo", "outlook, then global", (("volo_d1_224", {}),)),
    ("xcit", "channel and class attention", (("xcit_nano_12_p16_224", {}),)),
)

#: modules of convolutional and MLP networks: no query-key attention over tokens in any model
ATTENTION_FREE = frozenset(
    "convmixer convnext cspnet cspnext densenet dla dpn efficientnet fasternet focalnet ghostnet "
    "hardcorenas hgnet hrnet inception_next inception_resnet_v2 inception_v3 inception_v4 lcnetv2 "
    "mambaout mlp_mixer nasnet nfnet pnasnet rdnet regnet repghost repvit res2net resnest resnet "
    "resnetv2 rexnet selecsls senet sequencer sknet starnet tresnet vgg vovnet xception "
    "xception_aligned".split()
)

_QUICK = frozenset(
    "test_vit pvt_v2_b0 swin_tiny_patch4_window7_224 eva02_tiny_patch14_224 xcit_nano_12_p16_224 "
    "edgenext_xx_small lambda_resnet26rpt_256 vit_relpos_small_patch16_224".split()
)

_BASE = (
    "vit_base_patch16_224 deit_base_patch16_224 deit3_base_patch16_224 beit_base_patch16_224 "
    "eva02_base_patch14_224 vit_base_patch16_dinov3 swin_base_patch4_window7_224 "
    "swinv2_base_window8_256 pvt_v2_b5 twins_svt_base twins_pcpvt_base maxvit_base_tf_224 "
    "coatnet_1_rw_224 davit_base cait_s24_224 hiera_base_224 mvitv2_base nest_base "
    "vit_base_patch16_siglip_224 vit_relpos_base_patch16_224 convit_base tiny_vit_21m_224 "
    "samvit_base_patch16_224 volo_d3_224".split()
)

#: no token of an image is a query there
_CLASS = (("blocks_token_only.*", "class attention"), ("cls_attn_blocks.*", "class attention"))


def modules() -> dict[str, list[str]]:
    """Listed models by timm module."""
    found: dict[str, list[str]] = {}
    for module, _kind, models in _LIST:
        found.setdefault(module, []).extend(name for name, _ in models)
    return found


def _build(name: str, **kwargs: Any) -> nn.Module:
    kwargs.pop("_side", None)
    made: nn.Module = library("timm").create_model(name, pretrained=False, **kwargs)
    return made


def _inputs(model: nn.Module, seed: int, side: int | None) -> Any:
    if side is not None:
        return noise((2, 3, side, side), seed)
    settings: Any = getattr(model, "pretrained_cfg", {})
    return noise((2, *settings.get("input_size", (3, 224, 224))), seed)


def _case(module: str, kind: str, name: str, kwargs: dict[str, Any]) -> Case:
    side = kwargs.get("img_size") or kwargs.get("_side")
    short = {k.strip("_"): v for k, v in kwargs.items()}
    note = ", ".join(f"{k} {v}".replace("(", "").replace(")", "") for k, v in short.items())
    return Case(
        name=f"timm:{name}",
        family=f"{module}: {kind}" if kind else module,
        build=partial(_build, name, **kwargs),
        inputs=partial(_inputs, side=side),
        note=note.replace("img_size", "side"),
        over_grid=not kind.startswith(_NONE),
        aside=_CLASS,
        quick=name in _QUICK,
    )


def cases() -> list[Case]:
    """The list.

    Raises:
        ImportError: no timm.
    """
    library("timm")
    return [_case(m, k, name, kwargs) for m, k, models in _LIST for name, kwargs in models]


def base_cases() -> list[Case]:
    """Base-size models of the main families, to time conversion.

    Raises:
        ImportError: no timm.
    """
    library("timm")
    made = [_case("base", "", name, {}) for name in _BASE]
    small = {"img_size": 224}
    return [*made, _case("base", "", "vit_base_patch14_dinov2", small)]


def unlisted(pattern: str) -> Iterable[Case]:
    """Any models of timm by `fnmatch` pattern, at full size.

    Raises:
        ImportError: no timm.
    """
    timm = library("timm")
    for module in timm.list_modules():
        for name in timm.list_models(pattern, module=module):
            yield _case(module, "", name, {})
