"""What a trace would fix or lose of users' code: kept, noticed when it changes, or refused."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

import dgefx
from dgefx.nn.block import DGEBlock
from tests.helpers import error, images, slow
from tests.robust.user_blocks import (
    DIM,
    UserAttention,
    UserBlock,
    UserModel,
    UserNorm,
    with_change,
)

X = images(2, 64)


def finest(model: nn.Module, x: Tensor = X) -> nn.Module:
    return dgefx.convert(model, 1.0, example_inputs=x)


def refusal(model: nn.Module) -> str:
    """The reason why the blocks stay dense."""
    (reason,) = {b.reason for b in dgefx.explain(model, example_inputs=X).blocks}
    return reason


def gradients(model: nn.Module, x: Tensor = X) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    model(x).square().sum().backward()
    found = {"input": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_same_gradients(found: nn.Module, wanted: nn.Module, x: Tensor = X) -> None:
    a, b = gradients(found, x), gradients(wanted, x)
    scale = max(float(g.norm()) for g in b.values())
    for name in {*a, *b}:  # none is zero
        assert float((a.get(name, 0) - b.get(name, torch.zeros(()))).norm()) <= 1e-5 * scale, name


# -- types -----------------------------------------------------------------------------------------


def clamp_half(h: Tensor) -> Tensor:
    if h.dtype == torch.float16:
        h = h.clamp(-1e-3, 1e-3)
    return h


def test_a_branch_on_the_type_is_noticed_when_the_type_changes() -> None:
    converted = finest(UserModel(with_change("", clamp_half)).eval())
    assert error(converted(X), UserModel(with_change("", clamp_half)).eval()(X)) < 1e-5
    with pytest.raises(ValueError, match=r"blocks\.0 decides by the floating type.*float16"):
        copy.deepcopy(converted).half()(X.half())
    dense = UserModel(with_change("", clamp_half)).eval()
    assert error(converted.double()(X.double()), dense.double()(X.double())) < 1e-6


@pytest.mark.parametrize(
    "asks",
    [
        lambda h: h.element_size() != 4,
        lambda h: h.itemsize != 4,
        lambda h: h.dtype.itemsize != 4,
        lambda h: h.nbytes != 4 * h.numel(),
        lambda h: h.type() != "torch.FloatTensor",
        lambda h: torch.finfo(h.dtype).bits != 32,
    ],
)
@pytest.mark.parametrize("part", ["", slow("attn")])
def test_whatever_asks_for_the_type_binds_to_it(asks: Any, part: str) -> None:
    converted = finest(UserModel(with_change(part, lambda h: h.relu() if asks(h) else h)).eval())
    with pytest.raises(ValueError, match=r"blocks\.0 decides by the floating type"):
        copy.deepcopy(converted).bfloat16()(X.bfloat16())
    with pytest.raises(ValueError, match=r"blocks\.0 decides by the floating type"):
        converted.double()(X.double())


def test_a_model_in_a_type_in_which_it_branches_otherwise_is_refused() -> None:
    assert "in float16, which the model is in" in refusal(
        UserModel(with_change("", clamp_half)).half().eval()
    )


def test_a_branch_on_the_type_in_a_module_of_tokens_is_kept() -> None:
    dense = UserModel(with_change("mlp", clamp_half)).half().eval()
    converted = finest(dense)
    with torch.no_grad():
        reference = UserModel(with_change("mlp", lambda h: h.clamp(-1e-3, 1e-3))).eval()(X)
        own = error(dense(X.half()), reference)
        assert error(converted(X.half()), reference) < 2 * own < 0.01


def clamp_infinite(h: Tensor) -> Tensor:
    if h.dtype == torch.float16 and not torch.isfinite(h).all():
        h = h.clamp(-1e4, 1e4)
    return h


def test_a_clamp_of_what_is_not_finite_is_the_same_in_every_type() -> None:
    converted = finest(UserModel(with_change("", clamp_infinite)).half().eval())
    assert bool(torch.isfinite(converted(X.half())).all())


def clamp_named(h: Tensor) -> Tensor:
    return h.clamp(-1e-3, 1e-3) if "float16" in str(h.dtype) else h


def clamp_shown(h: Tensor) -> Tensor:
    return h.clamp(-1e-3, 1e-3) if re.search("float16", f"{h.dtype!r}") else h


def clamp_in_set(h: Tensor) -> Tensor:
    return h.clamp(-1e-3, 1e-3) if h.dtype in {torch.float16, torch.bfloat16} else h


def clamp_by_key(h: Tensor) -> Tensor:
    return h.clamp(-1e-3, 1e-3) if {"torch.float16": True}.get(str(h.dtype)) else h


@pytest.mark.parametrize("clamp", [clamp_named, clamp_shown, clamp_in_set, clamp_by_key])
def test_a_branch_on_the_name_of_the_type_is_noticed(clamp: Any) -> None:
    dense = UserModel(with_change("attn", clamp)).eval()
    converted = finest(dense)
    assert error(converted(X), dense(X)) < 1e-5
    with pytest.raises(ValueError, match=r"blocks\.0 decides by the floating type"):
        converted.half()(X.half())


def named_device(h: Tensor) -> Tensor:
    return h * 2 if str(h.device).startswith("meta") else h


def formatted_device(h: Tensor) -> Tensor:
    return h * 2 if f"{h.device}:0" == "meta:0" else h


def moved_by_name(h: Tensor) -> Tensor:
    return h.to(str(h.device))


def joined_device(h: Tensor) -> Tensor:
    return h * 2 if "on " + str(h.device) == "on meta" else h


def compared_device(h: Tensor) -> Tensor:
    return h * 2 if str(h.device) >= "m" else h


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [named_device, formatted_device, moved_by_name, joined_device, compared_device]
)
def test_a_branch_on_the_name_of_the_device_is_noticed(change: Any) -> None:
    converted = finest(UserModel(with_change("attn", change)).eval())
    with pytest.raises(ValueError, match=r"blocks\.0 decides by the device"):
        converted.to("meta")(X.to("meta"))


@torch.no_grad()
def test_the_name_of_the_device_as_a_key_decides_nothing() -> None:
    converted = finest(UserModel(DictionaryBelow).eval())
    assert converted.to("meta")(X.to("meta")).is_meta


def masked_by_limit(h: Tensor) -> Tensor:
    return h.masked_fill(h > 1e4, torch.finfo(h.dtype).min)


def test_the_limits_of_a_type_are_constants_of_float32() -> None:
    dense = UserModel(with_change("attn", masked_by_limit)).eval()
    converted = finest(dense)
    assert error(converted(X), dense(X)) < 1e-5
    with pytest.raises(ValueError, match=r"blocks\.0 decides by the floating type"):
        converted.double()(X.double())


def with_own_autocast(h: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return h.float() @ torch.eye(DIM) * 1.0


def asking_autocast(h: Tensor) -> Tensor:
    return h * 0.5 if torch.is_autocast_enabled("cpu") else h


@pytest.mark.parametrize("change", [with_own_autocast, asking_autocast])
def test_what_knows_of_autocast_refuses_to_run_under_it(change: Any) -> None:
    dense = UserModel(with_change("", change)).eval()
    converted = finest(dense)
    assert error(converted(X), dense(X)) < 1e-5
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"blocks\.0 switches autocast off inside"),
    ):
        converted(X)


def test_a_module_of_tokens_keeps_its_own_autocast() -> None:
    dense = UserModel(with_change("mlp", asking_autocast)).eval()
    converted = finest(dense)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert error(converted(X), dense(X)) < 0.01
        assert error(dense(X), UserModel().eval()(X)) > 0.05


# -- gradients -------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 0.1


class Clipped(torch.autograd.Function):
    """Does nothing to small gradients, as on few tokens."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (100 / gradient.norm()).clamp(max=1)


class PerImage(Clipped):
    """Does nothing to those of one image."""

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / len(gradient)


def of_many(h: Tensor) -> Tensor:
    return Scaled.apply(h) if h.shape[-2] > 49 else h


@pytest.mark.parametrize("change", [Clipped.apply, PerImage.apply, of_many])
def test_a_backward_pass_that_shows_on_all_tokens_alone_is_refused(change: Any) -> None:
    assert "has a backward pass of its own" in refusal(UserModel(with_change("attn", change)))


class ScaledInEval(UserAttention):
    def change(self, q: Tensor) -> Tensor:
        return q if self.training else PerImage.apply(q)


def test_a_backward_pass_of_eval_mode_is_compared_there() -> None:
    dense = UserModel()
    for block in dense.blocks:
        block.attn = ScaledInEval()
    assert "PerImage has a backward pass of its own" in refusal(dense)


@pytest.mark.parametrize("function", [StraightThrough, Scaled])
@pytest.mark.parametrize("part", ["", "attn"])
def test_a_function_with_a_backward_of_its_own_is_refused(function: Any, part: str) -> None:
    reason = refusal(UserModel(with_change(part, function.apply)))
    assert f"{function.__name__} has a backward pass of its own" in reason


class SmallGain(UserBlock):
    """Learned, by a hundredth of what attention is scaled by: float32 is too coarse to tell."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * (1 + 1e-2 * Scaled.apply(self.gain))
        return x + self.mlp(self.norm2(x))


def test_a_small_gradient_that_would_vanish_is_refused() -> None:
    assert "Scaled has a backward pass of its own" in refusal(UserModel(SmallGain))


@pytest.mark.parametrize("function", [StraightThrough, Scaled])
def test_a_module_of_tokens_keeps_its_backward(function: Any) -> None:
    dense = UserModel(with_change("mlp", function.apply))
    plain = UserModel()
    converted = finest(dense)
    assert_same_gradients(converted, dense)
    wanted = gradients(plain)["blocks.0.mlp.fc1.weight"]
    assert error(gradients(dense)["blocks.0.mlp.fc1.weight"], wanted) > 0.01


def without_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        weight = h.sigmoid() * 2
    return h * weight


def detached(h: Tensor) -> Tensor:
    return h + (h.sin() - h).detach()


def detached_at_once(h: Tensor) -> Tensor:
    return h.detach() * 1.0  # of a projection, if `h` are queries


@pytest.mark.parametrize("change", [without_grad, detached, detached_at_once])
@pytest.mark.parametrize("part", ["", "attn", "mlp"])
def test_gradients_stop_where_they_do_in_the_dense_block(change: Any, part: str) -> None:
    dense = UserModel(with_change(part, change))
    assert_same_gradients(finest(dense), dense)


class Frozen(UserBlock):
    """Learns in train mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


def test_a_block_that_stops_gradients_in_eval_mode_goes_on_to() -> None:
    dense = UserModel(Frozen)
    converted = finest(dense)
    for mode in (True, False):
        assert_same_gradients(converted.train(mode), dense.train(mode))


# -- attributes ------------------------------------------------------------------------------------


class Told(UserBlock):
    """Is told its sizes, as in the original code of Swin."""

    H = W = 0

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        y = self.attn(self.norm1(x)).transpose(1, 2).reshape(b, c, self.H, self.W)
        x = x + (y - F.avg_pool2d(y, 3, 1, 1)).flatten(2).transpose(1, 2)
        return x + self.mlp(self.norm2(x))


class Telling(UserModel):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            block.H, block.W = height, width
            x = block(x)
        return self.head(x.mean(1))


def right_or_told(call: Callable[[], Tensor], wanted: Tensor, match: str) -> None:
    """The right value or an error that names the cause."""
    try:
        found = call()
    except ValueError as caught:
        assert match in str(caught)
    else:
        assert error(found, wanted) < 1e-5


def test_a_block_that_is_told_its_sizes_by_attributes_follows_them() -> None:
    dense = Telling(Told).eval()
    x = images(2, (64, 96))
    converted = finest(dense, x)
    assert error(converted(x), dense(x)) < 1e-5
    for size in ((96, 64), (64, 64), (128, 96), (64, 96)):
        other = images(2, size)
        assert error(converted(other), dense(other)) < 1e-5
    coarse = dgefx.convert(dense, 0.7, example_inputs=x)
    assert coarse(images(2, (96, 64))).isfinite().all()


class KeepsLast(UserBlock):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x = super().forward(x)
        return x


class CountsCalls(UserBlock):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


class Appends(UserBlock):
    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.maps.append(x)
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "name"), [(KeepsLast, "last"), (CountsCalls, "calls"), (Appends, "maps")]
)
def test_what_forward_sets_is_refused(make: Any, name: str) -> None:
    assert f"its forward sets {name} on the module" in refusal(UserModel(make))


class Caches(UserBlock):
    """Fills in what it makes once; that is no state."""

    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.linspace(0, 1, DIM)
        return super().forward(x) + self.mask


class CachesInAttention(UserAttention):
    def __init__(self) -> None:
        super().__init__()
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.cache is None or self.cache.numel() != x.shape[1]:
            self.cache = torch.linspace(0.5, 1.5, x.shape[1])[:, None].to(x)
        return x * self.cache


class TableOfSize(UserAttention):
    """As in ConViT: made anew for other numbers of tokens, of any number that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] != x.shape[1]:
            self.table = torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype)[:, None]
        return super().forward(x) * self.table


class TableBelow(UserBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attn = TableOfSize()


def test_a_table_of_the_size_is_that_of_all_tokens() -> None:
    dense = UserModel(TableBelow).eval()
    converted = finest(dense, X)
    assert error(converted(X), dense(X)) < 1e-5


class TableOfGrid(TableOfSize):
    """Made anew for another grid, which a plain attribute keeps."""

    grid: tuple[int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        grid = (8, 8) if x.shape[1] == 64 else (4, 16)
        if self.grid != grid:
            self.table = torch.linspace(0.5, grid[0], x.shape[1])[:, None]
            self.grid = grid
        return UserAttention.forward(self, x) * self.table


class GridBelow(UserBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attn = TableOfGrid()


@pytest.mark.parametrize("before", [None, (32, 16)])
def test_a_table_of_the_grid_comes_with_what_says_so(before: tuple[int, int] | None) -> None:
    dense = UserModel(GridBelow).eval()
    if before is not None:
        dense(images(2, before))
    converted = finest(dense, X)
    assert error(converted(X), dense(X)) < 1e-5


def test_the_type_of_a_table_of_a_model_in_half_precision_is_asked_for() -> None:
    dense = UserModel(TableBelow).eval().bfloat16()
    with pytest.raises(ValueError, match=r"attn\.table in its first call: call the model once"):
        finest(dense, X.bfloat16())
    dense(X.bfloat16())
    converted = finest(dense, X.bfloat16())
    assert error(converted(X.bfloat16()).float(), dense(X.bfloat16()).float()) < 2e-2


class CachesBelow(UserBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attn = CachesInAttention()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [Caches, CachesBelow])
def test_a_cache_that_is_filled_once_converts(make: Any, dtype: torch.dtype) -> None:
    dense = UserModel(make).eval().to(dtype)
    x = X.to(dtype)
    converted = finest(dense, x)
    part = dense.blocks[0] if make is Caches else dense.blocks[0].attn
    assert part.mask is None if make is Caches else part.cache is None
    assert error(converted(x), dense(x)) < 1e-5
    assert error(dgefx.revert(converted)(x), dense(x)) < 1e-5


class CachesInDictionary(UserAttention):
    """As in LeViT and TinyViT."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.randn(DIM))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Self:
        self.cache = {} if mode else self.cache
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x) * (self.slope * 2)
        if str(x.device) not in self.cache:
            self.cache[str(x.device)] = self.slope * 2
        return super().forward(x) * self.cache[str(x.device)]


class DictionaryBelow(UserBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attn = CachesInDictionary()


class Prompted(UserBlock):
    """A dictionary that is no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = {"mlp": self.mlp.fc1, "one": torch.ones(DIM, requires_grad=True) * 2}

    def change(self, h: Tensor) -> Tensor:
        return h + self.prompts["one"] if "one" in self.prompts else h


def test_what_has_gradients_in_a_dictionary_is_no_cache() -> None:
    dense = UserModel(Prompted).eval()
    converted = finest(dense, X)
    assert error(converted(X), dense(X)) < 1e-5
    assert converted.blocks[0].prompts["mlp"] is converted.blocks[0].mlp.fc1
    assert error(dgefx.revert(converted)(X), dense(X)) < 1e-5


def test_a_model_that_ran_with_gradients_converts() -> None:
    dense = UserModel(DictionaryBelow).eval()
    dense(X)
    converted = finest(dense, X)
    assert list(dense.blocks[0].attn.cache) == ["cpu"]
    assert error(converted(X), dense(X)) < 1e-5
    assert error(dgefx.revert(converted)(X), dense(X)) < 1e-5
    assert_same_gradients(converted.train(), dense.train())


def scale_of(model: Any) -> None:
    model.blocks[1].attn.scale = 0.1


def drop_of(model: Any) -> None:
    model.blocks[1].attn.drop = 0.5


def eps_of(model: Any) -> None:
    model.blocks[1].norm1.eps = 1.0


def norm_of(model: Any) -> None:
    model.blocks[1].norm1 = nn.RMSNorm(DIM)


def attention_of(model: Any) -> None:
    model.blocks[1].attn = type("Other", (nn.Linear,), {})(DIM, DIM)


def forward_of(model: Any) -> None:
    attention = model.blocks[1].attn
    attention.forward = lambda x: UserAttention.forward(attention, x) * 0.5


def part_of(model: Any) -> None:
    model.blocks[1].attn.drops.p = 0.5


def class_setting_of(model: Any) -> None:
    model.blocks[1].attn.gain = 0.5


def subclass_of(model: Any) -> None:
    class Halved(UserAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.5

    model.blocks[1].attn = Halved()


def tensor_of(model: Any) -> None:
    model.blocks[1].attn.scale = torch.linspace(0.1, 1, DIM // 2)


LATER = [
    part_of,
    class_setting_of,
    subclass_of,
    tensor_of,
    forward_of,
    scale_of,
    drop_of,
    eps_of,
    norm_of,
    attention_of,
]


@pytest.mark.parametrize("change", LATER)
def test_what_is_changed_after_the_conversion_is_taken_or_named(change: Any) -> None:
    dense = UserModel().train()
    converted = finest(dense)
    for model in (dense, converted):
        torch.manual_seed(1)
        change(model)
        torch.manual_seed(1)
    before = UserModel().train()(X)
    wanted = dense(X)
    assert error(wanted, before) > 1e-4
    torch.manual_seed(1)
    right_or_told(lambda: converted(X), wanted, "block blocks.1: ")


def test_a_part_in_another_mode_is_named() -> None:
    dense = UserModel()
    for block in dense.blocks:
        block.attn.drop = 0.5
    converted = finest(dense).train()
    converted.blocks[1].attn.eval()
    with pytest.raises(ValueError, match=r"block blocks\.1: attn is in eval mode"):
        converted(X)
    converted.eval()
    dense.eval()
    assert error(converted(X), dense(X)) < 1e-5


def branch_on_torch(h: Tensor) -> Tensor:
    return 1.5 * h if torch.rand(()) < 0.5 else h


def number_of_torch(h: Tensor) -> Tensor:
    return h * torch.rand(1).item()


def branch_on_numpy(h: Tensor) -> Tensor:
    return 1.5 * h if np.random.rand() < 0.5 else h


def branch_on_pairs(h: Tensor) -> Tensor:
    return 1.5 * h if np.random.randn() < 0.5 else h  # every second one changes no seed


def branch_on_python(h: Tensor) -> Tensor:
    return 1.5 * h if random.random() < 0.5 else h


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (branch_on_torch, "follows random numbers, which rand draws"),
        (branch_on_numpy, "draws from numpy.random"),
        (branch_on_pairs, "draws from numpy.random"),
        (branch_on_python, "draws from Python's random module"),
    ],
)
def test_chance_that_a_trace_would_fix_is_refused(change: Any, said: str) -> None:
    assert said in refusal(UserModel(with_change("attn", change)))


def test_backward_hooks_that_change_gradients_are_named() -> None:
    dense = UserModel()
    for block in dense.blocks:
        block.attn.register_full_backward_hook(lambda _m, given, _o: (2.0 * given[0],))
    assert refusal(dense).startswith("backward hooks on attn change its gradients")


def test_a_backward_hook_on_one_of_equal_blocks_is_compared() -> None:
    dense = UserModel()
    hook = dense.blocks[1].attn.register_full_backward_hook(lambda _m, given, _o: (9 * given[0],))
    blocks = dgefx.explain(dense, example_inputs=X).blocks
    assert [b.status for b in blocks] == ["converted", "dense"]
    hook.remove()


class StopsInEval(UserAttention):
    def change(self, q: Tensor) -> Tensor:
        return q * 1.0 if self.training else q.detach() * 1.0


class StopsInEvalBlock(UserBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attn = StopsInEval()


@pytest.mark.parametrize("training", [False, True])
def test_gradients_stop_in_the_mode_in_which_they_do(training: bool) -> None:
    dense = UserModel(StopsInEvalBlock)
    converted = finest(dense)
    assert_same_gradients(converted.train(training), dense.train(training))


def by_isinstance(h: Tensor) -> Tensor:
    if not isinstance(h, torch.FloatTensor):
        h = h + 0.5
    return h


@pytest.mark.parametrize("part", ["", "attn"])
def test_a_branch_that_a_trace_does_not_see_is_named_with_its_line(part: str) -> None:
    reason = refusal(UserModel(with_change(part, by_isinstance)))
    assert reason.startswith("it goes another way when it is traced")
    assert reason.endswith(": h = h + 0.5")


def first_row_written(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, :8] += 1.0
    return h


def negative_scaled(h: Tensor) -> Tensor:
    h = h.clone()
    h[h < 0] *= 0.2
    return h


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("", first_row_written, "by their place"),
        ("mlp", first_row_written, "by their place"),
        ("", negative_scaled, "changes its shape with the data"),
        ("attn", negative_scaled, "changes its shape with the data"),
    ],
)
def test_writes_into_some_tokens_are_refused(part: str, change: Any, said: str) -> None:
    assert said in refusal(UserModel(with_change(part, change)))


def over_images(h: Tensor) -> Tensor:
    return h + h.mean(0, keepdim=True)


@pytest.mark.parametrize("part", ["", "mlp"])
def test_images_that_are_mixed_are_refused(part: str) -> None:
    reason = refusal(UserModel(with_change(part, over_images)))
    assert reason == "what it makes of an image depends on the other images of the batch"


def test_another_generator_of_numpys_is_no_trouble() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        assert refusal(UserModel()) == ""
        assert "draws from numpy.random" in refusal(UserModel(with_change("attn", branch_on_numpy)))
    finally:
        np.random.set_bit_generator(before)


def noise_of_numpy(h: Tensor) -> Tensor:
    return h + 0 * torch.from_numpy(np.random.rand(h.shape[-1])).to(h)


def test_a_module_that_stays_a_call_may_draw() -> None:
    assert refusal(UserModel(with_change("mlp", noise_of_numpy))) == ""


def test_spectral_norm_of_what_runs_twice_is_told() -> None:
    dense = UserModel()
    for block in dense.blocks:
        nn.utils.parametrizations.spectral_norm(block.attn.qkv)
        norm = block.attn.qkv.parametrizations.weight[0]
        norm._u.copy_(torch.randn_like(norm._u))
    assert "by what attn.qkv keeps, and a converted block calls that twice" in refusal(dense)
    for _ in range(300):
        dense.train()(X)
    converted = finest(dense)
    converted.train()
    with pytest.warns(UserWarning, match=r"attn.qkv runs twice .* running statistics"):
        converted(X)


def test_a_random_number_that_is_no_branch_is_drawn_in_every_call() -> None:
    dense = UserModel(with_change("attn", number_of_torch)).train()
    converted = finest(dense).train()
    outputs = []
    for seed in range(3):
        for model in (dense, converted):
            torch.manual_seed(seed)
            outputs.append(model(X))
        assert error(outputs[-1], outputs[-2]) < 1e-5
    assert error(outputs[0], outputs[2]) > 1e-3


class Padded(UserAttention):
    """Written-out scores, of padding the least number that there is, as in vit-pytorch."""

    fill = -1e9

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * self.scale @ k.transpose(-2, -1)
        scores = scores.masked_fill(torch.arange(n) >= n - 8, self.fill)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class PaddedBelow(UserBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Padded()


@pytest.mark.parametrize("fill", [-1e9, -1e30, torch.finfo(torch.float32).min])
def test_scores_of_hidden_keys_may_be_as_low_as_numbers_go(fill: float) -> None:
    dense = UserModel(PaddedBelow).eval()
    for block in dense.blocks:
        block.attn.fill = fill
    assert error(finest(dense)(X), dense(X)) < 1e-5


class ComplexQueries(UserAttention):
    """Queries turned as complex numbers, behind a prefix token."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.randn(64, DIM // 4)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def change(self, q: Tensor) -> Tensor:
        pairs = torch.view_as_complex(q[:, :, 1:].reshape(*q[:, :, 1:].shape[:-1], -1, 2))
        turned = torch.view_as_real(pairs * self.turns).flatten(3)
        return torch.cat([q[:, :, :1], turned], 2)


class ComplexBlock(UserBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attn = ComplexQueries()


class PrefixModel(UserModel):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__(make)
        self.prefix = nn.Parameter(torch.randn(1, 1, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def test_rotary_positions_as_complex_numbers_behind_a_prefix() -> None:
    dense = PrefixModel(ComplexBlock).eval()
    assert refusal(dense) == ""
    assert error(finest(dense)(X), dense(X)) < 1e-5


class Scores(nn.Module):
    """Treats rows of scores alike, as an MLP does tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().softmax(-1)


class SoftmaxModule(UserAttention):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = Scores()

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.softmax(q * self.scale @ k.transpose(-2, -1))
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


def test_a_softmax_in_a_module_of_its_own_is_attention() -> None:
    dense = UserModel().eval()
    for block in dense.blocks:
        block.attn = SoftmaxModule().eval()
    assert error(finest(dense)(X), dense(X)) < 1e-5


def test_reverting_keeps_what_was_set_since() -> None:
    model = finest(Telling(Told).eval(), images(2, (64, 96)))
    other = images(2, (96, 64))
    wanted = model(other)
    for block in model.blocks:
        block.mlp = nn.Identity()
    assert error(model(other), wanted) > 1e-3
    assert error(dgefx.revert(model)(other), model(other)) < 1e-5


def test_settings_of_a_drop_path_are_free_in_eval_mode() -> None:
    class Path(UserBlock):
        def __init__(self) -> None:
            super().__init__()
            self.path = DropPath(0.5)

        def change(self, h: Tensor) -> Tensor:
            return self.path(h)

    dense = UserModel(Path).eval()
    converted = finest(dense)
    for block in converted.blocks:
        block.path.drop_prob = 0.0
    assert error(converted(X), dense(X)) < 1e-5
    with pytest.raises(ValueError, match=r"path\.drop_prob was 0\.5"):
        converted.train()(X)


def by_numpy(h: Tensor) -> Tensor:
    side = int(np.sqrt(h.shape[1]))
    return h.unflatten(1, (side, side)).flatten(1, 2)


def test_numbers_that_numpy_makes_of_sizes() -> None:
    dense = UserModel(with_change("", by_numpy)).eval()
    assert error(finest(dense)(X), dense(X)) < 1e-5


def test_indices_of_no_axis_in_front_of_the_blocks() -> None:
    class Chosen(UserModel):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.stack([x, x], 0)[torch.tensor(0)])

    dense = Chosen().eval()
    assert error(finest(dense)(X), dense(X)) < 1e-5


class Rotary(UserAttention):
    """A complex table."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(64.0), torch.rand(DIM // 4))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def change(self, q: Tensor) -> Tensor:
        pairs = torch.view_as_complex(q.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self.turns).flatten(-2)


def test_complex_tables_stay_complex() -> None:
    dense = UserModel().eval()
    for block in dense.blocks:
        block.attn = Rotary().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = finest(dense)
    assert error(converted(X), dense(X)) < 1e-5


# -- branches --------------------------------------------------------------------------------------


def asks_grad(h: Tensor) -> Tensor:
    return h * 0.5 if torch.is_grad_enabled() else h


def test_branches_on_the_gradient_mode_are_refused() -> None:
    assert "asks torch.is_grad_enabled()" in refusal(UserModel(with_change("", asks_grad)))


class TokenBatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_running_statistics_that_move_twice_are_told_of() -> None:
    class Normed(UserBlock):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = TokenBatchNorm(DIM)  # type: ignore[assignment]

    dense = UserModel(Normed)
    converted = finest(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error(converted.eval()(X), dense.eval()(X)) < 1e-5
    with pytest.warns(UserWarning, match=r"blocks\.0\.norm1 runs twice in a training step"):
        converted.train()(X)


def by_nonzero(h: Tensor) -> Tensor:
    hot = (h.abs().amax((1, 2)) > 20).nonzero()
    return h * 0.5 if hot.shape[0] else h


def by_count(h: Tensor) -> Tensor:
    return h * 0.5 if h[h > 20].numel() else h


def by_length(h: Tensor) -> Tensor:
    return h * 0.5 if len(h[h > 20]) else h


@pytest.mark.parametrize("change", [by_nonzero, by_count, by_length])
def test_branches_on_data_through_a_size_are_refused(change: Any) -> None:
    assert "a branch or number follows the value of" in refusal(UserModel(with_change("", change)))


def by_tokens(h: Tensor) -> Tensor:
    return h * 0.5 if h.shape[1] > 1000 else h


def by_member(h: Tensor) -> Tensor:
    return h * 0.5 if 1280 in h.shape else h


def by_parity(h: Tensor) -> Tensor:
    return h * 0.5 if h.shape[1] % 2 else h


def by_images(h: Tensor) -> Tensor:
    return h * 0.5 if h.shape[0] > 2 else h


@pytest.mark.parametrize(
    ("change", "x"),
    [
        (by_tokens, images(1, (320, 256))),
        (by_member, images(1, (320, 256))),
        (by_parity, images(2, (72, 72))),
        (by_images, images(3, 64)),
    ],
)
def test_branches_on_sizes_are_asked_at_run_time(change: Any, x: Tensor) -> None:
    dense = UserModel(with_change("", change)).eval()
    try:
        converted = finest(dense)
    except ValueError as refused:
        assert "the batch size" in str(refused)
        return
    assert error(converted(X), dense(X)) < 1e-5
    with pytest.raises(ValueError, match=r"blocks\.0 (decides by the size|got)"):
        converted(x)


def loops_over_images(h: Tensor) -> Tensor:
    return torch.stack([h[i] * 0.5 for i in range(h.shape[0])])


def divides_by_images(h: Tensor) -> Tensor:
    return h / float(h.shape[0])


@pytest.mark.parametrize("change", [loops_over_images, divides_by_images])
def test_numbers_made_of_the_batch_size_are_refused(change: Any) -> None:
    assert "it was traced for 2 images: for" in refusal(UserModel(with_change("", change)))


# -- hooks -----------------------------------------------------------------------------------------


def test_hooks_on_norms_and_fused_projections_and_mlps_fire() -> None:
    model = finest(UserModel().eval())
    seen: list[str] = []
    for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1"):
        model.blocks[0].get_submodule(name).register_forward_hook(  # type: ignore[union-attr]
            lambda _m, _a, _o, name=name: seen.append(name)
        )
    with pytest.warns(UserWarning, match="runs twice in every call") as told:
        assert error(model(X), UserModel().eval()(X)) < 1e-5
    assert sorted(str(w.message).split()[4] for w in told) == [
        "blocks.0.attn.qkv",
        "blocks.0.norm1",
    ]
    assert set(seen) == {"norm1", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1"}


def test_hooks_that_change_values_are_kept() -> None:
    for name in ("norm1", "attn.qkv", "mlp"):
        dense = UserModel().eval()
        converted = finest(dense)
        plain = dense(X)
        for model in (dense, converted):
            model.blocks[0].get_submodule(name).register_forward_hook(  # type: ignore[union-attr]
                lambda _m, _a, o: o * 1.5
            )
        assert error(dense(X), plain) > 1e-4
        assert error(converted(X), dense(X)) < 1e-5


def test_a_hook_that_does_not_run_is_told_of_once() -> None:
    model = finest(UserModel().eval())
    model.blocks[0].attn.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match=r"a hook on blocks\.0\.attn does not run") as told:
        model(X)
        model(X)
    assert len(told) == 1


def test_copies_and_pickles_keep_their_guards() -> None:
    converted = finest(UserModel().eval())
    for made in (copy.deepcopy(converted),):
        assert error(made(X), converted(X)) == 0
        made.blocks[0].attn.scale = 0.3  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=r"attn\.scale was"):
            made(X)
    block = converted.blocks[0]
    assert isinstance(block, DGEBlock) and isinstance(block, UserBlock)
    assert isinstance(block.attn, UserAttention) and type(block.norm1) is UserNorm
