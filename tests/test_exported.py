"""`torch.export` programs: converted as `fx.GraphModule`s with the same names and numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dgefx
from dgefx.nn import DGEBlock
from tests.helpers import TinyViT, error, images, macs, randomise, slow

X = images(2, 32)
BATCH = {0: torch.export.Dim("batch")}


def exported(model: nn.Module, x: Tensor = X, dynamic: bool = True) -> torch.export.ExportedProgram:
    return torch.export.export(
        randomise(model).eval(), (x,), dynamic_shapes=(BATCH,) if dynamic else None
    )


def names(model: nn.Module) -> list[str]:
    return [block.name for block in dgefx.report(model).converted]


@torch.no_grad()
@pytest.mark.parametrize(
    ("order", "dynamic"), [("BNC", True), slow("BHWC", True), ("BCHW", True), ("BNC", False)]
)
def test_program_converts_exactly(order: str, dynamic: bool) -> None:
    dense = randomise(TinyViT(dim=32, order=order)).eval()
    program = exported(dense, dynamic=dynamic)
    finest = dgefx.convert(program, 1.0)
    assert isinstance(finest, fx.GraphModule)
    assert error(finest(X), dense(X)) < 1e-5
    assert names(finest) == ["blocks.0", "blocks.1"]
    assert sorted(finest.state_dict()) == sorted(dense.state_dict())
    converted = dgefx.convert(program, 0.6)
    ratio = macs(converted, X) / macs(dense, X)
    assert ratio == pytest.approx(dgefx.report(converted).ratio, abs=5e-3) and ratio < 0.61
    assert 1e-3 < error(converted(X), dense(X)) < 1
    if dynamic:
        more = images(5, 32, seed=1)
        assert error(finest(more), dense(more)) < 1e-5
        assert error(converted(more)[:2], converted(more[:2])) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("vit_tiny_patch16_224", 32, {"depth": 2, "img_size": 32, "patch_size": 4}),
        (
            "swin_tiny_patch4_window7_224",
            56,
            {
                "img_size": 56,
                "depths": (2,),
                "embed_dim": 16,
                "num_heads": (2,),
                "window_size": 7,
            },
        ),
        pytest.param("pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}, marks=pytest.mark.slow),
    ],
)
def test_timm_programs(name: str, side: int, options: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    dense = timm.create_model(name, num_classes=5, **options)
    x = images(2, side)
    program = exported(dense, x)
    blocks = names(dgefx.convert(dense, 0.9, example_inputs=x))
    converted = dgefx.convert(program, 1.0)
    assert names(converted) == blocks
    assert error(converted(x), dense(x)) < 1e-5
    assert sorted(converted.state_dict()) == sorted(program.state_dict)
    dgefx.set_budget(converted, 0.7)
    assert bool(torch.isfinite(converted(images(3, side))).all())


def test_module_of_a_program() -> None:
    program = exported(TinyViT(dim=32))
    module = program.module()
    code = module.code
    converted = dgefx.convert(module, 0.6, example_inputs=X)
    assert any(isinstance(m, DGEBlock) for m in converted.modules())
    assert module.code == code and not any(isinstance(m, DGEBlock) for m in module.modules())
    # parameters are copies, and it trains as a module does
    converted.train()(X).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())
    assert all(p.grad is None for p in module.parameters())
    for given in (program, module):
        with pytest.raises(ValueError, match=r"inplace=True: .* cannot be changed itself"):
            dgefx.convert(given, 0.6, example_inputs=X, inplace=True)


def test_calling_convention_stays() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = TinyViT(dim=32)

        def forward(self, x: Tensor, *, extra: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"sum": self.body(x) + extra["bias"], "same": extra["bias"]}

    dense = randomise(Named()).eval()
    bias = torch.randn(5)
    shapes = {"x": BATCH, "extra": {"bias": None}}
    kwargs = {"x": X, "extra": {"bias": bias}}
    program = torch.export.export(dense, (), kwargs, dynamic_shapes=shapes)
    converted = dgefx.convert(program, 1.0)
    found, wanted = converted(**kwargs), dense(**kwargs)
    assert list(found) == list(wanted)
    assert error(found["sum"], wanted["sum"]) < 1e-5


def test_one_image_only_is_refused() -> None:
    program = exported(TinyViT(dim=32), X[:1], dynamic=False)
    for given in (program, program.module()):
        with pytest.raises(ValueError, match="exactly one image") as caught:
            dgefx.convert(given, 0.6, example_inputs=X[:1])
        assert 'dynamic_shapes=({0: torch.export.Dim("batch")},)' in str(caught.value)


@pytest.mark.parametrize("dynamic", [slow(False), True])
def test_other_sizes_than_those_exported_are_refused(dynamic: bool) -> None:
    """Also those that have as many tokens."""
    converted = dgefx.convert(exported(TinyViT(dim=32), dynamic=dynamic), 0.6)
    refused = [images(2, (16, 64)), images(2, 64), images(2, 32)[0]]
    refused += [] if dynamic else [images(3, 32)]
    for x in refused:
        with pytest.raises(
            ValueError, match=r"exported for inputs of shape \((2|any), 3, 32, 32\)"
        ):
            converted(x)
    if not dynamic:
        with pytest.raises(ValueError, match="exported for inputs of shape"):
            dgefx.calibrate(converted, images(5, 32), progress=False)
    compiled = torch.compile(converted, fullgraph=True, backend="eager")
    assert error(compiled(X), converted(X)) < 1e-6


class Told(TinyViT):
    """What is added to the tokens is an argument, the same for all images."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_input_for_all_images_stays_one(dynamic: bool) -> None:
    dense, positions = randomise(Told(dim=32)).eval(), torch.randn(1, 64, 32)
    shapes = (BATCH, {}) if dynamic else None
    program = torch.export.export(dense, (X, positions), dynamic_shapes=shapes)
    converted = dgefx.convert(program, 1.0)
    assert names(converted) == ["blocks.0", "blocks.1"]
    assert error(converted(X, positions), dense(X, positions)) < 1e-5


def test_inside_another_model_is_refused_by_name() -> None:
    model = nn.Sequential(exported(TinyViT(dim=32)).module(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match="submodule 0 is the module of an exported program"):
        dgefx.convert(model, 0.6, example_inputs=X)


def test_life_after_conversion(tmp_path: Path) -> None:
    dense = randomise(TinyViT(dim=32, depth=1)).eval()
    program = exported(dense)
    assert len(dgefx.explain(program, 0.9).converted) == 1
    converted = dgefx.convert(program, 0.6)
    dgefx.calibrate(converted, images(4, 32), refine_passes=1, progress=False)
    dgefx.save(converted, tmp_path)
    found = converted(X)
    for other in (dgefx.load(tmp_path, program), copy.deepcopy(converted)):
        assert error(other(X), found) < 1e-6
        assert dgefx.report(other).calibrated
    assert error(dgefx.revert(converted)(X), dense(X)) < 1e-6
    again = torch.export.export(converted, (X,), dynamic_shapes=(BATCH,)).module()
    assert error(again(images(3, 32)), converted(images(3, 32))) < 1e-5
