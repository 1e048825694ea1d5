"""Hugging Face transformers: vision models from small configurations, no downloads.

One row per model: its name, the kind of its attention, how it is built, the side of its images.
The configurations and unusual inputs are in `hf_configs`. See `cases` for how they are chosen from.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from dgefx.coverage.cases import Case, Inputs, images, library
from dgefx.coverage.hf_configs import ASIDE, INPUTS, ROWS, Row

_QUICK = frozenset({"vit", "swin", "segformer", "dinov3_vit"})


def _build(row: Row) -> nn.Module:
    made: nn.Module = row.build(library("transformers"))
    return made


def _inputs(row: Row) -> Inputs:
    return INPUTS.get(row.name) or images(row.side, channels=row.channels)


def _case(row: Row) -> Case:
    return Case(
        name=f"hf:{row.name}",
        family=f"{row.name}: {row.kind}",
        build=partial(_build, row),
        inputs=_inputs(row),
        note=row.note,
        over_grid=row.over_grid,
        aside=ASIDE.get(row.name, ()),
        quick=row.name in _QUICK,
    )


def cases() -> list[Case]:
    """The list, of those models that the installed release has.

    Raises:
        ImportError: no transformers.
    """
    transformers: Any = library("transformers")
    return [_case(row) for row in ROWS if hasattr(transformers, row.needs)]


def base_cases() -> list[Case]:
    """Base-size models from the default configurations, to time conversion.

    Raises:
        ImportError: no transformers.
    """
    library("transformers")

    def case(model: str, config: str, side: int) -> Case:
        def build() -> nn.Module:
            hf = library("transformers")
            made: nn.Module = getattr(hf, model)(getattr(hf, config)(image_size=side))
            return made

        return Case(f"hf:{model}", "base", build, images(side))

    return [
        case("ViTModel", "ViTConfig", 224),
        case("DeiTModel", "DeiTConfig", 224),
        case("BeitModel", "BeitConfig", 224),
        case("Dinov2Model", "Dinov2Config", 224),
        case("SiglipVisionModel", "SiglipVisionConfig", 224),
        case("CLIPVisionModel", "CLIPVisionConfig", 224),
    ]
