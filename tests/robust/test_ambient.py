"""Modes that the caller has entered, other threads and other tracers: the conversion is the same,
and so is what they do."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import dgefx
from dgefx.modes import evaluating
from dgefx.passes.plan.cost import count_macs
from dgefx.precision import full_float32
from tests.helpers import TinyViT, error, images, randomise


@contextmanager
def changed(change: Callable[[Any], None], value: Any, after: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(after)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": lambda: changed(torch.use_deterministic_algorithms, True, False),
    "meta": lambda: changed(torch.set_default_device, "meta", None),
    "float64": lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: changed(torch.set_default_dtype, torch.bfloat16, torch.float32),
}


def dense_model() -> nn.Module:
    return randomise(TinyViT(prefix=1)).eval()


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module, Path]:
    """Converted, converted and calibrated, and where the latter is saved; outside any mode."""
    model = dgefx.convert(dense_model(), 0.6, example_inputs=images(2, 32))
    fitted = calibrated(copy.deepcopy(model))
    folder = tmp_path_factory.mktemp("saved")
    dgefx.save(fitted, folder)
    return model, fitted, folder


def calibrated(model: nn.Module) -> nn.Module:
    return dgefx.calibrate(model, images(4, 32, seed=1), refine_passes=2, progress=False)


def require_trains(model: nn.Module) -> None:
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    model.train()(images(2, 32)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MODES)
def test_modes_of_the_caller_change_nothing(
    name: str, usual: tuple[nn.Module, nn.Module, Path]
) -> None:
    wanted, fitted, folder = usual
    dense, empty, x = dense_model(), dense_model(), images(2, 32)
    pictures = images(4, 32, seed=1)
    with MODES[name]():
        made = dgefx.convert(dense, 0.6, example_inputs=x)
        told = dgefx.explain(dense, 0.6, example_inputs=x)
    assert torch.equal(made(x), wanted(x))
    assert dgefx.report(made) == dgefx.report(wanted) == told
    other = copy.deepcopy(made)
    with MODES[name]():
        # fitted to the same images, which were made outside
        dgefx.calibrate(other, pictures, refine_passes=2, progress=False)
        read = dgefx.load(folder, empty)
        ratio = dgefx.measured_ratio(wanted, pictures)
        maps = dgefx.granularity_maps(fitted, x)
        back = dgefx.revert(wanted)
    assert torch.equal(other(x), fitted(x))
    assert torch.equal(read(x), fitted(x))
    assert torch.equal(back(x), dense(x))
    assert ratio == dgefx.measured_ratio(wanted, pictures)
    assert maps.keys() == dgefx.granularity_maps(fitted, x).keys()
    for model in (made, other, read, back):
        require_trains(model)


def test_model_made_in_inference_mode() -> None:
    x = images(2, 32)
    with torch.inference_mode():
        dense = dense_model()
    require_trains(dgefx.convert(dense, 0.6, example_inputs=x))
    with pytest.warns(UserWarning, match=r"can never be trained.*returns a copy that can") as seen:
        dgefx.convert(dense, 0.6, example_inputs=x, inplace=True)
    assert seen[0].filename == __file__


class Doubled(nn.Module):
    """A model of a process whose default dtype is float64, with a table of that dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyViT()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * torch.linspace(0.5, 1.0, x.shape[-1]))


def test_model_that_relies_on_the_default_dtype() -> None:
    with MODES["float64"]():
        dense = randomise(Doubled()).eval()
        x = images(2, 32)
        model = dgefx.convert(dense, 1.0, example_inputs=x)
        assert error(model(x).detach(), dense(x).detach()) <= 1e-12


# -- threads -----------------------------------------------------------------------------------


def in_threads(*work: Callable[[], None]) -> None:
    """Run all at once; raise what the first of them raised."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as found:
            errors.append(found)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_other_threads_run_their_models_while_one_converts() -> None:
    x, dense = images(2, 32), dense_model()
    other = randomise(TinyViT(order="BHWC")).eval()
    layer = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    tokens = torch.randn(2, 9, 16)
    with torch.no_grad():
        wanted, attended = other(x), layer(tokens, tokens, tokens)[0]
    finished = threading.Event()
    runs = []

    def convert() -> None:
        try:
            for _ in range(2):
                model = dgefx.convert(dense, 1.0, example_inputs=x)
                assert error(model(x).detach(), dense(x).detach()) <= 1e-5
        finally:
            finished.set()

    def run() -> None:
        while not finished.is_set():
            with torch.no_grad():
                assert torch.equal(other(x), wanted)
                assert torch.equal(layer(tokens, tokens, tokens)[0], attended)
            assert type(other.head.weight) is nn.Parameter
            runs.append(1)

    in_threads(convert, run)
    assert runs


def test_nothing_of_torch_is_patched_while_a_block_is_traced() -> None:
    seen = []
    before = nn.Module.__call__, nn.Module.__getattr__

    class Watching(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, fx.Proxy):
                seen.append((nn.Module.__call__, nn.Module.__getattr__) == before)
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    dgefx.convert(TinyViT(make=Watching), 0.6, example_inputs=images(2, 32))
    assert seen and all(seen)


def test_two_threads_convert_at_once() -> None:
    x = images(2, 32)
    models = [randomise(TinyViT(order=order)).eval() for order in ("BNC", "BHWC", "BCHW")]

    def converting(dense: nn.Module) -> Callable[[], None]:
        def convert() -> None:
            model = dgefx.convert(dense, 1.0, example_inputs=x)
            assert error(model(x).detach(), dense(x).detach()) <= 1e-5
            assert len(dgefx.report(model).converted) == 2

        return convert

    in_threads(*(converting(dense) for dense in models))


def test_settings_of_the_process_come_back_when_threads_overlap() -> None:
    model = dense_model()
    entered, left = threading.Event(), threading.Event()
    found = []

    def settings() -> tuple[Any, ...]:
        stance = torch._dynamo.eval_frame._stance.stance
        precision = torch.get_float32_matmul_precision()
        return stance, precision, torch.backends.mha.get_fastpath_enabled()

    def first() -> None:
        with evaluating(model), full_float32():
            entered.set()
            left.wait(30)
        found.append(settings())

    def second() -> None:
        entered.wait(30)
        with evaluating(model), full_float32():
            left.set()
            thread.join()
            found.append(settings())

    torch.set_float32_matmul_precision("high")
    try:
        before = settings()
        thread = threading.Thread(target=first)
        thread.start()
        second()
        assert settings() == before
        assert found[0][:2] == found[1][:2] == ("force_eager", "highest"), "the second one's still"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert count_macs(model, (images(1, 32),), {}) > 0
    assert settings()[2] is before[2]


# -- other tracers -----------------------------------------------------------------------------


def converted_vit() -> nn.Module:
    dense = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, patch_size=8)
    return dgefx.convert(randomise(dense).eval(), 0.6, example_inputs=images(2, 64))


def test_symbolic_trace_keeps_blocks_as_calls() -> None:
    model = dgefx.convert(dense_model(), 0.6, example_inputs=images(2, 32))
    traced = fx.symbolic_trace(model)
    called = {n.target for n in traced.graph.nodes if n.op == "call_module"}
    assert {"blocks.0", "blocks.1"} <= called
    copied = copy.deepcopy(traced)
    stored = io.BytesIO()
    torch.save(traced, stored)
    stored.seek(0)
    read = torch.load(stored, weights_only=False)
    # the grid of every call is reported in the graph too
    for size in ((32, 32), (48, 20), (20, 48)):
        x = images(2, size)
        wanted = model(x)
        assert all(torch.equal(graph(x), wanted) for graph in (traced, copied, read))
    traced.train()(images(2, 32)).sum().backward()
    assert model.blocks[0].training, "the traced model holds the same block"
    assert all(p.grad is not None for p in model.parameters())


def test_feature_extractors_of_torchvision_and_timm() -> None:
    model, x = converted_vit(), images(2, 64)
    features = create_feature_extractor(model, {"blocks.0": "first", "norm": "last"})
    kept: dict[str, Tensor] = {}
    for name in ("blocks.0", "norm"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, output, name=name: kept.setdefault(name, output)
        )
    found = features(x)
    kept.clear()
    wanted = model(x)
    assert torch.equal(found["first"], kept["blocks.0"])
    assert torch.equal(found["last"], kept["norm"])
    assert torch.isfinite(wanted).all()
    from timm.models._features_fx import create_feature_extractor as of_timm

    with pytest.raises(ValueError, match=r"blocks\.0, which has forward hooks.*then convert"):
        of_timm(model, {"blocks.1": "second"})
    again = converted_vit()
    assert torch.equal(of_timm(again, {"head": "head"})(x)["head"], again(x))


class Inlined(nn.Module):
    """A patch embedding whose own output, not a convolution's, has the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, stride=4)


def test_tracing_through_what_reports_the_grid_is_refused() -> None:
    dense = TinyViT()
    dense.embed = Inlined()
    model = dgefx.convert(dense, 0.6, example_inputs=images(2, 32))
    with pytest.raises(ValueError, match=r"traces through Inlined.*as a leaf"):
        fx.symbolic_trace(model)

    class Leaving(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Inlined) or super().is_leaf_module(m, module_qualified_name)

    graph = fx.GraphModule(model, Leaving().trace(model))
    for size in ((48, 20), (20, 48)):
        assert torch.equal(graph(images(1, size)), model(images(1, size)))


def test_block_without_its_model_is_not_traced() -> None:
    block = dgefx.convert(dense_model(), 0.6, example_inputs=images(2, 32)).blocks[0]
    graph = fx.Graph()
    with pytest.raises(ValueError, match="only the model that it is a part of"):
        block(fx.Proxy(graph.placeholder("x")))


def test_no_warnings() -> None:
    with warnings.catch_warnings(), MODES["autocast"]():
        warnings.simplefilter("error")
        dgefx.convert(dense_model(), 0.6, example_inputs=images(2, 32))
