"""The training loop and its logs: accumulation, seeding and resumption, rows, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data import Mixup
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import dgefx
from dgefx.training import FinetuneTask, GateSchedule
from dgefx.training.log import CsvLog, TensorBoardLog
from dgefx.training.loop import train
from dgefx.training.optim import param_groups
from dgefx.training.scalars import Scalars
from tests.helpers import TinyViT, error, images

COLUMNS = ["epoch", "step", "lr", "gamma", "ratio", "loss", "budget_loss", "task_loss", "kd_loss"]


def converted(config: dgefx.DGEConfig | None = None) -> nn.Module:
    return dgefx.convert(TinyViT(), gamma=0.5, example_inputs=images(2, 32), config=config)


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return images(count, 32, seed), torch.arange(count) % 5


def sgd(task: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(task.get_trainable_module().parameters(), lr=lr)


def weights(task: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in task.get_trainable_module().parameters()])


def trained(model: nn.Module, loader: Any, **options: Any) -> tuple[Tensor, list[dict[str, Any]]]:
    """Weights after training a copy of `model`, and the rows."""
    task, rows = FinetuneTask(copy.deepcopy(model)), []
    train(task, loader, sgd(task), epochs=1, progress=False, log=rows.append, **options)
    return weights(task), rows


def test_accumulation_is_the_big_batch() -> None:
    # in double precision what remains is the order of sums; clipping acts on the mean gradient
    model = converted().double()
    input, target = batch(6)
    input = input.double()
    whole, big = trained(model, [(input, target)], clip_grad=0.05)
    parts = [(input[i : i + 2], target[i : i + 2]) for i in (0, 2, 4)]
    summed, rows = trained(model, parts, accumulate=3, clip_grad=0.05)
    assert error(summed, whole) < 1e-13
    assert len(rows) == 1
    for name in COLUMNS:
        assert rows[0][name] == pytest.approx(big[0][name], rel=1e-6, abs=1e-12)
    start = weights(FinetuneTask(model))
    assert float((whole - start).norm()) == pytest.approx(0.1 * 0.05, rel=1e-5)


def test_an_incomplete_group_is_divided_by_its_own_number() -> None:
    model = converted()
    one = trained(model, [batch(2)], accumulate=1)[0]
    assert torch.equal(trained(model, [batch(2)], accumulate=4)[0], one)
    rows = trained(model, [batch(2, seed) for seed in range(5)], accumulate=2)[1]
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_no_sync_around_all_but_the_last() -> None:
    task, entered = FinetuneTask(converted()), []

    def no_sync() -> Any:
        entered.append(1)
        return torch.enable_grad()

    task.no_sync = no_sync  # type: ignore[method-assign]
    train(task, [batch(2)] * 5, sgd(task), epochs=1, accumulate=3, progress=False)
    assert len(entered) == 2 + 1


class Noisy(Dataset[tuple[Tensor, int]]):
    """Images that are drawn, as augmented ones are."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, 32, 32) + index, index % 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_bit_for_bit(workers: int) -> None:
    config = dgefx.DGEConfig(router="linear", budget="average", capacity=None)
    schedule = GateSchedule(0.5, 9, warmup=0.5, noise=1.0)

    def setting(model: nn.Module) -> tuple[Any, ...]:
        task = FinetuneTask(model, schedule=schedule)
        optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=1e-3)
        scheduler, _ = create_scheduler_v2(
            optimizer, num_epochs=9, warmup_epochs=2, step_on_epochs=False, updates_per_epoch=1
        )
        loader = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)
        return task, loader, optimizer, scheduler

    kept: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    task, loader, optimizer, scheduler = setting(converted(config))
    teacher = copy.deepcopy(task.trainable_module)

    def after_epoch(epoch: int) -> None:
        torch.rand(epoch + 3)  # what evaluation draws must not matter
        task.eval()
        if epoch == 0:
            kept["model"] = copy.deepcopy(task.trainable_module.state_dict())
            kept["optimizer"] = copy.deepcopy(optimizer.state_dict())

    options: dict[str, Any] = {"epochs": 3, "progress": False, "seed": 5}
    train(task, loader, optimizer, scheduler, log=rows.append, after_epoch=after_epoch, **options)
    again: list[dict[str, Any]] = []
    other, loader, optimizer, scheduler = setting(teacher)
    other.trainable_module.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    torch.manual_seed(99)
    train(other, loader, optimizer, scheduler, start_epoch=1, log=again.append, **options)
    assert again == rows[3:] and [row["step"] for row in again] == list(range(3, 9))
    assert torch.equal(weights(other), weights(task))
    assert len({row["loss"] for row in rows}) == 9  # and epochs do differ


def test_rows_and_callbacks() -> None:
    task = FinetuneTask(converted(), schedule=GateSchedule(0.5, 4, warmup=0.5, stages=2))
    optimizer = torch.optim.SGD(
        [{"params": task.trainable_module.parameters(), "lr_scale": 0.5}], lr=0.1
    )
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=4, step_on_epochs=False, updates_per_epoch=1
    )
    rows: list[dict[str, Any]] = []
    over: list[tuple[int, int]] = []
    train(
        task,
        [batch(2), batch(2, 1)],
        optimizer,
        scheduler,
        epochs=2,
        progress=False,
        log=rows.append,
        after_epoch=lambda epoch: over.append((epoch, len(rows))),
    )
    assert over == [(0, 2), (1, 4)]
    assert all(sorted(row) == sorted(COLUMNS) for row in rows)
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert [row["gamma"] for row in rows] == [1.0, 0.75, 0.5, 0.5]
    assert rows[0]["ratio"] == 1.0 and 0.4 < rows[3]["ratio"] <= 0.5 < rows[1]["ratio"] <= 0.75
    assert rows[3]["ratio"] == dgefx.report(task.trainable_module).ratio
    assert rows[0]["lr"] == pytest.approx(0.1) and rows[3]["lr"] < rows[1]["lr"] < 0.1
    for row in rows:
        assert row["loss"] == pytest.approx(row["task_loss"] + row["kd_loss"], rel=1e-6)


def test_a_ratio_of_free_gates_is_the_tasks() -> None:
    config = dgefx.DGEConfig(router="linear", budget="average", capacity=None)
    task, rows = FinetuneTask(converted(config)), []
    train(task, [batch(2)], sgd(task, 1e-9), epochs=1, progress=False, log=rows.append)
    assert rows[0]["ratio"] == pytest.approx(task.ratio, rel=1e-6)
    assert rows[0]["budget_loss"] == pytest.approx((task.ratio - 0.5) ** 2, rel=1e-5)


def test_timms_own_tasks_train_too() -> None:
    task = ClassificationTask(TinyViT(), verbose=False)
    rows: list[dict[str, Any]] = []
    train(task, [batch(4)] * 8, sgd(task), epochs=2, progress=False, log=rows.append)
    assert sorted(rows[0]) == ["epoch", "loss", "lr", "step"]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_ema_follows() -> None:
    task, seen = FinetuneTask(converted()), []
    task.setup_ema(decay=0.25)
    before = weights(task)
    train(
        task,
        [batch(2)],
        sgd(task),
        epochs=3,
        progress=False,
        after_epoch=lambda epoch: seen.append(weights(task)),
    )
    ema = task.trainable_module_ema.module
    average = torch.cat([p.detach().flatten() for p in ema.parameters()])
    wanted = before
    for now in seen:
        wanted = 0.25 * wanted + 0.75 * now
    # timm begins the average with the weights after the first update, or with those before
    other = seen[0]
    for now in seen[1:]:
        other = 0.25 * other + 0.75 * now
    moved = error(seen[-1], average)
    assert min(error(average, wanted), error(average, other)) < 1e-6 < moved


def test_inputs_may_be_dicts_and_the_sampler_is_told_the_epoch() -> None:
    class Epochs(RandomSampler):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

    told: list[int] = []
    data = TensorDataset(*batch(4))
    loader = DataLoader(data, batch_size=2, sampler=Epochs(data), collate_fn=_as_dict)
    task = FinetuneTask(converted())
    train(task, loader, sgd(task), epochs=3, start_epoch=1, progress=False)
    assert told == [1, 2]


def _as_dict(samples: list[tuple[Tensor, Tensor]]) -> list[Any]:
    inputs, targets = zip(*samples, strict=True)
    return [{"x": torch.stack(inputs)}, torch.stack(targets)]


def test_mixup_and_autocast() -> None:
    mixup = Mixup(mixup_alpha=1.0, num_classes=5)
    task = FinetuneTask(converted(), criterion_kwargs={"soft_targets": True})
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"epochs": 1, "progress": False, "mixup": mixup}
    loader = [batch(2)]
    train(task, loader, sgd(task), amp=torch.bfloat16, log=rows.append, **options)
    assert 0 < rows[0]["task_loss"] < 10
    assert all(p.dtype == torch.float32 for p in task.trainable_module.parameters())
    with pytest.raises(TypeError, match="mixup needs a tensor"):
        train(task, [({"x": loader[0][0]}, loader[0][1])], sgd(task), **options)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = converted()
    calls: list[int] = []
    after: list[int] = []

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        loss = nn.functional.cross_entropy(output, target)
        return loss * float("nan") if len(calls) == 4 else loss

    task = FinetuneTask(model, criterion)
    kept: list[Tensor] = []
    rows: list[dict[str, Any]] = []

    def log(row: dict[str, Any]) -> None:
        rows.append(row)
        kept.append(weights(task))

    with pytest.raises(FloatingPointError, match=r"step 3 \(epoch 1, .*task_loss nan, kd_loss "):
        train(
            task,
            [batch(2)] * 2,
            sgd(task),
            epochs=3,
            progress=False,
            log=log,
            after_epoch=after.append,
        )
    assert len(rows) == 3 and after == [0]
    assert not torch.equal(weights(task), kept[-1])  # update 2 was made, update 3 was not
    assert bool(weights(task).isfinite().all())


def test_numbers_are_sent_for_and_read_later() -> None:
    rows: list[dict[str, Any]] = []
    scalars = Scalars(rows.append, world=1)
    row = {"epoch": 0, "lr": 0.1}
    scalars.send({**row, "step": 0}, {"loss": torch.tensor(1.0)})
    assert rows == []
    scalars.read()
    assert [r["loss"] for r in rows] == [1.0]
    scalars.send({**row, "step": 1}, {"loss": torch.tensor(float("inf"))})
    with pytest.raises(FloatingPointError, match="step 1"):
        scalars.read()


@pytest.mark.parametrize(
    ("loader", "options", "kind", "message"),
    [
        ([], {}, ValueError, "no batches"),
        (iter([]), {}, TypeError, "length"),
        ([1], {}, TypeError, "found int"),
        ([(1, 2, 3)], {}, TypeError, "found tuple of 3"),
        ([1], {"epochs": -1}, ValueError, "epochs must be at least 0"),
        ([1], {"accumulate": 0}, ValueError, "accumulate must be at least 1"),
        ([1], {"accumulate": 1.0}, TypeError, "accumulate must be an integer"),
        ([1], {"clip_grad": 0.0}, ValueError, "None for no clipping"),
        ([1], {"amp": torch.float16}, ValueError, "bfloat16"),
        ([1], {"amp": "bf16"}, TypeError, "torch.dtype"),
    ],
)
def test_arguments(
    loader: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    task = ClassificationTask(TinyViT(), verbose=False)
    with pytest.raises(kind, match=message):
        train(task, loader, sgd(task), **{"epochs": 1, "progress": False, **options})


def test_a_loader_shorter_than_it_says() -> None:
    class Short(list[Any]):
        def __len__(self) -> int:
            return 3

    task = ClassificationTask(TinyViT(), verbose=False)
    with pytest.raises(ValueError, match="loader ended"):
        train(task, Short([batch(2)]), sgd(task), epochs=1, progress=False)


def rows_of(first: int, last: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1 / (step + 1)} for step in range(first, last)]


def write(path: Path, first: int, last: int, **options: Any) -> None:
    with CsvLog(path, **options) as log:
        for row in rows_of(first, last):
            log(row)


def test_csv_goes_on_where_it_ended(tmp_path: Path) -> None:
    straight, parts = tmp_path / "straight.csv", tmp_path / "new" / "parts.csv"
    write(straight, 0, 6)
    assert len(straight.read_text().splitlines()) == 1 + 6
    write(parts, 0, 4)
    write(parts, 4, 6)
    assert parts.read_bytes() == straight.read_bytes()
    write(parts, 2, 6, keep_before_step=2)
    assert parts.read_bytes() == straight.read_bytes()
    write(parts, 0, 1, keep_before_step=0)
    assert parts.read_text().splitlines() == ["step,loss", "0,1.0"]


@pytest.mark.parametrize("cut", [1, 3, 30])
def test_csv_of_a_killed_run(tmp_path: Path, cut: int) -> None:
    straight, killed = tmp_path / "straight.csv", tmp_path / "killed.csv"
    write(straight, 0, 6)
    killed.write_bytes(straight.read_bytes()[:-cut])
    done = killed.read_text().count("\n") - 1
    write(killed, done, 6)
    assert killed.read_bytes() == straight.read_bytes()
    killed.write_bytes(straight.read_bytes()[:4])
    write(killed, 0, 6)
    assert killed.read_bytes() == straight.read_bytes()


def test_csv_errors(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write(path, 0, 2)
    with CsvLog(path) as log, pytest.raises(ValueError, match="columns"):
        log({"step": 2, "accuracy": 1.0})
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column step"):
        CsvLog(path, keep_before_step=1)


def test_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            assert (folder, purge_step) == (str(tmp_path), 3)

        add_scalar: Callable[..., None] = staticmethod(lambda *values: added.append(values))

        def close(self) -> None:
            added.append(("closed", 0.0, 0))

    module = type("module", (), {"SummaryWriter": Writer})
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", module)
    with TensorBoardLog(tmp_path, keep_before_step=3) as log:
        log({"step": 3, "loss": 0.5})
    assert added == [("train/loss", 0.5, 3), ("closed", 0.0, 0)]
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoardLog(tmp_path)


def test_rates_that_nobody_applies_are_refused() -> None:
    task = FinetuneTask(converted(dgefx.DGEConfig(router="linear")))
    model = task.get_trainable_module()
    optimizer = torch.optim.SGD(param_groups(model, gate_lr_scale=10.0), lr=0.1)
    with pytest.raises(ValueError, match="lr_scale"):
        train(task, [batch(2)], optimizer, epochs=1, progress=False)
    before = [group["lr"] for group in optimizer.param_groups]
    optimizer = torch.optim.SGD(param_groups(model, gate_lr_scale=10.0, lr=0.1))
    train(task, [batch(2)], optimizer, epochs=1, progress=False)
    assert before and max(group["lr"] for group in optimizer.param_groups) == pytest.approx(1.0)
