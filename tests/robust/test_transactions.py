"""Changes in place happen as a whole or not at all; and what cannot be changed says the way out."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor

import dgefx
from dgefx.nn import DGEBlock
from dgefx.nn.outlined import graphs_of
from dgefx.passes.frontends import block_extraction
from tests.helpers import TinyViT, error, images, randomise
from tests.robust.user_blocks import DIM, UserAttention, UserModel

X = images(2, 32)
#: the package has a function of this name
conversion = importlib.import_module("dgefx.convert")
LINEAR = dgefx.DGEConfig(router="linear")


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that a caller could find changed: identities, order, modes, hooks, values."""
    found: list[Any] = [torch.get_rng_state().tolist()]
    for name, module in model.named_modules():
        found += [name, id(module), type(module), list(vars(module)), module.training]
        for key, value in vars(module).items():
            if isinstance(value, dict):
                found += [key, id(value), [(k, id(v)) for k, v in value.items()]]
            elif not isinstance(value, (fx.Graph, fx.graph.CodeGen)):
                found += [key, id(value) if not isinstance(value, (str, int)) else value]
        if isinstance(module, fx.GraphModule):
            found += [module.code, id(type(module).forward)]
            for key, graph in graphs_of(module).items():
                found += [key, id(graph), id(graph.owning_module), str(graph)]
                found.append(all(node.graph is graph for node in graph.nodes))
    for value in [*model.parameters(), *model.buffers()]:
        found += [value.requires_grad, value.grad is None, value.tolist()]
    return found


def plain() -> nn.Module:
    """Modes and requires_grad differ from module to module, and there are hooks."""
    model = randomise(TinyViT(prefix=1)).train()
    model.blocks[0].attn.eval()
    model.blocks[1].mlp.requires_grad_(False)
    model.blocks[0].register_forward_hook(lambda _m, _a, _o: None)
    model.also = model.blocks[1]
    return model


def traced() -> nn.Module:
    model = fx.symbolic_trace(randomise(TinyViT(prefix=1)).eval())
    model.meta["note"] = {"of": "the user"}
    return model


class Switching(nn.Module):
    """A module with graphs for training and for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        dense = randomise(TinyViT(prefix=1)).eval()
        self.features = create_feature_extractor(dense, ["head"])

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)["head"]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "modules": plain,
    "graph": traced,
    "graphs": lambda: Switching().eval(),
}


def fail_late(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, calls: int) -> None:
    """`place.name` does its work `calls` times, then does it once more and is interrupted."""
    real, left = getattr(place, name), [calls]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return result

    monkeypatch.setattr(place, name, interrupted)


#: steps of an installation, and how often each runs before it fails
STAGES: dict[str, tuple[Any, str, int]] = {
    "outline": (conversion, "apply_extractions", 0),
    "first cut": (block_extraction, "_cut_out", 2),  # after the two of the working copy
    "second cut": (block_extraction, "_cut_out", 3),
    "first block": (conversion, "install", 0),
    "record": (conversion, "set_record", 0),
    "gates": (conversion, "open_gates", 0),
    "calibration": (conversion, "calibrate", 0),
}


@pytest.mark.parametrize("kind", MODELS)
def test_convert_in_place_is_undone_at_any_stage(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind]()
    wanted = copy.deepcopy(model).eval()(X)
    analysis = conversion.analyse(model, X, LINEAR, None)
    before = fingerprint(model)
    for name, (place, step, calls) in STAGES.items():
        if place is block_extraction and kind == "modules":
            continue
        with monkeypatch.context() as patch:
            patch.setattr(conversion, "analyse", lambda *_args: analysis)
            # of an analysis that was made before, only the model's own cuts are to come
            fail_late(patch, place, step, calls - 2 if place is block_extraction else calls)
            options = {"calibration": images(4, 32)} if step == "calibrate" else {}
            if step == "calibrate":  # the real one takes minutes; what it leaves is the same
                patch.setattr(conversion, "calibrate", half_calibrated)
            with pytest.raises(KeyboardInterrupt):
                dgefx.convert(model, 0.6, example_inputs=X, config=LINEAR, inplace=True, **options)
        assert fingerprint(model) == before, name
    assert error(copy.deepcopy(model).eval()(X), wanted) == 0.0
    # and it is not so broken that it could not be converted
    assert dgefx.convert(model, 1.0, example_inputs=X, inplace=True) is model
    assert error(model.eval()(X), wanted) < 1e-5


def half_calibrated(model: nn.Module, _images: Any) -> None:
    for module in model.modules():
        module.eval()
        if isinstance(module, DGEBlock):
            module.dge_router.set_importance(torch.ones(16))
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", MODELS)
def test_revert_in_place_is_undone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dgefx.convert(MODELS[kind](), 0.6, example_inputs=X)
    before, wanted = fingerprint(model), copy.deepcopy(model).eval()(X)
    for name, calls in (("put", 0), ("put", 1), ("restore", 0)):
        with monkeypatch.context() as patch:
            fail_late(patch, conversion, name, calls)
            with pytest.raises(KeyboardInterrupt):
                dgefx.revert(model, inplace=True)
        assert fingerprint(model) == before, (name, calls)
    assert error(model.eval()(X), wanted) == 0.0


def test_set_budget_and_calibrate_keep_the_last_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dgefx.convert(plain(), 0.6, example_inputs=X)

    def state() -> Any:
        routers = [m.dge_router for m in model.modules() if isinstance(m, DGEBlock)]
        return [(r.plan, r.open, r.importance, r.correction) for r in routers]

    before, report, kept = fingerprint(model), dgefx.report(model), state()
    with monkeypatch.context() as patch:
        fail_late(patch, dgefx.record, "open_gates", 0)
        with pytest.raises(KeyboardInterrupt):
            dgefx.set_budget(model, 0.8)
        with pytest.raises(KeyboardInterrupt):
            dgefx.calibrate(model, images(4, 32), 0.8, refine_passes=1, progress=False)
    assert dgefx.report(model) == report and state() == kept
    assert fingerprint(model) == before


def test_load_leaves_the_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = plain()
    dgefx.save(dgefx.convert(dense, 0.6, example_inputs=X), tmp_path)
    before = fingerprint(dense)
    fail_late(monkeypatch, conversion, "install", 0)
    with pytest.raises(KeyboardInterrupt):
        dgefx.load(tmp_path, dense)
    assert fingerprint(dense) == before


@torch.no_grad()
def test_set_input_size_after_the_conversion() -> None:
    """Right or refused with the way out, which works."""
    options = {"img_size": 64, "window_size": 4, "depths": (2, 1), "embed_dim": 32}
    dense = timm.create_model("swin_tiny_patch4_window7_224", num_heads=(2, 4), **options)
    dense = randomise(dense).eval()
    model, larger = dgefx.convert(dense, 1.0), images(2, 96)
    wanted = copy.deepcopy(dense)
    wanted.set_input_size((96, 96))
    with pytest.raises(
        ValueError,
        match=r"block layers\.0\.blocks\.0 .*again at that size.*dgefx\.revert",
    ):
        model.set_input_size((96, 96))
    model = dgefx.revert(model)
    model.set_input_size((96, 96))
    model = dgefx.convert(model, 1.0, example_inputs=larger)
    assert error(model(larger), wanted(larger)) < 1e-5


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    options = {"depth": 1, "img_size": 64, "patch_size": 8}
    return randomise(timm.create_model("vit_tiny_patch16_224", **options)).eval()


def test_pruned_before_the_conversion(vit: nn.Module) -> None:
    model, x = copy.deepcopy(vit), images(2, 64)
    prune.l1_unstructured(model.blocks[0].mlp.fc1, "weight", 0.5)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.weight .*prune\.remove\("):
        dgefx.convert(model)
    prune.remove(model.blocks[0].mlp.fc1, "weight")
    assert error(dgefx.convert(model, 1.0)(x), model(x)) < 1e-5


@torch.no_grad()
def test_pruned_after_the_conversion(vit: nn.Module) -> None:
    """Masks go on to act on weights that change, also on those of a fused projection."""
    model, x = dgefx.convert(vit, 1.0), images(2, 64)
    dense = dgefx.revert(model)
    for each in (model, dense):
        block = each.blocks[0]
        for layer in (block.attn.qkv, block.mlp.fc1):
            prune.l1_unstructured(layer, "weight", 0.5)
            layer.weight_orig.mul_(1.5)
    assert error(model(x), dense(x)) < 1e-5
    for each in (model, dense):
        prune.l1_unstructured(each.blocks[0].norm1, "weight", 0.5)
        each.blocks[0].norm1.weight_orig.mul_(1.5)
    assert error(model(x), dense(x)) < 1e-5


class Gained(UserAttention):
    """Read by the block, which does not call the module."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.randn(DIM // 2))

    def change(self, q: torch.Tensor) -> torch.Tensor:
        return q * self.slope


@torch.no_grad()
def test_pruned_where_the_block_reads_it() -> None:
    dense, x = UserModel().eval(), images(2, 64)
    for block in dense.blocks:
        block.attn = Gained().eval()
    model = dgefx.convert(dense, 1.0, example_inputs=x)
    assert error(model(x), dense(x)) < 1e-5
    for each in (model, dense):
        prune.l1_unstructured(each.blocks[0].attn, "slope", 0.5)
        each.blocks[0].attn.slope_orig.mul_(1.5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for call in (model, compiled):
        with pytest.raises(
            (ValueError, torch._dynamo.exc.Unsupported), match=r"block blocks\.0.*attn.*prune"
        ):
            call(x)
    torch._dynamo.reset()
    for each in (model, dense):
        prune.remove(each.blocks[0].attn, "slope")
    assert error(model(x), dense(x)) < 1e-5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_quantize_dynamic(vit: nn.Module) -> None:
    from torch.ao.quantization import quantize_dynamic

    x, dense = images(2, 64), quantize_dynamic(vit, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="convert the model first and quantise"):
        dgefx.convert(dense)
    model = quantize_dynamic(dgefx.convert(vit, 1.0), {nn.Linear}, dtype=torch.qint8)
    assert error(dense(x), vit(x)) > 1e-4
    assert error(model(x), dense(x)) < 1e-5


def test_a_model_without_attention() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    report = dgefx.explain(model, 0.5, example_inputs=X)
    assert (report.blocks, report.ratio, report.floor, report.macs) == ((), 1.0, 1.0, 97200)
    assert "no attention blocks found" in " ".join(str(report).split())
    with pytest.raises(ValueError, match="no attention blocks found in Sequential"):
        dgefx.convert(model, 0.5, example_inputs=X)


def test_memory_that_nothing_fills_is_refused(vit: nn.Module) -> None:
    model = dgefx.convert(vit, 1.0).to("meta")
    assert model(images(2, 64).to("meta")).is_meta
    with pytest.raises(ValueError, match=r"meta device.*Put the dense model on its device first"):
        model.to_empty(device="cpu")
