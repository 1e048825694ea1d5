"""Gradient checkpointing of transformers, timm and torch: kept, switched on and off afterwards."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_layers import GradientCheckpointingLayer

import dgefx
from dgefx.nn.block import DGEBlock
from tests.helpers import Block, TinyViT, error, images, randomise, slow

#: reentrant checkpointing, the default of some versions, asks for inputs that require gradients
KINDS = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}


@contextmanager
def saved() -> Iterator[list[int]]:
    """The numbers of elements that are kept for the backward."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def learn(model: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """Elements kept, and all gradients of the parameters that the dense model has too."""
    model.zero_grad()
    with saved() as kept:
        output = model(x)
    output = getattr(output, "logits", output)
    output.square().sum().backward()
    grads = [p.grad.flatten() for n, p in model.named_parameters() if "dge_router" not in n]
    return sum(kept), torch.cat(grads)


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=64,
        patch_size=8,
    )
    torch.manual_seed(0)
    return randomise(ViTForImageClassification(config)).double().train()


class Setting:
    """A dense model of transformers, what it keeps and its gradients, without and with."""

    def __init__(self) -> None:
        self.x = images(2, 64).double()
        self.dense = vit()
        self.all, self.wanted = learn(self.dense, self.x)
        self.switched = copy.deepcopy(self.dense)
        self.switched.gradient_checkpointing_enable(**KINDS)
        self.few, _ = learn(self.switched, self.x)
        assert 4 * self.few < self.all
        self.plain = dgefx.convert(self.dense, 1.0)

    def converted(self) -> Any:
        return copy.deepcopy(self.plain)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def test_switched_on_before(setting: Setting) -> None:
    model: Any = dgefx.convert(setting.switched, 1.0)
    kept, grads = learn(model, setting.x)
    assert kept == setting.few and error(grads, setting.wanted) < 1e-12
    model.gradient_checkpointing_disable()
    kept, grads = learn(model, setting.x)
    assert kept >= setting.all and error(grads, setting.wanted) < 1e-12


def test_switched_on_after_and_off_again(setting: Setting) -> None:
    model = setting.converted()
    before, grads = learn(model, setting.x)
    for _ in range(2):
        model.gradient_checkpointing_enable(**KINDS)
        kept, same = learn(model, setting.x)
        assert kept == setting.few and torch.equal(same, grads)
        model.gradient_checkpointing_disable()
        kept, same = learn(model, setting.x)
        assert kept == before and torch.equal(same, grads)
    assert error(grads, setting.wanted) < 1e-12


def layers(model: nn.Module) -> list[Any]:
    """What transformers takes for layers that can be checkpointed."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def test_every_second_layer(setting: Setting) -> None:
    found = []
    for model in (copy.deepcopy(setting.switched), dgefx.convert(setting.switched, 1.0)):
        first, second = layers(model)
        assert first.gradient_checkpointing
        second.gradient_checkpointing = False
        found.append(learn(model, setting.x)[0])
    assert setting.few < found[0] <= found[1] < setting.all


def test_nothing_to_checkpoint(setting: Setting) -> None:
    found = []
    for model in (copy.deepcopy(setting.dense), setting.converted()):
        calls: list[bool] = []

        def call(function: Any, *args: Any, calls: list[bool] = calls) -> Any:
            calls.append(torch.is_grad_enabled())
            return function(*args)

        for layer in layers(model):
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, call
        with torch.no_grad():
            model(setting.x)  # some versions do not look at whether there are gradients
        model.eval()(setting.x)
        found.append(calls)
    assert found[0] == found[1] and True not in found[1]


def test_hooks_run_once(setting: Setting) -> None:
    model = setting.converted()
    model.gradient_checkpointing_enable(**KINDS)
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, DGEBlock):
            module.register_forward_hook(lambda *_: calls.append(1))
    learn(model, setting.x)
    assert len(calls) == 2


def test_under_a_budget_with_gates_that_ask(setting: Setting) -> None:
    config = dgefx.DGEConfig(router="linear", budget="average", capacity=None)
    model: Any = dgefx.convert(setting.dense, 0.6, config=config)
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable(**KINDS)
        model.zero_grad()
        output = model(setting.x).logits
        (output.square().sum() + 20.0 * dgefx.budget_loss(model)).backward()
        gates = [p for n, p in model.named_parameters() if "gate" in n]
        assert all(p.grad.norm() > 0 for p in gates)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*grads)


def test_copies_and_the_dense_model_again_keep_it(setting: Setting) -> None:
    model = setting.converted()
    model.gradient_checkpointing_enable(**KINDS)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), dgefx.revert(model)):
        kept, grads = learn(again, setting.x)
        assert kept == setting.few and error(grads, setting.wanted) < 1e-12
    model.gradient_checkpointing_disable()
    assert learn(dgefx.revert(model), setting.x)[0] == setting.all


def test_a_sharded_block_is_still_converted(setting: Setting) -> None:
    # transformers puts a forward into every subclass of its layers, so into what FSDP2 makes
    class Mixin:
        pass

    model = setting.converted()
    block = next(m for m in model.modules() if isinstance(m, DGEBlock))
    ran: list[int] = []
    block.dge_router.register_forward_hook(lambda *_: ran.append(1))
    dense = block.__class__
    block.__class__ = type("Mixed", (Mixin, dense), {})
    assert isinstance(block, Mixin) and isinstance(block, dense)
    kept, grads = learn(model, setting.x)
    assert ran == [1] and error(grads, setting.wanted) < 1e-12
    model.gradient_checkpointing_enable(**KINDS)
    assert learn(model, setting.x)[0] == setting.few < kept


class Switched(nn.Module):
    """As layers of transformers 5.0 are: what is called decides."""

    gradient_checkpointing = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            call = functools.partial(super().__call__, **kwargs)
            return self._gradient_checkpointing_func(call, *args)
        return super().__call__(*args, **kwargs)


class Layer(Switched, Block):
    pass


class Louder(Block):
    """Called in its own way in training, of its own parts."""

    factor = 3.0

    def louder(self, y: Tensor) -> Tensor:
        return y * self.factor

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = super().__call__(x)
        return self.louder(y) if self.training else y


def tiny(kind: type[Block]) -> Any:
    model = TinyViT()
    for index in range(2):
        block = kind(16, "BNC")
        block.load_state_dict(model.blocks[index].state_dict())
        model.blocks[index] = block
    return randomise(model).double().train()


def switch(model: Any, on: bool) -> None:
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
            module.gradient_checkpointing = on


def test_a_call_that_checkpoints() -> None:
    dense, x = tiny(Layer), images(2, 32).double()
    wanted = learn(dense, x)[1]
    late: Any = dgefx.convert(dense, 1.0, example_inputs=x)
    more, grads = learn(late, x)
    assert error(grads, wanted) < 1e-12
    switch(dense, True)
    few = learn(dense, x)[0]
    switch(late, True)
    early = dgefx.convert(dense, 1.0, example_inputs=x)
    for model in (late, early, copy.deepcopy(early), pickle.loads(pickle.dumps(early))):
        assert isinstance(model.blocks[0], DGEBlock) and isinstance(model.blocks[0], Layer)
        kept, grads = learn(model, x)
        assert kept == few < more / 3 and error(grads, wanted) < 1e-12
    assert learn(dgefx.revert(early, inplace=True), x)[0] == few


def test_a_block_is_called_as_the_class_it_stands_for() -> None:
    dense, x = tiny(Louder), images(2, 32).double()
    model = dgefx.convert(dense, 1.0, example_inputs=x)
    for mode in (True, False):
        wanted = dense.train(mode)(x).detach()
        assert error(model.train(mode)(x).detach(), wanted) < 1e-12


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("vit_tiny_patch16_224", {"depth": 2, "img_size": 64, "patch_size": 8}, 64),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 56, "depths": (2,), "num_heads": (2,), "embed_dim": 32},
            56,
        ),
        slow("pvt_v2_b0", {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 40, 64)}, 64),
    ],
)
def test_timm(name: str, options: dict[str, Any], side: int) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, drop_path_rate=0.0, num_classes=5, **options)
    dense: Any = randomise(model).double().train()
    x = images(2, side).double()
    more, wanted = learn(dense, x)
    late: Any = dgefx.convert(dense, 1.0, example_inputs=x)
    dense.set_grad_checkpointing(True)
    few = learn(dense, x)[0]
    assert 3 * few < more
    early: Any = dgefx.convert(dense, 1.0, example_inputs=x)
    late.set_grad_checkpointing(True)
    for converted in (early, late):
        kept, grads = learn(converted, x)
        assert kept == few and error(grads, wanted) < 1e-9
        converted.set_grad_checkpointing(False)
        assert learn(converted, x)[0] >= more
        converted.set_grad_checkpointing(True)
        with torch.no_grad():
            assert error(converted.eval()(x), dense.eval()(x)) < 1e-12


def test_the_wrapper_of_torch() -> None:
    dense, x = tiny(Block), images(2, 32).double()
    model = dgefx.convert(dense, 0.6, example_inputs=x)
    more, wanted = learn(model, x)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    kept, grads = learn(model, x)
    assert 3 * kept < more and torch.equal(grads, wanted)
    dgefx.set_budget(model, 1.0)  # finds its blocks
    assert error(learn(model, x)[1], learn(dense, x)[1]) < 1e-12
