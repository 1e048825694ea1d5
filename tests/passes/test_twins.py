"""Blocks that are planned once for several of the same structure get what each would get alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from dgefx.analysis import analyse
from dgefx.config import DGEConfig
from dgefx.passes.capture import Call, record_calls
from dgefx.passes.rewrite import BlockPlan, plan_block
from dgefx.passes.twins import is_same_code
from tests.helpers import Attention, images, randomise

DIM, SIDE = 16, 8


def planned(model: nn.Module, side: int = 32) -> tuple[dict[str, BlockPlan], dict[str, Call]]:
    """The plans of a model's blocks, and the blocks' calls."""
    x = images(2, side)
    analysis = analyse(model, (x,), DGEConfig(), None)
    return analysis.plans, record_calls(model.eval(), set(analysis.plans), (x,), {})


def alone(model: nn.Module, plan: BlockPlan, call: Call) -> BlockPlan:
    stream = next(v for v in (*call[0], *call[1].values()) if isinstance(v, Tensor))
    return plan_block(
        model.get_submodule(plan.name), plan.name, call, plan.layout, tuple(stream.shape)
    )


#: a model, its side, how many of its blocks have their graph from another one
MODELS = {
    "vit": (lambda: timm.create_model("test_vit", img_size=32, depth=4), 32, 3),
    "drop path": (
        lambda: timm.create_model("test_vit", img_size=32, depth=4, drop_path_rate=0.3),
        32,
        2,  # the first block has nn.Identity in the place of a drop path
    ),
    "dropout": (
        lambda: timm.create_model("test_vit", img_size=32, depth=3, proj_drop_rate=0.3),
        32,
        2,
    ),
    "pvt": (lambda: timm.create_model("pvt_v2_b0"), 64, 4),
    "swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            embed_dim=16,
            depths=(4, 2),
            num_heads=(2, 2),
        ),
        64,
        1,  # the second shifted block of the first stage
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_shared_plans_are_those_of_each_block_alone(name: str) -> None:
    make, side, shared = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make())
    plans, calls = planned(model, side)
    assert sum(plan.twin is not None for plan in plans.values()) == shared
    for plan in plans.values():
        own = alone(model, plan, calls[plan.name])
        for code, wanted in ((plan.eval_code, own.eval_code), (plan.train_code, own.train_code)):
            assert code.source == wanted.source
            assert code.names == wanted.names
            assert code.label == wanted.label
        assert plan.constants.keys() == own.constants.keys()
        assert all(torch.equal(plan.constants[k], own.constants[k]) for k in own.constants)
        for field in ("channels", "spec", "tokens_apart", "exact_at_any_level", "stencils"):
            assert getattr(plan, field) == getattr(own, field), field


class Block(nn.Module):
    """`x` becomes x + update(attention), what is convolved, masked or scaled is told."""

    def __init__(self, kernel: Tensor | None = None, mask: Tensor | None = None, by: float = 2.0):
        super().__init__()
        self.norm, self.attn, self.by = nn.LayerNorm(DIM), Attention(DIM, 2), by
        self.conv = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM) if kernel is not None else None
        if kernel is not None:
            self.conv.weight.data.copy_(kernel.expand(DIM, 1, 3, 3))
        self.register_buffer("mask", mask)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm(x)) * self.by
        if self.mask is not None:
            y = y * self.mask
        if self.conv is not None:
            plane = y.transpose(1, 2).unflatten(2, (SIDE, SIDE))
            y = self.conv(plane).flatten(2).transpose(1, 2)
        x = x + y
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(3, DIM, 4, 4), nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.blocks(self.embed(x).flatten(2).transpose(1, 2))
        return tokens


ONES, STEP = torch.ones(SIDE * SIDE, 1), torch.arange(SIDE * SIDE).view(-1, 1) / SIDE


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (lambda: Block(by=2.0), lambda: Block(by=2.0), True),
        (lambda: Block(by=2.0), lambda: Block(by=3.0), True),
        (lambda: Block(by=2.0), lambda: Block(by=-2.0), False),
        (lambda: Block(by=2.0), lambda: Block(by=1.0), False),
        (lambda: Block(mask=STEP), lambda: Block(mask=STEP.clone()), True),
        (lambda: Block(mask=STEP), lambda: Block(mask=ONES), False),
        (lambda: Block(mask=STEP), lambda: Block(), False),
    ],
)
def test_only_what_scales_may_differ(
    one: Callable[[], Block], other: Callable[[], Block], shared: bool
) -> None:
    torch.manual_seed(0)
    model = Model(one(), other())
    plans, calls = planned(model)
    assert [plan.twin for plan in plans.values()] == [None, "blocks.0" if shared else None]
    second = plans["blocks.1"]
    assert second.eval_code.source == alone(model, second, calls["blocks.1"]).eval_code.source


def test_a_block_that_its_twin_hides_something_of_is_planned_alone() -> None:
    """A convolution that passes its input on looks tokenwise, and its twin is not."""
    centre = torch.zeros(3, 3)
    centre[1, 1] = 1.0
    torch.manual_seed(0)
    model = Model(Block(kernel=centre), Block(kernel=torch.randn(3, 3))).eval()
    plans, _calls = planned(model)
    assert plans["blocks.1"].twin is None
    assert plans["blocks.0"].stencils != plans["blocks.1"].stencils == {3}


class Shifted(nn.Module):
    """Its tokens are shifted, unless one window holds them all."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift


def test_code_is_the_same_only_with_the_same_settings() -> None:
    assert is_same_code(Shifted(1), Shifted(1))
    assert not is_same_code(Shifted(1), Shifted(0))
    assert not is_same_code(nn.Linear(2, 3), nn.Linear(3, 2))
    hooked = nn.Linear(2, 3)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_same_code(hooked, nn.Linear(2, 3))
