"""Acceptance 3: real DeiT-Tiny weights, Imagenette validation images, image by image.

Skipped where the shared data folder is not there (`DGEFX_DATA`, or ../shared/data).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import dgefx
from tests.helpers import error

DATA = Path(os.environ.get("DGEFX_DATA", Path(__file__).parents[2] / "shared" / "data"))
WEIGHTS = DATA / "weights" / "deit_tiny_patch16_224.safetensors"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WEIGHTS.exists(), reason=f"no real weights at {WEIGHTS}"),
]


def test_deit_tiny_predicts_the_same_for_every_image() -> None:
    dense = timm.create_model("deit_tiny_patch16_224").eval()
    dense.load_state_dict(load_file(WEIGHTS))
    converted = dgefx.convert(dense, 1.0)
    transform = timm.data.create_transform(
        224,
        crop_pct=1.0,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    files = sorted((DATA / "imagenette160" / "val").glob("*/*.jpg"))
    assert len(files) == 1500
    same = 0
    with torch.inference_mode():
        for start in range(0, len(files), 100):
            batch = [transform(Image.open(f).convert("RGB")) for f in files[start : start + 100]]
            x = torch.stack(batch)
            found, wanted = converted(x), dense(x)
            assert error(found, wanted) <= 1e-5
            same += int((found.argmax(1) == wanted.argmax(1)).sum())
    assert same == len(files)
