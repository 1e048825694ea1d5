"""The token grid belongs to the call: threads, recomputation, pipelines, patches cut by views."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dgefx
from dgefx.nn.block import DGEBlock
from tests.helpers import Block, images, randomise

Grid = tuple[int, int]
TALL, WIDE = (144, 64), (64, 144)  # 18 x 8 and 8 x 18 patches
SIZES = (TALL, WIDE, (64, 64), (72, 128))


def blocks_of(model: nn.Module) -> list[DGEBlock]:
    return [module for module in model.modules() if isinstance(module, DGEBlock)]


class Grids:
    """The grids that converted blocks route on while active, in any thread."""

    def __init__(self, model: nn.Module) -> None:
        self.found: list[Grid] = []
        self.handles = [
            block.dge_router.register_forward_pre_hook(
                lambda _m, args: self.found.append(tuple(args[1]))
            )
            for block in blocks_of(model)
        ]

    def __enter__(self) -> list[Grid]:
        return self.found

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    settings = {"depth": 2, "img_size": 64, "patch_size": 8, "dynamic_img_size": True}
    return randomise(timm.create_model("vit_tiny_patch16_224", **settings)).eval()


@pytest.fixture(scope="module")
def coarse(dense: nn.Module) -> nn.Module:
    """At a budget under one a block gives other values on another grid."""
    return dgefx.convert(dense, 0.6)


@pytest.fixture
def swift_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def alone(model: nn.Module, size: Grid) -> Tensor:
    """What a model gives for images of a size with nothing else under way."""
    with Grids(model) as grids, torch.no_grad():
        result = model(images(2, size))
    assert set(grids) <= {(size[0] // 8, size[1] // 8)}
    return result


def in_threads(model: nn.Module, sizes: tuple[Grid, ...], wanted: list[Tensor]) -> list[str]:
    """What differs or raises where every size is run in a thread of its own, many times."""
    start, wrong = threading.Barrier(len(sizes)), []

    def run(size: Grid, value: Tensor) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(12):
                try:
                    if not torch.allclose(model(images(2, size)), value, rtol=1e-5, atol=1e-5):
                        wrong.append(f"{size} differs")
                except Exception as error:
                    wrong.append(f"{size}: {error}")

    threads = [threading.Thread(target=run, args=pair) for pair in zip(sizes, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


@pytest.mark.usefixtures("swift_switches")
@pytest.mark.parametrize("sizes", [(TALL, WIDE), SIZES])
def test_threads(coarse: nn.Module, sizes: tuple[Grid, ...]) -> None:
    assert not in_threads(coarse, sizes, [alone(coarse, size) for size in sizes])


@pytest.mark.usefixtures("swift_switches")
def test_threads_at_gamma_one_equal_the_dense_model(dense: nn.Module) -> None:
    finest = dgefx.convert(dense, 1.0)
    assert not in_threads(finest, SIZES, [alone(dense, size) for size in SIZES])


@pytest.mark.slow
@pytest.mark.usefixtures("swift_switches")
def test_threads_of_a_compiled_block(coarse: nn.Module) -> None:
    wanted = [alone(coarse, size) for size in (TALL, WIDE)]
    compiled = copy.deepcopy(coarse)
    compiled.blocks[1].compile(backend="eager", fullgraph=True, dynamic=True)
    for size in (TALL, WIDE):
        alone(compiled, size)  # compiles
    assert not in_threads(compiled, (TALL, WIDE), wanted)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [p for name, p in model.named_parameters() if name.startswith("blocks.")]
    for parameter in parameters:
        parameter.grad = None
    loss.backward()  # what reentrant checkpointing knows alone
    return [parameter.grad.clone() for parameter in parameters]


def both_gradients(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Of two transposed images, both forward before both backward."""
    return gradients(model, call(images(1, TALL)).sum() - call(images(1, WIDE)).sum())


@pytest.fixture(scope="module")
def wanted(coarse: nn.Module) -> list[Tensor]:
    """The gradients, one image after the other."""
    one = gradients(coarse, coarse(images(1, TALL)).sum())
    other = gradients(coarse, coarse(images(1, WIDE)).sum())
    return [a - b for a, b in zip(one, other, strict=True)]


def by_blocks(model: nn.Module, reentrant: bool) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.forward_head(model.norm(x))

    return call


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(coarse: nn.Module, wanted: list[Tensor], reentrant: bool) -> None:
    with Grids(coarse) as grids:
        found = both_gradients(coarse, by_blocks(coarse, reentrant))
    assert len(grids) == 8  # each block twice per image: recomputed
    torch.testing.assert_close(found, wanted)


def test_checkpointing_of_timm(coarse: nn.Module, wanted: list[Tensor]) -> None:
    model = copy.deepcopy(coarse)
    model.set_grad_checkpointing()
    torch.testing.assert_close(both_gradients(model, model), wanted)


def test_checkpointing_at_gamma_one_equals_the_dense_model(dense: nn.Module) -> None:
    finest = dgefx.convert(dense, 1.0)
    finest.set_grad_checkpointing()
    wanted = both_gradients(dense, dense)
    torch.testing.assert_close(both_gradients(finest, finest), wanted, rtol=1e-4, atol=1e-5)


def test_recomputation_from_moved_tokens_is_not_guessed(coarse: nn.Module) -> None:
    model = copy.deepcopy(coarse)
    # as offloading does: a recomputed block does not know its input
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        one = by_blocks(model, False)(images(1, TALL)).sum()
        other = by_blocks(model, False)(images(1, WIDE)).sum()
    with pytest.raises(ValueError, match="laid out grids of 18 x 8 and 8 x 18: it is not known"):
        gradients(model, one + other)
    alone(model, TALL)  # the next call is not in doubt


def first_stage(model: nn.Module, size: Grid) -> Tensor:
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images(2, size)))))
    return model.blocks[0](x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_interleaved_pipeline(coarse: nn.Module, mode: Callable[[], object]) -> None:
    wanted = [alone(coarse, size) for size in SIZES]
    with mode(), Grids(coarse) as grids:  # type: ignore[attr-defined]
        stages = [first_stage(coarse, size) for size in SIZES]
        found = [coarse.forward_head(coarse.norm(coarse.blocks[1](x))) for x in stages]
    assert grids == [(h // 8, w // 8) for h, w in SIZES] * 2
    torch.testing.assert_close(found, wanted)


def test_a_second_stage_in_another_thread(coarse: nn.Module) -> None:
    wanted, found = [alone(coarse, size) for size in (TALL, WIDE)], []
    with torch.no_grad():
        stages = [first_stage(coarse, size) for size in (TALL, WIDE)]

    @torch.no_grad()
    def run() -> None:
        found.extend(coarse.forward_head(coarse.norm(coarse.blocks[1](x))) for x in stages)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("embedded", ["patches alone", "a block"])
def test_a_pipeline_that_copies_tokens_is_not_guessed(coarse: nn.Module, embedded: str) -> None:
    model = copy.deepcopy(coarse)
    with torch.no_grad(), pytest.raises(ValueError, match="grids of 18 x 8 and 8 x 18: it is not"):
        if embedded == "a block":
            one, _ = (first_stage(model, size).clone() for size in (TALL, WIDE))
            model.blocks[1](one)
        else:
            one, _ = (model._pos_embed(model.patch_embed(images(2, s))) for s in (TALL, WIDE))
            model.blocks[0](one)
    torch.testing.assert_close(alone(model, WIDE), alone(coarse, WIDE))


def test_memory_that_is_written_again(coarse: nn.Module) -> None:
    """Tokens of the next image in the memory of the last one's."""
    model, memory = copy.deepcopy(coarse), []

    def reuse(_m: nn.Module, _a: object, x: Tensor) -> Tensor:
        memory.append(x.clone() if not memory else memory[0])
        return memory[0].copy_(x)

    model.norm_pre.register_forward_hook(reuse)
    for mode in (torch.no_grad, torch.inference_mode):
        memory.clear()
        for size in (TALL, WIDE, TALL):
            with mode():
                torch.testing.assert_close(model(images(2, size)), alone(coarse, size))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(coarse: nn.Module, way: Callable[[nn.Module], nn.Module]) -> None:
    model = way(coarse)
    wanted = [alone(coarse, size) for size in (TALL, WIDE)]
    torch.testing.assert_close([alone(model, size) for size in (TALL, WIDE)], wanted)
    assert blocks_of(model)[0].dge_grid_shape is blocks_of(model)[1].dge_grid_shape
    assert blocks_of(model)[0].dge_grid_shape is not blocks_of(coarse)[0].dge_grid_shape


# -- patches that no convolution module lays out ---------------------------------------------


def cut(x: Tensor, side: int = 8) -> Tensor:
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // side, side, w // side, side).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, h * w // side**2, -1)


class Cut(nn.Module):
    """Patches by movement and a linear layer, in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(192, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(cut(x))


class Unfold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(192, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.unfold(x, 8, stride=8).transpose(1, 2))


class Overlapping(nn.Module):
    """Soft split, as in T2T-ViT: of pixels that lie in several patches, and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3 * 10**2, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.unfold(x, 10, stride=8, padding=1).transpose(1, 2))


class Functional(nn.Module):
    """A convolution without a module of its own, rounding down at the border."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 3, 8, 8) * 0.07)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, stride=8).flatten(2).transpose(1, 2)


class Model(nn.Module):
    """Blocks on patches; in_root: cut by the model's own forward; plane: a feature map comes out,
    of the grid's size."""

    def __init__(
        self, embed: type[nn.Module], in_root: bool = False, plane: bool = False, parts: int = 1
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.in_root, self.plane = embed(), in_root, plane
        self.blocks = nn.ModuleList(Block(16, "BNC") for _ in range(2))
        self.merge = nn.Linear(64, 16) if parts > 1 else None

    def forward_features(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values
        x = type(self.embed).forward(self.embed, x) if self.in_root else self.embed(x)
        for block in self.blocks:
            x = block(x)
            if self.merge is not None and block is self.blocks[0]:
                h, w = (size // 8 for size in pixel_values.shape[2:])
                x = cut(x.transpose(1, 2).reshape(-1, 16, h, w), 2)
                x = self.merge(x)
        return x

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.forward_features(pixel_values)
        if self.plane:
            h, w = (size // 8 for size in pixel_values.shape[2:])
            return x.transpose(1, 2).reshape(x.shape[0], 16, h, w)
        return x.mean(1)


CASES = {
    "movement": lambda: Model(Cut),
    "movement in the model's forward": lambda: Model(Cut, in_root=True),
    "unfold": lambda: Model(Unfold),
    "overlapping unfold": lambda: Model(Overlapping),
    "functional convolution": lambda: Model(Functional),
    "functional convolution in the model's forward": lambda: Model(Functional, in_root=True),
    "feature map of functional patches": lambda: Model(Functional, in_root=True, plane=True),
    "merged by movement": lambda: Model(Cut, parts=2),
}


@pytest.mark.parametrize("case", CASES)
def test_images_of_another_shape(case: str) -> None:
    model = CASES[case]().eval()
    finest, some = (dgefx.convert(model, g, example_inputs=images(2, 64)) for g in (1.0, 0.75))
    for size in ((32, 128), (128, 32), (64, 64), (96, 64), (32, 128)):
        first = (size[0] // 8, size[1] // 8)
        second = (first[0] // 2, first[1] // 2) if model.merge is not None else first
        with Grids(some) as grids, torch.no_grad():
            some(pixel_values=images(2, size))
        assert grids == [first, second]
        torch.testing.assert_close(finest(images(2, size)), model(images(2, size)))


def test_borders_of_functional_patches() -> None:
    converted = dgefx.convert(Model(Functional, in_root=True), 0.7, example_inputs=images(2, 68))
    for size, grid in (((71, 70), (8, 8)), ((130, 36), (16, 4)), ((80, 67), (10, 8))):
        with Grids(converted) as grids, torch.no_grad():
            converted(images(2, size))
        assert set(grids) == {grid}


def test_a_model_that_resizes_its_images_keeps_its_grid() -> None:
    class Resizing(Model):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return super().forward(F.interpolate(pixel_values, (64, 64)))

    model = Resizing(Cut, in_root=True).eval()
    converted = dgefx.convert(model, 0.7, example_inputs=images(2, (128, 64)))
    for size in ((64, 128), (128, 64), (96, 96)):
        with Grids(converted) as grids, torch.no_grad():
            converted(images(2, size))
        assert set(grids) == {(8, 8)}


def test_parts_without_their_model_warn() -> None:
    converted = dgefx.convert(Model(Cut, in_root=True), 0.7, example_inputs=images(2, 64))
    with pytest.warns(UserWarning, match="64 tokens are taken for a grid of 8 x 8"):
        converted.forward_features(images(2, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted(images(2, (32, 128)))
        dgefx.calibrate(converted, [images(2, 64)])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_graph_modules_and_their_copies(way: Callable[[nn.Module], nn.Module]) -> None:
    """Whose own hooks copies lose."""
    dense = torch.fx.symbolic_trace(Model(Functional, in_root=True).eval())
    converted = dgefx.convert(dense, 0.7, example_inputs=images(2, 64))
    for model in (converted, way(converted)):
        with Grids(model) as grids, torch.no_grad():
            model(images(2, (128, 32)))
        assert set(grids) == {(16, 4)}
    assert str(dgefx.revert(converted).graph) == str(dense.graph)


def test_revert_takes_the_hooks_away() -> None:
    model = dgefx.revert(dgefx.convert(Model(Cut), 0.7, example_inputs=images(2, 64)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_keep_what_tells_the_grid_beside_layers_of_einops() -> None:
    """einops' layers have a state of their own, without hooks."""
    einops_layers = pytest.importorskip("einops.layers.torch")

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            cut = einops_layers.Rearrange("b c (h p) (w q) -> b (h w) (c p q)", p=4, q=4)
            self.embed = nn.Sequential(cut, nn.Linear(48, 16))
            self.blocks = nn.Sequential(*(Block(16, "BNC") for _ in range(2)))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.embed(x)).mean(1)

    model = dgefx.convert(randomise(Patches()).eval(), 0.6, example_inputs=images(2, 32))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for size in ((16, 64), (48, 32)):
            assert torch.equal(copied(images(2, size)), model(images(2, size)))


@torch.no_grad()
def test_tables_that_are_stretched_for_another_size_bind_a_block_without_windows() -> None:
    settings = {"img_size": 128, "depth": 1, "embed_dim": 48, "num_heads": 2}
    made = timm.create_model("samvit_base_patch16_224", global_attn_indexes=(0,), **settings)
    dense = randomise(made).eval()
    converted = dgefx.convert(dense, 1.0)
    x = images(2, 128)
    assert torch.allclose(converted(x), dense(x), atol=1e-4)
    for other in ((64, 64), (128, 64), (192, 192)):
        assert dense(images(2, other)).isfinite().all()
        with pytest.raises(ValueError, match="does something else on other sizes"):
            converted(images(2, other))
