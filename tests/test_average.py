"""The average budget: images differ in their number of queries, the batch meets the budget.

Checked against the dense model (finest granularity), against the per-image mode (same levels
imposed on both) and against naive counting. Drawn weights are large enough that the converted
blocks decide the output: every comparison also shows that coarse routing changes it.
"""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import dgefx
from dgefx import DGEConfig
from dgefx.kernels.batch_budget import demote, share_levels
from dgefx.kernels.packed_attention import _with_dropout, packed_attention
from dgefx.kernels.ragged import from_padded, join_prefix, split_prefix, to_padded
from dgefx.kernels.routing import Routing
from dgefx.nn.block import DGEBlock
from dgefx.nn.capacity import plans
from dgefx.nn.router import Router
from dgefx.passes.plan.verify import random_levels
from dgefx.training import set_gates
from tests.helpers import COMPILERS, Attention, TinyViT, error, images, macs, randomise, slow

AVERAGE = DGEConfig(budget="average")


def lively(model: nn.Module) -> nn.Module:
    """Weights that make every block's update as large as the stream."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return randomise(model).eval()


class Biased(nn.Module):
    """Attention with a table per query and one value per image and key."""

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.inner = Attention(dim, 2, torch.randn(1, 2, tokens, tokens))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def hugging_face(name: str) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "image_size": 64, "patch_size": 8}
    if name == "dinov3":  # rotary embeddings, register tokens split from the grid
        config = transformers.DINOv3ViTConfig(num_register_tokens=2, **sizes)
        return transformers.DINOv3ViTModel(config)
    return transformers.ViTModel(transformers.ViTConfig(**sizes))


def build(name: str) -> tuple[nn.Module, Tensor]:
    x = images(3, 64)
    if name.startswith("tiny"):
        order = name.split("_")[1]
        return TinyViT(prefix=2 if order == "BNC" else 0, order=order), images(3, (36, 28))
    if name == "bias":
        return TinyViT(make=lambda dim: Biased(dim, 81)), images(3, 36)
    if name == "torchvision":
        vit = torchvision.models.VisionTransformer(64, 8, 2, 2, 32, 64, num_classes=7)
        return vit, x
    if name.startswith("hf_"):
        return hugging_face(name[3:]), x
    if name == "eva":  # rotary embeddings, the class token cut off and joined again
        return timm.create_model("eva02_tiny_patch14_224", depth=2, img_size=56), images(3, 56)
    if name == "beit":
        kwargs = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 128}
        return timm.create_model("beit_base_patch16_224", **kwargs), images(3, 128)
    if name == "pvt":
        return timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)), images(3, 96)
    kwargs = {"depths": (2, 2), "embed_dim": 24, "num_heads": (2, 2), "img_size": 56}
    return timm.create_model("swin_tiny_patch4_window7_224", **kwargs), images(3, 56)


MODELS = ["tiny_BNC", "tiny_BHWC", "tiny_BCHW", "bias", "torchvision", "hf_vit", "hf_dinov3"]
MODELS += ["eva", "beit", "pvt", "swin"]
_DOUBLE = ("tiny_BHWC", "hf_vit", "eva")  # others like them are among the rest


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return found if isinstance(found, Tensor) else found.last_hidden_state


def impose(model: nn.Module, levels: dict[str, Tensor]) -> nn.Module:
    for name, tensor in levels.items():
        model.get_submodule(name).dge_router.register_forward_hook(
            lambda router, inputs, _o, tensor=tensor: router.routing_for(
                inputs[0], tensor, inputs[1]
            )
        )
    return model


def blocks(model: nn.Module) -> dict[str, DGEBlock]:
    return {name: m for name, m in model.named_modules() if type(m) is DGEBlock}


@pytest.mark.parametrize("name", [slow(name) if name in _DOUBLE else name for name in MODELS])
def test_equals_dense_and_the_per_image_mode(name: str) -> None:
    dense, x = build(name)
    dense = lively(dense)
    packed = dgefx.convert(dense, 1.0, example_inputs=x[:2], config=AVERAGE)
    each = dgefx.convert(dense, 1.0, example_inputs=x[:2])
    assert len(dgefx.report(packed).converted) == len(dgefx.report(packed).blocks)
    wanted = output(dense, x)
    assert error(output(packed, x), wanted) <= 1e-5
    generator = torch.Generator().manual_seed(5)
    levels = {n: random_levels(b, len(x), generator) for n, b in blocks(packed).items()}
    found, same = (output(impose(m, levels), x) for m in (packed, each))
    # both are float32 evaluations of one formula, in other orders
    assert error(found, same) <= 1e-5
    assert error(found, wanted) > 1e-3
    # nothing is computed that the dense model does not compute
    assert dgefx.report(packed).ratio == pytest.approx(dgefx.report(each).ratio, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("tiny_BNC", "detail"),
        slow("tiny_BNC", "linear"),
        ("pvt", "detail"),
        slow("pvt", "linear"),
        slow("swin", "detail"),
        ("swin", "linear"),
    ],
)
def test_the_budget_holds_over_the_batch(name: str, router: str) -> None:
    dense, x = build(name)
    config = DGEConfig(budget="average", router=router)
    model = dgefx.convert(lively(dense), 0.75, example_inputs=x, config=config).eval()
    ratio = macs(model, x) / macs(dense, x)
    assert 0.72 <= ratio <= 0.75 + 1e-6
    assert abs(dgefx.report(model).ratio - ratio) < 0.005


def spied(model: nn.Module, x: Tensor) -> list[Routing]:
    found: list[Routing] = []
    handles = [
        b.dge_router.register_forward_hook(lambda _m, _i, o: found.append(o))
        for b in blocks(model).values()
    ]
    output(model, x)
    for handle in handles:
        handle.remove()
    return found


def test_an_image_with_detail_gets_more_queries_than_a_flat_one() -> None:
    dense = lively(TinyViT(prefix=1))
    x = images(3, 48)
    x[1] = x[1] * 0.01
    model = dgefx.convert(dense, 0.6, example_inputs=x, config=AVERAGE)
    mixed = [r for r in spied(model, x) if len(r.levels.unique()) > 1]
    assert mixed
    for routing in mixed:
        assert routing.ragged is not None
        counts = routing.ragged.offsets.diff()
        assert counts[1] < counts[0] and counts[1] < counts[2]


def test_gates_decide_and_the_capacity_demotes() -> None:
    dense = lively(TinyViT(prefix=1, depth=1))
    x = images(4, 48)
    free = DGEConfig(budget="average", router="linear", capacity=None)
    model = dgefx.convert(dense, 0.75, example_inputs=x, config=free)
    gate = blocks(model)["blocks.0"].dge_router.gate
    assert gate is not None
    nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))  # most ask for the finest level
    bounded = DGEConfig(budget="average", router="linear")
    held = dgefx.convert(dense, 0.75, example_inputs=x, config=bounded)
    held.load_state_dict(model.state_dict())
    (asked,), (given_,) = spied(model, x), spied(held, x)
    router = blocks(model)["blocks.0"].dge_router
    assert asked.ragged is not None and given_.ragged is not None
    assert asked.ragged.patch.min() >= 0  # exactly as many as asked for
    assert bool((given_.levels >= asked.levels).all())
    room = len(x) * (router.plan.slots + 1)
    assert int(given_.ragged.offsets[-1]) <= room == given_.ragged.patch.shape[0]
    assert int(asked.ragged.offsets[-1]) > room


def test_a_fresh_linear_gate_at_gamma_one_is_dense_whatever_it_asks_for() -> None:
    dense = lively(TinyViT(depth=1))
    x = images(2, 32)
    for capacity in ("budget", None):
        config = DGEConfig(budget="average", router="linear", capacity=capacity)
        model = dgefx.convert(dense, 1.0, example_inputs=x, config=config)
        nn.init.normal_(blocks(model)["blocks.0"].dge_router.gate.weight)
        assert error(output(model, x), output(dense, x)) <= 1e-5


# -- the parts -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    regions=st.integers(1, 9),
    clipped=st.booleans(),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 999),
)
def test_demote(batch: int, regions: int, clipped: bool, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 3, (batch, regions), generator=generator)
    scores = torch.randn(batch, regions, 2, generator=generator)
    costs = [torch.full((regions,), count) for count in (16, 4, 1)]
    if clipped:
        costs = [torch.randint(1, 5, (regions,), generator=generator) for _ in range(3)]
        costs = [sum(costs[i:]) for i in range(3)]
    least, most = batch * int(costs[2].sum()), batch * int(costs[0].sum())
    capacity = least + round(share * (most - least))
    found = demote(levels, scores, costs, capacity)
    table = torch.stack(costs)
    spent = table.unsqueeze(1).expand(-1, batch, -1).gather(0, found.unsqueeze(0)).sum()
    asked = table.unsqueeze(1).expand(-1, batch, -1).gather(0, levels.unsqueeze(0)).sum()
    assert spent <= capacity or spent <= asked <= capacity
    assert bool((found >= levels).all()) and bool((found <= 2).all())
    if asked <= capacity:
        assert torch.equal(found, levels)
    moved = (levels == 0) & (found > 0)
    kept = (levels == 0) & (found == 0)
    if moved.any() and kept.any():  # the lowest scores go first
        assert scores[..., 0][moved].max() <= scores[..., 0][kept].min()


def test_demote_takes_regions_without_a_score_first() -> None:
    levels, costs = torch.zeros(1, 3, dtype=torch.int64), [torch.full((3,), n) for n in (4, 1)]
    scores = torch.tensor([[[1.0], [float("nan")], [-5.0]]])
    assert demote(levels, scores, costs, 9).tolist() == [[0, 1, 0]]


def test_shared_levels_equal_one_large_image() -> None:
    gains = torch.tensor([[[4.0, 9.0], [3.0, 8.0]], [[2.0, 1.0], [5.0, 7.0]]])
    costs = [torch.full((2,), n) for n in (16, 4, 1)]
    found = share_levels(gains, costs, [16, 4, 2], [16, 4, 1])
    # two fine regions in all: the gains 5 and 4; two middle ones: 8 and 1
    assert found.tolist() == [[0, 1], [1, 0]]


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    prefix=st.integers(0, 2),
    sides=st.sampled_from([(1,), (1, 2), (1, 2, 4), (1, 3)]),
    region=st.booleans(),
    count=st.integers(1, 3),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 999),
)
def test_any_ragged_routing(
    grid: tuple[int, int],
    prefix: int,
    sides: tuple[int, ...],
    region: bool,
    count: int,
    share: float,
    seed: int,
) -> None:
    """Every token is in one query, the mean of which is that of its tokens; queries fit."""
    torch.manual_seed(seed)
    config = DGEConfig(budget="average", granularities=sides, region=sides[-1] if region else None)
    choices = plans(grid, config)
    plan = choices[round(share * (len(choices) - 1))]
    router = Router(config, grid, prefix, 3, plan)
    tokens = torch.randn(count, prefix + grid[0] * grid[1], 3, dtype=torch.float64)
    routing = router(tokens, grid)
    ragged = routing.ragged
    assert ragged is not None
    total = ragged.patch.shape[0]
    assert total == count * (prefix + plan.slots)
    assert int(ragged.offsets[-1]) <= total
    queries = dgefx.kernels.pool.pool(tokens, routing)[0]
    for query in range(total):
        held = [(b, t) for b, t in itertools.product(range(count), range(tokens.shape[1]))]
        held = [(b, t) for b, t in held if int(ragged.row[b, t]) == query]
        if query >= int(ragged.offsets[-1]):
            assert not held and int(ragged.patch[query]) == -1
            continue
        image = int(ragged.image[query])
        assert {b for b, _ in held} == {image}
        assert int(ragged.offsets[image]) <= query < int(ragged.offsets[image + 1])
        mean = torch.stack([tokens[b, t] for b, t in held]).mean(0)
        assert torch.allclose(queries[query], mean, atol=1e-12)
    front, body = split_prefix(queries, routing, 0)
    assert torch.equal(front, tokens[:, :prefix].flatten(0, 1))
    assert torch.equal(join_prefix(front, body, routing, 0), queries)
    padded = to_padded(queries, ragged, tokens.shape[1])
    back = from_padded(padded, ragged)
    assert torch.equal(back[: int(ragged.offsets[-1])], queries[: int(ragged.offsets[-1])])


def routed(count: int = 3) -> tuple[Router, Tensor, Routing]:
    grid = (5, 6)
    router = Router(AVERAGE, grid, 1, 8, plans(grid, AVERAGE)[20])
    torch.manual_seed(0)
    tokens = torch.randn(count, 31, 8)
    return router, tokens, router(tokens, grid)


@pytest.mark.parametrize("form", ["none", "additive", "bool", "per image"])
def test_packed_attention_reads_masks_per_patch_and_per_image(form: str) -> None:
    _, tokens, routing = routed()
    assert routing.ragged is not None
    queries = dgefx.kernels.pool.pool(tokens, routing).unflatten(2, (2, 4)).transpose(1, 2)
    context = tokens.unflatten(2, (2, 4)).transpose(1, 2)
    generator = torch.Generator().manual_seed(0)
    mask = None
    if form == "additive":
        mask = torch.randn(2, 31, 31, generator=generator)
    elif form == "bool":
        mask = torch.rand(31, 31, generator=generator) > 0.3
    elif form == "per image":
        mask = torch.randn(3, 1, 1, 31, generator=generator)
    found = packed_attention(queries, context, context, routing, mask)
    ragged = routing.ragged
    for query in range(int(ragged.offsets[-1])):
        image = int(ragged.image[query])
        own = queries[0, :, query].double()
        keys = context[image].double()
        scores = torch.einsum("hc,hkc->hk", own, keys) / 2.0
        if mask is not None:
            held = (ragged.row[image] == query).nonzero().flatten()
            full = mask.expand(3, 2, 31, 31)[image].double()
            bias = full[:, held].mean(1)
            if form == "bool":
                bias = torch.where(bias > 0.5, 0.0, -torch.inf)
            scores = scores + bias
        wanted = torch.einsum("hk,hkc->hc", scores.softmax(-1), keys)
        # a query that may see nothing has no defined result
        seen = torch.isfinite(wanted)
        assert torch.allclose(found[0, :, query].double()[seen], wanted[seen], atol=1e-5)


def test_attention_dropout_takes_the_padded_way() -> None:
    _, tokens, routing = routed()
    assert routing.ragged is not None
    queries = dgefx.kernels.pool.pool(tokens, routing).unflatten(2, (2, 4)).transpose(1, 2)
    context = tokens.unflatten(2, (2, 4)).transpose(1, 2)
    wanted = packed_attention(queries, context, context, routing)
    real = int(routing.ragged.offsets[-1])
    packed = queries[0].transpose(0, 1)
    found = _with_dropout(packed, context, context, routing, None, None, 0.0, None)
    assert torch.allclose(found.transpose(0, 1)[:, :real], wanted[0, :, :real], atol=1e-6)
    dropped = packed_attention(queries, context, context, routing, dropout_p=0.5)
    assert dropped.shape == wanted.shape and error(dropped, wanted) > 0.1


def test_attention_dropout_with_the_queries_of_all_levels() -> None:
    class DroppingAttention(Attention):
        """Drops none of its few hundred weights: what is left is the way that dropout takes."""

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            y = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(*y.unbind(0), dropout_p=1e-9)
            return self.proj(y.transpose(1, 2).reshape(b, n, c))

    dense = lively(TinyViT(prefix=1, depth=1, make=lambda dim: DroppingAttention(dim, 2)))
    x = images(3, 48)
    config = DGEConfig(router="linear", budget="average", capacity=None)
    model = dgefx.convert(dense, 0.9, example_inputs=x, config=config)
    gate = blocks(model)["blocks.0"].dge_router.gate
    assert gate is not None
    nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(gate.bias)  # every level is asked for
    set_gates(model.train(), noise=False, path="sparse")
    wanted = model(x).detach()  # with gradients: all levels are computed only then
    assert error(wanted, output(dense, x)) > 1e-3
    set_gates(model, path="dense")
    # other numbers of queries in one formula
    assert error(model(x).detach(), wanted) <= 1e-5


@pytest.mark.parametrize("style", ["timm", "torchvision"])
def test_drop_path_drops_whole_images(style: str) -> None:
    class Dropping(nn.Module):
        """A residual attention and nothing else, so that a dropped update leaves the stream."""

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(dim), Attention(dim, 2)
            made = timm.layers.DropPath(0.5)
            self.drop = made if style == "timm" else torchvision.ops.StochasticDepth(0.5, "row")

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.attn(self.norm(x)))

    dense = TinyViT(prefix=1, depth=1)
    dense.blocks[0] = Dropping(16)
    x = images(16, 32)
    model = dgefx.convert(lively(dense), 0.9, example_inputs=x, config=AVERAGE)
    block = blocks(model)["blocks.0"]
    tokens = torch.randn(16, 65, 16)
    levels = block.dge_router(tokens, (8, 8)).levels
    assert len(levels.unique()) > 1
    moved = (block.train()(tokens) - tokens).abs().amax(2) > 1e-6
    assert bool((moved.all(1) | ~moved.any(1)).all())  # an image as a whole, or not at all
    assert 2 <= int(moved.any(1).sum()) <= 14


# -- training, compiling, keeping ------------------------------------------------------------


@pytest.mark.parametrize("router", ["detail", "linear"])
def test_gradients_equal_the_per_image_mode(router: str) -> None:
    dense = lively(TinyViT(prefix=1))
    x = images(3, 36)
    config = {"router": router, "region": 4}
    packed = dgefx.convert(
        dense, 1.0, example_inputs=x, config=DGEConfig(budget="average", **config)
    )
    each = dgefx.convert(dense, 1.0, example_inputs=x, config=DGEConfig(**config))
    generator = torch.Generator().manual_seed(5)
    levels = {n: random_levels(b, len(x), generator) for n, b in blocks(packed).items()}
    for model in (packed, each):
        impose(model, levels)(x).square().sum().backward()
    wanted = dict(each.named_parameters())
    for name, parameter in packed.named_parameters():
        if "gate" in name:
            continue
        assert parameter.grad is not None
        assert error(parameter.grad, wanted[name].grad) <= 1e-4, name


@pytest.mark.parametrize("capacity", ["budget", None])
def test_gates_are_trained(capacity: str | None) -> None:
    config = DGEConfig(budget="average", router="linear", capacity=capacity)
    x = images(3, 36)
    model = dgefx.convert(lively(TinyViT(prefix=1)), 0.7, example_inputs=x, config=config).train()
    model(x).square().sum().backward()
    for block in blocks(model).values():
        assert float(block.dge_router.gate.weight.grad.norm()) > 0


@pytest.mark.parametrize(
    "kind", ["asked", *(pytest.param(k, marks=pytest.mark.slow) for k in ("detail", "linear"))]
)
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiles_to_one_graph(backend: str, kind: str) -> None:
    options = {
        "detail": {},
        "linear": {"router": "linear"},
        "asked": {"router": "linear", "capacity": None},
    }
    config = DGEConfig(budget="average", **options[kind])
    x = images(3, 48)
    dense = lively(TinyViT(depth=1, prefix=1))
    model = dgefx.convert(dense, 0.7, example_inputs=x, config=config).eval()
    for block in blocks(model).values():
        if block.dge_router.gate is not None:
            nn.init.normal_(block.dge_router.gate.weight)
            nn.init.zeros_(block.dge_router.gate.bias)
    # a number of queries that the data decides is a size that the compiler has to be told of
    with torch._dynamo.config.patch(capture_scalar_outputs=kind == "asked"), torch.no_grad():
        fast = torch.compile(model, fullgraph=True, backend=backend)
        for count in (3, 5, 2):
            batch = images(count, 48, seed=count)
            assert error(fast(batch), model(batch)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_pvt_equals_eager(backend: str) -> None:
    sizes = {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (1, 2)}
    dense = timm.create_model("pvt_v2_b0", mlp_ratios=(8, 8), sr_ratios=(8, 4), **sizes)
    x = images(3, 96)
    model = dgefx.convert(lively(dense), 0.7, example_inputs=x, config=AVERAGE).eval()
    with torch.no_grad():
        assert error(torch.compile(model, fullgraph=True, backend=backend)(x), model(x)) <= 1e-5


def test_calibrated_and_kept(tmp_path) -> None:  # type: ignore[no-untyped-def]
    dense = lively(TinyViT(dim=32, prefix=1))
    x = images(12, 48)
    model = dgefx.convert(dense, 0.6, example_inputs=x[:2], config=AVERAGE)
    dgefx.calibrate(model, x, refine_passes=2, progress=False)
    assert dgefx.report(model).calibrated
    assert macs(model, x[:4]) / macs(dense, x[:4]) <= 0.6 + 1e-6
    dgefx.save(model, tmp_path)
    again = dgefx.load(tmp_path, dense)
    assert error(output(again, x), output(model, x)) <= 1e-6
    dgefx.set_budget(model, 1.0)
    assert error(output(model, x), output(dense, x)) <= 1e-5


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"budget": "batch"}, "budget must be one of"),
        ({"capacity": 2.0}, "capacity must be"),
        ({"capacity": None}, 'needs budget="average"'),
        ({"capacity": None, "budget": "average"}, 'router="linear"'),
    ],
)
def test_settings_that_make_no_sense(kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DGEConfig(**kwargs)


def test_config_round_trip() -> None:
    config = DGEConfig(budget="average", router="linear", capacity=None)
    assert DGEConfig.from_json(config.to_json()) == config
    old = {k: v for k, v in DGEConfig().to_dict().items() if k != "capacity"}
    assert DGEConfig.from_dict(old) == DGEConfig()


def test_an_open_capacity_says_that_it_holds_nothing() -> None:
    config = DGEConfig(budget="average", router="linear", capacity=None)
    model = dgefx.convert(lively(TinyViT()), 0.7, example_inputs=images(2, 32), config=config)
    assert not dgefx.report(model).held
    assert "capacity=None" in " ".join(str(dgefx.report(model)).split())


def test_manual_attention_is_refused_with_the_way_out() -> None:
    class Manual(Attention):
        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            weights = (q @ k.transpose(-2, -1)).softmax(-1)
            return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))

    dense = TinyViT(make=lambda dim: Manual(dim, 2))
    with pytest.raises(ValueError, match=r"fused attention.*per_image"):
        dgefx.convert(dense, 0.7, example_inputs=images(2, 32), config=AVERAGE)


@pytest.mark.parametrize("router", [slow("detail"), "linear"])
def test_one_recompile_for_other_batch_sizes(router: str) -> None:
    config = DGEConfig(budget="average", router=router)
    x = images(2, 56)
    dense = lively(TinyViT(depth=1, prefix=1))
    model = dgefx.convert(dense, 0.7, example_inputs=x, config=config).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for count in (2, 4, 7, 3):
        batch = images(count, 56, seed=count)
        assert error(compiled(batch), model(batch)) <= 1e-5
    assert counter.frame_count <= 2


class OnePerImage(nn.Module):
    """Drops images; its size is read where a trace does not follow."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if float(x.detach().sum()) == 1.5:  # a branch on data: cannot be traced
            return x
        mask = torch.empty(x.size(0), *[1] * (x.ndim - 1)).bernoulli_(0.5)
        return x * mask * 2


class ChannelDropout(nn.Module):
    """A residual attention on (B, C, H, W) that drops whole channels of an image."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), Attention(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm(x.flatten(2).transpose(1, 2)))
        y = y.transpose(1, 2).reshape(x.shape)
        return x + nn.functional.dropout2d(y, 0.5, self.training)


@pytest.mark.parametrize("kind", ["images", "channels"])
def test_chance_that_packing_would_share_among_images_is_refused(kind: str) -> None:
    dense = TinyViT(order="BNC" if kind == "images" else "BCHW", depth=1)
    if kind == "images":
        dense.blocks[0].mlp = nn.Sequential(dense.blocks[0].mlp, OnePerImage())
    else:
        dense.blocks[0] = ChannelDropout(16)
    with pytest.raises(ValueError, match="train mode"):
        dgefx.convert(lively(dense), 1.0, example_inputs=images(2, 32), config=AVERAGE)


def test_dropout_of_single_numbers_is_no_obstacle() -> None:
    dense = TinyViT(prefix=1)
    for block in dense.blocks:
        block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.3))
    model = dgefx.convert(lively(dense), 0.7, example_inputs=images(2, 32), config=AVERAGE)
    assert len(dgefx.report(model).converted) == 2
    assert torch.isfinite(model.train()(images(3, 32))).all()


def test_a_mask_may_be_the_same_for_all_keys() -> None:
    _, tokens, routing = routed()
    queries = dgefx.kernels.pool.pool(tokens, routing).unflatten(2, (2, 4)).transpose(1, 2)
    context = tokens.unflatten(2, (2, 4)).transpose(1, 2)
    found = packed_attention(queries, context, context, routing, torch.randn(2, 31, 1))
    # the same for all keys changes nothing
    wanted = packed_attention(queries, context, context, routing)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_calibration_measures_plans_whatever_the_gates_ask_for() -> None:
    config = DGEConfig(budget="average", router="linear", capacity=None)
    x = images(8, 48)
    model = dgefx.convert(lively(TinyViT(prefix=1)), 0.7, example_inputs=x[:2], config=config)
    dgefx.calibrate(model, x, refine_passes=0, progress=False)
    assert dgefx.report(model).ratio > 0.65  # not the floor, as if nothing were lost there
    assert all(b.dge_router.config == config for b in blocks(model).values())
