"""`fx.GraphModule`s: their blocks are outlined into modules, and then are blocks like any other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.swin_transformer import SwinTransformer

import dgefx
from dgefx.nn import DGEBlock
from dgefx.passes.frontends.block_extraction import outline
from tests.helpers import Attention, TinyViT, error, images, macs, randomise
from tests.robust.test_grids import Cut, Grids, Model

X = images(2, 32)


class Split(nn.Module):
    """Blocks without containers: norms, attentions and MLPs in lists of their own, one scale."""

    def __init__(self, dim: int = 32, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, dim, 4, stride=4)
        self.scale = nn.Parameter(torch.ones(dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth))
        self.attentions = nn.ModuleList(Attention(dim, 2) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for i in range(len(self.mlps)):
            x = x + self.scale * self.attentions[i](self.norms[2 * i](x))
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return x.mean(1)


class SplitPlanes(Split):
    """The stream is (B, C, H, W); the MLP is added to it in this layout or in its own."""

    def __init__(self, own_layout: bool) -> None:
        super().__init__()
        self.own_layout = own_layout

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(len(self.mlps)):
            y = self.norms[2 * i](x.flatten(2).transpose(1, 2))
            x = x + self.attentions[i](y).transpose(1, 2).reshape(x.shape)
            y = x.permute(0, 2, 3, 1)
            z = self.mlps[i](self.norms[2 * i + 1](y))
            x = (y + z).permute(0, 3, 1, 2) if self.own_layout else x + z.permute(0, 3, 1, 2)
        return x.mean((2, 3))


class PostNorm(nn.Module):
    """x = norm(x + f(x)), a bias table shared by all blocks, sizes read once for all."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, dim, 4, stride=4)
        self.table = nn.Parameter(torch.randn(1, 2, 64, 64))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(dim, 3 * dim),
                    "norm1": nn.LayerNorm(dim),
                    "fc1": nn.Linear(dim, 2 * dim),
                    "fc2": nn.Linear(2 * dim, dim),
                    "norm2": nn.LayerNorm(dim),
                }
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            q, k, v = layer["qkv"](x).reshape(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=2 * self.table)
            x = layer["norm1"](x + y.transpose(1, 2).reshape(b, n, c))
            x = layer["norm2"](x + layer["fc2"](F.gelu(layer["fc1"](x))))
        return self.norm(x).mean(1)


class Tower(nn.Module):
    """A graph module inside an ordinary model."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(randomise(model).eval())


def tensors(output: Any) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else [output]


def assert_same(found: Any, wanted: Any, bound: float = 1e-5) -> None:
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    assert pairs and all(error(a, b) < bound for a, b in pairs)


def torchvision_extractor() -> nn.Module:
    model = randomise(VisionTransformer(32, 8, 2, 2, 32, 64)).eval()
    return create_feature_extractor(model, ["encoder.layers.encoder_layer_0", "heads"])


def timm_extractor() -> nn.Module:
    timm = pytest.importorskip("timm")
    from timm.layers import create_feature_extractor as create

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, patch_size=4)
    return create(randomise(model).eval(), ["blocks.0", "head"])


KINDS = {
    "BNC": (lambda: traced(TinyViT(dim=32, prefix=1)), ["blocks.0", "blocks.1"]),
    "BHWC": (lambda: traced(TinyViT(dim=32, order="BHWC")), ["blocks.0", "blocks.1"]),
    "BCHW": (lambda: traced(TinyViT(dim=32, order="BCHW")), ["blocks.0", "blocks.1"]),
    "lists of planes": (lambda: traced(SplitPlanes(False)), ["dge_block_0", "dge_block_1"]),
    "lists, MLP in its layout": (lambda: traced(SplitPlanes(True)), ["dge_block_0", "dge_block_1"]),
    "lists": (lambda: traced(Split()), ["dge_block_0", "dge_block_1"]),
    "post-norm": (lambda: traced(PostNorm()), ["layers.0", "layers.1"]),
    "torchvision": (
        torchvision_extractor,
        ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"],
    ),
    "timm": (timm_extractor, ["blocks.0", "blocks.1"]),
    "inside": (
        lambda: Tower(traced(TinyViT(dim=32))).eval(),
        ["backbone.blocks.0", "backbone.blocks.1"],
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_converts_exactly_and_keeps_keys(kind: str) -> None:
    make, names = KINDS[kind]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = model(X)
    code = [m.code for m in model.modules() if isinstance(m, fx.GraphModule)]

    finest = dgefx.convert(model, 1.0, example_inputs=X)
    assert [block.name for block in dgefx.report(finest).converted] == names
    assert_same(finest(X), wanted)
    converted = dgefx.convert(model, 0.6, example_inputs=X)
    if kind != "torchvision":  # the counter cannot see into nn.MultiheadAttention's fast path
        ratio = macs(converted, X) / macs(model, X)
        assert ratio == pytest.approx(dgefx.report(converted).ratio, abs=5e-3)
    pairs = zip(tensors(converted(X)), tensors(wanted), strict=True)
    assert any(error(a, b) > 1e-3 for a, b in pairs)
    for result in (converted, copy.deepcopy(converted)):
        assert sorted(result.state_dict()) == sorted(before)
        result.load_state_dict(before)
        dgefx.set_budget(result, 1.0)
        assert_same(result(X), wanted)
        dense = dgefx.revert(result)
        assert_same(dense(X), wanted, 1e-6)
        assert sorted(dense.state_dict()) == sorted(before)
        assert not any(isinstance(m, DGEBlock) for m in dense.modules())

    # the user's model is as it was
    assert list(model.state_dict()) == list(before)
    assert [m.code for m in model.modules() if isinstance(m, fx.GraphModule)] == code
    assert torch.equal(tensors(model(X))[-1], tensors(wanted)[-1])


def test_the_whole_block_is_cut_out() -> None:
    """Attention and MLP: what is left outside is the embedding and the head."""
    planes = [traced(SplitPlanes(own_layout)) for own_layout in (False, True)]
    for model in (traced(TinyViT(dim=32)), traced(PostNorm()), traced(Split()), *planes):
        outline(model, ((X,), {}))
        rest = [str(n.target) for n in model.graph.nodes if n.op == "call_module"]
        assert not [name for name in rest if "mlp" in name or "norm1" in name or "fc" in name]
        assert sum("blocks" in n or "layers" in n or "dge_block" in n for n in rest) == 2


@pytest.mark.parametrize("kind", ["BNC", "lists"])
def test_in_place_shares_parameters_and_keeps_hooks(kind: str) -> None:
    model = KINDS[kind][0]()
    wanted, parameters = model(X), dict(model.named_parameters())
    seen: list[Any] = []
    inner = next(m for m in model.modules() if isinstance(m, nn.GELU))
    inner.register_forward_hook(lambda *_: seen.append(1))
    assert dgefx.convert(model, 0.7, example_inputs=X, inplace=True) is model
    seen.clear()
    model(X)
    assert seen
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is value for name, value in parameters.items())
    assert dgefx.revert(model, inplace=True) is model
    assert torch.equal(model(X), wanted)
    assert not any(name.startswith("dge_") for name, _ in model.named_modules())


@pytest.mark.parametrize("kind", ["BNC", "lists"])
def test_trains(kind: str) -> None:
    model = dgefx.convert(KINDS[kind][0](), 0.7, example_inputs=X).train()
    model(X).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["BNC", "lists"])
def test_saves_loads_calibrates_and_pickles(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind][0]()
    converted = dgefx.convert(model, 0.7, example_inputs=X)
    dgefx.calibrate(converted, images(4, 32), refine_passes=1, progress=False)
    dgefx.save(converted, tmp_path)
    found = converted(X)
    for other in (
        dgefx.load(tmp_path, KINDS[kind][0]()),
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
    ):
        assert_same(other(X), found, 1e-6)
        assert dgefx.report(other).calibrated
    with pytest.raises(ValueError, match="not a converted one"):
        dgefx.report(dgefx.revert(converted))


def test_blocks_that_are_leaves_stay_modules() -> None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return type(m).__name__ == "Block" or super().is_leaf_module(m, module_qualified_name)

    dense = randomise(TinyViT(dim=32, prefix=1)).eval()
    model = fx.GraphModule(dense, Tracer().trace(dense))
    converted = dgefx.convert(model, 0.7, example_inputs=X)
    assert [b.name for b in dgefx.report(converted).converted] == ["blocks.0", "blocks.1"]
    assert type(converted.get_submodule("blocks.0")) is DGEBlock
    dgefx.set_budget(converted, 1.0)
    assert error(converted(X), dense(X)) < 1e-5


def test_filter_fn_gets_names_of_outlined_blocks() -> None:
    seen = []

    def keep(module: nn.Module, name: str) -> bool:
        seen.append((name, sum(p.numel() for p in module.parameters()) > 0))
        return name != "dge_block_0"

    report = dgefx.explain(traced(Split()), 0.9, example_inputs=X, filter_fn=keep)
    assert seen == [("dge_block_0", True), ("dge_block_1", True)]
    assert [b.name for b in report.converted] == ["dge_block_1"]


def test_other_image_sizes_and_batches() -> None:
    dense = randomise(TinyViT(dim=32)).eval()
    converted = dgefx.convert(fx.symbolic_trace(dense), 1.0, example_inputs=X)
    other = images(3, (40, 24))
    assert error(converted(other), dense(other)) < 1e-5


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_values_that_nothing_reads(kind: str) -> None:
    """A tracer leaves the C of `B, N, C = x.shape` and what `x, _ = attention(x)` drops."""
    if kind == "timm":
        options = {"depth": 2, "img_size": 32, "patch_size": 8, "embed_dim": 48}
        model: nn.Module = timm.create_model("vit_tiny_patch16_224", **options)
    else:
        model = VisionTransformer(32, 8, 2, 3, 48, 64)
    dense = traced(model)
    code, wanted = dense.code, dense(X)
    converted = dgefx.convert(dense, 1.0, example_inputs=X)
    assert len(dgefx.report(converted).converted) == 2
    assert_same(converted(X), wanted)
    assert dense.code == dgefx.revert(converted).code == code


def torchvision_swin(dropout: float = 0.0) -> nn.Module:
    """Functions that are told `training`, in graphs for both modes."""
    model = SwinTransformer([4, 4], 32, [2], [2], [4, 4], 2.0, 0.0, dropout, 0.0, num_classes=5)
    return create_feature_extractor(randomise(model).eval(), ["features.1.1", "head"])


class RatesWritten(Split):
    """Dropout at a rate that is a number in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for i in range(len(self.mlps)):
            y = self.attentions[i].qkv(self.norms[2 * i](x))
            q, k, v = y.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            rate = 0.1 if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
            x = x + y.transpose(1, 2).flatten(2)
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return x.mean(1)


def runs(model: nn.Module) -> int:
    """Converted blocks that run."""
    ran: list[int] = []
    blocks = [m for m in model.modules() if isinstance(m, DGEBlock)]
    handles = [block.register_forward_hook(lambda *_: ran.append(1)) for block in blocks]
    model(X)
    for handle in handles:
        handle.remove()
    return len(ran)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("make", [torchvision_extractor, torchvision_swin])
def test_graphs_for_training_and_evaluation(make: Callable[[], nn.Module], trains: bool) -> None:
    dense = make().train(trains)
    wanted = dense(X)
    converted = dgefx.convert(dense, 1.0, example_inputs=X)
    assert all(module.training is trains for module in converted.modules())
    for model in (converted, copy.deepcopy(converted)):
        for mode in (True, False, True):
            assert runs(model.train(mode)) == 2
            assert_same(model(X), wanted)
    back = dgefx.revert(converted.train(not trains))
    for mode in (True, False):
        assert_same(back.train(mode)(X), wanted, 1e-6)
        assert back.code == dense.train(mode).code


def test_graphs_for_both_modes_tell_the_grid() -> None:
    """Of patches that no module lays out: by the image that the graph takes."""
    dense = create_feature_extractor(Model(Cut, in_root=True).eval(), ["mean"])
    converted = dgefx.convert(dense, 1.0, example_inputs=images(2, 64))
    other = images(2, (32, 128))
    for mode in (True, False, True):
        with Grids(converted.train(mode)) as grids:
            assert_same(converted(other), dense(other))
        assert grids == [(4, 16), (4, 16)]
    assert dgefx.revert(converted).code == dense.train().code


def test_functions_in_blocks_are_told_the_mode() -> None:
    converted = dgefx.convert(torchvision_swin(0.5), 1.0, example_inputs=X)
    for mode in (True, False):
        first, second = (converted.train(mode)(X)["head"] for _ in range(2))
        assert torch.equal(first, second) is not mode


def test_a_graph_for_training_with_other_blocks_raises() -> None:
    dense = create_feature_extractor(randomise(RatesWritten()).eval(), ["mean"])
    converted = dgefx.convert(dense, 1.0, example_inputs=X)
    for model in (converted, copy.deepcopy(converted)):
        assert_same(model.eval()(X), dense.eval()(X))
        assert runs(model) == 2
        with pytest.raises(RuntimeError, match="convert the model that the graphs were traced"):
            model.train()(X)
    back = dgefx.revert(converted).train()
    assert back.code == dense.train().code


def test_a_tapped_inner_value_is_reported() -> None:
    dense = randomise(TinyViT(dim=32)).eval()
    graph = fx.symbolic_trace(dense)
    inner = next(n for n in graph.graph.nodes if n.target == "blocks.0.attn.qkv")
    output = next(n for n in graph.graph.nodes if n.op == "output")
    output.args = ((output.args[0], inner),)
    graph.recompile()
    report = dgefx.explain(graph, 0.9, example_inputs=X)
    assert [b.name for b in report.converted] == ["blocks.1"]
    assert len(report.blocks) == 2
