"""Which attentions convert, which module owns them, and what is said of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgefx.passes.capture import capture
from dgefx.passes.diagnosis.refusals import refusal_reasons
from dgefx.passes.layout import Layout
from dgefx.passes.locate.sites import Site, locate
from tests.helpers import Attention, images

DIM = 16


class Model(nn.Module):
    """Patch embedding of 8 x 8 tokens as (B, N, C), one block, mean."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 4, stride=4)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.embed(x).flatten(2).transpose(1, 2)).mean(1)


class Parts(nn.Module):
    """What the blocks below are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(DIM, 2)
        self.norm, self.last = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.linear, self.narrow = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM // 2)
        self.conv = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)
        self.scale = nn.Parameter(torch.ones(DIM))
        self.query = nn.Parameter(torch.randn(1, 64, DIM))

    def convolved(self, x: Tensor) -> Tensor:
        plane = x.transpose(1, 2).view(-1, DIM, 8, 8)
        return self.conv(plane).flatten(2).transpose(1, 2)


class Scaled(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale.view(1, 1, -1) + self.attn(self.norm(x))
        return self.scale * x + self.linear(self.last(x))


class Inner(Parts):
    """The attention adds to a value that the block makes first."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.convolved(x)
        x = x + self.attn(self.norm(x))
        return x + self.linear(x)


class PostNorm(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attn(x))
        return self.last(x + self.linear(x))


class ConvolvedSum(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.convolved(x + self.attn(self.norm(x)))
        return x + self.linear(x)


class Windowed(Parts):
    """padding: to windows that do not fit. merged: windows and images in one axis, heads too."""

    def __init__(self, side: int = 4, merged: bool = False, rotated: bool = False) -> None:
        super().__init__()
        self.side, self.merged, self.rotated = side, merged, rotated

    def forward(self, x: Tensor) -> Tensor:
        side, far = self.side, -8 % self.side
        count = (8 + far) // side
        y = F.pad(self.norm(x).view(-1, 8, 8, DIM), (0, 0, 0, far, 0, far))
        y = y.view(-1, count, side, count, side, DIM).transpose(2, 3)
        y = y.reshape(-1, count * count, side * side, DIM)
        if self.rotated:  # not data movement, and nothing known
            y = torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)))).flatten(-2)
        y = y.unflatten(-1, (2, -1)).transpose(2, 3)
        if self.merged:
            y = y.flatten(0, 1)
        y = F.scaled_dot_product_attention(y, y, y).transpose(-3, -2).flatten(-2)
        y = y.reshape(-1, count, count, side, side, DIM).transpose(2, 3)
        y = y.reshape(-1, count * side, count * side, DIM)[:, :8, :8].reshape(-1, 64, DIM)
        return x + self.linear(y)


@dataclass
class Found:
    """A located block, with its layout and stream, or why there is none."""

    name: str
    layout: Layout | None
    shape: tuple[int, ...]
    reason: str | None
    kind: str | None


def found_in(model: nn.Module, side: int) -> list[Found]:
    located = locate(capture(model.eval(), (images(2, side),), {}))
    reasons = refusal_reasons(located)
    found = []
    for block in located.blocks:
        if isinstance(block, Site):
            shape = block.stream.meta["shape"]
            found.append(Found(block.name, block.layout, shape, None, None))
        else:
            why = reasons[block]
            found.append(Found(block.name, None, (), why.text, why.kind))
    return found


def sites(block: nn.Module) -> list[Found]:
    torch.manual_seed(0)
    return found_in(Model(block), 32)


@pytest.mark.parametrize(
    "block",
    [
        Scaled(),
        Inner(),
        PostNorm(),
        ConvolvedSum(),
        Windowed(),
        Windowed(3),
        Windowed(merged=True),
        Windowed(rotated=True),
        Windowed(3, rotated=True),
        Windowed(3, merged=True, rotated=True),
    ],
    ids=lambda b: type(b).__name__,
)
def test_the_block_owns_its_attention(block: nn.Module) -> None:
    (site,) = sites(block)
    assert (site.name, site.reason) == ("block", None)
    assert site.layout is not None and site.layout.grid == (8, 8)
    assert site.shape == (2, 64, DIM)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


def test_the_innermost_module_owns_it() -> None:
    (site,) = sites(Wrapped(Inner()))
    assert (site.name, site.reason) == ("block.inner", None)


class Foreign(Parts):
    """Learned queries on the stream's path."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.query.expand(x.shape[0], -1, -1)
        return x + F.scaled_dot_product_attention(q, self.norm(x), x)


class Projected(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.attn(self.norm(x))


class Pooled(Parts):
    """A quarter of the queries, brought back to the stream's size."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q = F.avg_pool2d(y.transpose(1, 2).view(-1, DIM, 8, 8), 2).flatten(2).transpose(1, 2)
        return x + F.scaled_dot_product_attention(q, y, y).repeat(1, 4, 1)


class Channels(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).transpose(1, 2)
        scores = (y @ y.transpose(-2, -1)).softmax(-1)
        return x + (scores @ y).transpose(1, 2)


class ClassBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, DIM))
        self.inner = ClassAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))


class ClassAttention(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q = F.scaled_dot_product_attention(y[:, :1], y, y)
        return x + torch.cat([q, y[:, 1:]], 1)


class Cut(Parts):
    """The block hands out half of the channels, twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(x + self.attn(self.norm(x))).repeat(1, 1, 2)


class Head(Parts):
    def forward(self, x: Tensor) -> Tensor:
        q = self.query[:, :1].expand(x.shape[0], -1, -1)
        return F.scaled_dot_product_attention(q, self.norm(x), x)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Foreign(), "queries do not come from the stream that its output is added to"),
        (Projected(), "shortcut around it is pooled or projected"),
        (Pooled(), "16 queries against 64 tokens"),
        (Channels(), "channel attention"),
        (ClassBlock(), "prefix tokens alone: class attention"),
        (Head(), "no residual add around it"),
    ],
    ids=lambda b: type(b).__name__ if isinstance(b, nn.Module) else "",
)
def test_refused_with_its_reason(block: nn.Module, reason: str) -> None:
    (site,) = sites(block)
    assert site.reason is not None and reason in site.reason


class DecoderLayer(Parts):
    """Queries ask themselves, then the image."""

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        q = q + self.attn(self.norm(q))
        return q + F.scaled_dot_product_attention(self.linear(self.last(q)), x, x)


class Decoder(nn.Module):
    """Encoder, two layers of a decoder of learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Scaled()
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(2))
        self.query = nn.Parameter(torch.randn(1, 10, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        q = self.query.expand(x.shape[0], -1, -1)
        for layer in self.layers:
            q = layer(q, x)
        return q


def test_every_layer_of_a_decoder_has_learned_queries() -> None:
    encoder, *decoder = sites(Decoder())
    assert encoder.reason is None
    assert [site.kind for site in decoder] == 2 * [
        "pooling head or learned queries",
        "cross attention",
    ]
    assert all("starts with learned queries" in str(site.reason) for site in decoder[::2])


def timm_sites(name: str, side: int, **options: Any) -> list[Found]:
    torch.manual_seed(0)
    return found_in(timm.create_model(name, **options), side)


def test_davit() -> None:
    """Blocks begin with a convolution that is added to the stream."""
    found = timm_sites(
        "davit_tiny", 224, embed_dims=(8, 16, 32, 64), num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 1)
    )
    for stage in range(4):
        spatial, channel = found[2 * stage : 2 * stage + 2]
        assert (spatial.name, spatial.reason) == (f"stages.{stage}.blocks.0.0", None)
        assert channel.reason is not None and "channel attention" in channel.reason
        grid = (56 >> stage, 56 >> stage)
        assert spatial.layout is not None and (spatial.layout.order, spatial.layout.grid) == (
            "BCHW",
            grid,
        )


def test_gcvit_asks_with_global_queries() -> None:
    found = timm_sites("gcvit_xxtiny", 224)
    for local, of_image in zip(found[::2], found[1::2], strict=True):
        assert local.reason is None
        assert of_image.reason is not None
        assert "queries do not come from the stream" in of_image.reason


def test_coatnet_pools_its_first_shortcut() -> None:
    found = timm_sites("coatnet_0_rw_224", 224, depths=(1, 1, 2, 2))
    for first, second in (found[:2], found[2:]):
        assert first.reason is not None and "shortcut around it is pooled" in first.reason
        assert second.reason is None


def test_levit_makes_its_grid_smaller_by_attention() -> None:
    found = timm_sites("levit_128s", 224)
    smaller = {site.name: site.reason for site in found if site.reason is not None}
    assert set(smaller) == {f"stages.{i}.downsample.attn_downsample" for i in (1, 2)}
    assert "49 queries against 196 tokens and no residual add" in str(smaller[min(smaller)])


def test_caformer_scales_its_residuals() -> None:
    found = timm_sites("caformer_s18", 224)
    assert [s.reason for s in found] == [None] * 12
    names = [f"stages.{i}.blocks.{j}" for i, depth in ((2, 9), (3, 3)) for j in range(depth)]
    assert [s.name for s in found] == names


def test_an_attention_without_a_block_converts_as_an_update() -> None:
    (site,) = sites(Cut())
    assert site.reason is None and site.name == "block.attn"
    assert site.layout is not None and site.layout.update


def test_xcit_is_channel_and_class_attention() -> None:
    found = timm_sites("xcit_nano_12_p16_224", 224, depth=2)
    assert all("channel attention" in str(s.reason) for s in found[:2])
    assert all("class attention" in str(s.reason) for s in found[2:])
