"""`FinetuneTask`: its losses against formulas, its teacher, and timm's machinery around it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationEvaluator, DistillationTeacher
from torch import Tensor, nn

import dgefx
from dgefx import DGEConfig
from dgefx.training import FinetuneTask, GateSchedule, gates_of, set_gates
from tests.helpers import TinyViT, error, images, macs, randomise

OPEN = DGEConfig(router="linear", budget="average", capacity=None)


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", depth=2, img_size=64, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # so that blocks decide the output
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return randomise(model).eval()


def converted(config: DGEConfig | None = None, gamma: float = 0.6) -> tuple[nn.Module, nn.Module]:
    dense = vit()
    return dgefx.convert(dense, gamma, example_inputs=images(2, 64), config=config), dense


def batch() -> tuple[Tensor, Tensor]:
    return images(4, 64, seed=3), torch.tensor([0, 1, 2, 3])


def test_the_loss_is_the_sum_of_its_parts() -> None:
    model, dense = converted(OPEN)
    for gate in gates_of(model).values():
        nn.init.normal_(gate.weight)
        nn.init.zeros_(gate.bias)
    task = FinetuneTask(
        model,
        criterion_kwargs={"smoothing": 0.1},
        task_loss_weight=0.7,
        distill_loss_weight=1.5,
        budget_loss_weight=3.0,
        temperature=2.0,
    ).train()
    x, y = batch()
    found = task(x, y)
    output = model(x)
    task_loss = F.cross_entropy(output, y, label_smoothing=0.1)
    with torch.no_grad():
        wanted = (dense(x) / 2.0).log_softmax(-1)
    kd = 4.0 * F.kl_div(
        (output / 2.0).log_softmax(-1), wanted, log_target=True, reduction="batchmean"
    )
    ratio = macs(copy.deepcopy(model).eval(), x) / macs(dense, x)
    budget = (ratio - 0.6) ** 2
    assert error(found["output"].detach(), output.detach()) < 1e-6
    for key, value in (("task_loss", task_loss), ("kd_loss", kd), ("budget_loss", budget)):
        assert float(found[key]) == pytest.approx(
            float(value.detach() if isinstance(value, Tensor) else value), rel=1e-4
        ), key
        assert not found[key].requires_grad
    assert float(kd.detach()) > 0.01
    total = 0.7 * task_loss + 1.5 * kd + 3.0 * budget
    assert float(found["loss"].detach()) == pytest.approx(float(total.detach()), rel=1e-4)
    assert task.ratio == pytest.approx(ratio, rel=1e-6)


def test_the_teacher_is_the_dense_model_and_stays_it() -> None:
    model, dense = converted()
    task = FinetuneTask(model).train()
    assert isinstance(task.teacher, nn.Module)
    assert not task.teacher.training and task.trainable_module.training
    x, y = batch()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    for _ in range(2):
        task(x, y)["loss"].backward()
        optimizer.step()
    assert error(task.teacher(x), dense(x)) < 1e-6
    assert all(p.grad is None for p in task.teacher.parameters())
    before = dense.state_dict()
    assert any(not v.equal(before[k]) for k, v in dgefx.revert(model).state_dict().items())
    # neither timm's optimisers nor its checkpoints see the teacher
    assert set(task.get_checkpoint_state()["state_dict"]) == set(model.state_dict())


def test_other_teachers() -> None:
    model, dense = converted()
    x, y = batch()
    own = FinetuneTask(model, teacher=copy.deepcopy(dense)).train()(x, y)["kd_loss"]
    assert float(own) == pytest.approx(
        float(FinetuneTask(model).train()(x, y)["kd_loss"]), rel=1e-5
    )
    # a teacher of another input normalisation sees the same image
    other = copy.deepcopy(dense)
    other.pretrained_cfg = {**other.pretrained_cfg, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    found = FinetuneTask(model, teacher=DistillationTeacher(other)).train()(x, y)["kd_loss"]
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        wanted = other(x * std + mean).log_softmax(-1)
    kd = F.kl_div(model(x).log_softmax(-1), wanted, log_target=True, reduction="batchmean")
    assert float(found) == pytest.approx(float(kd.detach()), rel=1e-4)
    alone = FinetuneTask(model, teacher=None).train()(x, y)
    assert "kd_loss" not in alone
    assert float(alone["loss"].detach()) == pytest.approx(float(alone["task_loss"]), rel=1e-6)
    # distillation alone needs no targets
    distilled = FinetuneTask(model, task_loss_weight=0.0).train()(x)
    assert "task_loss" not in distilled and float(distilled["loss"].detach()) > 0


def test_features_and_dicts() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "image_size": 64, "patch_size": 8, "num_labels": 5}
    hf = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    x, y = batch()
    model = dgefx.convert(hf, 0.6, example_inputs={"pixel_values": x[:2]})
    found = FinetuneTask(model).train()({"pixel_values": x}, y)
    assert found["output"].shape == (4, 5) and float(found["kd_loss"]) > 0

    features = TinyViT(prefix=1)
    features.head = nn.Identity()
    x = images(3, (36, 28))
    model = dgefx.convert(randomise(features), 0.6, example_inputs=x)
    task = FinetuneTask(model, distill_distance="relative", task_loss_weight=0.0).train()
    with torch.no_grad():
        a, b = model(x), features.eval()(x)
    wanted = ((a - b).square().sum(1) / b.square().sum(1)).mean()
    assert float(task(x)["kd_loss"]) == pytest.approx(float(wanted), rel=1e-4)


def test_a_schedule_is_applied_at_once_and_by_step() -> None:
    model, _ = converted(OPEN)
    schedule = GateSchedule(0.6, 10, warmup=0.5, temperature=(2.0, 1.0), noise=0.5)
    task = FinetuneTask(model, schedule=schedule)
    assert task.gamma == 1.0 and all(g.noise for g in gates_of(model).values())
    assert task.set_step(9) == 0.6
    assert [float(g.temperature) for g in gates_of(model).values()] == [1.0] * 2
    # where the budget holds, the model's own budget moves
    held, _ = converted()
    task = FinetuneTask(held, schedule=GateSchedule(0.6, 10, warmup=0.5, stages=2))
    assert dgefx.report(held).ratio == pytest.approx(1.0)
    task.set_step(5)
    assert task.ratio == dgefx.report(held).ratio <= 0.6


def test_ema_and_evaluation_by_timm() -> None:
    model, _ = converted(OPEN)
    task = FinetuneTask(model).train()
    x, y = batch()
    task(x, y)["loss"].backward()  # a copy must not trip over the graph of this forward
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.head.weight.detach().clone()
    optimizer.step()
    task.update_ema()
    ema = task.get_trainable_module(ema=True).module
    assert torch.allclose(ema.head.weight, (before + model.head.weight) / 2, atol=1e-6)
    assert dgefx.report(ema).ratio == dgefx.report(model).ratio
    scheduled = FinetuneTask(converted()[0], schedule=GateSchedule(0.6, 4, warmup=1.0))
    scheduled.setup_ema()
    scheduled.set_step(4)
    assert dgefx.report(scheduled.get_trainable_module(ema=True).module).ratio <= 0.6
    evaluator = task.create_evaluator()
    assert isinstance(evaluator, ClassificationEvaluator)
    with torch.inference_mode():
        evaluator.update(task.get_eval_model().eval()(x), y)
    assert 0.0 <= evaluator.compute()["top1"] <= 100.0


def test_timm_saves_and_resumes_it(tmp_path: Any) -> None:
    from timm.task import resume_task_checkpoint
    from timm.utils import CheckpointSaver

    model, _ = converted(OPEN)
    task = FinetuneTask(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    task.train()(*batch())["loss"].backward()
    optimizer.step()
    saver = CheckpointSaver(
        model, optimizer, task=task, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(3)
    other, _ = converted(OPEN)
    resumed = FinetuneTask(other)
    epoch = resume_task_checkpoint(
        resumed, str(tmp_path / "last.pth.tar"), torch.optim.AdamW(other.parameters(), lr=1e-3)
    )
    assert epoch == 4
    x, _ = batch()
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_task_trains_as_an_eager_one(autocast: bool) -> None:
    found = []
    x, y = batch()
    for compiled in (False, True):
        model, _ = converted(DGEConfig(router="linear"))
        set_gates(model, path="sparse")
        task = FinetuneTask(model, schedule=GateSchedule(0.6, 4, temperature=(2.0, 1.0)))
        if compiled:
            task.compile(backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = []
        for step in range(4):
            task.set_step(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = task.train()(x, y)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0][-1] < found[0][0]


def test_weights_and_gates_learn_together() -> None:
    model, _ = converted(OPEN)
    task = FinetuneTask(model, task_loss_weight=0.0, budget_loss_weight=20.0).train()
    gates = {id(p) for g in gates_of(model).values() for p in g.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in gates], "lr": 0.05},
        {"params": [p for p in model.parameters() if id(p) not in gates], "lr": 1e-4},
    ]
    optimizer = torch.optim.Adam(groups)
    x, _ = batch()
    distances, ratios = [], []
    for _ in range(40):
        found = task(x)
        ratios.append(task.ratio)
        distances.append(float(found["kd_loss"]))
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
    assert ratios[0] > 0.95 and abs(ratios[-1] - 0.6) < 0.05


@pytest.mark.parametrize(
    ("kwargs", "kind", "words"),
    [
        ({"task_loss_weight": -1.0}, ValueError, "task_loss_weight must be at least 0"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"distill_distance": "mse"}, ValueError, "distill_distance must be"),
        ({"teacher": 3}, TypeError, "teacher must be"),
        ({"schedule": 3}, TypeError, "schedule must be a GateSchedule"),
    ],
)
def test_arguments_are_checked(kwargs: dict[str, Any], kind: type[Exception], words: str) -> None:
    model, dense = converted()
    with pytest.raises(kind, match=words):
        FinetuneTask(model, **kwargs)
    with pytest.raises(ValueError, match="teacher is the model itself"):
        FinetuneTask(model, teacher=model)
    with pytest.raises(ValueError, match="not a converted one"):
        FinetuneTask(dense)


def test_a_teacher_that_does_not_fit_is_named() -> None:
    model, _ = converted()
    teacher = timm.create_model("test_vit", img_size=64, num_classes=7)
    with pytest.raises(ValueError, match="teacher's output"):
        FinetuneTask(model, teacher=teacher).train()(*batch())


def test_without_a_schedule_the_models_own_budget_is_aimed_at() -> None:
    model, _ = converted(OPEN)
    task = FinetuneTask(model, task_loss_weight=0.0).train()
    dgefx.set_budget(model, 0.8)
    assert task.gamma == 0.8
    found = task(batch()[0])
    assert float(found["budget_loss"]) == pytest.approx(
        float(dgefx.budget_loss(model, 0.8).detach()), rel=1e-6
    )


def test_evaluation_has_a_loss_without_budget() -> None:
    model, _ = converted(OPEN)
    task = FinetuneTask(model).eval()
    with torch.no_grad():
        found = task(*batch())
    assert "budget_loss" not in found
    total = found["task_loss"] + found["kd_loss"]
    assert float(found["loss"]) == pytest.approx(float(total), rel=1e-6)


def test_a_task_without_a_loss_is_refused() -> None:
    model, _ = converted()
    with pytest.raises(ValueError, match="nothing to learn from"):
        FinetuneTask(model, task_loss_weight=0.0, teacher=None)
    free, _ = converted(OPEN)
    FinetuneTask(free, task_loss_weight=0.0, teacher=None).train()(batch()[0])["loss"].backward()
