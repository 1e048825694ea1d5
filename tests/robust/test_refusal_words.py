"""What is said of models that stay dense: the case by its name, once per kind, with advice that can
be followed; whose code failed, and in which line."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import dgefx
import dgefx.passes.plan.plan
import dgefx.passes.trace.block_trace
from dgefx.nn.unread import Unread
from dgefx.passes.errors import Refused
from dgefx.passes.plan.compare import require_equal
from dgefx.passes.reasons import ADVICE
from dgefx.reason_lines import reason_lines
from tests.helpers import Attention, TinyViT, error, images, randomise

DIM, SIDE = 16, 8
X = images(2, 4 * SIDE)
OTHER = images(2, 4 * SIDE, seed=1)
SMALL = images(2, 2 * SIDE, seed=2)


def explained(model: nn.Module, inputs: Any = X) -> tuple[dgefx.BlockReport, ...]:
    return dgefx.explain(randomise(model).eval(), 1.0, example_inputs=inputs).blocks


def line_of(text: str) -> int:
    """The first line of this file that holds `text`."""
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


# -- 21 a: an encoder that runs several times ------------------------------------------------------


class Encoder(TinyViT):
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean(1)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](self.embed(x).flatten(2).transpose(1, 2)))


class TwoViews(nn.Module):
    """One encoder for both; method: its name, as many call `encoder.forward_features`."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.encoder, self.method = Encoder(), method

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        run = self.encoder if self.method == "forward" else self.encoder.forward_features
        return run(a) - run(b)


@pytest.mark.parametrize("method", ["forward", "forward_features"])
def test_an_encoder_of_two_views_is_named_and_converts_alone(method: str) -> None:
    model = randomise(TwoViews(method)).eval()
    found = explained(model, (X, OTHER))
    assert [b.name for b in found] == ["encoder.blocks.0.attn", "encoder.blocks.1.attn"]
    for block in found:
        assert block.kind == "several views"
        assert "encoder runs its blocks 2 times per forward, once per view" in block.reason
        assert "model.encoder = dgefx.convert(model.encoder" in block.advice
    with torch.no_grad():
        wanted = model(X, OTHER)
        model.encoder = dgefx.convert(model.encoder, 1.0, example_inputs=X)
        assert [b.status for b in dgefx.report(model.encoder).blocks] == ["converted"] * 2
        assert error(model(X, OTHER), wanted) <= 1e-5


def test_blocks_with_shared_weights_are_told_apart_from_views() -> None:
    class Passes(TinyViT):
        def forward_features(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).transpose(1, 2)
            for _ in range(2):
                for block in self.blocks:
                    x = block(x)
            return x

        def forward(self, x: Tensor) -> Tensor:
            return self.forward_features(x)

    found = explained(Passes())
    assert [b.kind for b in found] == ["shared module"] * 2
    assert found[0].reason == "blocks.0 runs 2 times per forward"


# -- 21 b: a subset of tokens ----------------------------------------------------------------------


class Selecting(TinyViT):
    """Selects tokens in front of its last block."""

    def __init__(self, select: Callable[[Tensor], Tensor]) -> None:
        super().__init__(depth=2)
        self.select = select

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.embed(x).flatten(2).transpose(1, 2))
        return self.blocks[1](self.select(x))


def taken(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def pruned(x: Tensor) -> Tensor:
    return taken(x, x.norm(dim=-1).topk(32, dim=1).indices)


def dropped(x: Tensor) -> Tensor:
    return taken(x, torch.rand(x.shape[:2]).argsort(1)[:, :32])


def masked(x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[:, torch.randperm(x.shape[1])[:32]] = True
    return x[mask].view(len(x), 32, -1)


def shuffled(x: Tensor) -> Tensor:
    return x[:, torch.randperm(x.shape[1])]


SELECTIONS = [
    (pruned, "by the values of its input"),
    (dropped, "at random (patch dropout, masked training)"),
    (masked, "at random"),
    (shuffled, "at random"),
]


@pytest.mark.parametrize(("select", "words"), SELECTIONS)
def test_selected_tokens_are_named_and_blocks_before_them_convert(
    select: Callable[[Tensor], Tensor], words: str
) -> None:
    model = randomise(Selecting(select)).eval()
    first, second = explained(model)
    assert (first.status, second.kind) == ("converted", "selected tokens")
    assert words in second.reason and "patch_drop_rate=0" in second.advice
    converted = dgefx.convert(model, 1.0, example_inputs=X)
    with torch.no_grad():
        torch.manual_seed(5)
        wanted = model(X)
        torch.manual_seed(5)
        assert error(converted(X), wanted) <= 1e-5


def test_masked_training_of_transformers() -> None:
    config = transformers.ViTMAEConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    found = explained(transformers.ViTMAEForPreTraining(config))
    assert [b.kind for b in found] == ["selected tokens"] * 2
    assert found[0].reason.startswith("vit.embeddings selects or shuffles its tokens at random")


def test_patch_dropout_of_timm_converts_and_says_so_in_training() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=1, img_size=32, patch_size=4, patch_drop_rate=0.5
    )
    converted = dgefx.convert(model.train(), 1.0, example_inputs=X)
    assert dgefx.report(converted).blocks[0].status == "converted"
    with pytest.raises(ValueError, match="patch_drop_rate"):
        converted.train()(X)


def test_a_model_that_changes_from_call_to_call_is_said_to() -> None:
    class Drawn(TinyViT):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * random.random()

    with pytest.raises(ValueError, match=r"another output each time.*\(random, numpy\)"):
        dgefx.convert(randomise(Drawn()).eval(), 1.0, example_inputs=X)


# -- 21 c, d, e: other things than one image -------------------------------------------------------


class Joined(TinyViT):
    """A template in front of the image, or another image, or this one at half its size."""

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        x = nn.functional.avg_pool2d(z, 2) if x is None else x
        parts = [self.embed(image).flatten(2).transpose(1, 2) for image in (z, x)]
        return self.blocks[1](self.blocks[0](torch.cat(parts, 1)))


JOINED = [
    ((SMALL, X), "several images", "of 4 x 4 and 8 x 8"),
    ((X, OTHER), "several images", "of 8 x 8 and 8 x 8"),
    ((X,), "several grids", "8 x 8 and 4 x 4"),
]


@pytest.mark.parametrize(("inputs", "kind", "words"), JOINED)
def test_several_images_in_one_sequence(inputs: Any, kind: str, words: str) -> None:
    found = explained(Joined(), inputs)
    assert [(b.kind, words in b.reason) for b in found] == [(kind, True)] * 2


def test_parts_of_one_image_are_not_several() -> None:
    class Halves(TinyViT):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([x[:, :32], x[:, 32:], x.new_zeros(len(x), 1, DIM)], 1)
            return self.blocks[1](self.blocks[0](x))

    assert [b.kind for b in explained(Halves())] == ["token order"] * 2


class Patches(nn.Module):
    """Blocks over whatever its embedding makes of its input."""

    def __init__(self, embed: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.layer = embed, layer
        self.places, self.blocks = nn.Embedding(64, DIM), TinyViT().blocks

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        x = self.embed(self.layer, x)
        x = x if places is None else x + self.places(places)
        return self.blocks[1](self.blocks[0](x))


def tubelets(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.view(2, 3, 2, 2, 4, 4, 4, 4).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return layer(x.reshape(2, 32, -1))


CLIP = torch.randn(2, 3, 4, 16, 16)
SOURCES: list[tuple[Callable[[], nn.Module], Any, str, str]] = [
    (
        lambda: Patches(
            lambda layer, x: layer(x).flatten(2).transpose(1, 2),
            nn.Conv3d(3, DIM, (2, 4, 4), stride=(2, 4, 4)),
        ),
        CLIP,
        "volume or video",
        "an input of shape (2, 3, 4, 16, 16)",
    ),
    (
        lambda: Patches(tubelets, nn.Linear(96, DIM)),
        CLIP,
        "volume or video",
        "an input of shape (2, 3, 4, 16, 16)",
    ),
    (
        lambda: Patches(lambda layer, x: layer(x), nn.Linear(48, DIM)),
        (torch.randn(2, 32, 48), torch.arange(32).repeat(2, 1)),
        "packed patches",
        "patches that the model is given, as (2, 32, 48)",
    ),
    (
        lambda: Patches(lambda layer, x: layer(x), nn.Linear(48, DIM)),
        torch.randn(2, 32, 48),
        "layout unknown",
        "grid not found",
    ),
]


@pytest.mark.parametrize(("make", "inputs", "kind", "words"), SOURCES)
def test_volumes_and_packed_patches(
    make: Callable[[], nn.Module], inputs: Any, kind: str, words: str
) -> None:
    found = explained(make(), inputs)
    assert [(b.kind, words in b.reason) for b in found] == [(kind, True)] * 2
    assert ADVICE[kind] == found[0].advice  # type: ignore[index]


def test_packed_patches_of_transformers() -> None:
    config = transformers.Siglip2VisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        patch_size=4,
        num_patches=64,
    )
    given = {
        "pixel_values": torch.randn(2, 64, 48),
        "pixel_attention_mask": torch.ones(2, 64),
        "spatial_shapes": torch.tensor([[8, 8], [8, 8]]),
    }
    found = explained(transformers.Siglip2VisionModel(config), given)
    assert (found[0].name, found[0].kind) == ("encoder.layers.0", "packed patches")


# -- 21 f: further results that the model does not read --------------------------------------------


def swin(implementation: str, depth: int = 1) -> nn.Module:
    config = transformers.SwinConfig(
        embed_dim=16, depths=[depth], num_heads=[2], window_size=4, image_size=32, patch_size=4
    )
    torch.manual_seed(0)
    made = transformers.SwinForImageClassification._from_config(
        config, attn_implementation=implementation
    )
    return randomise(made).eval()


def test_eager_swin_of_transformers_converts() -> None:
    model = swin("eager")
    eager, fused = (dgefx.convert(m, 0.8, example_inputs=X) for m in (model, swin("sdpa")))
    with torch.no_grad():
        assert error(eager(X).logits, fused(X).logits) <= 1e-5  # coarse levels
        dgefx.set_budget(eager, 1.0)
        assert error(eager(X).logits, model(X).logits) <= 1e-5


def test_eager_swin_stays_dense_where_its_weights_are_read() -> None:
    """transformers returns those of the last block of every stage."""
    inputs = {"pixel_values": X, "output_attentions": True}
    assert [b.kind for b in explained(swin("eager", 2), inputs)] == ["", "further results"]


class Mapped(nn.Module):
    """Returns its attention's map as well, in either order."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(DIM), first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        weights = (y @ y.transpose(1, 2)).softmax(-1)
        updated = x + weights @ y
        return (updated, weights) if self.first else (weights, updated)


class Reader(TinyViT):
    """reads: what it does with the results of its blocks."""

    def __init__(self, first: bool, read: Callable[[tuple[Tensor, ...]], Tensor]) -> None:
        super().__init__()
        self.blocks, self.read = nn.ModuleList([Mapped(first) for _ in range(2)]), read

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = self.read(block(x))
        return x


def test_a_map_that_nobody_reads_is_not_computed_and_says_so() -> None:
    model = randomise(Reader(True, lambda results: results[0])).eval()
    converted = dgefx.convert(model, 1.0, example_inputs=X)
    with torch.no_grad():
        assert error(converted(X), model(X)) <= 1e-5
        tokens = model.embed(X).flatten(2).transpose(1, 2)
        _, weights = converted.blocks[0](tokens)
    assert isinstance(weights, Unread)
    for read in (lambda: weights.mean(), lambda: weights[0], lambda: torch.stack([weights])):
        with pytest.raises((AttributeError, TypeError), match="the model did not read"):
            read()


@pytest.mark.parametrize("first", [True, False])
def test_a_map_that_is_read_or_comes_first_keeps_blocks_dense(first: bool) -> None:
    read = (lambda r: r[0] + r[1].mean()) if first else (lambda r: r[1])
    found = explained(Reader(first, read))
    assert {b.kind for b in found} == {"further results"}


# -- 21 g: one line per kind -----------------------------------------------------------------------


def stubborn(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError("no tensor at all")
    return x


def test_twelve_layers_are_one_line() -> None:
    model = randomise(TinyViT(depth=12, make=lambda _: Checked(stubborn))).eval()
    with pytest.raises(ValueError, match="no attention block could be converted") as caught:
        dgefx.convert(model, 0.5, example_inputs=X)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and lines[1].startswith("  blocks.0 to blocks.11 (12): cannot be traced")
    table = str(dgefx.explain(model, 0.5, example_inputs=X))
    assert table.count("cannot be traced") == 1 and "blocks.0 to blocks.11 (12)" in table


def test_reasons_that_differ_in_numbers_are_one_line() -> None:
    reasons = [(f"a.{i}", f"a.{i} changes its shape to (2, {i})") for i in range(3)]
    assert reason_lines([*reasons, ("", "else")]) == [
        "a.0 to a.2 (3): a.0 changes its shape to (2, 0); the others alike",
        "(root): else",
    ]


# -- 21 h: what differs, and by how much -----------------------------------------------------------


def test_a_difference_is_never_nothing() -> None:
    stream, wanted = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    near = wanted.clone()
    near[0, 0, 0] += 0.01
    cases = {
        "shape (4, 3), the dense block's of (2, 4, 3)": wanted[0],  # no difference if broadcast
        "yields NaN or infinity": wanted / 0,
        "differs from the dense block by 1.0e-02, where rounding is at most 4.9e-05": near,
    }
    for words, found in cases.items():
        with pytest.raises(Refused, match=re.escape(words)) as caught:
            require_equal(found, wanted, stream, "the finest granularity")
        assert "0.0e+00" not in str(caught.value)


# -- 22: whose code fails --------------------------------------------------------------------------


class Checked(Attention):
    """Looks at what it is given first."""

    def __init__(self, check: Callable[[Tensor], Tensor]) -> None:
        super().__init__(DIM, 2)
        self.check = check

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.check(x))


def mismatched(x: Tensor) -> Tensor:
    return x if type(x) is Tensor else x @ torch.zeros(3, 3)  # a torch call fails


def numbered(x: Tensor) -> Tensor:
    return x * float(x.mean())  # a number of the data


@pytest.mark.parametrize(
    ("check", "words", "source"),
    [
        (stubborn, "TypeError: no tensor at all", 'raise TypeError("no tensor at all")'),
        (mismatched, "failed while tracing", "return x if type(x) is Tensor else x @"),
        (numbered, "a branch or number follows", "return x * float(x.mean())"),
    ],
)
def test_a_block_that_cannot_be_traced_names_its_line(
    check: Callable[[Tensor], Tensor], words: str, source: str
) -> None:
    (found,) = explained(TinyViT(depth=1, make=lambda _: Checked(check)))
    assert found.kind == "not traceable" and words in found.reason
    assert f"{__file__}:{line_of(source)}: {source}" in found.reason


class Bounded(Attention):
    """A table that is long enough for the tokens of the example alone."""

    def __init__(self) -> None:
        super().__init__(DIM, 2)
        self.register_buffer("table", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.table[x.abs().amax().long()]


def test_code_that_fails_on_random_tokens_names_its_line() -> None:
    model = TinyViT(depth=1, make=lambda _: Bounded())
    model.blocks[0].norm1 = nn.Identity()
    (found,) = explained(model, X * 1e-3)
    source = "return super().forward(x) * self.table[x.abs().amax().long()]"
    assert found.kind == "own code fails" and "IndexError" in found.reason
    assert f"{__file__}:{line_of(source)}: {source}" in found.reason


@pytest.mark.parametrize(
    "place", ["dgefx.passes.plan.plan.description", "dgefx.passes.trace.block_trace._drop_unread"]
)
def test_a_bug_of_this_library_is_raised_as_one(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomise(TinyViT(depth=1)).eval()
    monkeypatch.setattr(place, None)
    for call in (dgefx.convert, dgefx.explain):
        with pytest.raises(RuntimeError, match="internal error of dgefx") as caught:
            call(model, 1.0, example_inputs=X)
        assert isinstance(caught.value.__cause__, TypeError)
        for words in ("block blocks.0", "Please report it", "name != 'blocks.0' leaves"):
            assert words in str(caught.value)
