"""The budget loss: its value against torch's own counter, its gradient against naive counting, and
where it must be right: several processes, torch.compile, activation checkpointing, accumulation.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dgefx
from dgefx import DGEConfig
from dgefx.budget_loss import asked_ratio
from dgefx.nn.block import DGEBlock
from dgefx.nn.router import Router
from dgefx.record import conversion_record
from dgefx.training.gates import set_gates
from tests.helpers import COMPILERS, TinyViT, error, images, macs, randomise, slow
from tests.training.ranks import RANKS, start_on_ranks

OPEN = DGEConfig(router="linear", budget="average", capacity=None)


def routers(model: nn.Module) -> list[Router]:
    return [m.dge_router for m in model.modules() if type(m) is DGEBlock]


def lively_gates(model: nn.Module, std: float = 1.0) -> nn.Module:
    torch.manual_seed(3)
    for router in routers(model):
        assert router.gate is not None
        nn.init.normal_(router.gate.weight, std=std)
        nn.init.zeros_(router.gate.bias)
    return model


def dense_model(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "tiny":
        return TinyViT(prefix=2), images(6, (36, 28))
    if name == "torchvision":
        return torchvision.models.VisionTransformer(64, 8, 2, 2, 32, 64, num_classes=7), images(
            4, 64
        )
    if name == "pvt":
        return timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)), images(3, 96)
    kwargs = {"depths": (2, 2), "embed_dim": 24, "num_heads": (2, 2), "img_size": 56}
    return timm.create_model("swin_tiny_patch4_window7_224", **kwargs), images(3, 56)


def converted(
    name: str = "tiny", gamma: float = 0.7, config: DGEConfig = OPEN
) -> tuple[nn.Module, Tensor, nn.Module]:
    dense, x = dense_model(name)
    for module in dense.modules():  # so that train mode routes what eval mode routes
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    model = dgefx.convert(randomise(dense), gamma, example_inputs=x[:2], config=config)
    return model.train(), x, dense


def gate_gradients(model: nn.Module) -> Tensor:
    gates = [router.gate for router in routers(model)]
    return torch.cat([p.grad.flatten() for gate in gates if gate for p in gate.parameters()])


@pytest.mark.parametrize(
    ("name", "routing"),
    [
        ("tiny", "region"),
        slow("tiny", "layer"),
        slow("torchvision", "region"),
        ("torchvision", "layer"),
        ("pvt", "region"),
        slow("pvt", "layer"),
        slow("swin", "region"),
        ("swin", "layer"),
    ],
)
def test_the_ratio_is_what_torch_counts(name: str, routing: str) -> None:
    config = DGEConfig(router="linear", budget="average", capacity=None, routing=routing)
    model, x, dense = converted(name, config=config)
    lively_gates(model, 0.2 if name == "swin" else 1.0)
    model(x)
    loss = dgefx.budget_loss(model, 0.6)
    model.eval(), dense.eval()
    if name == "torchvision":
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        counted = macs(model, x) / macs(dense, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert counted < 0.98
    assert float(loss.detach()) == pytest.approx((counted - 0.6) ** 2, rel=1e-4)
    assert dgefx.measured_ratio(model, x) == pytest.approx(counted, rel=1e-6)


def test_the_ratio_counts_corrections() -> None:
    model, x, dense = converted()
    lively_gates(model)
    dgefx.calibrate(model, x, refine_passes=0, correction_rank=4, progress=False)
    assert all(router.correction is not None for router in routers(model))
    model.train()(x)
    loss = dgefx.budget_loss(model)
    counted = macs(model.eval(), x) / macs(dense.eval(), x)
    assert float(loss.detach()) == pytest.approx((counted - 0.7) ** 2, rel=1e-4)


def test_the_gradient_is_that_of_expected_queries() -> None:
    torch.manual_seed(0)
    dense, x = randomise(TinyViT(depth=1)), images(4, (36, 28))
    model = dgefx.convert(dense, 0.7, example_inputs=x[:2], config=OPEN).train()
    lively_gates(model)
    set_gates(model, temperature=1.5)
    (router,) = routers(model)
    gate, caught = router.gate, []
    assert gate is not None
    router.register_forward_hook(lambda _r, inputs, out: caught.append((inputs[0], out.levels)))
    model(x)
    dgefx.budget_loss(model, 0.6).backward()
    found = gate_gradients(model)

    tokens, levels = caught[0]
    square = tokens.detach().unflatten(1, (9, 7))
    expected = asked = torch.zeros(())
    for row in range(0, 9, 4):
        for column in range(0, 7, 4):
            part = square[:, row : row + 4, column : column + 4]
            height, width = part.shape[1:3]
            cost = torch.tensor(
                [float(-(-height // side) * -(-width // side)) for side in (1, 2, 4)]
            )
            chances = (gate(part.mean((1, 2))) / 1.5).softmax(-1)
            expected = expected + (chances @ cost).mean()
            region = (row // 4) * 2 + column // 4
            asked = asked + cost[levels[:, region]].mean()
    # MACs per query, from two forwards with all regions at one level
    spent = {}
    for level, queries in ((0, 63), (2, 6)):
        gate.bias.data.copy_(-100.0 * (torch.arange(3) != level))
        gate.weight.data.zero_()
        spent[queries] = macs(model.eval(), x) / macs(dense.eval(), x)
    slope = (spent[63] - spent[6]) / (63 - 6)
    ratio = spent[6] + slope * (float(asked) - 6)
    lively_gates(model)
    wanted = torch.autograd.grad(2 * (ratio - 0.6) * slope * expected, list(gate.parameters()))
    # float32 sums of a few hundred numbers, in another order
    assert error(found, torch.cat([g.flatten() for g in wanted])) < 1e-4


@pytest.mark.parametrize("start", [3.0, -3.0])
def test_gates_move_towards_the_budget_from_both_sides(start: float) -> None:
    model, x, _ = converted()
    x = x * torch.linspace(0.2, 1.0, len(x))[:, None, None, None]
    for router in routers(model):
        assert router.gate is not None
        nn.init.normal_(router.gate.weight, std=0.3)
        router.gate.bias.data.copy_(torch.tensor([start, 0.0, -start]))
    parameters = [p for r in routers(model) if r.gate for p in r.gate.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    record = conversion_record(model)
    seen = []
    for _ in range(80):
        model(x)
        loss = dgefx.budget_loss(model)
        ratio = asked_ratio(model, record)
        assert ratio is not None
        seen.append(float(ratio.detach()))
        optimizer.zero_grad()
        loss.backward()
        assert all(float(p.grad.norm()) > 0 for p in parameters)
        optimizer.step()
    assert abs(seen[0] - 0.7) > 0.15
    # a region changes the ratio in steps: six images of two blocks have 36 x 2 regions
    assert abs(seen[-1] - 0.7) < 0.05


@pytest.mark.parametrize(
    "config",
    [
        DGEConfig(),
        DGEConfig(budget="average"),
        DGEConfig(router="linear"),
        DGEConfig(router="linear", budget="average"),
    ],
)
def test_it_is_zero_where_the_budget_holds(config: DGEConfig) -> None:
    model, x, _ = converted(config=config)
    loss = dgefx.budget_loss(model)
    assert float(loss) == 0.0 and not loss.requires_grad
    assert dgefx.measured_ratio(model, x) == pytest.approx(dgefx.report(model).ratio, abs=1e-3)


def test_errors_say_what_to_do() -> None:
    model, x, dense = converted()
    with pytest.raises(ValueError, match="not a converted one"):
        dgefx.budget_loss(dense)
    with pytest.raises(ValueError, match="forward in train mode"):
        dgefx.budget_loss(model)
    model.eval()(x)
    with pytest.raises(ValueError, match="forward in train mode"):
        dgefx.budget_loss(model)
    model.train()(x)
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\]"):
        dgefx.budget_loss(model, 1.5)
    with torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        dgefx.budget_loss(model)
    with pytest.raises(ValueError, match="images is empty"):
        dgefx.measured_ratio(model, [])


class Checkpointed(nn.Module):
    """Every block of a TinyViT under activation checkpointing."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        found = checkpoint(self.block, x, use_reentrant=self.reentrant)
        assert isinstance(found, Tensor)
        return found


def step(model: nn.Module, x: Tensor, noise: bool = False) -> Tensor:
    """Gradients of the gates after one step with a loss of the output and the budget."""
    set_gates(model, noise=noise)
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(x).square().mean() + dgefx.budget_loss(model)
    loss.backward()
    return gate_gradients(model)


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_activation_checkpointing_changes_nothing(path: str) -> None:
    torch.manual_seed(0)
    dense = timm.create_model("test_vit", img_size=64)
    x = images(3, 64)
    config = DGEConfig(router="linear", budget="average", capacity=None)
    model = lively_gates(dgefx.convert(randomise(dense), 0.7, example_inputs=x, config=config))
    set_gates(model.train(), path=path)
    wanted = step(model, x, noise=True)
    model.set_grad_checkpointing(True)
    assert error(step(model, x, noise=True), wanted) < 1e-6


def test_reentrant_checkpointing_is_refused() -> None:
    model, x, _ = converted()
    blocks = list(model.blocks)
    model.blocks = nn.ModuleList(Checkpointed(block, True) for block in blocks)
    x.requires_grad_()
    model(x)
    model.blocks = nn.ModuleList(blocks)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        dgefx.budget_loss(model)


def test_accumulated_micro_batches_each_have_their_loss() -> None:
    model, x, _ = converted()
    lively_gates(model)
    wanted = (step(model, x[:3]) + step(model, x[3:])) / 2
    model.zero_grad()
    for part in (x[:3], x[3:]):
        loss = model(part).square().mean() + dgefx.budget_loss(model)
        (loss / 2).backward()
    assert error(gate_gradients(model), wanted) < 1e-6


@pytest.mark.parametrize(
    ("path", "config"),
    [
        ("sparse", OPEN),
        pytest.param("dense", DGEConfig(router="linear"), marks=pytest.mark.slow),
        pytest.param("sparse", DGEConfig(router="linear"), marks=pytest.mark.slow),
        pytest.param("dense", OPEN, marks=pytest.mark.slow),
    ],
    ids=["sparse-open", "dense-linear", "sparse-linear", "dense-open"],
)
@pytest.mark.parametrize("backend", COMPILERS)
def test_a_compiled_training_step_has_the_same_gradients(
    backend: str, path: str, config: DGEConfig
) -> None:
    model, x, _ = converted(config=config)
    set_gates(lively_gates(model), path=path)
    wanted = step(model, x)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        fast = torch.compile(model, fullgraph=True, backend=backend)
        model.zero_grad()
        loss = fast(x).square().mean() + dgefx.budget_loss(fast)
        loss.backward()
        # float32 in another order
        assert error(gate_gradients(model), wanted) < 1e-4
        if config is OPEN:
            assert float(loss.detach()) > 0
            counter = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            for temperature in (0.9, 0.5):  # a schedule does not recompile
                set_gates(model, temperature=temperature)
                fast(x)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counter


def _distributed(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    model, x, _ = converted()
    lively_gates(model)
    wrapped = DistributedDataParallel(model)
    share = x.chunk(RANKS)[rank]
    loss = wrapped(share).square().mean() + 3.0 * dgefx.budget_loss(wrapped)
    loss.backward()
    found = {"budget": dgefx.budget_loss(wrapped).detach(), "grads": gate_gradients(model)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    model, x, _ = converted()
    lively_gates(model)
    loss = model(x).square().mean() + 3.0 * dgefx.budget_loss(model)
    budget = dgefx.budget_loss(model).detach()
    loss.backward()
    start_on_ranks(_distributed, str(tmp_path))
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert float(found["budget"]) == pytest.approx(float(budget), rel=1e-5)
        assert error(found["grads"], gate_gradients(model)) < 1e-5


@pytest.mark.parametrize("side", [32, 48])
def test_another_image_size_counts_by_share(side: int) -> None:
    model, x, _ = converted()
    for router in routers(model):
        assert router.gate is not None
        nn.init.zeros_(router.gate.weight)
    found = []
    for level in (0, 2):
        for router in routers(model):
            assert router.gate is not None
            router.gate.bias.data.copy_(10.0 * (torch.arange(3) == level))
        for pixels in (x, images(2, side)):
            model(pixels)
            ratio = asked_ratio(model, conversion_record(model))
            assert ratio is not None and ratio.requires_grad
            found.append(float(ratio.detach()))
    # all fine and all coarse are that at any size
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] > 0.99
    assert found[2] == pytest.approx(found[3], rel=1e-5) and found[2] < 0.6


def test_a_dense_budget_or_a_block_in_eval_mode_is_named() -> None:
    model, x, _ = converted(gamma=1.0)
    model(x)
    assert float(dgefx.budget_loss(model)) == 0.0
    with pytest.raises(ValueError, match="set_budget"):
        dgefx.budget_loss(model, 0.6)
    dgefx.set_budget(model, 0.7)
    model(x)
    model.blocks[1].eval()
    with pytest.raises(ValueError, match=r"blocks\.1"):
        dgefx.budget_loss(model)
