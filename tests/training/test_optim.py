"""`param_groups`: every parameter once, timm's decay, gates by themselves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import dgefx
from dgefx.kernels.correction import Correction
from dgefx.nn.router import Router
from dgefx.training.optim import param_groups
from tests.helpers import TinyViT, images


def converted(model: nn.Module | None = None, side: int = 32) -> nn.Module:
    config = dgefx.DGEConfig(router="linear")
    model = TinyViT(depth=2) if model is None else model
    return dgefx.convert(model.eval(), 0.5, example_inputs=images(2, side), config=config)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """A timm model with `group_matcher` and `no_weight_decay`, converted."""
    return converted(timm.create_model("test_vit", img_size=64, patch_size=8, num_classes=5), 64)


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Group of every parameter; each must be in exactly one."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    counts = Counter(p for group in groups for p in group["params"])
    assert set(counts.values()) == {1}
    assert set(counts) == {p for p in model.parameters() if p.requires_grad}
    return {names[p]: group for group in groups for p in group["params"]}


def is_gate(name: str) -> bool:
    return ".dge_router.gate." in name


def test_weight_decay_and_gates(vit: nn.Module) -> None:
    found = names_of(vit, param_groups(vit, weight_decay=0.1, gate_lr_scale=7.0))
    assert sum(map(is_gate, found)) == 2 * len(vit.blocks)
    for name, group in found.items():
        if is_gate(name):
            assert group["lr_scale"] == 7.0
            assert group["weight_decay"] == 0.0
        else:
            assert "lr_scale" not in group
            exempt = found[name]["weight_decay"] == 0.0
            parameter = vit.get_parameter(name)
            assert exempt == (parameter.ndim <= 1 or name in vit.no_weight_decay())


def test_layer_decay_scales_gates_with_their_layer(vit: nn.Module) -> None:
    found = names_of(vit, param_groups(vit, layer_decay=0.5, gate_lr_scale=8.0))
    for index in range(len(vit.blocks)):
        layer = found[f"blocks.{index}.attn.qkv.weight"]["lr_scale"]
        assert found[f"blocks.{index}.dge_router.gate.weight"]["lr_scale"] == 8.0 * layer
        assert found[f"blocks.{index}.dge_router.gate.bias"]["weight_decay"] == 0.0
    assert found["blocks.0.attn.qkv.weight"]["lr_scale"] < found["head.weight"]["lr_scale"] == 1.0


def test_corrections_are_ordinary_weights() -> None:
    model = converted()
    router = model.blocks[0].dge_router
    assert isinstance(router, Router)
    router.set_correction(Correction(torch.zeros(33, 2), torch.zeros(2, 16)))
    found = names_of(model, param_groups(model, weight_decay=0.1))
    for name in ("correction_down", "correction_up"):
        group = found[f"blocks.0.dge_router.{name}"]
        assert group["weight_decay"] == 0.1 and "lr_scale" not in group


def test_frozen_parameters_and_dense_models() -> None:
    model = converted()
    model.embed.requires_grad_(False)
    model.blocks[0].dge_router.gate.requires_grad_(False)
    found = names_of(model, param_groups(model))
    assert sum(map(is_gate, found)) == 2
    dense = TinyViT()
    assert len(names_of(dense, param_groups(dense))) == len(list(dense.parameters()))


def test_wrapped_models_give_the_same_groups(vit: nn.Module) -> None:
    compiled: Any = torch.compile(vit)
    plain, wrapped = param_groups(vit, layer_decay=0.5), param_groups(compiled, layer_decay=0.5)
    assert len(plain) == len(wrapped)
    for one, other in zip(plain, wrapped, strict=True):
        assert [id(p) for p in one.pop("params")] == [id(p) for p in other.pop("params")]
        assert one == other


def test_rates_under_timm_scheduler_and_with_lr(vit: nn.Module) -> None:
    """Both ways of saying it give every parameter the same rate, once."""
    groups = param_groups(vit, layer_decay=0.5)
    optimizer = create_optimizer_v2(groups, opt="adamw", lr=1e-3, weight_decay=0.0)
    CosineLRScheduler(optimizer, t_initial=10)
    scaled = param_groups(vit, layer_decay=0.5, lr=1e-3)
    assert not any("lr_scale" in group for group in scaled)
    by_hand = torch.optim.AdamW(scaled)
    rates: list[dict[Tensor, float]] = [
        {p: group["lr"] for group in found.param_groups for p in group["params"]}
        for found in (optimizer, by_hand)
    ]
    assert rates[0].keys() == rates[1].keys()
    for parameter, rate in rates[0].items():
        assert rate == pytest.approx(rates[1][parameter])
    assert len(set(rates[0].values())) > 3


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay"),
        ({"layer_decay": 0.0}, ValueError, "layer_decay"),
        ({"layer_decay": 1.5}, ValueError, "layer_decay"),
        ({"gate_lr_scale": 0.0}, ValueError, "gate_lr_scale"),
        ({"gate_lr_scale": True}, TypeError, "gate_lr_scale"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"layer_decay": 0.7}, ValueError, "group_matcher"),
    ],
)
def test_errors(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        param_groups(TinyViT(), **kwargs)


def test_errors_of_the_model() -> None:
    with pytest.raises(TypeError, match="model"):
        param_groups([nn.Linear(1, 1)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to train"):
        param_groups(TinyViT().requires_grad_(False))
