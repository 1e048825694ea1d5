"""What `models.py` times: a timm model, its conversions, and token merging at equal MACs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import _common as common
import dgefx
from tome import ToMe, even_schedule

DENSE, PER_IMAGE, AVERAGE, MERGING = "dense", "per_image", "average", "ToMe"
METHODS = (DENSE, PER_IMAGE, AVERAGE, MERGING)


@dataclass
class Prepared:
    """One architecture, in the dtype that is timed.

    models, ratios: per method the model and its MACs over the dense one's, by torch's counter.
    missing: per method that there is none of, why.
    """

    side: int  # of the images, in pixels
    models: dict[str, nn.Module] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def create(name: str, img_size: int | None, shallow: bool) -> Any:
    """An untrained timm model that uses fused attention wherever timm has it."""
    set_fused_attn(True, experimental=True)
    more: dict[str, object] = {}
    if shallow and ("vit" in name or "deit" in name):
        more["depth"] = 3
    if img_size is not None:
        try:
            return timm.create_model(name, img_size=img_size, **more).eval()
        except TypeError:  # takes any size
            pass
    return timm.create_model(name, **more).eval()


def prepare(
    name: str,
    methods: Sequence[str],
    gamma: float,
    device: torch.device,
    dtype: torch.dtype,
    img_size: int | None = None,
    shallow: bool = False,
) -> Prepared:
    """Create, convert and count; MACs are counted on two images."""
    torch.manual_seed(0)
    dense = create(name, img_size, shallow).to(device)
    side = img_size or dense.pretrained_cfg["input_size"][-1]
    x = torch.randn(2, 3, side, side, device=device)
    found, macs = Prepared(side), measured_macs(dense, x)
    ratio = gamma
    for method in methods:
        try:
            if method == DENSE:
                model: nn.Module = dense
            elif method == MERGING:
                model = merging_at(dense, found.ratios.get(PER_IMAGE, ratio), x, macs)
            else:
                config = dgefx.DGEConfig(budget=method)
                model = dgefx.convert(dense, gamma, example_inputs=x, config=config)
            found.ratios[method] = measured_macs(model, x) / macs
            found.models[method] = model
        except Exception as error:
            found.missing[method] = common.why(error)
    for model in found.models.values():
        model.to(dtype)
    return found


def measured_macs(model: nn.Module, images: Tensor) -> int:
    """MACs of a batch by torch's counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2


def merging_at(model: Any, ratio: float, images: Tensor, dense: int) -> ToMe:
    """The token merging with the largest measured ratio not above `ratio`.

    Raises:
        ValueError: not a plain vision transformer, or the ratio is out of its reach.
    """
    if type(model) is not VisionTransformer or model.cls_token is None:
        raise ValueError("token merging: for plain vision transformers with a class token only")
    depth, tokens = len(model.blocks), model.patch_embed.num_patches

    def ratio_at(merged: int) -> float:
        return measured_macs(ToMe(model, even_schedule(merged, depth)), images) / dense

    low, high = 0, tokens * depth // 2  # high merges all that can be merged
    if ratio_at(high) > ratio:
        raise ValueError(f"token merging does not get down to {ratio:.2f}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ratio_at(middle) <= ratio else (middle, high)
    return ToMe(model, even_schedule(high, depth))
