"""granularity_maps, plot_granularity, plot_sensitivity."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dgefx
from dgefx.maps import _most_mixed
from tests.helpers import TinyViT, images

X = images(3, 56)  # 14 x 14 tokens: clipped at every level


@pytest.fixture(scope="module", params=["nested", "region"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    config = dgefx.DGEConfig(routing=request.param)
    dense = TinyViT(dim=32, depth=3, prefix=1).eval()
    return dgefx.convert(dense, 0.5, example_inputs=X[:2], config=config)


def test_maps_hold_no_more_patches_than_slots(model: nn.Module) -> None:
    model.train()
    maps = dgefx.granularity_maps(model, X)
    assert model.training and list(maps) == [f"blocks.{i}" for i in range(3)]
    config = model.blocks[0].dge_router.config
    for block, sides in zip(dgefx.report(model).blocks, maps.values(), strict=True):
        cells = -(-14 // config.region_side)
        assert sides.shape == (3, cells, cells) and sides.dtype == torch.int64
        token = sides.repeat_interleave(config.region_side, 1)[:, :14]
        token = token.repeat_interleave(config.region_side, 2)[:, :, :14]
        for level, side in enumerate((1, 2, 4)):
            corner = token[:, ::side, ::side] == side  # a patch's first token has its side
            assert int(corner.flatten(1).sum(1).max()) <= block.slots[level]


def test_pictures(model: nn.Module, tmp_path: Path) -> None:
    figure = dgefx.plot_granularity(model, X[:2], blocks=2)
    assert len(figure.axes) == 2 * 3
    figure.savefig(tmp_path / "maps.png")
    uniform = dgefx.set_budget(copy.deepcopy(model), 1.0)  # no block mixes: shown all the same
    assert len(dgefx.plot_granularity(uniform, X[:2], blocks=2).axes) == 2 * 3
    assert len(dgefx.plot_granularity(uniform, X[:1]).axes) == 1 + 3
    dgefx.plot_granularity(model, X[:1], blocks=["blocks.2"], mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(ValueError, match=r"blocks \['head'\] are not converted"):
        dgefx.plot_granularity(model, X, blocks=["head"])
    single = dgefx.granularity_maps(model, X[0])
    assert torch.equal(single["blocks.0"], dgefx.granularity_maps(model, X[:1])["blocks.0"])
    assert len(dgefx.plot_granularity(model, X[0], blocks=1).axes) == 2
    for wrong in ("image.png", iter([X]), X.to(torch.uint8), ["image.png"]):
        with pytest.raises(TypeError, match="images"):
            dgefx.granularity_maps(model, wrong)
    with pytest.raises(ValueError, match="several batches"):
        dgefx.granularity_maps(model, [X[:1], X[1:]])
    with pytest.raises(ValueError, match="has shape"):
        dgefx.granularity_maps(model, X[0, 0])


def shown(figure: Any) -> list[str]:
    return [axis.get_title().split("\n")[0] for axis in figure.axes[1:] if axis.get_title()]


def test_blocks_that_mix_most_are_shown() -> None:
    def sides(*rows: str) -> Tensor:  # one image per string
        return torch.tensor([[[int(side) for side in row]] for row in rows])

    maps = {
        "fine": sides("11111111", "11111111"),
        "barely": sides("11111112", "11111111"),
        "halves": sides("11114444", "44442222"),
        "one level per image": sides("11111111", "44444444"),
        "all three": sides("11122444", "42424211"),
    }
    assert _most_mixed(maps, 1) == ["all three"]
    assert _most_mixed(maps, 2) == ["halves", "all three"]
    assert _most_mixed(maps, None) == ["barely", "halves", "all three"]  # no uniform block
    assert _most_mixed(maps, 4) == ["fine", "barely", "halves", "all three"]
    many = {f"{name} {i}": sides for i in range(2) for name, sides in maps.items()}
    assert _most_mixed(many, None) == ["halves 0", "all three 0", "halves 1", "all three 1"]
    uniform = {str(i): maps["fine"] for i in range(7)}
    assert _most_mixed(uniform, None) == ["0", "2", "4", "6"]
    assert _most_mixed(uniform, 3) == ["0", "3", "6"]
    assert _most_mixed(uniform, 1) == ["0"] and _most_mixed(uniform, 9) == list(uniform)


def test_blocks_with_one_level_are_not_shown_first() -> None:
    dense = TinyViT(dim=32, depth=7).eval()
    model = dgefx.convert(dense, 0.5, example_inputs=X[:2])  # shares guessed from depth
    mixed = [n for n, m in dgefx.granularity_maps(model, X[:1]).items() if len(m.unique()) > 1]
    assert 0 < len(mixed) < 7
    default = shown(dgefx.plot_granularity(model, X[:1]))
    assert len(default) == min(4, len(mixed)) and set(default) <= set(mixed)
    assert set(mixed) <= set(shown(dgefx.plot_granularity(model, X[:1], blocks=len(mixed) + 1)))
    named = ["blocks.6", "blocks.0"]  # those named are shown, as they are and in this order
    assert shown(dgefx.plot_granularity(model, X[:1], blocks=named)) == named


def test_drawn_patches_tile_the_image(model: nn.Module) -> None:
    """Every token is covered once, by a rectangle of the area of its patch."""
    figure = dgefx.plot_granularity(model, X[:1], blocks=["blocks.1"])
    (patches,) = figure.axes[1].collections
    areas = [
        (p.vertices[:, 0].max() - p.vertices[:, 0].min())
        * (p.vertices[:, 1].max() - p.vertices[:, 1].min())
        for p in patches.get_paths()
    ]
    assert sum(areas) == pytest.approx(56 * 56)
    assert len(areas) <= sum(dgefx.report(model).blocks[1].slots)


def test_sensitivity_curves(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not calibrated"):
        dgefx.plot_sensitivity(model)
    model = dgefx.calibrate(copy.deepcopy(model), X, progress=False)
    figure = dgefx.plot_sensitivity(model)
    assert len(figure.axes[0].lines) == 3 and len(figure.axes[1].patches) == 3
    figure.savefig(tmp_path / "curves.png")
