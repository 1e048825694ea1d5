"""Models that torch.compile has wrapped, as a whole, in place or in part."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import dgefx
from tests.helpers import TinyViT, error, images, randomise, slow

X = images(2, 32)


def dense() -> nn.Module:
    return randomise(TinyViT(dim=32, prefix=1)).eval()


def names(model: nn.Module) -> list[str]:
    return [block.name for block in dgefx.report(model).converted]


def test_wrapped_model_says_what_to_convert() -> None:
    wrapped = torch.compile(dense(), backend="eager")
    with pytest.raises(ValueError, match=r"torch\.compile\(dgefx\.convert\(model\._orig_mod"):
        dgefx.convert(wrapped, 0.6, example_inputs=X)
    converted = torch.compile(dgefx.convert(wrapped._orig_mod, 0.6, example_inputs=X))
    assert len(names(converted)) == 2


@torch.no_grad()
def test_compiled_in_place() -> None:
    model = dense()
    wanted = model(X)
    model.compile(backend="eager")
    model(X)
    converted = dgefx.convert(model, 1.0, example_inputs=X)
    assert error(converted(X), wanted) < 1e-5
    # what was compiled before sees the converted blocks
    assert dgefx.convert(model, 0.6, example_inputs=X, inplace=True) is model
    assert error(model(X), wanted) > 1e-3
    dgefx.set_budget(model, 1.0)
    assert error(model(X), wanted) < 1e-5


def in_part(part: str) -> nn.Module:
    if part == "backbone":
        body = torch.compile(dense(), backend="eager")
        return nn.Sequential(body, nn.Linear(5, 3)).eval()
    model = dense()
    for block in model.blocks:
        block.compile(backend="eager")
    return model


PARTS = {
    "backbone": ["0._orig_mod.blocks.0", "0._orig_mod.blocks.1"],
    "blocks in place": ["blocks.0", "blocks.1"],
}


@torch.no_grad()
@pytest.mark.parametrize("part", [slow("backbone"), "blocks in place"])
def test_compiled_in_part(part: str) -> None:
    model = in_part(part)
    plain = copy.deepcopy(model)
    with torch.compiler.set_stance("force_eager"):
        wanted = plain(X)
    model(X)  # compiled now, for the dense blocks
    keys = list(model.state_dict())
    converted = dgefx.convert(model, 1.0, example_inputs=X)
    assert names(converted) == PARTS[part]
    assert list(converted.state_dict()) == keys
    assert error(converted(X), wanted) < 1e-5
    dgefx.set_budget(converted, 0.6)
    assert 1e-3 < error(converted(X), wanted) < 1
    assert error(model(X), wanted) < 1e-5
    assert error(dgefx.revert(converted)(X), wanted) < 1e-5


def test_wrapped_blocks_are_refused_with_the_way_out() -> None:
    model = dense()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    report = dgefx.explain(model, 0.9, example_inputs=X)
    assert [b.name for b in report.converted] == ["blocks.0"]
    assert "compile it with block.compile()" in report.blocks[1].reason


def test_compiled_in_part_calibrates(tmp_path: Path) -> None:
    converted = dgefx.convert(in_part("backbone"), 0.6, example_inputs=X)
    dgefx.calibrate(converted, images(4, 32), refine_passes=1, progress=False)
    assert dgefx.report(converted).calibrated
    with pytest.raises(ValueError, match=r"wrapped by torch\.compile"):
        dgefx.save(converted, tmp_path)
