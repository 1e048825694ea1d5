"""Streams that hold their tokens in another order than the grid's raster, against the dense model
and, at mixed granularities, against a block written by hand in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import dgefx
from dgefx import DGEConfig
from dgefx.passes.capture import capture
from dgefx.passes.layout import Layout
from dgefx.passes.locate.grid import GridFinder
from dgefx.passes.locate.refusal import Cause
from dgefx.passes.plan.verify import patch_constant_stream
from tests.fuzz.reference import pooling, random_cells
from tests.helpers import error, images, randomise

GRID, WINDOW, DIM = (8, 12), (4, 4), 16
SLOTS = WINDOW[0] * WINDOW[1]
AXES = {"BNC": (0, 1, 2), "NBC": (1, 0, 2), "BCN": (0, 2, 1)}


class Mixer(nn.Module):
    """Pre-norm block on tokens in any order, with a position bias.

    Args:
        windows: that tokens are in, 0 for none. fast: whether they are the fast axis.
        core: "sdpa" or "manual". masked: whether every window has a mask of its own.
        mixes: a convolution over the tokens, in the stream's order, in the MLP.
    """

    def __init__(
        self,
        tokens: int,
        order: str = "BNC",
        windows: int = 0,
        fast: bool = True,
        core: str = "sdpa",
        masked: bool = False,
        mixes: bool = False,
    ) -> None:
        super().__init__()
        self.order, self.windows, self.fast, self.core = order, windows, fast, core
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        count = tokens // max(windows, 1)
        lead = (windows,) if masked else (1,) if windows else ()
        self.bias = nn.Parameter(2 * torch.randn(2, *lead, count, count))
        self.conv = nn.Conv1d(2 * DIM, 2 * DIM, 3, padding=1) if mixes else None

    def attend(self, y: Tensor) -> Tensor:
        b, n, c = y.shape
        if not self.windows:
            qkv = self.qkv(y).reshape(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4)
        elif self.fast:
            qkv = self.qkv(y).reshape(b, -1, self.windows, 3, 2, c // 2).permute(3, 0, 4, 2, 1, 5)
        else:
            qkv = self.qkv(y).reshape(b, self.windows, -1, 3, 2, c // 2).permute(3, 0, 4, 1, 2, 5)
        q, k, v = qkv.unbind(0)
        if self.core == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            y = (scores + self.bias).softmax(-1) @ v
        if not self.windows:
            y = y.transpose(1, 2)
        else:
            y = y.transpose(1, 3) if self.fast else y.permute(0, 2, 3, 1, 4)
        return self.proj(y.reshape(b, n, c))

    def mlp(self, y: Tensor) -> Tensor:
        y = self.fc1(y)
        if self.conv is not None:
            y = self.conv(y.transpose(1, 2)).transpose(1, 2)
        return self.fc2(F.gelu(y))

    def forward(self, x: Tensor) -> Tensor:
        axes = AXES[self.order]
        if self.order == "BNC":
            x = x + self.attend(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = x + self.attend(self.norm1(x.permute(axes))).permute(axes)
        return x + self.mlp(self.norm2(x.permute(axes))).permute(axes)


def windows_of(grid: tuple[int, int]) -> Tensor:
    """(windows, slots) raster numbers of the tokens of every window, row by row."""
    tokens = torch.arange(grid[0] * grid[1]).view(
        grid[0] // WINDOW[0], WINDOW[0], grid[1] // WINDOW[1], WINDOW[1]
    )
    return tokens.transpose(1, 2).reshape(-1, SLOTS)


def order_of(kind: str, seed: int = 0) -> Tensor:
    """Raster numbers in the order of the stream: anything, or window by window with windows and
    slots in any order, windows on the slow or the fast axis."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "any":
        return torch.randperm(GRID[0] * GRID[1], generator=generator)
    table = windows_of(GRID)
    table = table[torch.randperm(table.shape[0], generator=generator)]
    table = table[:, torch.randperm(SLOTS, generator=generator)]
    return (table.T if kind == "fast" else table).flatten()


class Permuted(nn.Module):
    """Patch embedding, a fixed permutation of the tokens, prefix tokens, blocks, mean head."""

    def __init__(
        self, places: Tensor, *blocks: nn.Module, prefix: int = 0, order: str = "BNC"
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 4, stride=4)
        self.register_buffer("places", places)
        self.prefix = nn.Parameter(torch.randn(1, prefix, DIM)) if prefix else None
        self.blocks, self.order = nn.ModuleList(blocks), order
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)[:, self.places]
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)
        x = x.permute(AXES[self.order])
        for block in self.blocks:
            x = block(x)
        return self.head(x.permute(AXES[self.order]).mean(1))


TOKENS = GRID[0] * GRID[1]
PHOTO = (4 * GRID[0], 4 * GRID[1])
#: order of the stream, its axes, prefix tokens, settings of the block
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "global": ("any", "BNC", 0, {}),
    "global, written out": ("any", "BNC", 0, {"core": "manual"}),
    "prefix": ("any", "BNC", 3, {}),
    "prefix, written out, NBC": ("any", "NBC", 2, {"core": "manual"}),
    "BCN": ("any", "BCN", 0, {}),
    "windows on the fast axis": ("fast", "BNC", 0, {"windows": 6}),
    "the same, written out": ("fast", "BNC", 0, {"windows": 6, "core": "manual"}),
    "windows on the slow axis": ("slow", "BNC", 0, {"windows": 6, "fast": False}),
}


def made(name: str, depth: int = 2, **more: Any) -> Permuted:
    torch.manual_seed(0)
    kind, order, prefix, settings = CASES[name]
    blocks = [Mixer(TOKENS + prefix, order, **settings, **more) for _ in range(depth)]
    model = Permuted(order_of(kind), *blocks, prefix=prefix, order=order)
    return randomise(model).eval()  # type: ignore[return-value]


def blocks_of(model: nn.Module) -> list[dgefx.nn.DGEBlock]:
    return [m for m in model.modules() if isinstance(m, dgefx.nn.DGEBlock)]


def exact(dense: nn.Module, x: Tensor, count: int, config: DGEConfig | None = None) -> nn.Module:
    converted = dgefx.convert(dense, 1.0, example_inputs=x, config=config)
    assert len(blocks_of(converted)) == count, str(dgefx.report(converted))
    with torch.no_grad():
        for images_ in (x, x.flip(2)[:1]):
            assert error(converted(images_), dense(images_)) <= 1e-5
    return converted


@pytest.mark.parametrize("budget", ["per_image", "average"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_model_at_the_finest_level(name: str, budget: Any) -> None:
    if budget == "average" and CASES[name][3] == {"core": "manual"}:
        pytest.skip("packed queries need fused attention")
    exact(made(name), images(2, PHOTO), 2, DGEConfig(budget=budget))


def bias_in_raster(model: Permuted, block: Mixer, prefix: int) -> Tensor:
    """(heads, tokens, tokens) of the whole image in raster order; tokens of other windows are out
    of reach."""
    places = model.places
    assert isinstance(places, Tensor)
    bias = block.bias.detach().double()
    if not block.windows:
        inverse = torch.cat([torch.arange(prefix), places.argsort() + prefix])
        return bias[:, inverse][:, :, inverse]
    whole = torch.full((2, TOKENS, TOKENS), -1e9, dtype=torch.float64)
    table = places.view(-1, block.windows).T if block.fast else places.view(block.windows, -1)
    for window, tokens in enumerate(table):
        own = bias[:, window if bias.shape[1] > 1 else 0]
        whole[:, tokens[:, None], tokens] = own
    return whole


def by_hand(model: Permuted, block: Mixer, x: Tensor, cells: Tensor, prefix: int) -> Tensor:
    """x + U (path(P x; x) - P x) of one image, (1, tokens, C) in raster order, float64."""
    pool, spread = (matrix.double() for matrix in pooling(cells, GRID, prefix))
    bias = pool @ bias_in_raster(model, block, prefix)
    block = copy.deepcopy(block).double()

    def heads(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (2, -1)).transpose(1, 2)

    queries = pool @ x
    q = heads(block.qkv(block.norm1(queries))[..., :DIM])
    k, v = (heads(part) for part in block.qkv(block.norm1(x))[..., DIM:].chunk(2, -1))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias
    y = queries + block.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    y = y + block.mlp(block.norm2(y))
    return x + spread @ (y - queries)


@pytest.mark.parametrize("budget", ["per_image", "average"])
@pytest.mark.parametrize("name", [*CASES, "a mask per window"])
def test_mixed_granularities_by_hand(name: str, budget: Any) -> None:
    """Patches are those of the image; tables are pooled over them."""
    masked = name not in CASES
    name = "windows on the fast axis" if masked else name
    kind, order, prefix, settings = CASES[name]
    if budget == "average" and settings == {"core": "manual"}:
        pytest.skip("packed queries need fused attention")
    torch.manual_seed(1)
    dense = made(name, 1, masked=masked)
    block = dense.blocks[0]
    assert isinstance(block, Mixer)
    if masked:  # the right half of every window is out of reach of the left one
        table = order_of(kind).view(SLOTS, -1).T
        right = table % WINDOW[1] >= WINDOW[1] // 2
        block.bias.data = torch.zeros_like(block.bias)
        for window, half in enumerate(right):
            apart = half[:, None] != half
            block.bias.data[:, window] = torch.where(apart, -1.0 - window, 0.0)
    config = DGEConfig(budget=budget)
    model = dgefx.convert(dense, 1.0, example_inputs=images(2, PHOTO), config=config)
    (converted,) = blocks_of(model)
    generator = torch.Generator().manual_seed(3)
    cells = [random_cells(GRID, generator) for _ in range(3)]
    levels = torch.stack(cells)
    if masked:  # patches end where the mask changes, and halves of windows are apart
        assert converted.dge_router.windows.cuts == ((), (2,))
        cells = [c.clamp(max=1) for c in cells]
        levels = torch.stack(cells).repeat_interleave(2, 2)
    levels = levels.flatten(1)
    converted.dge_router.register_forward_hook(
        lambda router, inputs, _o: router.routing_for(inputs[0], levels, inputs[1])
    )
    raster = torch.randn(3, prefix + TOKENS, DIM, generator=generator)
    places = torch.cat([torch.arange(prefix), order_of(kind) + prefix])
    with torch.no_grad():
        found = converted(raster[:, places].permute(AXES[order])).permute(AXES[order])
        for image in range(3):
            x = raster[image : image + 1].double()
            wanted = by_hand(dense, block, x, cells[image], prefix)[:, places]
            update = wanted - x[:, places]
            assert error(found[image : image + 1] - x[:, places], update) <= 1e-5


def test_patch_constant_input_without_tables() -> None:
    """Random levels on a stream that is constant within the coarsest patches: equal to dense."""
    torch.manual_seed(0)
    dense = made("windows on the fast axis", 1)
    block = dense.blocks[0]
    assert isinstance(block, Mixer)
    block.bias.data.zero_()
    (converted,) = blocks_of(exact(dense, images(2, PHOTO), 1))
    router = converted.dge_router
    generator = torch.Generator().manual_seed(0)
    layout = Layout("BNC", GRID, 0, token_order=tuple(order_of("fast").tolist()))
    space = router.space(GRID)
    stream = patch_constant_stream(
        layout, router.config, torch.empty(2, TOKENS, DIM), generator, space
    )
    levels = torch.stack([random_cells(GRID, generator).flatten() for _ in range(2)])
    router.register_forward_hook(
        lambda module, inputs, _o: module.routing_for(inputs[0], levels, inputs[1])
    )
    with torch.no_grad():
        assert error(converted(stream) - stream, block(stream) - stream) <= 1e-5


def test_a_convolution_along_the_stream_runs_at_full_resolution_in_its_own_order() -> None:
    dense = made("prefix", mixes=True)
    exact(dense, images(2, PHOTO), 2)
    coarse = dgefx.convert(dense, 0.8, example_inputs=images(2, PHOTO))
    with torch.no_grad():
        assert bool(coarse(images(2, PHOTO)).isfinite().all())


class OnTheGrid(Mixer):
    """A depthwise convolution in the MLP: on the image's grid, or on the stream as if it were."""

    def __init__(self, raster: bool) -> None:
        super().__init__(TOKENS)
        self.raster = raster
        self.depthwise = nn.Conv2d(2 * DIM, 2 * DIM, 3, padding=1, groups=2 * DIM)

    def mlp(self, y: Tensor) -> Tensor:
        (h, w), (b, n, _) = GRID, y.shape
        y = self.fc1(y)
        if self.raster:
            y = y.view(b, 2, 2, h // 2, w // 2, -1).permute(0, 3, 1, 4, 2, 5)
        y = self.depthwise(y.reshape(b, h, w, -1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.raster:
            y = y.reshape(b, h // 2, 2, w // 2, 2, -1).permute(0, 2, 4, 1, 3, 5)
        return self.fc2(F.gelu(y.reshape(b, n, -1)))


def test_convolutions_on_the_grid() -> None:
    torch.manual_seed(0)
    places = torch.arange(TOKENS).view(GRID[0] // 2, 2, GRID[1] // 2, 2).permute(1, 3, 0, 2)
    dense = randomise(Permuted(places.flatten(), OnTheGrid(raster=True))).eval()
    (block,) = blocks_of(exact(dense, images(2, PHOTO), 1))
    assert "stencil_conv" in block.code
    # one that takes the stream for the grid sees other neighbours, which no patch has
    dense = randomise(Permuted(places.flatten(), OnTheGrid(raster=False))).eval()
    with pytest.raises(ValueError, match="mixes tokens"):
        dgefx.convert(dense, 1.0, example_inputs=images(2, PHOTO))


COARSE = ["prefix", "windows on the fast axis"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COARSE)
def test_compiled_in_one_graph(name: str) -> None:
    model = dgefx.convert(made(name), 0.7, example_inputs=images(2, PHOTO)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for count in (2, 3):
            x = images(count, PHOTO, seed=count)
            assert error(compiled(x), model(x)) <= 1e-5


@pytest.mark.parametrize("name", COARSE)
def test_copied_saved_and_in_half_precision(name: str, tmp_path: Path) -> None:
    x = images(2, PHOTO)
    dense = made(name)
    model = dgefx.convert(dense, 0.7, example_inputs=x).eval()
    assert set(model.state_dict()) == set(dense.state_dict())
    dgefx.save(model, tmp_path)
    loaded = dgefx.load(tmp_path, made(name)).eval()
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(copy.deepcopy(model)(x), wanted)
        assert torch.equal(loaded(x), wanted)
        assert error(model.bfloat16()(x.bfloat16()), wanted) <= 0.1


@pytest.mark.parametrize("name", COARSE)
def test_gradients_are_those_of_the_dense_model(name: str) -> None:
    dense, x = made(name), images(2, PHOTO)
    model = dgefx.convert(dense, 1.0, example_inputs=x)
    wanted = dict(dense.named_parameters())
    dense(x).square().mean().backward()
    model(x).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert error(parameter.grad, wanted[key].grad) <= 1e-4, key


@pytest.mark.parametrize("name", COARSE)
def test_maps_and_calibration(name: str) -> None:
    x = images(4, PHOTO)
    model = dgefx.convert(made(name), 0.7, example_inputs=x[:2])
    dgefx.calibrate(model, [x], refine_passes=1)
    assert abs(dgefx.report(model).ratio - 0.7) <= 0.03
    maps = dgefx.granularity_maps(model, x)
    shape = GRID if "windows" in name else (GRID[0] // 2, GRID[1] // 2)  # of tokens, of regions
    assert {tuple(m.shape) for m in maps.values()} == {(4, *shape)}


class Unrolled(nn.Module):
    """Takes any image size: every second row and column first, by views."""

    def __init__(self, windows: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, DIM, 4, stride=4)
        self.block = Mixer(4, windows=1)
        self.block.bias.data = torch.zeros(1, 1)
        self.windowed = windows

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c)
        self.block.windows = h * w // 4 if self.windowed else 0
        return self.block(x).mean(1)


@pytest.mark.parametrize("windows", [False, True])
def test_another_image_size_says_what_to_do(windows: bool) -> None:
    dense = Unrolled(windows).eval()
    model = exact(dense, images(2, (32, 48)), 1)
    for side in (32, (48, 32), (64, 48)):
        dense(images(1, side))
        told = (
            r"convert\(\) the model at this image size|windows was 24 when the model was converted"
        )
        with pytest.raises(ValueError, match=told):
            model(images(1, side))


def layout_in(model: nn.Module) -> Layout | Cause:
    captured = capture(model.eval(), (images(2, PHOTO),), {})
    norm = next(n for n in captured.graph.nodes if "layer_norm" in str(n.target))
    return GridFinder().layout(norm.all_input_nodes[0])


def test_the_order_is_read_off_the_model() -> None:
    places = order_of("any")
    found = layout_in(made("prefix"))
    assert isinstance(found, Layout)
    assert (found.prefix, found.grid, found.token_order) == (3, GRID, tuple(places.tolist()))
    assert [found.token_order[found.position(t)] for t in range(TOKENS)] == list(range(TOKENS))
    raster = Permuted(torch.arange(TOKENS), Mixer(TOKENS))
    assert layout_in(raster) == Layout("BNC", GRID, 0, "embed")
    twice = torch.arange(TOKENS)
    twice[0] = 1
    assert layout_in(Permuted(twice, Mixer(TOKENS))) == Cause("tokens not in order")


def small_hiera() -> nn.Module:
    return timm.create_model(
        "hiera_tiny_224", img_size=64, embed_dim=16, stages=(1, 2, 2, 1), mask_unit_size=(8, 8)
    )


def test_hiera() -> None:
    """All blocks but the first of every later stage, whose queries are pooled."""
    torch.manual_seed(0)
    dense, x = randomise(small_hiera()).eval(), images(2, 64)
    model = exact(dense, x, 3)
    report = dgefx.report(model)
    assert {b.kind for b in report.blocks if b.status == "dense"} == {
        "pooled or projected shortcut"
    }
    coarse = dgefx.convert(dense, 0.8, example_inputs=x)
    dgefx.calibrate(coarse, [images(4, 64)], refine_passes=0)
    assert bool(coarse(x).isfinite().all())


def test_hiera_of_transformers() -> None:
    torch.manual_seed(0)
    config = transformers.HieraConfig(
        image_size=[64, 64], embed_dim=16, depths=[1, 2, 2, 1], num_heads=[1, 2, 4, 8]
    )
    dense, x = randomise(transformers.HieraModel(config)).eval(), images(2, 64)
    model = dgefx.convert(dense, 1.0, example_inputs=x)
    assert len(blocks_of(model)) == 3
    with torch.no_grad():
        assert error(model(x)[0], dense(x)[0]) <= 1e-5


@pytest.mark.slow
def test_hiera_tiny() -> None:
    torch.manual_seed(0)
    exact(randomise(timm.create_model("hiera_tiny_224")).eval(), images(2, 224, seed=1), 9)
