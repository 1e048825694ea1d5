"""`GateSchedule` and `set_gates`: what they set, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dgefx
from dgefx import DGEConfig
from dgefx.training import FinetuneTask, GateSchedule, gates_of, set_gates
from tests.helpers import Attention, TinyViT, images, randomise

OPEN = DGEConfig(router="linear", budget="average", capacity=None)


def model_with(config: DGEConfig, gamma: float = 0.6) -> torch.nn.Module:
    return dgefx.convert(
        randomise(TinyViT()), gamma, example_inputs=images(2, (36, 28)), config=config
    )


def test_a_held_budget_falls_in_stages_and_never_too_early() -> None:
    schedule = GateSchedule(0.6, steps=100, warmup=0.5, stages=4)
    model = model_with(DGEConfig())
    seen = [schedule.apply(model, step) for step in range(100)]
    assert sorted(set(seen), reverse=True) == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 1.0 and seen[49] > 0.6 and seen[50:] == [0.6] * 50
    assert all(a >= schedule.gamma_at(step) - 1e-9 for step, a in enumerate(seen))
    assert dgefx.report(model).gamma == 0.6 and dgefx.report(model).ratio <= 0.6
    schedule.apply(model, 20)  # and back, on resume
    assert dgefx.report(model).gamma == pytest.approx(0.9)


def test_free_gates_get_a_falling_target_and_stay_open() -> None:
    schedule = GateSchedule(0.6, steps=100, warmup=0.5)
    model = model_with(OPEN)
    seen = [schedule.apply(model, step) for step in range(60)]
    assert seen[0] == 1.0 and seen[25] == pytest.approx(0.8) and seen[50] == 0.6
    assert len(set(seen[:51])) == 51
    # at a gamma of 1 the model would be the dense one, and its gates would not learn
    assert dgefx.report(model).gamma == 0.6
    schedule.apply(model, 0)
    assert all(gate.learns for gate in gates_of(model.train()).values())
    model(images(2, (36, 28)))
    assert dgefx.budget_loss(model, 1.0).requires_grad


def test_temperature_and_noise() -> None:
    schedule = GateSchedule(0.6, steps=11, temperature=(4.0, 1.0), noise=0.5)
    model = model_with(OPEN)
    found = []
    for step in (0, 5, 6, 10, 50):
        schedule.apply(model, step)
        (first, _) = gates_of(model).values()
        found.append((round(float(first.temperature), 4), first.noise))
    assert found == [(4.0, True), (2.0, True), (1.7411, False), (1.0, False), (1.0, False)]
    set_gates(model, path="dense")
    assert {gate.path for gate in gates_of(model).values()} == {"dense"}
    assert {gate.noise for gate in gates_of(model).values()} == {False}


def test_a_model_without_gates_is_left_alone() -> None:
    model = model_with(DGEConfig())
    set_gates(model, noise=True, path="dense", temperature=2.0)
    assert gates_of(model) == {}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"gamma": 1.5}, "gamma must be in"),
        ({"gamma_start": 0.3}, "gamma_start must be at least gamma"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"stages": 0}, "stages must be at least 1"),
        ({"warmup": 1.5}, "warmup must be a share"),
        ({"noise": -0.1}, "noise must be a share"),
        ({"temperature": (1.0, 0.0)}, "temperature must be positive"),
    ],
)
def test_a_schedule_checks_its_arguments(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GateSchedule(**{"gamma": 0.5, "steps": 10, **kwargs})


def test_set_gates_checks_its_arguments() -> None:
    model = model_with(OPEN)
    with pytest.raises(ValueError, match="path must be one of"):
        set_gates(model, path="full")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="noise must be True or False"):
        set_gates(model, noise=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be positive"):
        set_gates(model, temperature=-1.0)
    with pytest.raises(ValueError, match="not a converted one"):
        set_gates(TinyViT(), noise=True)


def test_a_schedule_under_the_floor_is_refused_at_once() -> None:
    model = model_with(OPEN)
    floor = dgefx.report(model).floor
    for schedule in (
        GateSchedule(floor / 2, 100, warmup=0.5, noise=1.0, temperature=(3.0, 1.0)),
        GateSchedule(floor / 2, 100, noise=1.0, temperature=(3.0, 1.0)),
    ):
        with pytest.raises(ValueError, match="under this model's floor"):
            FinetuneTask(model, schedule=schedule)
    for gate in gates_of(model).values():
        assert not gate.noise and float(gate.temperature) == 1.0
    assert dgefx.report(model).gamma == 0.6


def test_the_dense_path_refuses_batch_norms() -> None:
    class Normed(torch.nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.inner = Attention(dim, 2)
            self.norm = torch.nn.BatchNorm1d(dim)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.norm(x.transpose(1, 2)).transpose(1, 2))

    dense = TinyViT(make=Normed)
    x = images(2, (36, 28))
    model = dgefx.convert(randomise(dense), 0.8, example_inputs=x, config=OPEN)
    with pytest.raises(ValueError, match="batch statistics"):
        set_gates(model, path="dense", noise=True)
    assert {(gate.path, gate.noise) for gate in gates_of(model).values()} == {("sparse", False)}


@pytest.mark.parametrize("warmup", [0.9, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 100])
def test_the_last_step_is_at_gamma(steps: int, warmup: float) -> None:
    schedule = GateSchedule(0.6, steps, warmup=warmup)
    assert schedule.gamma_at(steps - 1) == schedule.stage_at(steps - 1) == 0.6
