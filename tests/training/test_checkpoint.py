"""`save_checkpoint` and `load_checkpoint`: what comes back is exactly what went in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import load_checkpoint as timm_load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor, nn
from torch.optim import Optimizer

import dgefx
from dgefx.training.checkpoint import load_checkpoint, save_checkpoint
from dgefx.training.optim import param_groups
from dgefx.training.shard import shard
from tests.helpers import TinyViT, images
from tests.training.ranks import RANKS, run_on_ranks

LINEAR = dgefx.DGEConfig(router="linear")
EXTRA = {"scheduler": {"t": 3, "values": [0.1, 0.2]}, "best": 0.5, "rng": torch.arange(4)}


def build(seed: int = 0) -> nn.Module:
    """A converted model; its weights differ by `seed`, its structure does not."""
    model = dgefx.convert(TinyViT().eval(), 0.5, example_inputs=images(2, 32), config=LINEAR)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def adamw(model: nn.Module) -> Optimizer:
    groups = param_groups(model)
    return create_optimizer_v2(groups, opt="adamw", lr=1e-3, weight_decay=0.0)


def step(task: TrainingTask, optimizer: Optimizer, seed: int, rank: int | None = None) -> Tensor:
    """One training step on a batch, or on a rank's part of it; the loss before it."""
    task.train()
    batch, target = images(2 * RANKS, 32, seed=seed), torch.arange(2 * RANKS) % 5
    if rank is not None:
        batch, target = batch[2 * rank : 2 * rank + 2], target[2 * rank : 2 * rank + 2]
    loss = task(batch, target)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    task.update_ema()
    return loss.detach()


def started(
    seed: int = 0, steps: int = 0, make: Callable[[nn.Module], Optimizer] = adamw
) -> tuple[ClassificationTask, Optimizer]:
    task = ClassificationTask(build(seed), verbose=False)
    optimizer = make(task.trainable_module)
    for index in range(steps):
        step(task, optimizer, index)
    return task, optimizer


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit, down to the structure."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("steps", [0, 2])
def test_resumed_run_goes_on_bit_for_bit(tmp_path: Path, steps: int) -> None:
    """Also saved before the first step, and read into a run that has gone elsewhere."""
    path = tmp_path / "new" / "last.pt"
    task, optimizer = started(0, steps)
    untouched = copy.deepcopy(optimizer.state_dict())
    save_checkpoint(path, task, optimizer, epoch=7, extra=EXTRA)
    assert same(optimizer.state_dict(), untouched)
    other, fresh = started(1, 0)
    further, used = started(2, 3)
    for found, its in ((other, fresh), (further, used)):
        result = load_checkpoint(path, found, its)
        assert same(result, {"epoch": 7, "extra": EXTRA})
        assert same(its.state_dict(), optimizer.state_dict())
    for seed in (10, 11):
        loss = step(task, optimizer, seed)
        for found, its in ((other, fresh), (further, used)):
            assert torch.equal(step(found, its, seed), loss)
            assert same(found.state_dict(), task.state_dict())
            assert same(its.state_dict(), optimizer.state_dict())
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_entries_of_groups_and_schedulers_come_back(tmp_path: Path) -> None:
    task, optimizer = started()
    scheduler = CosineLRScheduler(optimizer, t_initial=10, warmup_t=2, warmup_lr_init=1e-6)
    step(task, optimizer, 0)
    scheduler.step(1)
    save_checkpoint(tmp_path / "a.pt", task, optimizer, epoch=0, extra=None)
    other, fresh = started(1)
    assert load_checkpoint(tmp_path / "a.pt", other, fresh) == {"epoch": 0, "extra": None}
    assert same(fresh.param_groups[-1]["lr_scale"], 10.0)
    assert same(
        [{k: v for k, v in g.items() if k != "params"} for g in fresh.param_groups],
        [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
    )


def test_parameters_without_a_gradient_stay_without_state(tmp_path: Path) -> None:
    """As gates of blocks at their finest are."""
    task, optimizer = started()
    unused = task.trainable_module.unused = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [unused], "weight_decay": 0.0})
    step(task, optimizer, 0)
    assert unused not in optimizer.state
    save_checkpoint(tmp_path / "a.pt", task, optimizer, epoch=0)
    other, fresh = started(1)
    other.trainable_module.unused = nn.Parameter(torch.zeros(3))
    fresh.add_param_group({"params": [other.trainable_module.unused], "weight_decay": 0.0})
    load_checkpoint(tmp_path / "a.pt", other, fresh)
    assert other.trainable_module.unused not in fresh.state
    assert same(fresh.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(tmp_path: Path, momentum: float) -> None:
    def sgd(model: nn.Module) -> Optimizer:
        return torch.optim.SGD(param_groups(model, lr=0.01), momentum=momentum, dampening=0.5)

    for steps in (0, 1):
        task, optimizer = started(0, steps, sgd)
        save_checkpoint(tmp_path / "a.pt", task, optimizer, epoch=0)
        other, fresh = started(1, 0, sgd)
        load_checkpoint(tmp_path / "a.pt", other, fresh)
        assert torch.equal(step(task, optimizer, 5), step(other, fresh, 5))
        assert same(other.state_dict(), task.state_dict())


def test_compiled_and_plain_read_each_other(tmp_path: Path) -> None:
    """The names are those of the bare model, whole or single modules compiled."""
    plain, optimizer = started(0, 2)
    compiled, its = started(1, 0)
    compiled.compile(backend="eager")
    partly, third = started(2, 0)
    partly.trainable_module.head = torch.compile(partly.trainable_module.head, backend="eager")
    save_checkpoint(tmp_path / "plain.pt", plain, optimizer, epoch=1)
    load_checkpoint(tmp_path / "plain.pt", compiled, its)
    save_checkpoint(tmp_path / "compiled.pt", compiled, its, epoch=1)
    load_checkpoint(tmp_path / "compiled.pt", partly, third)
    save_checkpoint(tmp_path / "partly.pt", partly, third, epoch=1)
    one = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert list(one["state_dict"]) == list(build().state_dict())
    for name in ("compiled.pt", "partly.pt"):
        assert same(dict(torch.load(tmp_path / name, weights_only=True)), dict(one))


def test_ema(tmp_path: Path) -> None:
    task, optimizer = started()
    task.setup_ema(decay=0.9)
    step(task, optimizer, 0)
    save_checkpoint(tmp_path / "a.pt", task, optimizer, epoch=0)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(content["state_dict_ema"]) == list(content["state_dict"])
    assert not same(dict(content["state_dict_ema"]), dict(content["state_dict"]))
    other, fresh = started(1)
    with pytest.raises(ValueError, match="setup_ema"):
        load_checkpoint(tmp_path / "a.pt", other, fresh)
    other.setup_ema(decay=0.9)
    load_checkpoint(tmp_path / "a.pt", other, fresh)
    step(task, optimizer, 1)
    step(other, fresh, 1)
    assert same(other.state_dict(), task.state_dict())
    save_checkpoint(tmp_path / "b.pt", *started(), epoch=0)
    with pytest.raises(ValueError, match="EMA"):
        load_checkpoint(tmp_path / "b.pt", other, fresh)


def test_timm_reads_the_weights(tmp_path: Path) -> None:
    task, optimizer = started()
    save_checkpoint(tmp_path / "a.pt", task, optimizer, epoch=0)
    model = build(3)
    timm_load_checkpoint(model, str(tmp_path / "a.pt"))
    assert same(dict(model.state_dict()), dict(task.trainable_module.state_dict()))


def test_timm_model_with_layer_decay(tmp_path: Path) -> None:
    def make() -> tuple[ClassificationTask, Optimizer]:
        torch.manual_seed(0)
        vit = timm.create_model("test_vit", img_size=64, patch_size=8, num_classes=5)
        model = dgefx.convert(vit.eval(), 0.5, example_inputs=images(2, 64), config=LINEAR)
        groups = param_groups(model, layer_decay=0.5)
        optimizer = create_optimizer_v2(groups, opt="adamw", lr=1e-3, weight_decay=0.0)
        return ClassificationTask(model, verbose=False), optimizer

    def advance(task: ClassificationTask, optimizer: Optimizer) -> Tensor:
        loss = task.train()(images(2, 64), torch.tensor([1, 2]))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    (task, optimizer), (other, fresh) = make(), make()
    advance(task, optimizer)
    save_checkpoint(tmp_path / "a.pt", task, optimizer, epoch=0)
    load_checkpoint(tmp_path / "a.pt", other, fresh)
    assert torch.equal(advance(task, optimizer), advance(other, fresh))
    assert same(other.state_dict(), task.state_dict())


def test_a_failed_write_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, optimizer = started()
    path = tmp_path / "a.pt"
    save_checkpoint(path, task, optimizer, epoch=1)
    before = path.read_bytes()

    def full(*_args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, task, optimizer, epoch=2)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_the_file(tmp_path: Path) -> None:
    task, optimizer = started()
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_checkpoint(tmp_path / "none.pt", task, optimizer)
    (tmp_path / "text.pt").write_text("nothing of the kind")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {}, "epoch": 1}, tmp_path / "timm.pt")
    torch.save(task, tmp_path / "pickled.pt")
    wrong = {"state_dict": {}, "optimizer": {}, "epoch": 1, "extra": None}
    torch.save(wrong, tmp_path / "wrong.pt")
    for name, match in {
        "text.pt": "no checkpoint",
        "list.pt": "holds a list",
        "timm.pt": r"state_dict.*missing, found.*model",
        "pickled.pt": "no checkpoint",
        "wrong.pt": "it holds",
    }.items():
        with pytest.raises(ValueError, match=match):
            load_checkpoint(tmp_path / name, task, optimizer)


def test_errors_of_the_model_and_its_groups(tmp_path: Path) -> None:
    """Nothing is loaded then."""
    task, optimizer = started(0, 1)
    save_checkpoint(tmp_path / "a.pt", task, optimizer, epoch=1)
    dense = TinyViT()
    wide = TinyViT(dim=32)
    other = ClassificationTask(build(1), verbose=False)
    for found, match in (
        (ClassificationTask(dense, verbose=False), r"unknown.*dge_router"),
        (ClassificationTask(wide, verbose=False), "embed.weight is"),
    ):
        with pytest.raises(ValueError, match=match):
            load_checkpoint(tmp_path / "a.pt", found, adamw(found.trainable_module))
    before = copy.deepcopy(other.state_dict())
    ungrouped = torch.optim.AdamW(other.trainable_module.parameters())
    with pytest.raises(ValueError, match="groups"):
        load_checkpoint(tmp_path / "a.pt", other, ungrouped)
    sgd = torch.optim.SGD(param_groups(other.trainable_module), lr=0.1)
    with pytest.raises(ValueError, match=r"another kind than SGD: .*betas"):
        load_checkpoint(tmp_path / "a.pt", other, sgd)
    with pytest.raises(ValueError, match="trainable module does not have"):
        load_checkpoint(tmp_path / "a.pt", other, adamw(build(2)))
    with pytest.raises(ValueError, match="trainable module does not have"):
        save_checkpoint(tmp_path / "b.pt", other, adamw(build(2)), epoch=1)
    assert same(other.state_dict(), before)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"path": 3}, TypeError, "path"),
        ({"task": TinyViT()}, TypeError, "task"),
        ({"optimizer": None}, TypeError, "optimizer"),
        ({"epoch": 1.5}, TypeError, "epoch"),
        ({"extra": lambda: 0}, ValueError, "extra"),
        ({"extra": Path("a")}, ValueError, "extra"),
    ],
)
def test_errors_of_arguments(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], match: str
) -> None:
    task, optimizer = started()
    given: dict[str, Any] = {"path": tmp_path / "a.pt", "task": task, "optimizer": optimizer}
    with pytest.raises(error, match=match):
        save_checkpoint(**{**given, "epoch": 1, "extra": None, **change})
    assert not list(tmp_path.iterdir())


def distribute(task: ClassificationTask, kind: str) -> Optimizer:
    """As a training script does, EMA first: FSDP2's parameters cannot be copied."""
    # the foreach update would mix sharded and whole tensors
    task.setup_ema(decay=0.9, foreach=False)
    if kind == "fsdp":
        shard(task.trainable_module)
        shard(task.trainable_module_ema.module)
        return adamw(task.trainable_module)
    optimizer = adamw(task.trainable_module)
    task.prepare_distributed()
    return optimizer


def work(rank: int, folder: Path) -> dict[str, Any]:
    """Per kind: two steps, a checkpoint after a validation, two more; then the same resumed."""
    result: dict[str, Any] = {}
    for kind in ("ddp", "fsdp"):
        task = ClassificationTask(build(0), verbose=False)
        optimizer = distribute(task, kind)
        save_checkpoint(folder / f"{kind}0.pt", task, optimizer, epoch=0)
        for seed in (0, 1):
            step(task, optimizer, seed, rank)
        with torch.no_grad():
            task.eval().trainable_module(images(2, 32))
        save_checkpoint(folder / f"{kind}.pt", task, optimizer, epoch=3, extra={"kind": kind})
        losses = [step(task, optimizer, seed, rank) for seed in (2, 3)]
        save_checkpoint(folder / f"{kind}-end.pt", task, optimizer, epoch=4)

        resumed = ClassificationTask(build(rank + 1), verbose=False)  # differs by rank: all is sent
        other = distribute(resumed, kind)
        meta = load_checkpoint(folder / f"{kind}.pt", resumed, other)
        again = [step(resumed, other, seed, rank) for seed in (2, 3)]
        save_checkpoint(folder / f"{kind}-again.pt", resumed, other, epoch=4)
        errors = []
        for path in (folder / "none.pt", folder / "ddp0.txt"):
            try:
                load_checkpoint(path, resumed, other)
            except (FileNotFoundError, ValueError) as found:
                errors.append(type(found).__name__)
            if rank == 0:
                (folder / "ddp0.txt").write_text("nothing")
        result[kind] = {"losses": losses, "again": again, "meta": meta, "errors": errors}
    crossed = ClassificationTask(build(rank + 1), verbose=False)
    optimizer = distribute(crossed, "fsdp")
    load_checkpoint(folder / "ddp.pt", crossed, optimizer)
    save_checkpoint(folder / "crossed.pt", crossed, optimizer, epoch=3, extra={"kind": "ddp"})
    result["files"] = str(folder)
    return result


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_on_ranks(work, tmp_path_factory.mktemp("ranks"))


def read(ranks: list[Any], name: str) -> dict[str, Any]:
    content = torch.load(Path(ranks[0]["files"]) / name, weights_only=True)
    return {key: dict(v) if isinstance(v, dict) else v for key, v in content.items()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_distributed_run_resumes_bit_for_bit(ranks: list[Any], kind: str) -> None:
    for result in ranks:
        assert same(result[kind]["losses"], result[kind]["again"])
        assert result[kind]["meta"] == {"epoch": 3, "extra": {"kind": kind}}
        assert result[kind]["errors"] == ["FileNotFoundError", "ValueError"]
    assert same(read(ranks, f"{kind}-end.pt"), read(ranks, f"{kind}-again.pt"))
    assert not same(read(ranks, f"{kind}-end.pt"), read(ranks, f"{kind}.pt"))


def test_checkpoints_cross_between_kinds_of_runs(ranks: list[Any]) -> None:
    assert same(read(ranks, "crossed.pt"), read(ranks, "ddp.pt"))
    assert same(read(ranks, "ddp0.pt"), read(ranks, "fsdp0.pt"))
    folder = Path(ranks[0]["files"])
    for kind in ("ddp", "fsdp"):
        task, optimizer = started(5)
        task.setup_ema(decay=0.9)
        load_checkpoint(folder / f"{kind}.pt", task, optimizer)
        save_checkpoint(folder / "plain.pt", task, optimizer, epoch=3, extra={"kind": kind})
        assert same(read(ranks, "plain.pt"), read(ranks, f"{kind}.pt"))
