"""Deformable attention: queries that sample a dense map by offsets and softmaxed weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import dgefx
from dgefx import DGEConfig
from dgefx.passes.attention.registry import find_cores
from dgefx.passes.capture import capture, example_of
from dgefx.training import set_gates
from tests.dat import DAT, Attention, GridBlock, GridModel, Warp
from tests.dpvt import DPVT, centres
from tests.helpers import COMPILERS, error, images, macs, randomise, slow

#: one stage on a grid of 12 tokens a side
SMALL: dict[str, Any] = {"dims": (16,), "strides": (4,), "side": 48}
BUDGETS = ["per_image", "average"]


def pair(
    gamma: float = 1.0, budget: str = "per_image", **options: Any
) -> tuple[nn.Module, nn.Module]:
    """(dense model, converted one), all blocks converted."""
    dense = randomise(DPVT(**(SMALL | options))).eval()
    config = DGEConfig(budget=budget)
    model = dgefx.convert(dense, gamma, example_inputs=images(2, 48), config=config)
    blocks = dgefx.report(model).blocks
    assert [b.status for b in blocks] == ["converted"] * sum(map(len, dense.stages))
    return dense, model


def update_error(dense: nn.Module, model: nn.Module, x: Tensor) -> float:
    """Relative error of the features before the head, where nothing is averaged away."""
    found: list[Tensor] = []
    for module in (model, dense):
        last = module.stages[-1][-1]
        handle = last.register_forward_hook(lambda _m, _a, output: found.append(output))
        with torch.no_grad():
            module(x)
        handle.remove()
    return error(*found)


def test_four_stages_with_depthwise_convolutions_equal_the_dense_model() -> None:
    dense = randomise(DPVT(dims=(8, 8, 16, 16), depthwise=True)).eval()
    model = dgefx.convert(dense, 1.0, example_inputs=images(2, 64))
    assert [(b.status, b.grid) for b in dgefx.report(model).blocks] == [
        ("converted", (side, side)) for side in (16, 8, 4, 2)
    ]
    assert update_error(dense, model, images(2, 64, seed=1)) <= 1e-5


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reference": "arange", "weighting": "einsum"},
        {"reference": "buffer", "weighting": "matmul"},
        {"reference": "none", "depthwise": True},
        {"heads": 1},
        {"maps": 2},
    ],
    ids=str,
)
def test_every_way_to_write_it_equals_the_dense_model(options: Any, budget: str) -> None:
    dense, model = pair(budget=budget, **options)
    assert update_error(dense, model, images(3, 48, seed=1)) <= 1e-5
    if options.get("reference") != "buffer":  # also a grid of 13 x 21
        assert update_error(dense, model, images(2, (52, 84), seed=2)) <= 1e-5


@pytest.mark.parametrize("budget", BUDGETS)
def test_gradients_in_train_mode_are_those_of_the_dense_model(budget: str) -> None:
    dense, model = pair(budget=budget, dropout=0.1 if budget == "per_image" else 0.0)
    found = {}
    for name, module in (("dense", dense.train()), ("converted", model.train())):
        x = images(2, 48, seed=1).requires_grad_()
        torch.manual_seed(3)
        module(x).square().sum().backward()
        found[name] = {n: p.grad for n, p in module.named_parameters()} | {"": x.grad}
    assert found["dense"].keys() == found["converted"].keys()
    for name, wanted in found["dense"].items():
        assert wanted.norm() > 0
        assert error(found["converted"][name], wanted) <= 1e-5, name


def patches(sides: Tensor, grid: tuple[int, int], cell: int) -> Tensor:
    """(queries, N) means over the patches of one image, from its granularity map."""
    height, width = grid
    tokens = {}
    for row in range(height):
        for column in range(width):
            side = int(sides[row // cell, column // cell])
            key = (side, row // side, column // side)
            tokens.setdefault(key, []).append(row * width + column)
    means = torch.zeros(len(tokens), height * width, dtype=torch.float64)
    for query, members in enumerate(tokens.values()):
        means[query, members] = 1 / len(members)
    return means


def reference(block: Any, x: Tensor, grid: tuple[int, int], means: Tensor) -> Tensor:
    """The update of one image's (N, C) tokens by its pooled queries, written out in float64."""
    height, width = grid
    attn, queries = block.attn, means @ x
    q, kv = block.norm1(queries), block.norm1(x)
    points = means @ centres(height, width, x).double()
    offsets = attn.offsets(q).unflatten(1, (attn.heads, attn.points, 2))
    places = points[:, None, None] + offsets / torch.tensor([width, height])
    weights = attn.weights(q).unflatten(1, (attn.heads, attn.points)).softmax(-1)
    value = attn.value(kv).unflatten(1, (attn.heads, -1))
    heads = []
    for head in range(attn.heads):
        plane = value[:, head].t().unflatten(1, grid)[None]
        samples = F.grid_sample(plane, 2 * places[None, :, head] - 1, align_corners=False)[0]
        heads.append((samples * weights[:, head]).sum(-1).t())
    y = queries + attn.proj(torch.cat(heads, 1))
    y = y + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(y))))
    return (means > 0).double().t() @ (y - queries)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("size", [(48, 48), (52, 36)])
def test_mixed_granularities_equal_an_independent_reference(
    budget: str, size: tuple[int, int]
) -> None:
    dense, model = pair(0.6, budget)
    x, grid = images(3, size, seed=5), (size[0] // 4, size[1] // 4)
    x[0, :, : size[0] // 2] *= 0.1  # one image is calmer
    x[1, :, :, : size[1] // 3] = 0.0
    maps = dgefx.granularity_maps(model, x)["stages.0.0"]
    assert len(maps.unique()) > 1
    block, seen = model.get_submodule("stages.0.0"), []
    handle = block.register_forward_hook(lambda _m, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        model(x)
    handle.remove()
    ((stream, output),) = seen
    exact = copy.deepcopy(dense.stages[0][0]).double()
    for image in range(3):
        means = patches(maps[image], grid, DGEConfig().region_side)
        with torch.no_grad():
            wanted = reference(exact, stream[image].double(), grid, means)
        # float32: the update is a difference of streams of its own size
        assert error(output[image] - stream[image], wanted) <= 1e-5


@pytest.mark.parametrize("budget", BUDGETS)
def test_gamma_holds_by_torchs_counter(budget: str) -> None:
    dense, model = pair(0.5, budget, depth=3)
    x = images(2, 48, seed=1)
    assert 0.48 <= macs(model, x) / macs(dense, x) <= 0.5


@pytest.mark.parametrize("budget", ["per_image", slow("average")])
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_whole_it_equals_eager(backend: str, budget: str) -> None:
    _, model = pair(0.7, budget)
    x = images(2, 48, seed=3)
    with torch.no_grad():
        wanted = model(x)
        assert error(torch.compile(model, fullgraph=True, backend=backend)(x), wanted) <= 1e-5


@pytest.mark.parametrize("capacity", ["budget", None])
def test_the_dense_training_path_computes_what_the_sparse_one_does(capacity: str | None) -> None:
    dense = randomise(DPVT(**SMALL))
    config = DGEConfig(budget="average", router="linear", capacity=capacity)
    model = dgefx.convert(dense, 0.7, example_inputs=images(2, 48), config=config).train()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "dge_router.gate" in name:
            nn.init.normal_(parameter, std=0.5)
    x, found = images(3, 48, seed=1), {}
    for path in ("sparse", "dense"):
        set_gates(model, path=path)
        found[path] = model(x)
    assert error(found["dense"].detach(), found["sparse"].detach()) <= 1e-5
    found["dense"].square().sum().backward()
    gates = [p.grad for n, p in model.named_parameters() if "dge_router.gate" in n]
    assert gates and all(g.abs().sum() > 0 for g in gates)


def deformable_detr(levels: int) -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"] if levels == 1 else ["stage3", "stage4"],
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_feature_levels=levels,
        num_queries=10,
    )
    torch.manual_seed(0)
    return randomise(transformers.DeformableDetrModel(config)).eval()


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_deformable_detr_encoder_with_one_level_converts(budget: str) -> None:
    dense, config = deformable_detr(1), DGEConfig(budget=budget)
    model = dgefx.convert(dense, 1.0, example_inputs=images(2, (96, 128)), config=config)
    status = {b.name: b.status for b in dgefx.report(model).blocks}
    assert status == {
        "encoder.layers.0": "converted",
        "encoder.layers.1": "converted",
        "decoder.layers.0": "dense",
        "decoder.layers.0.encoder_attn.attn": "dense",
    }
    mask = torch.ones(2, 104, 200, dtype=torch.long)
    mask[1, :, 120:] = 0
    with torch.no_grad():
        for inputs in ({}, {"pixel_mask": mask}):
            found, wanted = (m(images(2, (104, 200), seed=4), **inputs) for m in (model, dense))
            assert error(found.encoder_last_hidden_state, wanted.encoder_last_hidden_state) <= 1e-5
            assert error(found.last_hidden_state, wanted.last_hidden_state) <= 1e-5
        dgefx.set_budget(model, (1 + dgefx.report(model).floor) / 2)
        assert torch.isfinite(model(images(2, (104, 200))).last_hidden_state).all()


def test_several_grids_in_one_stream_are_refused_with_the_reason() -> None:
    report = dgefx.explain(deformable_detr(2), 1.0, example_inputs=images(2, (96, 128)))
    reasons = {b.name: b.reason for b in report.blocks}
    for layer in (0, 1):
        assert "not prefix tokens followed by the grid" in reasons[f"encoder.layers.{layer}"]
    assert all(b.status == "dense" for b in report.blocks)
    assert [b.name for b in report.blocks].count("encoder.layers.0") == 1  # not once per level


def kinds(module: nn.Module) -> list[str]:
    seen = capture(module.eval(), (images(2, 8, channels=16),), {})
    return [core.form.name for core in find_cores(seen.graph, example_of)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_sampled_keys_and_values_belong_to_the_attention_that_reads_them(budget: str) -> None:
    dense = randomise(GridModel(GridBlock(16, DAT(16, fused=True)))).eval()
    config, x = DGEConfig(budget=budget), images(2, 32)
    model = dgefx.convert(dense, 1.0, example_inputs=x, config=config)
    with torch.no_grad():
        for y in (x, images(2, (52, 60), seed=2)):
            assert error(model(y), dense(y)) <= 1e-5
    assert kinds(DAT(16, fused=True)) == ["scaled_dot_product_attention"]
    assert "grid_sample" not in kinds(DAT(16))


@pytest.mark.parametrize("kind", ["affine", "flow", "table"])
def test_resampling_is_no_attention(kind: str) -> None:
    assert kinds(Warp(16, kind)) == []
    with pytest.raises(ValueError, match="no attention blocks found"):
        dgefx.convert(GridModel(GridBlock(16, Warp(16, kind))), example_inputs=images(2, 64))
    # beside a real attention it runs at full resolution
    dense = randomise(GridModel(GridBlock(16, Attention(16), Warp(16, kind)))).eval()
    x = images(2, 32, seed=1)
    model = dgefx.convert(dense, 1.0, example_inputs=x)
    with torch.no_grad():
        assert error(model(x), dense(x)) <= 1e-5


def test_weights_that_are_no_softmax_are_no_attention() -> None:
    with pytest.raises(ValueError, match="no attention blocks found"):
        dgefx.convert(DPVT(**SMALL, softmax=False), example_inputs=images(2, 48))
