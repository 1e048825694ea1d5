"""PEFT adapters: their layers stay calls, so that merging and switching off work afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dgefx
from tests.helpers import TinyViT, error, images, randomise, slow

peft = pytest.importorskip("peft")
X = images(2, 32)


def fused() -> nn.Module:
    return randomise(TinyViT(dim=32, prefix=1)).eval()


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, patch_size=4)
    return randomise(model).eval()


def hugging_face() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=4,
    )
    return randomise(transformers.ViTForImageClassification(config)).eval()


def attention_layers(model: nn.Module) -> list[str]:
    """Query and value projections (transformers renamed them), or the fused one."""
    found = {name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is nn.Linear}
    wanted = {"qkv", "query", "value", "q_proj", "v_proj"}
    return sorted(found & wanted)


def adapted(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=attention_layers(model), lora_dropout=0.1)
    model = peft.get_peft_model(model, config)
    fill(model)
    return model.eval()


def fill(model: nn.Module) -> None:
    """lora_B is zero at first, which would hide all mistakes."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    output: Any = model(x)
    return output if isinstance(output, Tensor) else output.logits


MODELS = {"fused": fused, "timm": timm_vit, "hugging face": hugging_face}


def inputs(kind: str) -> Any:
    return {"pixel_values": X} if kind == "hugging face" else X


@pytest.mark.parametrize("kind", MODELS)
def test_adapted_model_converts_exactly_and_trains(kind: str) -> None:
    base = MODELS[kind]()
    without = run(base)
    model = adapted(base)
    wanted = run(model)
    assert error(wanted, without) > 1e-2
    converted = dgefx.convert(model, 1.0, example_inputs=inputs(kind))
    assert len(dgefx.report(converted).converted) == 2
    assert error(run(converted), wanted) < 1e-5
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, p in converted.named_parameters() if p.requires_grad] == trainable

    dgefx.set_budget(converted, 0.8)
    run(converted.train()).square().sum().backward()
    for name, parameter in converted.named_parameters():
        if name in trainable:
            assert parameter.grad is not None and bool(parameter.grad.any()), name
        else:
            assert parameter.grad is None


@torch.no_grad()
@pytest.mark.parametrize("kind", ["fused", slow("timm"), slow("hugging face")])
def test_merging_after_conversion(kind: str) -> None:
    model = adapted(MODELS[kind]())
    converted = dgefx.convert(model, 0.8, example_inputs=inputs(kind))
    wanted = run(converted)
    with model.disable_adapter():
        plain = run(dgefx.convert(model, 1.0, example_inputs=inputs(kind)))
    finest = dgefx.convert(model, 1.0, example_inputs=inputs(kind))
    with finest.disable_adapter():
        assert error(run(finest), plain) < 1e-5
    converted.merge_adapter()
    assert error(run(converted), wanted) < 1e-5
    converted.unmerge_adapter()
    assert error(run(converted), wanted) < 1e-5
    merged = converted.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert error(run(merged), wanted) < 1e-5
    assert type(merged) is type(MODELS[kind]())


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_adapting_after_conversion(kind: str) -> None:
    """The same as before it: also a fused projection's adapter is not passed over."""
    wanted = run(adapted(MODELS[kind]()))
    model = dgefx.convert(MODELS[kind](), 1.0, example_inputs=inputs(kind))
    assert error(run(adapted(model)), wanted) < 1e-5
