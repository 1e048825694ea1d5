"""What models are called with and what they return: flags, lists, dicts, dataclasses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dgefx
from dgefx.outputs import tensors_in
from tests.helpers import TinyViT, error, images, randomise

X = images(2, 32)


@dataclasses.dataclass
class Output:
    """Not registered with pytree, as users' own are not."""

    logits: Tensor
    features: list[Tensor]
    loss: Tensor | None = None


class Wrapped(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body = kind, TinyViT(dim=32)

    def forward(
        self, x: Tensor, features: bool = True, mode: str = "a", scale: float | None = None
    ) -> Any:
        tokens = self.body.forward_features(x)
        logits = self.body.head(tokens.mean(1)) * (1.0 if scale is None else scale)
        if not features:
            return logits
        return {
            "dict": {"logits": logits, mode: [tokens]},
            "tuple": (logits, (tokens, None), mode),
            "dataclass": Output(logits, [tokens]),
            "nested": [{"out": Output(logits, [tokens])}],
            "namespace": SimpleNamespace(logits=logits, tokens=tokens),
        }[self.kind]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dict", "tuple", "dataclass", "nested", "namespace"])
def test_outputs_of_any_kind(kind: str, tmp_path: Path) -> None:
    model = randomise(Wrapped(kind)).eval()
    call = {"x": X, "features": True, "mode": "b", "scale": 2.0}
    wanted = model(**call)
    converted = dgefx.convert(model, 1.0, example_inputs=call)
    found = converted(**call)
    assert type(found) is type(wanted)
    pairs = list(zip(tensors_in(found), tensors_in(wanted), strict=True))
    assert len(pairs) == 2 and all(error(a, b) < 1e-5 for a, b in pairs)
    # flags stay the user's to set
    assert error(converted(X, features=False), model(X, features=False)) < 1e-5
    dgefx.set_budget(converted, 0.6)
    dgefx.save(converted, tmp_path)
    loaded = dgefx.load(tmp_path, model)
    assert error(tensors_in(loaded(**call))[0], tensors_in(converted(**call))[0]) < 1e-6


def test_dataclass_outputs_calibrate() -> None:
    model = randomise(Wrapped("dataclass")).eval()
    converted = dgefx.convert(model, 0.6, example_inputs=X)
    dgefx.calibrate(converted, images(4, 32), refine_passes=1, progress=False)
    assert dgefx.report(converted).calibrated


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "side", "options", "kind"),
    [
        (
            "vit_tiny_patch16_224",
            32,
            {"img_size": 32, "patch_size": 4, "depth": 2, "out_indices": (0, 1)},
            "FeatureGetterNet",
        ),
        (
            "swin_tiny_patch4_window7_224",
            56,
            {
                "img_size": 56,
                "depths": (1, 1),
                "embed_dim": 16,
                "num_heads": (2, 2),
                "window_size": 7,
                "out_indices": (0, 1),
            },
            "FeatureListNet",
        ),
    ],
)
def test_timm_features_only(name: str, side: int, options: dict[str, Any], kind: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, features_only=True, **options)).eval()
    assert type(model).__name__ == kind
    x = images(2, side)
    converted = dgefx.convert(model, 1.0, example_inputs=x)
    found, wanted = converted(x), model(x)
    assert [f.shape for f in found] == [w.shape for w in wanted]
    assert all(error(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))
    assert converted.feature_info.channels() == model.feature_info.channels()
    dgefx.set_budget(converted, 0.7)
    assert any(error(a, b) > 1e-4 for a, b in zip(converted(x), wanted, strict=True))


@torch.no_grad()
def test_timm_hooked_features() -> None:
    """FeatureHookNet collects what hooks on inner modules saw."""
    timm = pytest.importorskip("timm")
    from timm.models import FeatureHookNet

    torch.manual_seed(0)
    body = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2)
    info = [
        {"num_chs": 192, "reduction": 4, "module": f"blocks.{i}", "hook_type": "forward"}
        for i in range(2)
    ]
    body.feature_info = info
    model = FeatureHookNet(randomise(body), out_indices=(0, 1), out_map=["a", "b"]).eval()
    wanted = model(X)
    converted = dgefx.convert(model, 1.0, example_inputs=X)
    assert len(dgefx.report(converted).converted) == 2
    found = converted(X)
    assert len(found) == len(wanted) == 2
    assert all(error(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("weights.pt", "a path holds no architecture"),
        (Path("weights.pt"), "a path holds no architecture"),
        (TinyViT().state_dict(), "if it is a state_dict, build the model"),
        ((TinyViT(), None), "pass one model"),
        ([TinyViT()], "pass one model"),
        (TinyViT, "that is a class: pass an instance"),
        (X, "pass the model first"),
        (fx.symbolic_trace(TinyViT()).graph, r"torch\.fx\.GraphModule"),
        (None, "found NoneType"),
    ],
)
def test_wrong_kinds_say_what_to_pass(given: Any, message: str) -> None:
    for call in (dgefx.convert, dgefx.explain):
        with pytest.raises(TypeError, match=message):
            call(given, 0.6, example_inputs=X)


def test_torchscript_says_what_to_pass() -> None:
    scripted = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"convert the nn\.Module that it was made from"):
        dgefx.convert(scripted, 0.6)
