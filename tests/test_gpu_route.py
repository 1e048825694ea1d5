"""What a converted model runs on a GPU, run here: packings, operators, interpreted Triton kernels.

On a GPU the router makes a `Packing` and the kernels hand over to the operators; the first tests
ask for that on the CPU, where the operators take their PyTorch references. The last ones also let
the operators take their Triton kernels, which Triton's interpreter runs. Compared with the plain
PyTorch route, which the other tests compare with the dense model.
"""

from __future__ import annotations

import copy
import itertools
import pkgutil
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import dgefx
from dgefx import DGEConfig
from dgefx.training import gates_of, set_gates
from tests.helpers import COMPILERS, TinyViT, error, images, randomise, slow

LAUNCHERS = (
    "collect.launch_collect",
    "spread.launch_spread",
    "stencil.run_stencil",
    "stencil.run_coefficients",
    "attend_forward.launch_attend_forward",
    "attend_backward.launch_attend_backward",
)
OPERATORS = ("pool_op", "unpool_op", "transfer_op", "stencil_op", "attend")
# one operator against a chain of fused PyTorch operations, both in float32
BOUND = 1e-5


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgefx.nn.router_routings.takes_triton", lambda tensor: True)


@pytest.fixture
def launched(packing: None, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Lets the operators take their kernels; holds the names of the launchers that ran."""
    for name in OPERATORS:
        monkeypatch.setattr(f"dgefx.kernels.{name}.takes_triton", lambda tensor: True)
    names: set[str] = set()
    for place in LAUNCHERS:
        launch = pkgutil.resolve_name(f"dgefx.kernels.gpu.{place}")

        def noted(*args: Any, real: Any = launch, place: str = place, **kwargs: Any) -> Any:
            names.add(place)
            return real(*args, **kwargs)

        monkeypatch.setattr(f"dgefx.kernels.gpu.{place}", noted)
    return names


def build(name: str) -> tuple[nn.Module, Tensor]:
    if name.startswith("tiny"):
        order = name.split("_")[1]
        return TinyViT(prefix=2 if order == "BNC" else 0, order=order), images(3, (36, 28))
    if name == "pvt":
        return timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)), images(2, 96)
    kwargs = {"depths": (2, 2), "embed_dim": 24, "num_heads": (2, 2), "img_size": 56}
    return timm.create_model("swin_tiny_patch4_window7_224", **kwargs), images(3, 56)


def convert(name: str, config: DGEConfig, drop_path: bool = True) -> tuple[nn.Module, Tensor]:
    dense, x = build(name)
    torch.manual_seed(1)
    for module in dense.modules():
        if hasattr(module, "drop_prob") and not drop_path:
            module.drop_prob = 0.0
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return dgefx.convert(randomise(dense).eval(), 0.75, example_inputs=x, config=config), x


CONFIGS = {
    "per_image": DGEConfig(),
    "average": DGEConfig(budget="average"),
    "gates": DGEConfig(budget="average", router="linear"),
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *itertools.product(("tiny_BNC", "tiny_BCHW"), CONFIGS),
        ("pvt", "per_image"),
        slow("pvt", "average"),
        ("pvt", "gates"),
        slow("swin", "per_image"),
        ("swin", "average"),
        slow("swin", "gates"),
    ],
)
def test_operators_equal_the_plain_route(
    name: str, config: str, request: pytest.FixtureRequest
) -> None:
    model, x = convert(name, CONFIGS[config])
    with torch.no_grad():
        wanted = model(x)
    wanted_gradients = gradients(model, x)
    request.getfixturevalue("packing")
    assert spied_packing(model, x)
    with torch.no_grad():
        assert error(model(x), wanted) <= BOUND
    for key, gradient in gradients(model, x).items():
        # sums of many float32 products in another order
        assert error(gradient, wanted_gradients[key]) <= 1e-4, key


def spied_packing(model: nn.Module, x: Tensor) -> bool:
    found: list[bool] = []
    handles = [
        m.register_forward_hook(lambda _m, _i, o: found.append(o.packing is not None))
        for n, m in model.named_modules()
        if n.endswith("dge_router")
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return len(found) > 0 and all(found)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tiny_BNC", "average"),
        pytest.param("pvt", "per_image", marks=pytest.mark.slow),
        pytest.param("tiny_BNC", "per_image", marks=pytest.mark.slow),
        pytest.param("pvt", "average", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.usefixtures("packing")
def test_operators_compile_to_one_graph(backend: str, name: str, config: str) -> None:
    model, x = convert(name, CONFIGS[config])
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend=backend)(x)
        assert error(found, model(x)) <= BOUND


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted there")
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tiny_BNC", "per_image"),
        ("tiny_BNC", "average"),
        slow("conv", "per_image"),
        slow("conv", "gates"),
    ],
)
def test_triton_kernels_carry_a_model(
    name: str, config: str, request: pytest.FixtureRequest
) -> None:
    if name == "conv":
        dense, x = Convolved(), images(2, 24)
        torch.manual_seed(1)
        model = dgefx.convert(
            randomise(dense).eval(), 0.9, example_inputs=x, config=CONFIGS[config]
        )
    else:
        model, x = convert(name, CONFIGS[config])
    with torch.no_grad():
        wanted = model(x)
    wanted_gradients = gradients(model, x)
    launched = request.getfixturevalue("launched")
    with torch.no_grad():
        assert error(model(x), wanted) <= BOUND
    for key, gradient in gradients(model, x).items():
        assert error(gradient, wanted_gradients[key]) <= 1e-4, key
    expected = {name for name in LAUNCHERS if name.split(".")[0] in ("collect", "spread")}
    if name == "conv":
        expected |= {name for name in LAUNCHERS if name.startswith("stencil")}
    if config != "per_image":
        expected |= {name for name in LAUNCHERS if name.startswith("attend")}
    assert launched == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted there")
@pytest.mark.slow  # of every kernel alone: tests/kernels
@pytest.mark.parametrize("config", ["per_image", "average"])
@pytest.mark.usefixtures("launched")
def test_half_precision_model(config: str) -> None:
    x = images(2, 24)
    torch.manual_seed(1)
    model = dgefx.convert(
        randomise(Convolved()).eval(), 0.9, example_inputs=x, config=CONFIGS[config]
    )
    # float64 levels may differ from those of half precision: the finest everywhere instead
    dgefx.set_budget(model, 1.0)
    with torch.no_grad():
        wanted = model(x)
        found = copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16())
    # some dozen roundings of 2 ** -8 each, and the interpreter truncates instead of rounding
    assert found.dtype == torch.bfloat16 and error(found, wanted) <= 12 * 2**-8


@pytest.mark.parametrize("config", ["per_image", "average"])
@pytest.mark.usefixtures("packing")
def test_autocast_gives_the_types_of_the_dense_block(config: str) -> None:
    x = images(2, 24)
    dense = randomise(Convolved()).eval()
    model = dgefx.convert(dense, 1.0, example_inputs=x, config=CONFIGS[config])
    stream = torch.randn(2, 36, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for tokens in (stream, stream.bfloat16()):
            wanted, found = dense.blocks[0](tokens), model.blocks[0](tokens)
            assert found.dtype == wanted.dtype
            assert error(found, wanted) <= 12 * 2**-8  # as above


class MixFFN(nn.Module):
    """A depthwise convolution between two linear layers, as in SegFormer, on 6 x 6 tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.conv = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        side = 6
        y = self.enter(x).transpose(1, 2).reshape(x.shape[0], -1, side, side)
        return self.leave(self.conv(y).flatten(2).transpose(1, 2))


class Convolved(TinyViT):
    """A block with a Mix-FFN, so that the stencil takes part."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.blocks[0].mlp = MixFFN(16)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tiny_BNC", "linear"),
        ("tiny_BNC", "open"),
        ("pvt", "linear"),
        slow("pvt", "open"),
        slow("swin", "linear"),
        ("swin", "open"),
    ],
)
def test_the_dense_training_path(name: str, config: str, packing: None) -> None:
    """All granularities at once have no packing, as tokens are in several patches there."""
    configs = {
        "linear": DGEConfig(router="linear"),
        "open": DGEConfig(router="linear", budget="average", capacity=None),
    }
    model, x = convert(name, configs[config], drop_path=False)
    found = []
    for path in ("sparse", "dense"):
        set_gates(model, path=path)
        for gate in gates_of(model).values():
            torch.manual_seed(2)
            nn.init.normal_(gate.weight)
            nn.init.zeros_(gate.bias)
        model.train().zero_grad()
        output = model(x)
        output.square().mean().backward()
        gates = [p.grad for g in gates_of(model).values() for p in g.parameters()]
        assert all(bool(g.isfinite().all()) and bool(g.any()) for g in gates if g is not None)
        found.append(output.detach())
    assert error(found[1], found[0]) < BOUND
