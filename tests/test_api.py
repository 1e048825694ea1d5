"""The public calls: what they return, what they keep, and how they fail."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import dgefx
from dgefx.nn import DGEBlock
from dgefx.passes.frontends.inputs import resolve_inputs
from tests.helpers import Block, TinyViT, error, images, randomise

X = images(2, 32)


@pytest.fixture
def dense() -> nn.Module:
    return randomise(TinyViT(prefix=1)).eval()


@pytest.fixture
def converted(dense: nn.Module) -> nn.Module:
    return dgefx.convert(dense, 0.6, example_inputs=X)


def snapshot(model: nn.Module) -> Any:
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(n, type(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules()],
        sorted(vars(model)),
    )


def assert_unchanged(model: nn.Module, before: Any) -> None:
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][k], v) for k, v in before[0].items())


def test_returns_a_new_model_of_the_same_class(dense: nn.Module, converted: nn.Module) -> None:
    assert type(converted) is type(dense)
    assert not any(isinstance(m, DGEBlock) for m in dense.modules())
    assert list(converted.state_dict()) == list(dense.state_dict())
    converted.load_state_dict(dense.state_dict())
    assert converted.forward_features(X).shape == dense.forward_features(X).shape
    own = {p.data_ptr() for p in dense.parameters()}
    assert not any(p.data_ptr() in own for p in converted.parameters())


def test_mode_and_dtype_are_kept(dense: nn.Module) -> None:
    for training in (True, False):
        model = copy.deepcopy(dense).train(training).to(torch.bfloat16)
        result = dgefx.convert(model, 0.6, example_inputs=X)
        assert all(m.training is training for m in result.modules())
        assert all(p.dtype == torch.bfloat16 for p in result.parameters())
        assert result(X.bfloat16()).dtype == torch.bfloat16


def test_inplace(dense: nn.Module) -> None:
    parameters = list(dense.parameters())
    result = dgefx.convert(dense, 0.6, example_inputs=X, inplace=True)
    assert result is dense
    assert all(a is b for a, b in zip(parameters, dense.parameters(), strict=True))
    assert any(isinstance(m, DGEBlock) for m in dense.modules())


def test_linear_router_only_adds_keys(dense: nn.Module) -> None:
    config = dgefx.DGEConfig(router="linear")
    model = dgefx.convert(dense, 0.6, example_inputs=X, config=config)
    added = set(model.state_dict()) - set(dense.state_dict())
    assert set(dense.state_dict()) <= set(model.state_dict())
    assert added == {f"blocks.{i}.dge_router.gate.{n}" for i in (0, 1) for n in ("weight", "bias")}
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert set(missing) == added and not unexpected


def test_hooks_stay(dense: nn.Module) -> None:
    seen: list[tuple[int, ...]] = []
    handle = dense.blocks[0].register_forward_hook(lambda _m, _a, out: seen.append(out.shape))
    model = dgefx.convert(dense, 0.6, example_inputs=X)
    seen.clear()  # hooks are part of the model: they also run on the copies that are analysed
    model(X)
    assert seen == [(2, 65, 16)]
    handle.remove()


@pytest.mark.parametrize("kind", [tuple, dict, list])
def test_example_input_kinds(dense: nn.Module, kind: type) -> None:
    given: Any = {"x": X} if kind is dict else kind([X])
    assert dgefx.report(dgefx.convert(dense, 0.6, example_inputs=given)).ratio <= 0.605


def test_one_example_image_is_enough(dense: nn.Module) -> None:
    assert len(dgefx.report(dgefx.convert(dense, 0.6, example_inputs=X[:1])).converted) == 2


def test_finds_the_input_size_itself() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=96)
    assert dgefx.explain(model, 0.9).converted[0].grid == (6, 6)


def test_filter_fn(dense: nn.Module) -> None:
    report = dgefx.explain(
        dense, 0.9, example_inputs=X, filter_fn=lambda module, name: name == "blocks.1"
    )
    assert [(b.name, b.status) for b in report.blocks] == [
        ("blocks.0", "dense"),
        ("blocks.1", "converted"),
    ]
    assert report.blocks[0].reason == "left out by filter_fn"


def test_explain_changes_nothing_and_agrees(dense: nn.Module, converted: nn.Module) -> None:
    before = snapshot(dense)
    report = dgefx.explain(dense, 0.6, example_inputs=X)
    assert_unchanged(dense, before)
    assert report == dgefx.report(converted)


def test_report_prints_a_table(converted: nn.Module) -> None:
    text = str(dgefx.report(converted))
    for part in ("blocks.0", "blocks.1", "converted", "MAC ratio 0.5", "8x8+1", "floor"):
        assert part in text


def test_revert(dense: nn.Module, converted: nn.Module) -> None:
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(0.01)
    converted.train()
    back = dgefx.revert(converted)
    assert any(isinstance(m, DGEBlock) for m in converted.modules())
    assert not any(isinstance(m, DGEBlock) for m in back.modules())
    assert all(m.training for m in back.modules())
    assert [(n, type(m)) for n, m in back.named_modules()] == [
        (n, type(m)) for n, m in dense.named_modules()
    ]
    assert all(not m._forward_hooks for m in back.modules())
    moved = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.01)
    assert error(back.eval()(X), moved(X)) == 0.0
    assert dgefx.revert(converted, inplace=True) is converted
    assert dgefx.report(dgefx.convert(converted, 0.6, example_inputs=X)).ratio <= 0.605


@pytest.mark.parametrize("router", ["detail", "linear"])
def test_save_and_load(dense: nn.Module, tmp_path: Path, router: str) -> None:
    config = dgefx.DGEConfig(router=router, granularities=(1, 2), region=4)
    model = dgefx.convert(dense, 0.7, example_inputs=X, config=config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02)
    dgefx.save(model, tmp_path / "m")
    fresh = TinyViT(prefix=1).eval()
    back = dgefx.load(tmp_path / "m", fresh)
    assert error(back(X), model(X)) == 0.0
    assert dgefx.report(back).ratio == dgefx.report(model).ratio
    assert dgefx.report(back).gamma == 0.7
    assert not any(isinstance(m, DGEBlock) for m in fresh.modules())
    with pytest.raises(ValueError, match="does not fit"):
        dgefx.load(tmp_path / "m", TinyViT(prefix=1, depth=3))


def test_deepcopy_and_pickle(converted: nn.Module) -> None:
    wanted = converted(X)
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(twin(X), wanted)
        assert torch.equal(twin.train()(X), converted.train()(X))
        converted.eval()
        own = {p.data_ptr() for p in converted.parameters()}
        assert not any(p.data_ptr() in own for p in twin.parameters())
        assert error(dgefx.revert(twin).eval()(X), dgefx.revert(converted).eval()(X)) == 0.0
        # the twin's blocks and the dense blocks they keep share parameters
        for block in twin.modules():
            if isinstance(block, DGEBlock):
                kept = dict(block.dense_block().named_parameters())
                assert all(p is kept[n] for n, p in block.named_parameters() if n in kept)


def test_config_round_trips() -> None:
    config = dgefx.DGEConfig(granularities=(1, 3), region=6, routing="layer", router="detail")
    assert dgefx.DGEConfig.from_json(config.to_json()) == config
    # defaults stay defaults when other fields are replaced
    other = dataclasses.replace(dgefx.DGEConfig(), router="linear", granularities=(1, 3))
    assert (other.routing_mode, other.region_side) == ("region", 3)
    assert dgefx.DGEConfig.from_json(other.to_json()) == other
    assert json.loads(config.to_json())["version"] == 1
    with pytest.raises(ValueError, match="does not know the fields \\['gammma'\\]"):
        dgefx.DGEConfig.from_dict({"gammma": 1})
    with pytest.raises(ValueError, match="version 99"):
        dgefx.DGEConfig.from_dict({"version": 99})
    with pytest.raises(AttributeError):
        config.region = 3  # type: ignore[misc]


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("gamma", "raised", "message"),
    [
        ("0.5", TypeError, "gamma must be a number"),
        (None, TypeError, "gamma must be a number"),
        (True, TypeError, "gamma must be a number"),
        (0, ValueError, r"gamma must be in \(0, 1\]"),
        (-0.5, ValueError, r"gamma must be in \(0, 1\]"),
        (1.5, ValueError, r"gamma must be in \(0, 1\]"),
        (float("nan"), ValueError, r"gamma must be in \(0, 1\]"),
        (0.01, ValueError, "floor of 0.*coarsest"),
    ],
)
def test_bad_gamma(dense: nn.Module, gamma: Any, raised: type[Exception], message: str) -> None:
    before = snapshot(dense)
    for inplace in (False, True):
        with pytest.raises(raised, match=message):
            dgefx.convert(dense, gamma, example_inputs=X, inplace=inplace)
    assert_unchanged(dense, before)


@pytest.mark.parametrize(
    ("options", "raised", "message"),
    [
        ({"example_inputs": None}, ValueError, "no example input"),
        ({"example_inputs": "image"}, TypeError, "example_inputs must be"),
        ({"example_inputs": images(2, 32, channels=4)}, ValueError, "the model rejects them"),
        ({"example_inputs": X[:0]}, ValueError, "an empty tensor"),
        ({"config": {"region": 4}}, TypeError, "config must be"),
        ({"filter_fn": "blocks"}, TypeError, "filter_fn must be callable"),
        ({"calibration": 3}, TypeError, "calibration must be an iterable"),
        ({"filter_fn": lambda m, n: False}, ValueError, "blocks.1: left out by filter_fn"),
    ],
)
def test_bad_arguments(
    dense: nn.Module, options: dict[str, Any], raised: type[Exception], message: str
) -> None:
    before = snapshot(dense)
    with pytest.raises(raised, match=message):
        dgefx.convert(dense, 0.6, **{"example_inputs": X, "inplace": True, **options})
    assert_unchanged(dense, before)


class Counts(nn.Module):
    """A model that takes batches of some sizes only, and keeps those that it was given."""

    def __init__(self, model: nn.Module, taken: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.taken, self.given = model, taken, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given.append(len(x))
        if len(x) not in self.taken:
            raise RuntimeError(f"not {len(x)} images")
        return self.model(x)


@pytest.mark.parametrize(
    ("taken", "given", "tried", "message"),
    [
        ((1, 2), 1, [1, 2], None),
        ((1, 2), 2, [2], None),
        ((1,), 1, [1, 2], "takes one image but not a batch of two.*not 2 images"),
        ((2,), 1, [1], "the model rejects them.*not 1 images"),
        ((1,), 2, [2], "the model rejects them.*not 2 images"),
    ],
)
def test_examples_are_tried_once_as_given_and_once_as_two_images(
    dense: nn.Module, taken: tuple[int, ...], given: int, tried: list[int], message: str | None
) -> None:
    model, x = Counts(dense, taken).eval(), images(given, 32)
    if message is None:
        (args, _), output = resolve_inputs(model, x)
        assert len(args[0]) == len(output) == 2
    else:
        with pytest.raises(ValueError, match=message):
            resolve_inputs(model, x)
    assert model.given == tried


class TakesList(nn.Module):
    """As detectors do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(self.model(torch.stack(images)))


@pytest.mark.parametrize("count", [1, 2])
def test_a_list_of_images_is_an_example(dense: nn.Module, count: int) -> None:
    given = list(images(count, 32))
    model = TakesList(dense)
    converted = dgefx.convert(model, 1.0, example_inputs=(given,))
    assert (
        dgefx.report(converted).macs_dense
        == dgefx.explain(dense, 1.0, example_inputs=images(2, 32)).macs_dense
    )
    assert torch.allclose(converted(given)[0], model(given)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "raised", "message"),
    [
        ({"granularities": (2, 4)}, ValueError, "start with 1"),
        ({"granularities": (1, 2, 3)}, ValueError, "divide the next"),
        ({"granularities": (1, 4, 2)}, ValueError, "divide the next"),
        ({"granularities": ()}, TypeError, "must be integers"),
        ({"granularities": (1, 2.0)}, TypeError, "must be integers"),
        ({"granularities": 4}, TypeError, "tuple of patch sides"),
        ({"region": 6}, ValueError, "multiple of the coarsest granularity 4, found 6"),
        ({"region": 0}, ValueError, "multiple of the coarsest"),
        ({"routing": "token"}, ValueError, "routing must be one of"),
        ({"router": "mlp"}, ValueError, "router must be one of"),
        ({"budget": "total"}, ValueError, "budget must be one of"),
    ],
)
def test_bad_config(fields: dict[str, Any], raised: type[Exception], message: str) -> None:
    with pytest.raises(raised, match=message):
        dgefx.DGEConfig(**fields)


def test_an_argument_the_example_left_out_is_refused() -> None:
    class Masked(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x if mask is None else x * mask))

    class Model(TinyViT):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = self.embed(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x) if mask is None else block(x, mask)
            return x.mean(1)

    dense = Model()
    dense.blocks = nn.ModuleList(Masked(16, "BNC") for _ in range(2))
    model = dgefx.convert(dense, 0.6, example_inputs=X)
    with pytest.raises(ValueError, match="converted for mask=None"):
        model(X, torch.ones(2, 64, 1))
    with pytest.raises(TypeError, match="without bogus"):
        model.blocks[0](torch.randn(2, 64, 16), bogus=3)
    with pytest.raises(TypeError, match="2 positional arguments, 3"):
        model.blocks[0](torch.randn(2, 64, 16), None, 1)


def test_a_block_with_two_names_is_replaced_under_both(dense: nn.Module) -> None:
    dense.first = dense.blocks[0]
    model = dgefx.convert(dense, 0.6, example_inputs=X)
    assert model.first is model.blocks[0]
    assert isinstance(model.first, DGEBlock)
    back = dgefx.revert(model)
    assert back.first is back.blocks[0] and not isinstance(back.first, DGEBlock)


def test_a_hooked_projection_is_called_whole(dense: nn.Module) -> None:
    seen = []
    dense.blocks[0].attn.qkv.register_forward_hook(lambda _m, _a, out: seen.append(out.shape))
    model = dgefx.convert(dense, 1.0, example_inputs=X)
    assert error(model(X), dense(X)) <= 1e-5
    seen.clear()
    model(X)
    assert seen


def test_hugging_face_hidden_states() -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=4,
    )
    for used_before in (False, True):
        dense = transformers.ViTModel(config).eval()
        if used_before:
            dense(X, output_hidden_states=True)
        model = dgefx.convert(dense, 1.0, example_inputs={"pixel_values": X})
        found = model(X, output_hidden_states=True).hidden_states
        wanted = dense(X, output_hidden_states=True).hidden_states
        assert len(found) == len(wanted) == 3
        assert all(error(f, w) <= 1e-5 for f, w in zip(found, wanted, strict=True))


def test_wrapped_models_are_refused_with_advice(dense: nn.Module) -> None:
    with pytest.raises(ValueError, match="convert the model itself, then compile"):
        dgefx.convert(torch.compile(dense), example_inputs=X)
    with pytest.raises(TypeError, match="ScriptModule"):
        dgefx.convert(torch.jit.trace(dense, X), example_inputs=X)


def test_not_a_model_and_no_attention() -> None:
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, found list"):
        dgefx.convert([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no attention blocks found in Nothing"):
        dgefx.convert(Nothing(), example_inputs=X)
    with pytest.raises(ValueError, match="not a converted one"):
        dgefx.report(Nothing())
    with pytest.raises(ValueError, match="not a converted one"):
        dgefx.revert(Nothing())


def test_converting_twice(converted: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"already converted; use dgefx.revert"):
        dgefx.convert(converted, 0.5, example_inputs=X)


def test_nan_model_is_refused(dense: nn.Module) -> None:
    with torch.no_grad():
        dense.blocks[0].norm1.weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        dgefx.convert(dense, 0.6, example_inputs=X)


def test_a_block_that_fails_verification_stays_dense(dense: nn.Module) -> None:
    class LastToken(nn.Module):
        """Right at the finest granularity, wrong at any other: only the coarse check sees it."""

        def forward(self, x: Tensor) -> Tensor:
            return x + x[:, -1:]

    dense.blocks[1].mlp = nn.Sequential(dense.blocks[1].mlp, LastToken())
    report = dgefx.explain(dense, 0.9, example_inputs=X)
    assert report.blocks[0].status == "converted"
    assert report.blocks[1].status == "dense"
    assert report.blocks[1].reason.startswith("verification: mixed granularities")


def test_a_model_that_changes_from_call_to_call_is_refused(dense: nn.Module) -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    dense.blocks[1].mlp = nn.Sequential(dense.blocks[1].mlp, Counting())
    with pytest.raises(ValueError, match="another output each time it runs"):
        dgefx.convert(dense, 0.9, example_inputs=X)
