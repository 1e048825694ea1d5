"""The learned gate in training: what its gradients are, by formulas written out in float64.

The reference knows nothing of queries: it mixes the outputs of the block at each single level,
token by token, with weights that are one-hot in value and softmax in gradient.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgefx
from dgefx import DGEConfig
from dgefx.kernels.routing import Routing
from dgefx.nn.block import DGEBlock
from dgefx.nn.gate import Gate, one_hot
from dgefx.training.gates import set_gates
from tests.helpers import TinyViT, error, images, randomise, slow

LEVELS = 3
CONFIGS = {
    "per_image": DGEConfig(router="linear"),
    "average": DGEConfig(router="linear", budget="average"),
    "open": DGEConfig(router="linear", budget="average", capacity=None),
    "layer": DGEConfig(router="linear", budget="average", capacity=None, routing="layer"),
}


def converted(config: DGEConfig, order: str = "BNC", prefix: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    dense = TinyViT(depth=1, prefix=prefix, order=order)
    for module in dense.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    # 9 x 7 tokens: patches are clipped at the border
    x = images(3, (36, 28))
    model = dgefx.convert(randomise(dense), 0.7, example_inputs=x[:2], config=config).double()
    gate = model.blocks[0].dge_router.gate
    nn.init.normal_(gate.weight)
    nn.init.zeros_(gate.bias)
    return model.train(), x.double()


class Watch:
    """Input, output and routing of the last forward of a block, and its output at single levels."""

    def __init__(self, block: DGEBlock) -> None:
        self.block = block
        block.register_forward_hook(self._block, with_kwargs=True)
        self.routed = block.dge_router.register_forward_hook(self._router)
        self.forced: int | None = None

    def _block(self, _m: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        if self.forced is None:
            self.args, self.kwargs, self.output = args, kwargs, output

    def _router(self, router: nn.Module, inputs: tuple, output: Routing) -> Routing | None:
        if self.forced is not None:
            levels = torch.full_like(self.routing.levels, self.forced)
            return router.routing_for(inputs[0], levels, inputs[1])
        self.routing = output
        return None

    def alone(self, level: int) -> Tensor:
        """The block's output with every region at one level."""
        self.forced = level
        try:
            args = [a.detach() if isinstance(a, Tensor) else a for a in self.args]
            return self.block(*args, **self.kwargs).detach()
        finally:
            self.forced = None


def naive_logits(gate: Gate, tokens: Tensor, grid: tuple[int, int], region: int) -> Tensor:
    """(B, rows, columns, L): the linear layer on every (clipped) region's mean token."""
    square = tokens.unflatten(1, grid)
    if not region:
        return gate(square.mean((1, 2), keepdim=True))
    rows = [
        torch.stack([part.mean((1, 2)) for part in row.split(region, 2)], 1)
        for row in square.split(region, 1)
    ]
    return gate(torch.stack(rows, 1))


def to_tokens(value: Tensor, order: str) -> Tensor:
    if order == "BNC":
        return value
    return value.flatten(1, 2) if order == "BHWC" else value.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize(
    ("name", "order", "prefix"),
    [
        ("per_image", "BNC", 2),
        ("per_image", "BCHW", 0),
        ("average", "BNC", 0),
        ("open", "BNC", 2),
        ("open", "BHWC", 0),
        ("layer", "BNC", 2),
    ],
)
def test_gradients_are_those_of_the_mixture(name: str, order: str, prefix: int, path: str) -> None:
    model, x = converted(CONFIGS[name], order, prefix)
    block, temperature = model.blocks[0], 0.7
    set_gates(model, path=path, temperature=temperature)
    watch, gate, grid = Watch(block), block.dge_router.gate, (9, 7)
    model(x)
    stream, output = (to_tokens(t, order) for t in (watch.args[0], watch.output))
    weight = torch.randn(output.shape, dtype=torch.float64)
    found = torch.autograd.grad((output * weight).sum(), list(gate.parameters()))

    region = 0 if name == "layer" else 4
    tokens = stream.detach()[:, prefix:]
    chances = (naive_logits(gate, tokens, grid, region) / temperature).softmax(-1)
    side = region or 9
    spread = chances.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, : grid[0], : grid[1]]
    spread = spread.flatten(1, 2)  # (B, N, L)
    levels = watch.routing.levels[:, block.dge_router.patch_region_0]
    if name in ("open", "layer"):
        assert torch.equal(levels, spread.argmax(-1))
    # levels are both chosen and turned down; of three images not all three
    assert len(levels.unique()) >= (2 if name == "layer" else LEVELS)
    carried = spread - spread.detach()
    if path == "sparse":  # the chosen level's only
        carried = carried * F.one_hot(levels, LEVELS)
    own = F.one_hot(levels, LEVELS) + carried
    updates = [to_tokens(watch.alone(level), order) - stream.detach() for level in range(LEVELS)]
    body = sum(own[..., n, None] * updates[n][:, prefix:] for n in range(LEVELS))
    wanted = torch.autograd.grad((body * weight[:, prefix:]).sum(), list(gate.parameters()))
    # the forward is the mixture too (float64; sums in another order)
    assert error(output[:, prefix:].detach(), (tokens + body).detach()) < 1e-12
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b) < 1e-10


def windows_and_full_resolution(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "pvt":
        return timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), drop_path_rate=0.0), images(
            2, 96
        )
    kwargs = {"depths": (2,), "embed_dim": 24, "num_heads": (2,), "img_size": 56}
    model = timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0, **kwargs)
    return model, images(2, 56)


@pytest.mark.parametrize(
    ("model_name", "name"),
    [("pvt", "open"), slow("pvt", "per_image"), ("swin", "per_image"), slow("swin", "open")],
)
def test_the_dense_path_in_windows_and_at_full_resolution(model_name: str, name: str) -> None:
    dense, x = windows_and_full_resolution(model_name)
    model = dgefx.convert(randomise(dense), 0.8, example_inputs=x, config=CONFIGS[name])
    model, x = model.double().train(), x.double()
    blocks = [m for m in model.modules() if type(m) is DGEBlock]
    for module in blocks:
        module.dge_router.gate.temperature.fill_(2.0)
        nn.init.normal_(module.dge_router.gate.weight, std=0.3)
    last = blocks[-1]
    if name == "open":  # all at the middle level: then other levels alone are what a mixture mixes
        nn.init.zeros_(last.dge_router.gate.weight)
        last.dge_router.gate.bias.data.copy_(torch.tensor([0.0, 1.0, -1.0]))
    watch = Watch(last)
    outputs, grads = {}, {}
    for path in ("sparse", "dense"):
        set_gates(model, path=path)
        model.zero_grad()
        outputs[path] = model(x)
        outputs[path].square().sum().backward()
        grads[path] = [p.grad for p in last.mlp.parameters()]
    assert error(outputs["dense"].detach(), outputs["sparse"].detach()) < 1e-12
    for a, b in zip(grads["dense"], grads["sparse"], strict=True):
        assert error(a, b) < 1e-10
    if name != "open":
        return
    model(x)
    weight = torch.randn(watch.output.shape, dtype=torch.float64)
    gate = last.dge_router.gate
    (found,) = torch.autograd.grad((watch.output * weight).sum(), [gate.bias])
    stream = watch.args[0].detach()
    slopes = torch.stack([(weight * (watch.alone(n) - stream)).sum() for n in range(LEVELS)])
    chances = (gate.bias / 2.0).softmax(0)
    (wanted,) = torch.autograd.grad((chances * slopes).sum(), [gate.bias])
    assert error(found, wanted) < 1e-10


def test_noise_draws_levels_with_their_probabilities() -> None:
    gate = Gate(4, 3).train()
    gate.noise = True
    logits = torch.tensor([0.5, 0.0, -1.0]).expand(1, 40_000, 3)
    torch.manual_seed(0)
    drawn = gate.decide(logits)
    share = F.one_hot(drawn.logits.argmax(-1), 3).float().mean((0, 1))
    # four standard deviations of the mean of 40 000 draws, the largest 0.5 / 200
    assert torch.allclose(share, logits[0, 0].softmax(-1), atol=0.01)
    assert drawn.chances is not None and torch.equal(drawn.chances, drawn.logits.softmax(-1))
    assert torch.equal(gate.eval().decide(logits).logits, logits)
    assert gate.decide(logits).chances is None
    with torch.no_grad():
        assert gate.train().decide(logits).chances is None


def test_noise_reaches_the_routing_in_train_mode_only() -> None:
    model, x = converted(CONFIGS["open"])
    watch = Watch(model.blocks[0])

    def levels() -> Tensor:
        with torch.enable_grad():
            model(x)
        return watch.routing.levels

    plain = levels()
    set_gates(model, noise=True)
    assert not torch.equal(levels(), plain)
    model.eval()
    assert torch.equal(levels(), plain)


def test_one_hot_is_exact_in_half_precision() -> None:
    chances = torch.rand(2, 50, 3).softmax(-1).bfloat16().requires_grad_()
    levels = torch.randint(0, 3, (2, 50))
    assert torch.equal(one_hot(chances, levels), F.one_hot(levels, 3).bfloat16())


def test_a_model_can_be_copied_between_forward_and_backward() -> None:
    model, x = converted(CONFIGS["open"])
    loss = model(x).sum() + dgefx.budget_loss(model)
    twin = copy.deepcopy(model)
    assert twin.blocks[0].dge_router.gate.demand is None
    pickle.dumps(model.blocks[0].dge_router)
    loss.backward()
    assert model.blocks[0].dge_router.gate.demand is not None


def test_layer_routing_needs_images_that_differ() -> None:
    with pytest.raises(ValueError, match='budget="average"'):
        DGEConfig(routing="layer", router="linear")


def test_layer_routing_decides_per_image() -> None:
    model, x = converted(CONFIGS["layer"], prefix=1)
    watch = Watch(model.blocks[0])
    model.eval()(torch.cat([x + shift for shift in (-2.0, 0.0, 2.0)]))
    levels = watch.routing.levels
    assert bool((levels == levels[:, :1]).all()) and len(levels[:, 0].unique()) > 1


def test_layer_routing_keeps_to_a_capacity_with_whole_images() -> None:
    config = DGEConfig(router="linear", budget="average", routing="layer")
    model, x = converted(config)
    router = model.blocks[0].dge_router
    watch = Watch(model.blocks[0])
    nn.init.zeros_(router.gate.weight)
    router.gate.bias.data.copy_(torch.tensor([1.0, 0.0, -1.0]))  # all ask for the finest
    model.eval()(x)
    levels = watch.routing.levels
    assert bool((levels == levels[:, :1]).all()) and bool(levels.any())
    assert watch.routing.ragged is not None
    assert int(watch.routing.ragged.offsets[-1]) <= len(x) * router.plan.slots
