"""Windowed attention: conversion of windowed blocks of every kind, against the dense model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import dgefx
from dgefx.nn.capacity import plans
from dgefx.nn.hierarchy import nested_levels
from dgefx.passes.plan.verify import patch_constant_stream
from tests.helpers import COMPILERS, error, images, macs, randomise, slow
from tests.windowed import TinySwin, WindowBlock


def blocks_of(model: nn.Module) -> list[dgefx.nn.DGEBlock]:
    return [m for m in model.modules() if isinstance(m, dgefx.nn.DGEBlock)]


def check_exact(model: nn.Module, dense: list[str], x: Tensor) -> nn.Module:
    """Everything converts but the blocks `dense`, and equals the dense model at gamma 1."""
    randomise(model).eval()
    converted = dgefx.convert(model, 1.0, example_inputs=x)
    refused = [b.name for b in dgefx.report(converted).blocks if b.status == "dense"]
    assert refused == dense
    with torch.no_grad():
        found, wanted = converted(x), model(x)
    if not isinstance(wanted, Tensor):
        found, wanted = found[0], wanted[0]
    assert error(found, wanted) <= 1e-5
    return converted


KINDS = st.fixed_dictionaries(
    {
        "window": st.tuples(st.integers(2, 5), st.integers(2, 5)),
        "shift": st.tuples(st.integers(0, 4), st.integers(0, 4)),
        "kind": st.sampled_from(["block", "grid", "pad_first"]),
        "core": st.sampled_from(["sdpa", "manual", "cosine"]),
        "masked": st.booleans(),
        "bias": st.booleans(),
    }
)


#: all windows share the mask of its columns
WIDER_THAN_THE_GRID = {
    "window": (3, 5),
    "shift": (0, 2),
    "kind": "block",
    "core": "manual",
    "masked": True,
    "bias": False,
}


def window_block(case: dict[str, Any], bias: bool | None = None) -> WindowBlock:
    shift = tuple(s % w for s, w in zip(case["shift"], case["window"], strict=True))
    return WindowBlock(
        window=case["window"],
        shift=(0, 0) if case["kind"] == "grid" else shift,
        kind=case["kind"],
        core=case["core"],
        masked=case["masked"],
        bias=case["bias"] if bias is None else bias,
    )


@settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(KINDS, st.tuples(st.integers(4, 12), st.integers(4, 12)), st.integers(0, 99))
@example(WIDER_THAN_THE_GRID, (10, 4), 10)
def test_any_windows(case: dict[str, Any], grid: tuple[int, int], seed: int) -> None:
    """Exact at the finest level; and, without a position bias, at any routing on input that is
    constant within patches, whatever the shift, the mask and the padding."""
    if case["kind"] == "grid":
        grid = tuple(g - g % w or w for g, w in zip(grid, case["window"], strict=True))
    torch.manual_seed(seed)
    x = images(2, (4 * grid[0], 4 * grid[1]), seed)
    dense = TinySwin(window_block(case)).eval()
    check_exact(dense, [], x)
    dense = TinySwin(window_block(case, bias=False)).eval()
    (block,) = blocks_of(dgefx.convert(dense, 1.0, example_inputs=x))
    check_coarse(block, dense.blocks[0], seed)


def check_coarse(block: dgefx.nn.DGEBlock, dense: nn.Module, seed: int) -> None:
    """Random levels on a stream that is constant within the coarsest patches: equal to dense."""
    router = block.dge_router
    generator = torch.Generator().manual_seed(seed)
    space, sides = router.space(router.grid), router.config.granularities
    like = torch.empty(2, *router.grid, router.channels)
    layout = dgefx.passes.layout.Layout("BHWC", router.grid, 0)
    x = patch_constant_stream(layout, router.config, like, generator, space)
    levels = torch.randint(0, 3, (2, len(router.region_cost_0)), generator=generator)
    levels = nested_levels(levels, space, sides)
    impose(block, levels)
    with torch.no_grad():
        found, wanted = block(x), dense(x)
    assert error(found - x, wanted - x) <= 1e-5


def impose(block: dgefx.nn.DGEBlock, levels: Tensor) -> None:
    block.dge_router.register_forward_hook(
        lambda module, inputs, _output: module.routing_for(inputs[0], levels, inputs[1])
    )


@pytest.mark.parametrize("shift", [slow(0), 3])
def test_swin_on_patch_constant_input(shift: int) -> None:
    """Acceptance 4 on the real block; the mask stays, the position bias is zeroed."""
    torch.manual_seed(0)
    dense = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 1, 1, 1)).eval()
    for module in dense.modules():
        if hasattr(module, "relative_position_bias_table"):
            module.relative_position_bias_table.data.zero_()
    name = f"layers.0.blocks.{int(shift > 0)}"
    assert dense.get_submodule(name).shift_size == (shift, shift)
    model = dgefx.convert(dense, 1.0, filter_fn=lambda _m, n: n == name)
    (block,) = blocks_of(model)
    check_coarse(block, dense.get_submodule(name), seed=shift)


def test_position_bias_is_pooled() -> None:
    """A coarse query attends with the mean bias of its tokens, by hand."""
    torch.manual_seed(0)
    dense = TinySwin(WindowBlock(window=(4, 4), core="manual")).eval()
    x = images(2, 32)
    (block,) = blocks_of(dgefx.convert(dense, 1.0, example_inputs=x))
    impose(block, torch.full((2, 16), 2))  # all 4 x 4: one query per window
    stream = torch.randn(2, 8, 8, 16)
    with torch.no_grad():
        found = block(stream)
        layer = dense.blocks[0]
        windows = layer._partition(stream)
        q = windows.mean(1, keepdim=True)
        scale = 8**-0.5
        wq, wk, wv = layer.qkv.weight.chunk(3)
        bq, bk, bv = layer.qkv.bias.chunk(3)

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (2, 8)).transpose(1, 2)

        normed = layer.norm1(windows)
        queries = heads(layer.norm1(q) @ wq.t() + bq)
        keys, values = heads(normed @ wk.t() + bk), heads(normed @ wv.t() + bv)
        assert layer.bias is not None
        scores = queries @ keys.transpose(-2, -1) * scale + layer.bias.mean(1, keepdim=True)
        y = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        y = q + layer.proj(y)
        y = y + layer.mlp(layer.norm2(y))
        wanted = stream + layer._reverse((y - q).expand(-1, 16, -1), 8, 8)
    assert error(found, wanted) <= 1e-5


def test_a_detailed_window_gets_all_its_queries() -> None:
    """Acceptance 3: one window of noise and 63 flat ones, at gamma 0.5. Every converted block of
    the first stage keeps the 49 queries of that window, wherever the budget leaves so many."""
    torch.manual_seed(0)
    sizes = {"depths": (2, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}
    dense = timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval()
    model = dgefx.convert(dense, 0.5)
    block = model.layers[0].blocks[0]
    router = block.dge_router
    stream = torch.randn(1, 1, 1, 24).expand(1, 56, 56, 24).clone()
    stream[:, 21:28, 35:42] = torch.randn(1, 7, 7, 24)
    tokens = stream.flatten(1, 2)
    at_convert = router.plan
    # also with a budget that leaves hardly more than what this window needs
    tight = next(p for p in plans(router.space((56, 56)), router.config) if p.capacities[0] >= 49)
    assert tight.slots < 0.2 * 56 * 56
    for plan in (at_convert, tight):
        router.plan = plan
        routing = router(tokens, (56, 56))
        slots = routing.token_slot.view(56, 56)[21:28, 35:42]
        assert slots.unique().numel() == 49  # the clipped corner is a patch of one token
    flat = routing.token_slot.view(56, 56)[:7, :7].unique().numel()
    assert flat < 49


SHORT: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "swin_tiny_patch4_window7_224": (
        224,
        {"embed_dim": 24, "num_heads": (1, 2, 4, 8), "depths": (2, 1, 1, 2)},
        [],
    ),
    "swin_s3_tiny_224": (
        224,
        {"embed_dim": 24, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 2, 1)},
        [],
    ),
    "swinv2_tiny_window8_256": (
        256,
        {"embed_dim": 24, "num_heads": (1, 2, 4, 8), "depths": (2, 1, 2, 1)},
        [],
    ),
    "swinv2_cr_tiny_224": (
        224,
        {"embed_dim": 24, "num_heads": (1, 2, 4, 8), "depths": (2, 1, 2, 2)},
        [],
    ),
    "samvit_base_patch16_224": (
        320,
        {"img_size": 320, "embed_dim": 48, "num_heads": 3, "depth": 3, "global_attn_indexes": (2,)},
        [],
    ),
    "twins_svt_small": (
        224,
        {"embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8), "depths": (2, 2, 2, 2)},
        [],
    ),
    "davit_tiny": (
        224,
        {"embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8), "depths": (1, 1, 1, 1)},
        [f"stages.{i}.blocks.0.1" for i in range(4)],  # channel attention
    ),
}


#: of a kind with "swinv2_tiny_window8_256", "swin_tiny_patch4_window7_224" and (what of it
#: converts) "twins_svt_small"
_DOUBLE = ("swinv2_cr_tiny_224", "swin_s3_tiny_224", "davit_tiny")


@pytest.mark.parametrize("name", [slow(name) if name in _DOUBLE else name for name in SHORT])
def test_timm(name: str) -> None:
    side, options, refused = SHORT[name]
    torch.manual_seed(0)
    check_exact(timm.create_model(name, **options), refused, images(2, side, seed=1))


WHOLE: dict[str, list[str]] = {
    "swin_tiny_patch4_window7_224": [],
    "swin_s3_tiny_224": [],
    "swinv2_tiny_window8_256": [],
    "swinv2_cr_tiny_224": [],
    "samvit_base_patch16_224": [],
    "twins_svt_small": [],
    "maxvit_tiny_tf_224": [],
    "tiny_vit_5m_224": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_timm_whole(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name)
    side = model.pretrained_cfg["input_size"][-1]
    check_exact(model, WHOLE[name], images(2, side, seed=1))


PARTLY = {
    "davit_tiny": (6, "channel attention"),
    "coatnet_0_rw_224": (7, "shortcut around it is pooled"),
    "gcvit_tiny": (17, "queries do not come from the stream"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTLY)
def test_timm_partly(name: str) -> None:
    """What is left dense carries the right reason."""
    torch.manual_seed(0)
    dense = randomise(timm.create_model(name)).eval()
    x = images(2, 224, seed=1)
    model = dgefx.convert(dense, 1.0, example_inputs=x)
    blocks = dgefx.report(model).blocks
    converted, reason = PARTLY[name]
    assert sum(b.status == "converted" for b in blocks) == converted
    assert all(reason in b.reason for b in blocks if b.status == "dense")
    with torch.no_grad():
        assert error(model(x), dense(x)) <= 1e-5


def tiny_torchvision(version: int) -> nn.Module:
    kind = torchvision.models.swin_transformer
    more = {}
    if version == 2:
        more = {"block": kind.SwinTransformerBlockV2, "downsample_layer": kind.PatchMergingV2}
    return kind.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7], num_classes=5, **more)


@pytest.mark.parametrize("version", [slow(1), 2])
def test_torchvision(version: int) -> None:
    torch.manual_seed(0)
    check_exact(tiny_torchvision(version), [], images(2, 112, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
def test_torchvision_whole(name: str) -> None:
    torch.manual_seed(0)
    check_exact(getattr(torchvision.models, name)(), [], images(2, 224, seed=1))


def tiny_hugging_face(version: int) -> nn.Module:
    options = {"depths": [2, 2], "embed_dim": 16, "num_heads": [1, 2]}
    if version == 1:
        return transformers.SwinModel(transformers.SwinConfig(image_size=112, **options))
    config = transformers.Swinv2Config(image_size=128, window_size=8, **options)
    return transformers.Swinv2Model(config)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_hugging_face(version: int) -> None:
    torch.manual_seed(0)
    check_exact(tiny_hugging_face(version), [], images(2, 112 if version == 1 else 128, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize("gamma", [0.5, 0.7])
def test_ratio(name: str, gamma: float) -> None:
    """Acceptance 2, with torch's own counter."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    x = images(1, dense.pretrained_cfg["input_size"][-1])
    model = dgefx.convert(dense, gamma)
    ratio = macs(model, x) / macs(dense, x)
    assert gamma - 0.03 <= ratio <= gamma + 0.005
    assert abs(ratio - dgefx.report(model).ratio) <= 0.002


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.5, 0.7])
def test_ratio_of_small_swin(gamma: float) -> None:
    torch.manual_seed(0)
    _, options, _ = SHORT["swin_tiny_patch4_window7_224"]
    dense = timm.create_model("swin_tiny_patch4_window7_224", **options).eval()
    x = images(1, 224)
    ratio = macs(dgefx.convert(dense, gamma), x) / macs(dense, x)
    assert gamma - 0.03 <= ratio <= gamma + 0.005


def tiny(kind: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    if kind == "own":
        shifted = WindowBlock(shift=(2, 2), core="sdpa")
        return TinySwin(WindowBlock(), shifted), 32
    if kind in ("timm", "timm stage"):
        options = {"embed_dim": 16, "num_heads": (1, 2), "depths": (2, 1)}
        if kind == "timm stage":
            options |= {"num_heads": (1,), "depths": (2,)}
        name = "swin_tiny_patch4_window7_224"
        return timm.create_model(name, img_size=56, num_classes=5, **options), 56
    return tiny_hugging_face(1), 112


def tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("kind", [slow("own"), "timm stage", slow("hf")])
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_in_one_graph(backend: str, kind: str) -> None:
    dense, side = tiny(kind)
    model = dgefx.convert(randomise(dense), 0.7, example_inputs=images(2, side)).eval()
    x = images(3, side, seed=3)
    with torch.no_grad():
        wanted = tensor(model(x))
        found = tensor(torch.compile(model, fullgraph=True, backend=backend)(x))
    assert error(found, wanted) <= 1e-5


@pytest.mark.slow
def test_one_recompile_for_a_new_batch_size() -> None:
    dense, side = TinySwin(WindowBlock(shift=(2, 2), core="sdpa")), 32
    model = dgefx.convert(randomise(dense), 0.7, example_inputs=images(2, side)).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for count in (2, 4, 7, 3):
            x = images(count, side, seed=count)
            assert error(compiled(x), model(x)) <= 1e-5
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", ["own", pytest.param("hf", marks=pytest.mark.slow)])
def test_images_do_not_influence_each_other(kind: str) -> None:
    dense, side = tiny(kind)
    model = dgefx.convert(randomise(dense), 0.6, example_inputs=images(2, side)).eval()
    x = images(3, side, seed=5)
    with torch.no_grad():
        together = tensor(model(x))
        for index in range(3):
            alone = tensor(model(x[index : index + 1]))
            assert error(together[index : index + 1], alone) <= 1e-5


@pytest.mark.parametrize(
    ("shift", "kind"),
    [((0, 0), "pad_first"), slow((2, 1), "pad_first"), slow((0, 0), "block"), ((2, 1), "block")],
)
def test_other_image_sizes(kind: str, shift: tuple[int, int]) -> None:
    """The finest plan follows to sizes that need other padding; a coarse one runs there."""
    torch.manual_seed(0)
    dense = TinySwin(WindowBlock(shift=shift, kind=kind), WindowBlock(core="cosine")).eval()
    model = dgefx.convert(dense, 1.0, example_inputs=images(2, 32))
    coarse = dgefx.convert(dense, 0.7, example_inputs=images(2, 32))
    with torch.no_grad():
        for side in (32, 48, (36, 60), (20, 52)):
            x = images(3, side)
            assert error(model(x), dense(x)) <= 1e-5
            assert bool(coarse(x).isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_torchvision, tiny_hugging_face])
def test_other_image_sizes_of_libraries(make: Any) -> None:
    torch.manual_seed(0)
    dense = make(1).eval()
    model = dgefx.convert(dense, 1.0, example_inputs=images(2, 112))
    with torch.no_grad():
        for side in (112, 168, 224):
            x = images(1, side)
            assert error(tensor(model(x)), tensor(dense(x))) <= 1e-5


def test_sizes_at_which_the_dense_block_branches_are_refused() -> None:
    """torchvision leaves out the shift where one window holds everything."""
    torch.manual_seed(0)
    dense = tiny_torchvision(1).eval()
    model = dgefx.convert(dense, 1.0, example_inputs=images(2, 112))
    with torch.no_grad():
        for side in (168, 120, (112, 200)):
            assert error(model(images(1, side)), dense(images(1, side))) <= 1e-5
        for side in (56, (56, 112), 40):
            with pytest.raises(ValueError, match="at this image size"):
                model(images(1, side))
    # and the other way round: at 56 px its second stage is one window, which does not shift
    small = dgefx.convert(dense, 1.0, example_inputs=images(2, 56))
    with pytest.raises(ValueError, match="at this image size"):
        small(images(1, 112))


@pytest.mark.parametrize("core", ["sdpa", "manual"])
def test_one_window_at_the_converted_size(core: str) -> None:
    torch.manual_seed(0)
    dense = TinySwin(WindowBlock(core=core), WindowBlock(shift=(1, 2), core=core)).eval()
    model = check_exact(dense, [], images(2, 16))
    with torch.no_grad():
        for side in (16, 32, (20, 44), 12):
            x = images(2, side)
            assert error(model(x), dense(x)) <= 1e-5


def test_random_state_is_left_alone_at_other_sizes() -> None:
    torch.manual_seed(0)
    config = dgefx.DGEConfig(router="linear")
    dense = TinySwin(WindowBlock()).eval()
    model = dgefx.convert(dense, 0.7, example_inputs=images(2, 32), config=config)
    before = torch.get_rng_state()
    with torch.no_grad():
        model(images(1, 48))
    assert torch.equal(before, torch.get_rng_state())


def test_gradients_reach_every_parameter() -> None:
    """And at the finest plan they are the dense model's."""
    torch.manual_seed(0)
    dense = randomise(TinySwin(WindowBlock(), WindowBlock(shift=(2, 2), core="cosine")))
    x = images(2, 32)
    model = dgefx.convert(dense, 1.0, example_inputs=x)
    wanted = dict(dense.named_parameters())
    dense(x).square().mean().backward()
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, wanted[name].grad) <= 1e-4, name
    coarse = dgefx.convert(dense, 0.6, example_inputs=x).train()
    coarse(x).square().mean().backward()
    for name, parameter in coarse.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_dropout_and_drop_path_in_windows() -> None:
    torch.manual_seed(0)
    options = {"embed_dim": 16, "num_heads": (1, 2), "depths": (2, 1)}
    rates = {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2}
    dense = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, num_classes=5, **options, **rates
    )
    model = dgefx.convert(dense, 0.7)
    assert len(blocks_of(model)) == 3
    x = images(4, 56)
    model.train()
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    first.sum().backward()
    model.eval()
    assert torch.equal(model(x), model(x))


def test_half_precision() -> None:
    dense, side = tiny("timm")
    model = dgefx.convert(randomise(dense), 0.7, example_inputs=images(2, side)).eval()
    x = images(2, side)
    with torch.no_grad():
        wanted = model(x)
        found = model.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert error(found, wanted) <= 0.1  # eight bits of mantissa through three blocks


def test_mask_borders_that_are_no_seams_cut_patches() -> None:
    """timm rolls, then pads, and masks by the padded size: at 55 tokens a side the mask's border
    lies inside the rolled image, one row from the seam."""
    torch.manual_seed(0)
    dense = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=220,
        window_size=7,
        embed_dim=16,
        num_heads=(1, 2),
        depths=(2, 1),
    ).eval()
    for module in dense.modules():
        if hasattr(module, "relative_position_bias_table"):
            module.relative_position_bias_table.data.zero_()
    name = "layers.0.blocks.1"
    model = dgefx.convert(dense, 1.0, filter_fn=lambda _m, n: n == name)
    (block,) = blocks_of(model)
    assert block.dge_router.windows.cuts == ((4,), (4,))
    check_coarse(block, dense.get_submodule(name), seed=0)


def test_blocks_that_only_know_one_size_say_so() -> None:
    """Stripes over the whole height are windows whose size follows the image."""

    class Stripes(WindowBlock):
        def _windows(self, x: Tensor) -> Tensor:
            _, h, w, _ = x.shape
            x = x.view(x.shape[0], h, w // 2, 2, 16).transpose(1, 2).reshape(-1, h * 2, 16)
            x = self._attend(x, None)
            return x.view(-1, w // 2, h, 2, 16).transpose(1, 2).reshape(-1, h, w, 16)

    torch.manual_seed(0)
    dense = TinySwin(Stripes(bias=False)).eval()
    model = check_exact(dense, [], images(2, 32))
    with pytest.raises(ValueError, match="convert\\(\\) the model at this image size"):
        model(images(2, 48))


def test_two_partitions_in_one_block_are_refused() -> None:
    class Both(WindowBlock):
        def _windows(self, x: Tensor) -> Tensor:
            first = super()._windows(x)
            self.kind = "grid" if self.kind == "block" else "block"
            second = super()._windows(x)
            self.kind = "grid" if self.kind == "block" else "block"
            return first + second

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="two different partitions"):
        dgefx.convert(TinySwin(Both()).eval(), 0.7, example_inputs=images(2, 32))


def test_maps_and_calibration_of_windows() -> None:
    dense, side = tiny("timm")
    model = dgefx.convert(randomise(dense), 0.7, example_inputs=images(2, side))
    dgefx.calibrate(model, [images(4, side)], refine_passes=1)
    assert abs(dgefx.report(model).ratio - 0.7) <= 0.03
    maps = dgefx.granularity_maps(model, images(2, side))
    assert [tuple(m.shape) for m in maps.values()] == [(2, 14, 14), (2, 14, 14), (2, 7, 7)]
    assert set(itertools.chain(*(m.unique().tolist() for m in maps.values()))) <= {1, 2, 4}


def test_tables_of_another_size_serve_training_after_inference() -> None:
    kwargs = {"depths": (2, 2), "embed_dim": 24, "num_heads": (2, 2), "img_size": 56}
    dense = timm.create_model(
        "swin_tiny_patch4_window7_224", strict_img_size=False, drop_path_rate=0.0, **kwargs
    )
    model = dgefx.convert(dense, 0.7, example_inputs=torch.randn(2, 3, 56, 56))
    other = torch.randn(2, 3, 140, 140)  # a size that no other test has
    with torch.inference_mode():
        model.eval()(other)
    model.train()(other).sum().backward()
