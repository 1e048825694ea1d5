"""Blocks that are planned once for several of the same structure get what each would get alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgefx
from dgefx.config import DGEConfig
from dgefx.outputs import Call
from dgefx.passes.capture import record_calls
from dgefx.passes.pipeline import analyse
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.plan.plan import BlockPlan, plan_block
from dgefx.passes.plan.signature import _signed
from dgefx.passes.plan.sizes import held_sizes
from tests.helpers import Attention, error, images, randomise, slow

DIM, SIDE = 16, 8


def planned(model: nn.Module, side: int = 32) -> tuple[dict[str, BlockPlan], dict[str, Call]]:
    """The plans of a model's blocks, and the blocks' calls."""
    x = images(2, side)
    analysis = analyse(model, (x,), DGEConfig(), None)
    return analysis.plans, record_calls(model.eval(), set(analysis.plans), (x,), {})


def alone(model: nn.Module, plan: BlockPlan, call: Call) -> BlockPlan:
    """The block planned as if there were no other one, and no other mode."""
    stream = next(v for v in (*call[0], *call[1].values()) if isinstance(v, Tensor))
    block, shape = model.get_submodule(plan.name), tuple(stream.shape)
    example = BlockExample(plan.name, block, call, plan.layout, shape)
    with mock.patch("dgefx.passes.plan.graph_cache.ignores_mode", return_value=False):
        own = plan_block(example)
    return own.restricted(held_sizes(example, own, DGEConfig()))


FIELDS = (
    "layout channels spec needs_grid_shape exact_at_any_level windows fixed_slots "
    "tokens_apart rank stencils only_here"
).split()

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


@pytest.mark.parametrize(
    "name", [slow(name) if name in ("swin", "drop path") else name for name in MODELS]
)
def test_shared_plans_are_those_of_each_block_alone(name: str) -> None:
    make, side, shared = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make())
    plans, calls = planned(model, side)
    assert sum(bool(plan.same_graph_as) for plan in plans.values()) == shared
    for plan in plans.values():
        own = alone(model, plan, calls[plan.name])
        for code, wanted in ((plan.eval_code, own.eval_code), (plan.train_code, own.train_code)):
            assert code.source == wanted.source
            assert code.names == wanted.names
            assert code.label == wanted.label
        assert plan.constants.keys() == own.constants.keys()
        assert all(torch.equal(plan.constants[k], own.constants[k]) for k in own.constants)
        # which forms of its call hold is asked afterwards
        spec = dataclasses.replace(plan.spec, masks=(), alike=frozenset())
        plan = dataclasses.replace(plan, spec=spec)
        for field in FIELDS:
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
    assert [plan.same_graph_as for plan in plans.values()] == ["", "blocks.0" if shared else ""]
    second = plans["blocks.1"]
    assert second.eval_code.source == alone(model, second, calls["blocks.1"]).eval_code.source


def test_a_convolution_that_passes_its_input_on_is_a_stencil_all_the_same() -> None:
    """It may be trained."""
    centre = torch.zeros(3, 3)
    centre[1, 1] = 1.0
    torch.manual_seed(0)
    model = Model(Block(kernel=centre), Block(kernel=torch.randn(3, 3))).eval()
    plans, _calls = planned(model)
    assert plans["blocks.0"].stencils == plans["blocks.1"].stencils == {3}


class Around(nn.Module):
    """A block whose update is the attention's, with something done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(DIM), Attention(DIM, 2)
        self.mlp = nn.Linear(DIM, DIM)

    def change(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.change(self.attn(self.norm(x)))
        return x + self.mlp(x)


class Hides(Around):
    """A stencil, so that no identity holds below the finest level, beside a convolution over the
    tokens that mixes them or not."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.plane = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)
        self.line = nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM, bias=False)
        self.line.weight.data.copy_(kernel.expand(DIM, 1, 3))

    def change(self, y: Tensor) -> Tensor:
        y = self.line(y.transpose(1, 2)).unflatten(2, (SIDE, SIDE))
        return self.plane(y).flatten(2).transpose(1, 2)


def test_a_kernel_that_hides_mixing_does_not_hide_it_from_blocks_that_share_its_graph() -> None:
    torch.manual_seed(0)
    model = Model(Hides(torch.tensor([0.0, 1.0, 0.0])), Hides(torch.randn(3)))
    plans, calls = planned(model)
    second = plans["blocks.1"]
    assert second.eval_code.source == alone(model, second, calls["blocks.1"]).eval_code.source


class Gated(Around):
    """What follows a zero gate is nothing, whatever it does in train mode."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.gate, self.mix = nn.Parameter(torch.full((1,), gate)), MixesInTraining()

    def change(self, y: Tensor) -> Tensor:
        return self.mix(self.gate * y)


class MixesInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError("cannot be traced: it stays a call")
        return x - x.mean(1, keepdim=True) if self.training else x * 1.0


def test_zeros_do_not_hide_what_train_mode_does() -> None:
    codes = []
    for gate in (0.0, 0.7):
        torch.manual_seed(0)
        plans, _calls = planned(Model(Gated(gate)))
        codes.append(plans["blocks.0"].train_code.source)
        assert codes[-1] != plans["blocks.0"].eval_code.source
    assert codes[0] == codes[1]


class Told(Around):
    """What is done in train mode is an argument."""

    def forward(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        y = self.attn(self.norm(x))
        x = x + (act(y) if self.training else y)
        return x + self.mlp(x)


class TellingModel(Model):
    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        for block, act in zip(self.blocks, (torch.tanh, F.relu), strict=True):
            tokens = block(tokens, act)
        return tokens


class Tied(Around):
    """Two layers, which are one in some blocks."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.b.load_state_dict(self.a.state_dict())
        self.c = self.a if tied else self.b

    def change(self, y: Tensor) -> Tensor:
        return self.a(y) + self.c(F.gelu(y)) + 0 * self.b(y)


def test_arguments_that_are_no_tensors_are_part_of_the_structure() -> None:
    torch.manual_seed(0)
    model = TellingModel(Told(), Told())
    x = images(2, 32)
    converted = dgefx.convert(model, gamma=1.0, example_inputs=(x,))
    with torch.no_grad():
        assert error(converted.train()(x), model.train()(x)) < 1e-5


def test_tied_layers_are_part_of_the_structure() -> None:
    torch.manual_seed(0)
    model = Model(Tied(True), Tied(False)).eval()
    x = images(2, 32)
    converted = dgefx.convert(model, gamma=1.0, example_inputs=(x,))
    with torch.no_grad():
        for changed in (model, converted):
            changed.get_parameter("blocks.1.b.weight").copy_(torch.eye(DIM))
        assert error(converted(x), model(x)) < 1e-5


class Shrinks(Hides):
    """A threshold decides whether anything passes to the convolution that mixes tokens."""

    def __init__(self, threshold: float) -> None:
        super().__init__(torch.randn(3))
        self.threshold = threshold

    def change(self, y: Tensor) -> Tensor:
        return super().change(F.hardshrink(y, self.threshold))


def test_thresholds_are_part_of_the_structure() -> None:
    torch.manual_seed(0)
    model = Model(Shrinks(1e5), Shrinks(0.01))
    plans, calls = planned(model)
    second = plans["blocks.1"]
    assert second.eval_code.source == alone(model, second, calls["blocks.1"]).eval_code.source


class Acts(Around):
    """What is done is an attribute."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def change(self, y: Tensor) -> Tensor:
        return self.act(y)


def test_partial_functions_are_equal_where_their_parts_are() -> None:
    torch.manual_seed(0)
    acts = [partial(F.gelu, approximate=a) for a in ("tanh", "tanh", "none")]
    plans, _calls = planned(Model(*map(Acts, acts)))
    assert [plan.copy_of for plan in plans.values()] == ["", "blocks.0", ""]
    third = plans["blocks.2"]
    assert "none" in third.eval_code.source and "tanh" not in third.eval_code.source


class Scaled(Around):
    """Two parameters, equal today, of which one is used by way of an attribute."""

    def __init__(self, used: int, how: Callable[[nn.Parameter], object]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        value = torch.randn(DIM, generator=generator)
        self.first, self.second = nn.Parameter(value.clone()), nn.Parameter(value.clone())
        self.by = how(self.second if used else self.first)

    def change(self, y: Tensor) -> Tensor:
        return self.by(y) if callable(self.by) else y * self.by[0]


@pytest.mark.parametrize("how", [lambda p: partial(torch.mul, p), lambda p: [p]])
def test_which_parameter_an_attribute_holds_is_part_of_the_structure(
    how: Callable[[nn.Parameter], object],
) -> None:
    torch.manual_seed(0)
    model = Model(*(Scaled(used, how) for used in (0, 1, 1)))
    converted = dgefx.convert(model, gamma=1.0, example_inputs=(images(2, 32),))
    assert len(dgefx.report(converted).converted) == 3
    for changed in (model, converted):
        changed(images(2, 32)).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    found = {name: p.grad for name, p in converted.named_parameters()}
    for place, used in enumerate((0, 1, 1)):
        for index, name in enumerate(("first", "second")):
            own, same = (g[f"blocks.{place}.{name}"] for g in (found, wanted))
            assert (own is None) == (same is None) == (index != used)
            assert own is None or error(own, same) < 1e-4


class Tagged(Around):
    """What is done in train mode is an attribute of an attribute."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.act = partial(torch.tanh)
        self.act.by = by

    def change(self, y: Tensor) -> Tensor:
        return self.act(y) * (self.act.by if self.training else 1.5)


def test_attributes_of_partial_functions_are_part_of_the_structure() -> None:
    torch.manual_seed(0)
    plans, _calls = planned(Model(Tagged(2.5), Tagged(3.5), Tagged(3.5)))
    assert [plan.copy_of for plan in plans.values()] == ["", "", "blocks.1"]
    assert "3.5" in plans["blocks.1"].train_code.source


class Flagged(Around):
    """A parameter decides what is done in train mode."""

    def __init__(self, flag: float) -> None:
        super().__init__()
        self.flag = nn.Parameter(torch.tensor(flag))

    def change(self, y: Tensor) -> Tensor:
        return y.tanh() if self.training and self.flag > 0 else y


def test_branches_on_parameters_are_refused() -> None:
    report = dgefx.explain(Model(Flagged(1.0), Flagged(-1.0)), example_inputs=(images(2, 32),))
    assert all("follows the value" in block.reason for block in report.blocks)


class Windowed(Around):
    """Windows of 4 x 4 tokens, shifted while they are many but not more than `least`."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        shift = 2 if min(h, w) > 6 and max(h, w) / 4 < self.least else 0
        y = torch.roll(self.norm(x), (-shift, -shift), (1, 2)) if shift else self.norm(x)
        y = F.pad(y, (0, 0, 0, -w % 4, 0, -h % 4))
        rows, columns = y.shape[1] // 4, y.shape[2] // 4
        y = y.unflatten(2, (columns, 4)).unflatten(1, (rows, 4)).transpose(2, 3)
        y = self.attn(y.reshape(-1, 16, DIM)).reshape(-1, rows, columns, 4, 4, DIM)
        y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w]
        x = x + (torch.roll(y, (shift, shift), (1, 2)) if shift else y)
        return x + self.mlp(x)


class WindowedModel(Model):
    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.blocks(self.embed(x).permute(0, 2, 3, 1))
        return tokens


@pytest.mark.parametrize("limits", [(100.0, 2.4), (2.4, 100.0)])
def test_blocks_that_branch_at_other_sizes_keep_their_own_rule(limits: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    model = WindowedModel(*map(Windowed, limits)).eval()
    plans, calls = planned(model)
    for plan in plans.values():
        assert plan.windows == alone(model, plan, calls[plan.name]).windows
    assert plans["blocks.0"].windows != plans["blocks.1"].windows


@dataclass(frozen=True)
class Settings:
    table: Tensor


def test_settings_that_cannot_be_compared_do_no_harm() -> None:
    class Block(Windowed):
        def __init__(self) -> None:
            super().__init__(100.0)
            self.settings = Settings(torch.arange(3))

    torch.manual_seed(0)
    plans, _calls = planned(WindowedModel(Block(), Block()))
    assert len(plans) == 2


def is_same_code(one: nn.Module, other: nn.Module) -> bool:
    signed = [_signed(lambda module=module: module) for module in (one, other)]
    return None not in signed and signed[0] == signed[1]


class Setting(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value
        self.register_buffer("table", torch.tensor([1.0 if value is None else 0.0]))


@pytest.mark.parametrize("value", [1, 1.0, True, 0.5, "1", None, (1, 2), [1, 2], {"a": 1}, print])
def test_code_is_the_same_only_with_the_same_settings(value: object) -> None:
    assert is_same_code(Setting(value), Setting(value))
    for other in (0, 2.0, False, 0.25, "2", (1, 3), [1], {"a": 2}, {"b": 1}, len, 1, 1.0, True):
        if type(other) is not type(value) or other != value:
            assert not is_same_code(Setting(value), Setting(other)), other


def test_code_is_not_the_same_with_other_shapes_buffers_hooks_or_ties() -> None:
    assert not is_same_code(nn.Linear(2, 3), nn.Linear(3, 2))
    other = Setting(1)
    other.table += 1
    assert not is_same_code(Setting(1), other)
    hooked = nn.Linear(2, 3)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_same_code(hooked, nn.Linear(2, 3))
    one = nn.Linear(2, 2)
    assert not is_same_code(nn.Sequential(one, one), nn.Sequential(one, nn.Linear(2, 2)))


def test_drop_paths_do_not_keep_blocks_from_sharing_their_sizes() -> None:
    """Their rates do nothing in eval mode, and the sizes are asked about in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, depth=4, drop_path_rate=0.3)
    with mock.patch("dgefx.passes.plan.convert_block.held_sizes", side_effect=held_sizes) as asked:
        plans, _calls = planned(model)
    assert len(plans) == 4
    assert asked.call_count == 2  # the first block has nn.Identity in the place of a drop path


@pytest.mark.parametrize("limits", [(100.0, 2.4), (100.0, 100.0)])
def test_only_blocks_of_the_same_settings_share_their_sizes(limits: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    with mock.patch("dgefx.passes.plan.convert_block.held_sizes", side_effect=held_sizes) as asked:
        planned(WindowedModel(*map(Windowed, limits)))
    assert asked.call_count == len(set(limits))
