"""Blocks that differ in nothing that the example call reads: in a branch that larger images, a mask
or a flag take. What holds for one of them is not taken to hold for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgefx
from tests.helpers import Attention, error, images

DIM = 16
#: what a block does, and with what
Change = Callable[["Block", Tensor, Any], Tensor]


class MaskedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """`attn_mask` and `flag` are what the model is given; `k` differs between blocks."""

    def __init__(self, k: Any, mask_scale: float = 1.0) -> None:
        super().__init__()
        self.k, self.mask_scale = k, mask_scale
        self.norm1, self.attn = nn.LayerNorm(DIM), MaskedAttention()
        self.norm2, self.fc1 = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM)
        self.fc2 = nn.Linear(2 * DIM, DIM)

    def change(self, x: Tensor, given: Any) -> Tensor:
        return x

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, flag: bool | None = None) -> Any:
        if attn_mask is not None and self.mask_scale != 1.0 and x.shape[1] > 100:
            attn_mask = attn_mask * self.mask_scale
        x = x + self.attn(self.norm1(x), attn_mask)
        update = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + self.change(update, flag if attn_mask is None else attn_mask)


class Model(nn.Module):
    """64 tokens of images of 32 px."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, DIM, 4, 4), nn.Linear(DIM, 5)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, attn_mask: Any = None, flag: Any = None) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, attn_mask, flag)
        return self.head(x.mean(1))


def with_change(change: Change, values: tuple[Any, ...]) -> Model:
    kind = type("Changed", (Block,), {"change": lambda s, x, given: change(s, x, given)})
    torch.manual_seed(0)
    return Model([kind(value) for value in values]).eval()


def assert_never_wrong(model: nn.Module, least: int = 1, **given: Any) -> None:
    """At every size and in both modes a converted model is right, or says that it is not.

    Args:
        least: how many of the calls it answers.
    """
    converted, answered = dgefx.convert(model, 1.0, example_inputs=images(2, 32)), 0
    for training in (False, True):
        model.train(training), converted.train(training)
        for side in (32, 16, 64):
            tokens = (side // 4) ** 2
            call = {name: value(tokens) for name, value in given.items()}
            x = images(2, side)
            try:
                found = converted(x, **call)
            except ValueError:
                continue
            answered += 1
            assert error(found, model(x, **call)) < 1e-4, (training, side)
    assert answered >= least


def is_large(x: Tensor) -> bool:
    return x.shape[1] > 100


def scaled_if_large(block: Block, x: Tensor, given: Any) -> Tensor:
    return x * block.k if is_large(x) else x


def called_if_large(block: Block, x: Tensor, given: Any) -> Tensor:
    return block.k(x) if is_large(x) else x


def of_object_if_large(block: Block, x: Tensor, given: Any) -> Tensor:
    return x * block.k.value if is_large(x) else x


def by_flag(block: Block, x: Tensor, given: Any) -> Tensor:
    return x * 2 if given is False and block.k else x


def by_flag_in_training(block: Block, x: Tensor, given: Any) -> Tensor:
    return x * 2 if given is False and block.k and block.training else x


def by_size_in_training(block: Block, x: Tensor, given: Any) -> Tensor:
    return x * 2 if block.training and x.shape[1] > 32 else x


def by_type_in_training(block: Block, x: Tensor, given: Any) -> Tensor:
    floats = given is not None and given.dtype != torch.bool
    return x * 2 if floats and block.training else x


def below_a_limit(block: Block, x: Tensor, given: Any) -> Tensor:
    assert x.shape[1] <= 4096
    return x


def by_mask(block: Block, x: Tensor, given: Any) -> Tensor:
    return x if given is None or not block.k else x * 2


class Hiding:
    """Copies share it, and its pickle does not say what it holds."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (scaled_if_large, (1.5, 3.0)),
        (called_if_large, (nn.Identity(), nn.Linear(DIM, DIM))),
        (of_object_if_large, (Hiding(1.0), Hiding(2.0))),
    ],
)
def test_what_larger_images_read(change: Change, values: tuple[Any, Any]) -> None:
    for pair in (values, values[::-1]):
        assert_never_wrong(with_change(change, pair), least=2)


@pytest.mark.parametrize("change", [by_flag, by_flag_in_training])
@pytest.mark.parametrize("flag", [None, False])
def test_what_a_flag_reads(change: Change, flag: bool | None) -> None:
    least = 6 if flag is None else 0
    assert_never_wrong(with_change(change, (False, True)), least, flag=lambda _: flag)


def random_mask(tokens: int) -> Tensor:
    return torch.randn(2, 1, tokens, tokens, generator=torch.Generator().manual_seed(0))


def test_what_a_mask_reads() -> None:
    for values in ((False, True), (True, False)):
        assert_never_wrong(with_change(by_mask, values), 2, attn_mask=random_mask)


def test_what_training_asks_of_the_size() -> None:
    assert_never_wrong(with_change(by_size_in_training, (0, 0)), 4)


def test_what_a_mask_of_numbers_does_in_training() -> None:
    assert_never_wrong(with_change(by_type_in_training, (0, 0)), 0, attn_mask=random_mask)


def test_a_mask_beside_a_question_about_the_size() -> None:
    assert_never_wrong(with_change(below_a_limit, (0, 0)), 6, attn_mask=random_mask)


def test_numbers_of_images_in_training() -> None:
    def by_images(block: Block, x: Tensor, given: Any) -> Tensor:
        return x * float(x.shape[0]) if block.training else x

    blocks = dgefx.explain(with_change(by_images, (0, 0)), example_inputs=images(2, 32)).blocks
    assert all("it was traced for 2 images: for 1" in block.reason for block in blocks)


def test_what_a_mask_asks_of_the_size() -> None:
    torch.manual_seed(0)
    model = Model([Block(0, mask_scale=2.0), Block(0, mask_scale=2.0)]).eval()
    assert_never_wrong(model, least=0, attn_mask=random_mask)  # refuses them all
    assert_never_wrong(model, least=6)


def test_hooks_that_act_on_larger_images() -> None:
    def hook(scale: float) -> Callable[..., Tensor]:
        return lambda _m, _a, found: found * scale if is_large(found) else found

    torch.manual_seed(0)
    model = Model([Block(0), Block(0)]).eval()
    for scale, block in zip((1.0, 2.0), model.blocks, strict=True):
        block.attn.register_forward_hook(hook(scale))
    assert_never_wrong(model, least=2)


class WindowBlock(nn.Module):
    """As in Swin, a stage that is one window is not shifted."""

    side = 8

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.norm1, self.attn = nn.LayerNorm(DIM), Attention(DIM, 2)
        self.norm2, self.fc1 = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM)
        self.fc2 = nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, height, width, c = x.shape
        side, y = self.side, self.norm1(x)
        shifts = min(height, width) > side and self.shift > 0
        if shifts:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = y.view(b, height // side, side, width // side, side, c).transpose(2, 3)
        y = self.attn(y.reshape(-1, side * side, c))
        y = y.view(b, height // side, width // side, side, side, c).transpose(2, 3)
        y = y.reshape(b, height, width, c)
        if shifts:
            y = y.roll((self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class WindowModel(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("shifts", [(0, 4), (4, 0)])
def test_a_shift_that_one_window_does_not_read(shifts: tuple[int, int]) -> None:
    model = WindowModel([WindowBlock(shift) for shift in shifts]).eval()
    converted = dgefx.convert(model, 1.0, example_inputs=images(2, 32))
    assert error(converted(images(3, 32)), model(images(3, 32))) < 1e-5
    try:
        found = converted(images(2, 64))
    except ValueError:
        return
    assert error(found, model(images(2, 64))) < 1e-4


class CountedBlock(Block):
    """Is told how many images there are."""

    def forward(self, x: Tensor, count: Any, *_others: Any) -> Tensor:
        return super().forward(x.reshape(count, -1, DIM))


class CountingModel(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, x.shape[0])
        return self.head(x.mean(1))


def test_a_number_of_images_that_a_block_is_given() -> None:
    torch.manual_seed(0)
    model = CountingModel([CountedBlock(0), CountedBlock(0)]).eval()
    converted = dgefx.convert(model, 1.0, example_inputs=images(2, 32))
    for count in (1, 2, 3, 5):
        assert error(converted(images(count, 32)), model(images(count, 32))) < 1e-5


def test_a_block_that_cannot_be_trained_stays_dense() -> None:
    class Frozen(Block):
        def train(self, mode: bool = True) -> Self:
            if mode:
                raise RuntimeError("frozen for good")
            return super().train(mode)

    model = Model([Frozen(0), Block(0)]).eval()
    first, second = dgefx.explain(model, example_inputs=images(2, 32)).blocks
    assert first.status != "converted" and "frozen for good" in first.reason
    assert second.status == "converted"
