"""`fit_gates` and `settle_gates`: gates that pick what the detail score picks, in budget."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import dgefx
from dgefx import DGEConfig
from dgefx.nn.block import DGEBlock
from dgefx.training import FinetuneTask, fit_gates, gates_of, settle_gates
from tests.helpers import TinyViT, images, macs, randomise

OPEN = DGEConfig(router="linear", budget="average", capacity=None)
LAYER = DGEConfig(router="linear", budget="average", capacity=None, routing="layer")


def pictures(count: int, side: int | tuple[int, int], seed: int = 0) -> Tensor:
    """Noise on light, the stronger the brighter, differing from place to place and by image."""
    generator = torch.Generator().manual_seed(seed)
    x = images(count, side, seed)
    # one brightness for each region of 4 x 4 tokens of 4 x 4 pixels
    cells = [-(-size // 16) for size in x.shape[2:]]
    strength = torch.rand(count, 1, *cells, generator=generator).square()
    strength = strength.repeat_interleave(16, 2).repeat_interleave(16, 3)
    return (x + 2.0) * strength[:, :, : x.shape[2], : x.shape[3]]


def converted(
    config: DGEConfig, gamma: float = 0.7, name: str = "tiny"
) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "swin":
        kwargs = {"depths": (2, 2), "embed_dim": 24, "num_heads": (2, 2), "img_size": 56}
        dense: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", **kwargs)
        x = pictures(24, 56)
    else:
        dense, x = TinyViT(prefix=2), pictures(24, (36, 28))
    model = dgefx.convert(randomise(dense).eval(), gamma, example_inputs=x[:2], config=config)
    return model, dense, x


def levels_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found, hooks = {}, []
    for name, module in model.named_modules():
        if type(module) is DGEBlock:
            hooks.append(
                module.dge_router.register_forward_hook(
                    lambda _r, _i, out, name=name: found.update({name: out.levels})
                )
            )
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["tiny", "swin"])
def test_fitted_gates_keep_to_their_budgets(name: str) -> None:
    model, dense, x = converted(OPEN, name=name)
    fresh = macs(model.eval(), x) / macs(dense, x)
    assert fresh > 0.99
    before = {n: p.clone() for n, p in model.named_parameters() if "gate" not in n}
    assert fit_gates(model.train(), x) is model and model.training
    # each block meets its slots on dense inputs to within a region; routed ones differ a little
    found = macs(model.eval(), x) / macs(dense, x)
    assert abs(found - dgefx.report(model).ratio) < 0.02
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    assert not any(r._forward_hooks for r in model.modules() if hasattr(r, "plan"))
    # every block has its own share
    for name, levels in levels_of(model, x).items():
        router = model.get_submodule(name).dge_router
        queries = router.level_costs().gather(1, levels.t()).sum() / len(x)
        assert abs(float(queries) - router.plan.slots) / router.level_costs()[:, 0].sum() < 0.06


def test_fitted_gates_pick_regions_with_detail() -> None:
    model, _, x = converted(OPEN)
    fit_gates(model, x)
    first = model.blocks[0].dge_router
    plain = dgefx.convert(
        dgefx.revert(model),
        0.7,
        example_inputs=x[:2],
        config=DGEConfig(budget="average", routing="region"),
    )
    plain.blocks[0].dge_router.plan = first.plan
    agreed = levels_of(model, x)["blocks.0"] == levels_of(plain, x)["blocks.0"]
    shares = torch.stack([(levels_of(plain, x)["blocks.0"] == n).float().mean() for n in range(3)])
    # by chance, with these shares of the levels
    assert float(agreed.float().mean()) > float(shares.square().sum()) + 0.1


def test_fitted_gates_under_layer_routing() -> None:
    model, dense, x = converted(LAYER, gamma=0.8)
    fit_gates(model, x)
    assert abs(macs(model.eval(), x) / macs(dense, x) - dgefx.report(model).ratio) < 1e-6


def test_fitted_gates_learn_on() -> None:
    model, _, x = converted(OPEN)
    fit_gates(model, x)
    task = FinetuneTask(model, task_loss_weight=0.0).train()
    task(x)["loss"].backward()
    assert all(float(p.grad.norm()) > 0 for g in gates_of(model).values() for p in g.parameters())
    chances = [
        g.decide(torch.zeros(1, 1, 16) @ g.weight.t() + g.bias) for g in gates_of(model).values()
    ]
    assert all(bool(c.chances.isfinite().all()) for c in chances if c.chances is not None)


@pytest.mark.parametrize("gamma", [0.6, 0.7])
def test_settled_gates_ask_for_gamma(gamma: float) -> None:
    model, dense, x = converted(OPEN)
    fit_gates(model, x)
    found = settle_gates(model, x, gamma)
    assert found == pytest.approx(macs(model.eval(), x) / macs(dense, x), rel=1e-5)
    # 24 images of two blocks have 24 x 6 x 2 regions
    assert abs(found - gamma) < 0.01
    assert abs(dgefx.measured_ratio(model, pictures(64, (36, 28), seed=5)) - gamma) < 0.03


def test_settling_leaves_alone_what_it_cannot_help() -> None:
    model, _, x = converted(OPEN)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="not among them"):
        settle_gates(model, x, 0.05)
    with pytest.raises(ValueError, match="images is empty"):
        settle_gates(model, [])
    with pytest.raises(ValueError, match="gamma must be in"):
        settle_gates(model, x, 2.0)
    with pytest.raises(ValueError, match="images is empty"):
        fit_gates(model, [])
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    held, _, x = converted(DGEConfig(router="linear"))
    assert settle_gates(held, x) == dgefx.report(held).ratio
    detail, _, x = converted(DGEConfig())
    assert settle_gates(detail, x) == dgefx.report(detail).ratio
    with pytest.raises(ValueError, match="no gates"):
        fit_gates(detail, x)


def test_a_settled_gamma_is_the_models() -> None:
    model, _, x = converted(OPEN)
    fit_gates(model, x)
    settle_gates(model, x, 0.6)
    assert dgefx.report(model).gamma == 0.6
    dense, _, x = converted(OPEN, gamma=1.0)
    with pytest.raises(ValueError, match="set_budget"):
        settle_gates(dense, x, 0.6)
    assert settle_gates(dense, x) == dgefx.report(dense).ratio
