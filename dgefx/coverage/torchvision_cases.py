"""torchvision: its transformers, and its segmentation and detection heads on them.

torchvision ships no detector or segmenter with a transformer backbone; these are put together as
its users do, with `IntermediateLayerGetter` and `BackboneWithFPN`. See `cases`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dgefx.coverage.cases import Case, images, library


class _Planes(nn.Module):
    """(B, H, W, C) to (B, C, H, W), as convolutional heads take it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).contiguous()


class _Grid(nn.Module):
    """Drops the class token and lays the others out as an image."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))


class _ViTFeatures(nn.Module):
    """A torchvision ViT as a backbone: {"out": (B, C, H, W)}."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit
        self.grid = _Grid(vit.image_size // vit.patch_size)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.vit._process_input(x)
        token = self.vit.class_token.expand(x.shape[0], -1, -1)
        return OrderedDict(out=self.grid(self.vit.encoder(torch.cat([token, x], 1))))


class _PlanarSwin(nn.Sequential):
    """The stages of a Swin, each followed by its planes: "1", "3", "5" and "7" are maps."""


def _swin_stages(swin: Any) -> nn.Module:
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    for name, stage in swin.features.named_children():
        stages[name] = stage
    return _PlanarSwin(stages)


class _PlanarMaps(nn.Module):
    """Named maps (B, H, W, C) of a backbone as planes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.planes = body, _Planes()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict((k, self.planes(v)) for k, v in self.body(x).items())


def _models() -> Any:
    return library("torchvision").models


def _vit() -> Any:
    return _models().VisionTransformer(112, 16, 2, 3, 192, 384)


def _swin(version: int = 1) -> Any:
    models, transformer = _models(), library("torchvision").models.swin_transformer
    block = transformer.SwinTransformerBlockV2 if version == 2 else None
    merge = transformer.PatchMergingV2 if version == 2 else transformer.PatchMerging
    return models.SwinTransformer(
        [4, 4],
        48,
        [2, 2, 2, 2],
        [2, 4, 8, 16],
        [7, 7],
        block=block,
        downsample_layer=merge,
        stochastic_depth_prob=0.0,
    )


def _maxvit() -> Any:
    return _models().MaxVit((112, 112), 32, 7, [32, 64], [1, 1], 32, 0.0)


def _getter(body: nn.Module, layers: dict[str, str]) -> nn.Module:
    made: nn.Module = _models()._utils.IntermediateLayerGetter(body, layers)
    return made


def _swin_maps() -> nn.Module:
    layers = {"1": "0", "3": "1", "5": "2", "7": "3"}
    return _PlanarMaps(_getter(_swin_stages(_swin()), layers))


def _segmenter(head: str, backbone: str) -> nn.Module:
    segmentation = _models().segmentation
    body: nn.Module
    if backbone == "vit":
        body, channels = _ViTFeatures(_vit()), 192
    elif backbone == "maxvit":
        body, channels = _maxvit_maps(), 64
    else:
        body = _PlanarMaps(_getter(_swin_stages(_swin()), {"7": "out"}))
        channels = 384
    if head == "fcn":
        made: nn.Module = segmentation.FCN(body, segmentation.fcn.FCNHead(channels, 5))
        return made
    deep = segmentation.deeplabv3
    planar: nn.Module = deep.DeepLabV3(body, deep.DeepLabHead(channels, 5))
    return planar


def _maxvit_maps() -> nn.Module:
    whole = _maxvit()
    stages = OrderedDict(stem=whole.stem, first=whole.blocks[0], second=whole.blocks[1])
    return _getter(nn.Sequential(stages), {"second": "out"})


class _Pyramid(nn.Module):
    """Swin's four maps and the feature pyramid over them, as detectors take it."""

    def __init__(self) -> None:
        super().__init__()
        ops = library("torchvision").ops
        self.body = _swin_maps()
        pool = ops.feature_pyramid_network.LastLevelMaxPool()
        self.fpn = ops.FeaturePyramidNetwork([48, 96, 192, 384], 64, pool)
        self.out_channels = 64

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.fpn(self.body(x))
        return found


def _faster_rcnn() -> nn.Module:
    """The backbone of a FasterRCNN, taken out of it: what a user converts and puts back."""
    detector = _models().detection.FasterRCNN(_Pyramid(), num_classes=3)
    backbone: nn.Module = detector.backbone
    return backbone


def _retina() -> nn.Module:
    """RetinaNet's dense heads on the pyramid, without the suppression that picks boxes."""
    detection = _models().detection
    body = _Pyramid()
    return _Heads(body, detection.retinanet.RetinaNetHead(64, 9, 3))


class _Heads(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def _classifier(name: str) -> nn.Module:
    made: nn.Module = _models().get_model(name, weights=None)
    return made


_Row = tuple[str, str, Callable[[], nn.Module], int, str]


def _rows() -> tuple[_Row, ...]:
    short = "small widths, 2 blocks a stage"
    return (
        ("vit_b_32", "vit", partial(_classifier, "vit_b_32"), 224, ""),
        ("vit_small", "vit", _vit, 112, "depth 2"),
        ("swin_t", "swin", partial(_classifier, "swin_t"), 224, ""),
        ("swin_small", "swin", _swin, 112, short),
        ("swin_v2_t", "swin_v2", partial(_classifier, "swin_v2_t"), 256, ""),
        ("swin_v2_small", "swin_v2", partial(_swin, 2), 112, short),
        ("maxvit_t", "maxvit", partial(_classifier, "maxvit_t"), 224, ""),
        ("maxvit_small", "maxvit", _maxvit, 112, "2 stages of 1 block"),
        ("fcn_vit", "segmentation: FCN", partial(_segmenter, "fcn", "vit"), 112, "depth 2"),
        ("fcn_swin", "segmentation: FCN", partial(_segmenter, "fcn", "swin"), 224, short),
        (
            "fcn_maxvit",
            "segmentation: FCN",
            partial(_segmenter, "fcn", "maxvit"),
            112,
            "2 stages of 1 block",
        ),
        (
            "deeplabv3_swin",
            "segmentation: DeepLabV3",
            partial(_segmenter, "deeplab", "swin"),
            224,
            short,
        ),
        (
            "deeplabv3_vit",
            "segmentation: DeepLabV3",
            partial(_segmenter, "deeplab", "vit"),
            112,
            "depth 2",
        ),
        (
            "fasterrcnn_swin_fpn",
            "detection: FasterRCNN",
            _faster_rcnn,
            224,
            f"backbone and pyramid; {short}",
        ),
        (
            "retinanet_swin_fpn",
            "detection: RetinaNet",
            _retina,
            224,
            f"up to the dense heads; {short}",
        ),
    )


_QUICK = frozenset({"vit_small", "swin_small", "fcn_vit", "fasterrcnn_swin_fpn"})


def _case(row: _Row) -> Case:
    name, family, build, side, note = row
    return Case(f"torchvision:{name}", family, build, images(side), note, quick=name in _QUICK)


def cases() -> list[Case]:
    """The list.

    Raises:
        ImportError: no torchvision.
    """
    library("torchvision")
    return [_case(row) for row in _rows()]


def base_cases() -> list[Case]:
    """Base-size models, to time conversion.

    Raises:
        ImportError: no torchvision.
    """
    library("torchvision")
    sides = {"vit_b_16": 224, "swin_b": 224, "swin_v2_b": 256}
    return [_case((n, "base", partial(_classifier, n), side, "")) for n, side in sides.items()]
