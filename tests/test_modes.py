"""Batches, image sizes, training, autocast: a converted model is used like the dense one."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import dgefx
from tests.helpers import Attention, Block, TinyViT, error, images, randomise, slow


def finest(model: nn.Module, side: int | tuple[int, int] = 32) -> nn.Module:
    return dgefx.convert(model, 1.0, example_inputs=images(2, side))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_other_batch_sizes(count: int) -> None:
    dense = randomise(TinyViT(prefix=2)).eval()
    x = images(count, 32, seed=count)
    assert error(finest(dense)(x), dense(x)) <= 1e-5


@pytest.mark.parametrize("order", ["BNC", "BHWC", "BCHW"])
@pytest.mark.parametrize("size", [slow((48, 48)), (20, 36), (36, 20), slow((24, 24))])
def test_other_image_sizes(order: str, size: tuple[int, int]) -> None:
    dense = randomise(TinyViT(order=order)).eval()
    x = images(2, size)
    assert error(finest(dense)(x), dense(x)) <= 1e-5
    half = dgefx.convert(dense, 0.6, example_inputs=images(2, 32))
    assert torch.isfinite(half(x)).all()
    levels = []
    for block in half.blocks:
        block.dge_router.register_forward_hook(lambda _m, _a, out: levels.append(out))
    half(x)
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)  # cells of 2 x 2 tokens
    assert all(r.grid == (size[0] // 4, size[1] // 4) for r in levels)
    assert all(r.levels.shape == (2, rows * columns) for r in levels)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "pvt_v2_b0", slow("twins_pcpvt_small")])
def test_other_image_sizes_of_real_models(name: str) -> None:
    options = {"dynamic_img_size": True, "depth": 2} if name.startswith("vit") else {}
    dense = randomise(timm.create_model(name, **options)).eval()
    converted = dgefx.convert(dense, 1.0, example_inputs=images(2, 128))
    for size in ((160, 96), (96, 192)):
        x = images(1, size)
        assert error(converted(x), dense(x)) <= 1e-5


def test_results_do_not_depend_on_batch_mates() -> None:
    model = dgefx.convert(randomise(TinyViT()), 0.6, example_inputs=images(2, 56)).eval()
    x = images(4, 56)
    alone = model(x)[1]
    mates = torch.cat([images(1, 56, seed=5) * 9, x[1:2], images(2, 56, seed=6)])
    assert torch.equal(model(mates)[1], alone)


class Dropping(nn.Module):
    """Attention with a functional dropout that only train mode has."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = Attention(dim, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.inner.qkv(x).reshape(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        p = self.drop.p if self.training else 0.0
        x = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.drop(self.inner.proj(x.transpose(1, 2).reshape(b, n, c)))


def test_train_mode_drops_and_eval_mode_does_not() -> None:
    dense = TinyViT(make=Dropping)
    model = finest(dense)
    x = images(2, 32)
    model.train(), dense.train()
    torch.manual_seed(1)
    wanted = dense(x)
    torch.manual_seed(1)
    assert error(model(x), wanted) <= 1e-5, "same random numbers, same masks"
    assert not torch.equal(model(x), model(x))
    model.eval(), dense.eval()
    assert torch.equal(model(x), model(x))
    assert error(model(x), dense(x)) <= 1e-5


def test_drop_path_is_alive_in_train_mode() -> None:
    dense = timm.create_model("pvt_v2_b0", drop_path_rate=0.5)
    model = dgefx.convert(dense, 0.6, example_inputs=images(2, 64)).train()
    assert len(dgefx.report(model).converted) == 8
    x = images(4, 64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "pvt_v2_b0", slow("beit_base_patch16_224")]
)
@pytest.mark.parametrize("router", ["detail", "linear"])
def test_gradients_reach_every_parameter(name: str, router: str) -> None:
    options = {"depth": 2, "img_size": 64} if name.startswith(("vit", "beit")) else {}
    if name.startswith("vit"):
        options["global_pool"] = "avg"  # a class token leaves the last block's grid unread
    dense = randomise(timm.create_model(name, **options))
    config = dgefx.DGEConfig(router=router)
    x = images(2, 64)
    model = dgefx.convert(dense, 0.7, example_inputs=x, config=config).train()
    model(x).square().mean().backward()
    dense.train()(x).square().mean().backward()
    reached = {n for n, p in dense.named_parameters() if p.grad is not None and p.grad.any()}
    missing = [
        n
        for n, p in model.named_parameters()
        if (n in reached or "dge_router" in n) and (p.grad is None or not p.grad.any())
    ]
    assert not missing


def test_gradients_equal_the_dense_models_at_the_finest_level() -> None:
    dense = randomise(TinyViT(prefix=1))
    model = finest(dense)
    x = images(2, 32)
    for m in (dense, model):
        m(x).square().sum().backward()
    for (name, wanted), found in zip(dense.named_parameters(), model.parameters(), strict=True):
        assert error(found.grad, wanted.grad) <= 1e-4, name


def test_bf16_autocast() -> None:
    dense = randomise(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64)).eval()
    model = dgefx.convert(dense, 1.0, example_inputs=images(2, 64))
    x = images(2, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = model(x), dense(x)
    assert found.dtype == wanted.dtype
    # bf16 keeps 8 bits: two rounding orders of a 2-block model stay within a few units of them
    assert error(found.float(), wanted.float()) <= 0.02
    half = dgefx.convert(dense, 0.6, example_inputs=images(2, 64)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = half(x).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters() if p.grad is not None)


def test_another_call_is_refused_not_miscomputed() -> None:
    class Scaled(Block):
        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            x = x + scale * self.attn(self.norm1(x))
            return x + scale * self.mlp(self.norm2(x))

    class ScaledModel(TinyViT):
        scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x, scale=self.scale)
            return x.mean(1)

    dense = ScaledModel()
    dense.blocks = nn.ModuleList(Scaled(16, "BNC") for _ in range(2))
    model = dgefx.convert(dense, 0.6, example_inputs=images(2, 32))
    model(images(1, 32))
    model.scale = 2.0
    with pytest.raises(ValueError, match=r"converted for scale=1.0"):
        model(images(1, 32))
