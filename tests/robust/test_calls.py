"""How converted models are called: masks in all their forms, flags, batches of any size."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from timm.layers import DropPath
from torch import Tensor, nn

import dgefx
from dgefx.coverage.hf_configs import _DETR, _resnet
from tests.helpers import Block, TinyViT, error, images, randomise, slow
from tests.robust.user_blocks import UserAttention, UserBlock, UserModel

X = images(2, 64)
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 8,
}
#: float32, after a few layers
CLOSE = 1e-5


def timm_vit() -> nn.Module:
    name = "vit_tiny_patch16_224"
    return randomise(timm.create_model(name, depth=2, img_size=64, patch_size=8)).eval()


def hf_vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL)
    return randomise(transformers.ViTForImageClassification(config)).eval()


def timm_swin() -> nn.Module:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=24,
        depths=(2,),
        num_heads=(2,),
    )
    return randomise(model).eval()


def hf_swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=64, embed_dim=24, depths=[2], num_heads=[2], window_size=4, num_labels=5
    )
    return randomise(transformers.SwinForImageClassification(config)).eval()


class Tensors(nn.Module):
    """A model that returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found = self.model(x)
        return found if isinstance(found, Tensor) else found.logits


# -- 12: optional masks ----------------------------------------------------------------------


def test_a_hugging_face_model_is_exported() -> None:
    converted = dgefx.convert(hf_vit(), 0.6)
    program = torch.export.export(converted, (), kwargs={"pixel_values": X})
    found = program.module()(pixel_values=X).logits
    torch.testing.assert_close(found, converted(X).logits)


@pytest.fixture(scope="module")
def detr() -> nn.Module:
    torch.manual_seed(0)
    sizes = {**_DETR, "encoder_layers": 1, "decoder_layers": 1}
    config = transformers.DetrConfig(backbone_config=_resnet(transformers), **sizes)
    return randomise(transformers.DetrForObjectDetection(config)).eval()


def pixel_mask() -> Tensor:
    """Images of another shape, padded to one size."""
    mask = torch.ones(2, 128, 128, dtype=torch.int64)
    mask[0, 100:] = 0
    mask[1, :, 70:] = 0
    return mask


@pytest.mark.parametrize("example", ["no mask", "padded"])
def test_detr_serves_batches_with_and_without_padding(detr: nn.Module, example: str) -> None:
    x = images(2, 128)
    given = {"pixel_values": x} | ({"pixel_mask": pixel_mask()} if example == "padded" else {})
    converted = dgefx.convert(detr, 1.0, example_inputs=given)
    seen = []
    for mask in (None, torch.ones_like(pixel_mask()), pixel_mask()):
        wanted = detr(x, pixel_mask=mask)
        found = converted(x, pixel_mask=mask)
        assert error(found.logits, wanted.logits) < CLOSE
        assert error(found.encoder_last_hidden_state, wanted.encoder_last_hidden_state) < CLOSE
        seen.append(wanted.encoder_last_hidden_state)
    assert error(seen[2], seen[0]) > 10 * CLOSE  # padding does something


@pytest.mark.slow
def test_detr_compiles_in_one_graph(detr: nn.Module) -> None:
    x = images(2, 128)
    converted = dgefx.convert(detr, 0.99, example_inputs={"pixel_values": x})
    compiled = torch.compile(converted, fullgraph=True, backend="eager")
    for mask in (None, pixel_mask()):
        wanted = converted(x, pixel_mask=mask).logits
        torch.testing.assert_close(compiled(x, pixel_mask=mask).logits, wanted)


def _masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(2, 1, 65, 65, generator=generator) > 0.4
    seen[..., 0] = True
    return {
        "one per query": seen,
        "padded": seen[:, :, :1],
        "all true": torch.ones_like(seen),
        "for all images": seen[0, 0],
        "bias": torch.randn(2, 1, 65, 65, generator=generator),
        "per head": torch.randn(2, 3, 65, 65, generator=generator),
        "additive": torch.where(seen[:, :, :1], 0.0, -torch.inf),
        "bias for all images": torch.randn(65, 65, generator=generator),
    }


@pytest.fixture(scope="module", params=["per_image", "average"])
def masked(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    dense = timm_vit()
    return dense, dgefx.convert(dense, 1.0, config=dgefx.DGEConfig(budget=request.param))


@pytest.mark.parametrize("name", _masks())
def test_masks_of_any_form(masked: tuple[nn.Module, nn.Module], name: str) -> None:
    dense, converted = masked
    mask = _masks()[name]
    for training in (False, True):
        dense.train(training), converted.train(training)
        wanted = dense.forward_features(X, attn_mask=mask)  # type: ignore[operator]
        found = converted.forward_features(X, attn_mask=mask)  # type: ignore[operator]
        assert error(found, wanted) < CLOSE
        gradients = [
            torch.autograd.grad(output.square().sum(), model.patch_embed.proj.weight)[0]  # type: ignore[union-attr]
            for output, model in ((wanted, dense), (found, converted))
        ]
        assert error(gradients[1], gradients[0]) < 10 * CLOSE
    plain = dense.forward_features(X)  # type: ignore[operator]
    assert name == "all true" or error(wanted, plain) > 1e-3


def test_a_pooled_query_sees_what_all_its_tokens_may_see() -> None:
    """With all queries at the coarsest, a mask and that which patches have in common are alike."""
    converted = dgefx.convert(timm_vit(), 0.6)
    for block in converted.blocks:  # type: ignore[union-attr]
        block.dge_router.plan = dgefx.nn.capacity.Plan((0, 0, 4))
    mask = _masks()["one per query"]
    grid = mask[:, :, 1:].unflatten(2, (2, 4, 2, 4))
    common = grid.amin((3, 5), keepdim=True).expand_as(grid).flatten(2, 5)
    common = torch.cat([mask[:, :, :1], common], 2)
    assert not torch.equal(common, mask)
    found, wanted = (converted.forward_features(X, attn_mask=m) for m in (mask, common))  # type: ignore[operator]
    torch.testing.assert_close(found, wanted)


def test_masks_that_a_block_does_not_take_are_named(
    masked: tuple[nn.Module, nn.Module],
) -> None:
    with pytest.raises(ValueError, match=r"attn_mask may be None or a bool or float tensor"):
        masked[1].forward_features(X, attn_mask=torch.ones(65, 65).long())  # type: ignore[operator]


class MaskBlock(Block):
    """A block whose mask may be looked at."""

    def __init__(self, dim: int, rule: str) -> None:
        super().__init__(dim, "BNC")
        self.rule = rule

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        y = self.attn.qkv(self.norm1(x))
        q, k, v = y.reshape(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scale = torch.tensor([0.7])  # constants of a form, under the same names in the others
        if mask is not None:
            scale = torch.tensor([1.3]) * torch.tensor([0.9])
            if self.rule == "type" and mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape).masked_fill(~mask, -3.0)
            if self.rule == "data" and mask.all():
                mask = None
        y = F.scaled_dot_product_attention(q, k, v * scale, attn_mask=mask)
        x = x + self.attn.proj(y.transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


class MaskViT(TinyViT):
    def __init__(self, rule: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MaskBlock(16, rule) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.mean(1))


@pytest.mark.parametrize("rule", ["plain", "type", "data"])
def test_what_a_block_does_with_its_mask_is_kept(rule: str) -> None:
    x = images(2, 32)
    dense = randomise(MaskViT(rule)).eval()
    converted = dgefx.convert(dense, 1.0, example_inputs=x)
    mask = _masks()["one per query"][..., :64, :64]
    bias = _masks()["bias"][..., :64, :64]
    assert error(converted(x), dense(x)) < CLOSE
    if rule == "data":
        with pytest.raises(ValueError, match="converted for mask=None"):
            converted(x, mask)
        return
    assert error(dense(x, mask), dense(x)) > 1e-3
    assert error(converted(x, mask), dense(x, mask)) < CLOSE
    if rule == "plain":
        assert error(converted(x, bias), dense(x, bias)) < CLOSE
    else:
        with pytest.raises(ValueError, match=r"mask may be None or a bool tensor.*float32"):
            converted(x, bias)


class TwoMasks(UserAttention):
    """Of few tokens, its second mask makes something else."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * self.scale @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask, -torch.inf)
            scores = scores * 2 if n <= 32 else scores
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class TwoMaskBlock(UserBlock):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.attn, self.drop_path = TwoMasks(), DropPath(rate)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), mask, key_mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TwoMaskModel(UserModel):
    """The second block alone gets the second mask."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for number, block in enumerate(self.blocks):
            x = block(x, mask=mask, key_mask=key_mask if number else None)
        return self.head(x.mean(1))


@pytest.mark.parametrize("rates", [[0.1, 0.1], [0.1, 0.2]])
def test_a_form_that_does_not_hold_in_a_block_holds_in_none_like_it(rates: list[float]) -> None:
    left = iter(rates)
    dense = TwoMaskModel(lambda: TwoMaskBlock(next(left))).eval()
    converted = dgefx.convert(dense, 1.0, example_inputs=X)
    mask = _masks()["one per query"][..., :64, :64]
    assert error(converted(X, mask), dense(X, mask)) < CLOSE
    with pytest.raises(ValueError, match="not converted for calls with these masks"):
        converted(X, key_mask=mask)


def test_forms_are_copied_pickled_reverted_and_serve_other_sizes() -> None:
    x, larger = images(2, 32), images(3, (32, 64))
    dense = randomise(MaskViT("plain")).eval()
    converted = dgefx.convert(dense, 1.0, example_inputs=x)
    mask = (_masks()["padded"][:1, ..., :64]).repeat(3, 1, 1, 2)
    wanted = dense(larger, mask)
    for model in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert error(model(larger, mask), wanted) < CLOSE
    assert torch.equal(dgefx.revert(converted)(larger, mask), wanted)


# -- 13: flags -------------------------------------------------------------------------------


def test_generate_of_an_encoder_decoder() -> None:
    encoder = transformers.ViTConfig(**SMALL)
    decoder = transformers.GPT2Config(
        n_embd=48,
        n_layer=1,
        n_head=2,
        vocab_size=50,
        n_positions=32,
        add_cross_attention=True,
        is_decoder=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    both = transformers.VisionEncoderDecoderConfig
    config = both.from_encoder_decoder_configs(encoder, decoder)
    torch.manual_seed(0)
    dense = randomise(transformers.VisionEncoderDecoderModel(config)).eval()
    ids = torch.zeros(2, 1, dtype=torch.int64)
    given = {"pixel_values": X, "decoder_input_ids": ids}
    converted = dgefx.convert(dense, 1.0, example_inputs=given)
    options = {"max_new_tokens": 5, "do_sample": False, "decoder_start_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    wanted, found = dense.generate(X, **options), converted.generate(X, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert error(torch.stack(found.scores), torch.stack(wanted.scores)) < CLOSE


class FlagBlock(Block):
    def forward(  # type: ignore[override]
        self, x: Tensor, maps: bool | None = None, scale: bool | None = False
    ) -> Tensor:
        if maps:
            raise NotImplementedError
        return super().forward(x * 1.5 if scale is None else x)


class FlagViT(TinyViT):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FlagBlock(16, "BNC") for _ in range(2))

    def forward(self, x: Tensor, **flags: Any) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, **flags)
        return self.head(x.mean(1))


def test_none_and_false_are_alike_where_the_block_does_the_same() -> None:
    x = images(2, 32)
    dense = randomise(FlagViT()).eval()
    converted = dgefx.convert(dense, 1.0, example_inputs=x)
    for flags in ({"maps": None}, {"maps": False}, {"maps": False, "scale": False}):
        for training in (False, True):
            dense.train(training), converted.train(training)
            assert error(converted(x, **flags), dense(x, **flags)) < CLOSE
    assert error(dense(x, scale=None), dense(x)) > 1e-2
    with pytest.raises(ValueError, match="converted for scale=False"):
        converted(x, scale=None)
    with pytest.raises(ValueError, match="converted for maps=None"):
        converted(x, maps=True)


# -- 9: torch.jit.trace ----------------------------------------------------------------------


def jit_traced(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes that are numbers while it traces
        traced: Callable[[Tensor], Tensor] = torch.jit.trace(model, x, check_trace=False)
    return traced


@pytest.mark.parametrize(
    ("make", "gamma"),
    [
        slow(timm_vit, 1.0),
        (timm_vit, 0.75),
        slow(timm_swin, 1.0),
        (timm_swin, 0.75),
        (hf_swin, 1.0),
        slow(hf_swin, 0.75),
    ],
)
def test_a_traced_model_follows_its_batch(make: Callable[[], nn.Module], gamma: float) -> None:
    dense = Tensors(make())
    for parameter in dense.parameters():  # so that attention tells tokens apart
        if parameter.dim() == 2:
            parameter.data.mul_(5.0)
    converted = Tensors(dgefx.convert(dense.model, gamma, example_inputs=X))
    with torch.no_grad():
        for first, then in ((1, 3), (2, 5)):
            x = images(then, 64, seed=1)
            traced = jit_traced(converted, images(first, 64))
            wanted = converted(x)
            assert error(traced(x), wanted) < 1e-6
            assert gamma < 1.0 or error(wanted, dense(x)) < CLOSE


@pytest.mark.parametrize("budget", ["per_image", "average"])
def test_tables_per_image_in_a_traced_model(budget: Any) -> None:
    """A mask of one image is not taken for one that all images share."""
    dense = randomise(MaskViT("plain")).eval()
    x, mask = images(3, 32), _masks()["bias"][:1, :, :64, :64].repeat(3, 1, 1, 1)
    mask[1:] *= torch.tensor([-1.0, 2.0])[:, None, None, None]
    converted = dgefx.convert(dense, 0.7, example_inputs=x, config=dgefx.DGEConfig(budget=budget))
    with torch.no_grad():
        traced = jit_traced(converted, (x[:1], mask[:1]))  # type: ignore[arg-type]
        assert error(traced(x, mask), converted(x, mask)) < 1e-6  # type: ignore[call-arg]


# -- 17: empty batches -----------------------------------------------------------------------


def torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    model = SwinTransformer([4, 4], 24, [2], [2], [4, 4], num_classes=5)
    return randomise(model).eval()


@pytest.mark.parametrize("budget", ["per_image", "average"])
@pytest.mark.parametrize("make", [timm_vit, torchvision_swin])
def test_an_empty_batch(make: Callable[[], nn.Module], budget: Any) -> None:
    dense = Tensors(make())
    config = dgefx.DGEConfig(budget=budget)
    converted = Tensors(dgefx.convert(dense.model, 0.8, example_inputs=X, config=config))
    nothing = torch.empty(0, 3, 64, 64)
    for training in (False, True):
        dense.train(training), converted.train(training)
        wanted, found = dense(nothing), converted(nothing)
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        found.sum().backward()
        assert converted(X).shape[0] == 2


def test_models_that_take_no_empty_batch_say_what_they_said() -> None:
    dense = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)).eval()
    converted = dgefx.convert(dense, 0.9, example_inputs=X)
    for model in (dense, converted):
        with pytest.raises(RuntimeError, match=r"cannot reshape .* \[0, -1, 32\]"):
            model(torch.empty(0, 3, 64, 64))
