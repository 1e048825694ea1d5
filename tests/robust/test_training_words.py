"""What the training recipe refuses, warns of and calls by its name, before it is too late."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from torch import Tensor, nn

import dgefx
from dgefx.training import FinetuneTask, GateSchedule, fit_gates, loop, settle_gates, train
from tests.helpers import TinyViT, images

OPEN = dgefx.DGEConfig(router="linear", budget="average", capacity=None)
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
BATCH = (images(2, 32), torch.arange(2))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return dgefx.convert(TinyViT(), 0.7, example_inputs=images(2, 32))


@pytest.fixture(scope="module")
def open_gates() -> nn.Module:
    return dgefx.convert(TinyViT(), 0.7, example_inputs=images(2, 32), config=OPEN)


@pytest.fixture
def task(plain: nn.Module) -> FinetuneTask:
    return FinetuneTask(copy.deepcopy(plain))


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def cosine(optimizer: torch.optim.Optimizer, length: int, per_epoch: bool = False) -> Any:
    return create_scheduler_v2(
        optimizer, num_epochs=length, step_on_epochs=per_epoch, updates_per_epoch=1
    )[0]


def weights(task: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in task.get_trainable_module().parameters()])


def short(task: Any, optimizer: Any, scheduler: Any = None, **options: Any) -> None:
    """Two epochs of two updates."""
    arguments = {"epochs": 2, "progress": False, **options}
    train(task, [BATCH] * 2, optimizer, scheduler, **arguments)


# -- an optimiser or a schedule of something else ----------------------------------------------


@pytest.mark.parametrize("whose", ["dense", "copy", "some", "teacher"])
def test_an_optimizer_of_another_model(task: FinetuneTask, whose: str) -> None:
    model = task.trainable_module
    other: Any = {"dense": TinyViT(), "copy": copy.deepcopy(model), "teacher": task.teacher}
    optimizer = sgd(other.get(whose, model))
    if whose == "some":
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    before = weights(task)
    with pytest.raises(ValueError, match="optimizer is not one of the task's model"):
        short(task, optimizer)
    assert torch.equal(weights(task), before)


def test_an_optimizer_of_a_part_is_one_of_the_model(task: FinetuneTask) -> None:
    before = weights(task)
    short(task, sgd(task.trainable_module.head), epochs=1)
    assert not torch.equal(weights(task), before)


@pytest.mark.parametrize(
    ("length", "per_epoch", "options", "message"),
    [
        (2, False, {}, "made for 2 updates, but there are 4"),
        (8, False, {}, "made for 8 updates, but there are 4"),
        (4, False, {"accumulate": 2}, "made for 4 updates, but there are 2"),
        (4, True, {}, "made for 4 epochs, but there are 2"),
        (4, False, {"schedule_epochs": 3}, "made for 4 updates, but there are 6"),
        (4, False, {}, ""),
        (2, True, {}, ""),
        (6, False, {"schedule_epochs": 3}, ""),
        (5, False, {"schedule_epochs": 0}, ""),
    ],
)
def test_a_schedule_of_another_length(
    task: FinetuneTask, length: int, per_epoch: bool, options: dict[str, Any], message: str
) -> None:
    optimizer = sgd(task.trainable_module)
    scheduler = cosine(optimizer, length, per_epoch)
    if not message:
        return short(task, optimizer, scheduler, **options)
    with pytest.raises(ValueError, match=f"scheduler was {message}"):
        short(task, optimizer, scheduler, **options)
    return None


def test_a_schedule_of_another_optimizer(task: FinetuneTask) -> None:
    optimizer, other = sgd(task.trainable_module), sgd(task.trainable_module)
    with pytest.raises(ValueError, match="scheduler was made for another optimizer"):
        short(task, optimizer, cosine(other, 4))


def test_gates_whose_schedule_is_not_over(plain: nn.Module) -> None:
    def make(**options: Any) -> FinetuneTask:
        return FinetuneTask(copy.deepcopy(plain), schedule=GateSchedule(0.7, 40, **options))

    task = make(warmup=0.5)
    with pytest.raises(ValueError, match=r"40 steps and is not over.*gamma=0\.7,.*gamma=0\.955,"):
        short(task, sgd(task.trainable_module))
    with pytest.raises(ValueError, match=r"temperature=1, .*temperature=1\.9"):
        late = make(temperature=(2.0, 1.0))
        short(late, sgd(late.trainable_module))
    short(task, sgd(task.trainable_module), epochs=1, schedule_epochs=20)
    for same in (make(), make(warmup=0.05)):  # over in time, or nothing changes
        short(same, sgd(same.trainable_module))


# -- arguments of another kind -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("cross_entropy", "criterion must be a module or a function.*found str"),
        (
            nn.CrossEntropyLoss,
            r"the class CrossEntropyLoss; pass an instance, CrossEntropyLoss\(\)",
        ),
        ({"smoothing": 0.1}, "criterion must be .*found dict"),
    ],
)
def test_a_wrong_criterion(plain: nn.Module, criterion: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FinetuneTask(plain, criterion)
    with pytest.raises(TypeError, match="criterion_kwargs must be a dict, found str"):
        FinetuneTask(plain, criterion_kwargs="smoothing")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("criterion", "kind", "message"),
    [
        (
            lambda output, target: 1.0,
            TypeError,
            "the loss of the criterion must be a tensor.*float",
        ),
        (lambda output, target: (output.sum(),), TypeError, "criterion must be a tensor.*tuple"),
        (nn.CrossEntropyLoss(reduction="none"), ValueError, r"one number.*shape \(2,\)"),
    ],
)
def test_a_criterion_that_returns_no_loss(
    plain: nn.Module, criterion: Any, kind: type[Exception], message: str
) -> None:
    task = FinetuneTask(copy.deepcopy(plain), criterion)
    with pytest.raises(kind, match=message):
        short(task, sgd(task.trainable_module))


class Silent(ClassificationTask):
    def forward(self, input: Tensor, target: Tensor | None = None) -> Any:  # type: ignore[override]
        return {"output": self.trainable_module(input)}


def test_a_wrong_task(plain: nn.Module) -> None:
    for wrong, message in (
        (plain, r"found TinyViT; for a converted model FinetuneTask\(model\)"),
        (FinetuneTask, "found the class FinetuneTask"),
        ("task", "found str"),
    ):
        with pytest.raises(
            TypeError, match=f"task must be one of timm's training tasks.*{message}"
        ):
            short(wrong, sgd(plain))
    task = Silent(copy.deepcopy(plain), verbose=False)
    with pytest.raises(TypeError, match=r"task must return a dict with the loss.*Silent returns"):
        short(task, sgd(task.trainable_module))


def test_a_wrong_scheduler_or_optimizer(task: FinetuneTask) -> None:
    optimizer = sgd(task.trainable_module)
    made = create_scheduler_v2(optimizer, num_epochs=2, updates_per_epoch=2)
    for wrong, message in (
        (torch.optim.lr_scheduler.ConstantLR(optimizer), "found ConstantLR"),
        (made, r"found tuple; it returns \(scheduler, epochs\)"),
        (type(made[0]), "found the class CosineLRScheduler"),
        ("cosine", "found str"),
    ):
        with pytest.raises(TypeError, match=f"scheduler must be one of timm's.*{message}"):
            short(task, optimizer, wrong)
    for wrong, message in ((torch.optim.SGD, "the class SGD"), ("sgd", "str"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"optimizer must be .*found {message}"):
            short(task, wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": 0.5}, "mixup must be a function or None, found float"),
        ({"log": "log.csv"}, "log must be a function or None, found str"),
        ({"after_epoch": 3}, "after_epoch must be a function or None, found int"),
        ({"clip_grad": "1"}, "clip_grad must be a number or None, found '1'"),
        ({"seed": None}, "seed must be an integer, found None"),
        ({"schedule_epochs": 1.5}, "schedule_epochs must be an integer, found 1.5"),
    ],
)
def test_other_arguments(task: FinetuneTask, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        short(task, sgd(task.trainable_module), **options)


# -- a loss that is not finite -----------------------------------------------------------------


def test_on_accelerators_too_it_is_found_before_the_update(
    plain: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        kept.append(weights(task))
        loss = nn.functional.cross_entropy(output, target)
        return loss * float("inf") if len(kept) == 3 else loss

    task = FinetuneTask(copy.deepcopy(plain), criterion)
    task.device = torch.device("cuda")  # what the loop went by; nothing is moved there
    monkeypatch.setattr(loop, "_move", lambda value, _device: value)
    rows: list[dict[str, Any]] = []
    with pytest.raises(FloatingPointError, match="step 2"):
        short(task, sgd(task.trainable_module), log=rows.append)
    assert torch.equal(weights(task), kept[2]) and not torch.equal(kept[1], kept[2])
    assert [row["step"] for row in rows] == [0, 1]


# -- gates that miss their budget --------------------------------------------------------------


def test_a_budget_that_is_missed_is_told(open_gates: nn.Module) -> None:
    model = copy.deepcopy(open_gates)
    x = images(4, 32)
    with torch.no_grad():
        for block in model.blocks:  # every region asks alike: there is nothing between two levels
            block.dge_router.gate.weight.zero_()
    with pytest.warns(
        UserWarning, match=r"ask for 0\.\d+ of .*4 images, not for gamma=0\.7"
    ) as found:
        ratio = settle_gates(model, x)
    assert f"ask for {ratio:.3f}" in str(found[0].message) and abs(ratio - 0.7) > 0.005
    assert dgefx.measured_ratio(model, x) == pytest.approx(ratio, rel=1e-5)


def test_a_budget_that_is_met_is_not(open_gates: nn.Module) -> None:
    model, x = copy.deepcopy(open_gates), images(16, 32)
    fit_gates(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert abs(settle_gates(model, x) - 0.7) < 0.005


def test_another_gamma_where_gates_do_not_decide(plain: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"gamma=0\.7 by construction.*set_budget\(model, 0\.5\)"):
        settle_gates(plain, images(2, 32), 0.5)
    assert settle_gates(plain, images(2, 32), 0.7) == dgefx.report(plain).ratio


# -- images ------------------------------------------------------------------------------------


Call = Callable[[nn.Module, Any], Any]
CALLS: dict[str, Call] = {
    "calibrate": dgefx.calibrate,
    "measured_ratio": dgefx.measured_ratio,
    "granularity_maps": dgefx.granularity_maps,
    "plot_granularity": dgefx.plot_granularity,
    "fit_gates": fit_gates,
    "settle_gates": settle_gates,
}


@pytest.mark.parametrize("name", CALLS)
def test_errors_about_images_name_the_call(open_gates: nn.Module, name: str) -> None:
    batches = name not in ("granularity_maps", "plot_granularity")
    wrong: list[tuple[Any, str]] = [
        ([images(2, 32) * float("nan")], "item 0 holds NaN"),
        (["a.jpg"], "item 0"),
        ([{"picture": images(2, 32)}], "item 0 is a dict"),
    ]
    wrong += (
        [([], "is empty"), (3, "must be an iterable")] if batches else [(3, "must be one batch")]
    )
    for value, message in wrong:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: images.*{message}") as found:
            CALLS[name](open_gates, value)
        assert "calibrat" not in str(found.value).removeprefix("calibrate")


@pytest.mark.parametrize("name", ["measured_ratio", "fit_gates", "settle_gates"])
def test_numbers_of_images(open_gates: nn.Module, name: str) -> None:
    call: Any = CALLS[name]
    for option in ("max_images", "batch_size"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, found 0"):
            call(open_gates, images(2, 32), **{option: 0})


# -- examples ----------------------------------------------------------------------------------


def test_overwrite_keeps_the_old_run_where_the_new_one_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    import _recipe
    from finetune_pvt import DEFAULTS

    old = [
        tmp_path / "run" / name for name in ("settings.json", "checkpoint.pt", "start/dgefx.json")
    ]
    for path in old:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    small = ["--model", "test_vit", "--img-size", "64", "--limit-batches", "1", "--device", "cpu"]
    for option in (["--gamma", "0.01"], ["--model-kwargs", "depth=0"]):
        with pytest.raises(SystemExit, match="nothing was done: "):
            _recipe.main(DEFAULTS, [*small, *option, "--out", "run", "--overwrite"])
        assert all(path.read_text() == "{}" for path in old)
