"""Blocks that are more than attention, then an MLP: several attentions, main path operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgefx
from tests.helpers import Attention, error, images, macs, randomise, slow


class Model(nn.Module):
    """Patch embedding, one or two blocks on (B, N, C), a head on the mean."""

    def __init__(self, make: Callable[[], nn.Module], depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.Sequential(*(make() for _ in range(depth)))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x).flatten(2).transpose(1, 2))
        return self.head(x.mean(1))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def sibling_mlp() -> nn.Module:
    attention = nn.Sequential(nn.LayerNorm(16), Attention(16, 2))
    return nn.Sequential(Residual(attention), Residual(mlp()))


class Layers(nn.Module):
    """Attention and MLP in turn, the residual adds in the loop: one block with several cores."""

    def __init__(self) -> None:
        super().__init__()
        pairs = [(nn.Sequential(nn.LayerNorm(16), Attention(16, 2)), mlp()) for _ in range(2)]
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for attend, forward in self.layers:
            x = attend(x) + x
            x = forward(x) + x
        return x


class Parallel(nn.Module):
    """Attention and MLP on the same norm, one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(16), Attention(16, 2), mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attn(y) + self.mlp(y)


class TwoAtOnce(nn.Module):
    """Two attentions that read the same stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two, self.mlp = (
            nn.LayerNorm(16),
            Attention(16, 2),
            Attention(16, 4),
            mlp(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.one(y) + self.two(y)
        return x + self.mlp(x)


class Scaled(nn.Module):
    """Shortcuts with a learned scale per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(16), Attention(16, 2), mlp()
        self.first, self.second = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first * x + self.attn(self.norm(x))
        return self.second * x + self.mlp(x)


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(16), nn.LayerNorm(16), Attention(16, 2)
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class ConvolutionBetween(nn.Module):
    """A depthwise convolution on the main path itself, between attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(16), Attention(16, 2), mlp()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        side = int(x.shape[1] ** 0.5)
        x = self.conv(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        return x + self.mlp(x)


MAKERS = {
    "sibling": sibling_mlp,
    "layers": Layers,
    "parallel": Parallel,
    "two": TwoAtOnce,
    "scaled": Scaled,
    "postnorm": PostNorm,
    "convolution": ConvolutionBetween,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_exact_and_cheaper(kind: str) -> None:
    dense = randomise(Model(MAKERS[kind])).eval()
    x = images(2, 32, seed=1)
    model = dgefx.convert(dense, 1.0, example_inputs=x)
    report = dgefx.report(model)
    assert [(b.name, b.status) for b in report.blocks] == [
        ("blocks.0", "converted"),
        ("blocks.1", "converted"),
    ]
    with torch.no_grad():
        assert error(model(x), dense(x)) <= 1e-5
    for layer, other in zip(model.blocks, dense.blocks, strict=True):
        stream = torch.randn(3, 64, 16)
        with torch.no_grad():
            found, wanted = layer(stream) - stream, other(stream) - stream
        assert error(found, wanted) <= 1e-5
    cheap = dgefx.convert(dense, 0.6, example_inputs=x)
    assert 0.55 <= macs(cheap, x) / macs(dense, x) <= 0.6


@pytest.mark.parametrize("kind", MAKERS)
def test_mixed_granularities_on_patch_constant_input(kind: str) -> None:
    """Convolutions see the borders of patches, all else is exact at any routing."""
    dense = randomise(Model(MAKERS[kind], depth=1)).eval()
    model = dgefx.convert(dense, 1.0, example_inputs=images(2, 32))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 2, 2, 16, generator=generator)
    stream = values.repeat_interleave(4, 1).repeat_interleave(4, 2).flatten(1, 2)
    levels = torch.tensor([[0, 0, 2, 2] * 2 + [1] * 8, [2] * 16])
    levels = levels.view(2, 4, 4)
    router = model.blocks[0].dge_router
    router.register_forward_hook(
        lambda module, inputs, _o: module.routing_for(inputs[0], levels.flatten(1), inputs[1])
    )
    if kind == "convolution":
        weight = torch.zeros_like(dense.blocks[0].conv.weight)
        weight[:, :, 1, 1] = dense.blocks[0].conv.weight.detach()[:, :, 1, 1]
        for owner in (dense, model):
            owner.blocks[0].conv.weight.data.copy_(weight)
    with torch.no_grad():
        found, wanted = model.blocks[0](stream), dense.blocks[0](stream)
    assert error(found - stream, wanted - stream) <= 1e-5


def test_main_path_operations_see_every_token() -> None:
    """At the coarsest level, by hand: the norm on the main path acts on tokens, not on queries."""
    dense = randomise(Model(PostNorm, depth=1)).eval()
    model = dgefx.convert(dense, 1.0, example_inputs=images(2, 32))
    router = model.blocks[0].dge_router
    router.register_forward_hook(
        lambda module, inputs, _o: module.routing_for(inputs[0], torch.full((2, 16), 2), inputs[1])
    )
    block = dense.blocks[0]
    x = torch.randn(2, 64, 16)

    def pooled(t: Tensor) -> Tensor:
        grid = t.transpose(1, 2).unflatten(2, (8, 8))
        return F.avg_pool2d(grid, 4).flatten(2).transpose(1, 2)

    def spread(t: Tensor) -> Tensor:
        grid = t.transpose(1, 2).unflatten(2, (2, 2))
        return F.interpolate(grid, scale_factor=4).flatten(2).transpose(1, 2)

    with torch.no_grad():
        q = pooled(x)
        attn = block.attn
        wq, wk, wv = attn.qkv.weight.chunk(3)
        bq, bk, bv = attn.qkv.bias.chunk(3)

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (2, 8)).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            heads(q @ wq.t() + bq), heads(x @ wk.t() + bk), heads(x @ wv.t() + bv)
        )
        middle = block.norm1(x + spread(attn.proj(y.transpose(1, 2).flatten(2))))
        q = pooled(middle)
        wanted = block.norm2(middle + spread(block.mlp(q)))
        found = model.blocks[0](x)
    assert error(found, wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["layers", "convolution", slow("postnorm")])
def test_gradients(kind: str) -> None:
    dense = randomise(Model(MAKERS[kind], depth=1))
    x = images(2, 32)
    model = dgefx.convert(dense, 1.0, example_inputs=x)
    dense(x).square().mean().backward()
    model(x).square().mean().backward()
    wanted = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, wanted[name].grad) <= 1e-4, name
    with torch.no_grad():
        compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")
        assert error(compiled(x), model(x)) <= 1e-5


def test_calibration_of_blocks_with_main_path_operations() -> None:
    dense = randomise(Model(ConvolutionBetween)).eval()
    model = dgefx.convert(dense, 0.6, example_inputs=images(2, 32))
    dgefx.calibrate(model, [images(8, 32)], refine_passes=1)
    x = images(2, 32, seed=7)
    with torch.no_grad():
        assert bool(model(x).isfinite().all())
    assert 0.55 <= dgefx.report(model).ratio <= 0.6


@pytest.mark.parametrize("kind", ["postnorm", "layers"])
def test_corrections_are_counted_and_applied_once(kind: str) -> None:
    dense = randomise(Model(MAKERS[kind])).eval()
    model = dgefx.convert(dense, 0.75, example_inputs=images(2, 32))
    dgefx.calibrate(model, [images(8, 32)], refine_passes=1)
    x = images(2, 32, seed=7)
    assert abs(macs(model, x) / macs(dense, x) - dgefx.report(model).ratio) <= 0.002
    assert model.blocks[0].code.count("corrected(") == 1


@pytest.mark.slow
def test_unfused_attention_compiles() -> None:
    """Inductor replaces matmul-softmax-matmul; keys that come transposed confuse it."""

    class Manual(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            weights = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
            return self.proj((weights @ v).transpose(1, 2).flatten(2))

    torch._dynamo.reset()

    def make() -> nn.Module:
        return Residual(nn.Sequential(nn.LayerNorm(16), Manual(16, 2)))

    dense = randomise(Model(make, depth=1)).eval()
    model = dgefx.convert(dense, 0.8, example_inputs=images(2, 32))
    x = images(2, 32, seed=1)
    with torch.no_grad():
        assert error(torch.compile(model, fullgraph=True)(x), model(x)) <= 1e-5


def test_outer_block_is_reported() -> None:
    """A module around a block that has an attention of its own stays as it is."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm, self.attn = Parallel(), nn.LayerNorm(16), Attention(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return x + self.attn(self.norm(x))

    dense = randomise(Model(Outer, depth=1)).eval()
    model = dgefx.convert(dense, 1.0, example_inputs=images(2, 32))
    status = {b.name: b for b in dgefx.report(model).blocks}
    assert status["blocks.0.inner"].status == "converted"
    assert "also holds the block blocks.0.inner" in status["blocks.0"].reason
