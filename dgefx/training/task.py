"""`FinetuneTask`: task loss, distillation from the dense model and budget term, for timm's loops.

A `timm.task.TrainingTask`, so it goes wherever those go (timm's train script, its checkpoints,
EMA and evaluators). Reads `dgefx.budget_loss`; `dgefx.training.gates` says how gates are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.task import DistillationTeacher, TrainingTask
from timm.task.classification import resolve_classification_loss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dgefx.budget_loss import asked_ratio, budget_loss
from dgefx.calibration.distance import Kind, compared, distance, logits_of, reference
from dgefx.convert import report, revert
from dgefx.record import conversion_record, converted_blocks, unwrap
from dgefx.training.checks import check_number
from dgefx.training.gates import GateSchedule
from dgefx.training.given import described, scalar
from dgefx.training.shard import shard

Criterion = Callable[[Any, Any], Tensor]


class FinetuneTask(TrainingTask):
    """Fine-tunes a converted model to its budget.

    loss = task_loss_weight * criterion(output, target)
         + distill_loss_weight * distance(teacher's output, output)
         + budget_loss_weight * budget_loss

    The teacher is by default the dense model that `model` was made from, with the weights that
    `model` has now: make the task before training, and before loading a checkpoint.

    Args:
        model: converted, not yet wrapped; trained in place.
        criterion: of (output, target), where `target` is whatever the loader yields and `output`
            the model's: logits where it is a classifier's. Made by timm from `criterion_kwargs` if
            None. Not called where `task_loss_weight` is 0.
        criterion_kwargs: for `timm.loss.create_classification_loss`.
        teacher: "dense", None, any module that takes the same input (frozen and put in eval mode),
            a timm `DistillationTeacher` (of another input normalisation, say), or the name of a
            pretrained timm model.
        task_loss_weight, distill_loss_weight, budget_loss_weight: at least 0.
        temperature: of both softmaxes in the distillation of logits; the loss is multiplied by its
            square, so that gradients keep their size.
        distill_distance: "kl" of the logits, "relative" squared distance of all outputs (features,
            dense prediction), or "auto": KL where the output could be logits.
        schedule: applied by `set_step`; None: nothing changes over the training.
        device, dtype, verbose: as timm's tasks take them; device and dtype of the model if None.

    Raises:
        TypeError, ValueError: naming the argument, or not a converted model.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Criterion | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        *,
        teacher: Literal["dense"] | str | nn.Module | None = "dense",
        task_loss_weight: float = 1.0,
        distill_loss_weight: float = 1.0,
        budget_loss_weight: float = 20.0,
        temperature: float = 1.0,
        distill_distance: Literal["auto", "kl", "relative"] = "auto",
        schedule: GateSchedule | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        record = conversion_record(model)
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        if parameter is not None:
            device, dtype = device or parameter.device, dtype or parameter.dtype
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.task_loss_weight = check_number("task_loss_weight", task_loss_weight)
        self.distill_loss_weight = check_number("distill_loss_weight", distill_loss_weight)
        self.budget_loss_weight = check_number("budget_loss_weight", budget_loss_weight)
        self.temperature = check_number("temperature", temperature, positive=True)
        if distill_distance not in ("auto", "kl", "relative"):
            raise ValueError(
                f'distill_distance must be "auto", "kl" or "relative", found {distill_distance!r}'
            )
        self.distill_distance = distill_distance
        if schedule is not None and not isinstance(schedule, GateSchedule):
            raise TypeError(f"schedule must be a GateSchedule, found {type(schedule).__name__}")
        self.schedule = schedule
        self._aim: float | None = None
        if criterion is not None and (isinstance(criterion, type) or not callable(criterion)):
            made = f"; pass an instance, {criterion.__name__}()" if callable(criterion) else ""
            raise TypeError(
                f"criterion must be a module or a function of (output, target), found "
                f"{described(criterion)}{made}"
            )
        if criterion_kwargs is not None and not isinstance(criterion_kwargs, dict):
            raise TypeError(f"criterion_kwargs must be a dict, found {described(criterion_kwargs)}")
        self.criterion = resolve_classification_loss(
            criterion, self.device, criterion_kwargs=criterion_kwargs
        )
        self.teacher = self._make_teacher(teacher, model)
        free = record.config.capacity is None and record.gamma < 1.0 and self.budget_loss_weight
        if self.teacher is None and not self.task_loss_weight and not free:
            raise ValueError(
                "nothing to learn from: task_loss_weight is 0, there is no teacher, and the budget "
                "holds by construction; give the task loss or the teacher a weight"
            )
        self.trainable_module = model
        if schedule is not None:
            self.set_step(0)

    def _make_teacher(self, teacher: Any, model: nn.Module) -> nn.Module | None:
        if teacher is None or not self.distill_loss_weight:
            return None
        if isinstance(teacher, str) and teacher == "dense":
            teacher = revert(model)
        elif isinstance(teacher, str):
            classes = getattr(model, "num_classes", None)
            teacher = DistillationTeacher(teacher, classes, device=self.device, dtype=self.dtype)
        elif not isinstance(teacher, nn.Module):
            raise TypeError(
                f'teacher must be "dense", None, the name of a timm model or a module, found '
                f"{type(teacher).__name__}"
            )
        else:
            own = {id(parameter) for parameter in model.parameters()}
            if any(id(parameter) in own for parameter in teacher.parameters()):
                raise ValueError(
                    "teacher is the model itself, or shares weights with it, and would be frozen; "
                    'for the dense original use "dense"'
                )
        module: nn.Module = teacher
        return module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FinetuneTask:
        """Train mode for the model; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def set_step(self, step: int) -> float:
        """Apply the schedule at an optimiser step; call it before the step's first forward.

        The copy that averages the weights, if there is one, gets the same budget.

        Returns:
            the gamma that is aimed at now.
        """
        if self.schedule is not None:
            self._aim = self.schedule.apply(self.trainable_module, step)
            average = self.get_trainable_module(ema=True)
            if average is not None:
                self.schedule.apply(getattr(average, "module", average), step)
        return self.gamma

    @property
    def gamma(self) -> float:
        """What is aimed at: the schedule's gamma at its step, without one the model's."""
        if self._aim is not None:
            return self._aim
        return conversion_record(unwrap(self.trainable_module)).gamma

    @property
    def ratio(self) -> float:
        """MAC ratio of the last training forward: of what the gates asked for, by the blocks'
        measured costs; where the budget holds by construction the report's."""
        inner = unwrap(self.trainable_module)
        asked = asked_ratio(inner, conversion_record(inner))
        return report(inner).ratio if asked is None else float(asked.detach())

    # timm's tasks have this signature, nn.Module another
    def compile(  # type: ignore[override]
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile model and teacher; before `prepare_distributed`."""
        compiled: Any = torch.compile(
            self.trainable_module, backend=backend, mode=mode, **compile_kwargs
        )
        self.trainable_module = self.eval_model = compiled
        if self.teacher is not None:
            # in place: the name of its weights does not matter, its type may
            self.teacher.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def prepare_distributed(
        self, device_ids: list[int] | None = None, **ddp_kwargs: Any
    ) -> FinetuneTask:
        """Wrap the model in DistributedDataParallel; the teacher is not wrapped.

        Corrections of blocks that are at their finest are not used: with corrections
        `find_unused_parameters` is on, unless told otherwise.
        """
        inner = unwrap(self.trainable_module)
        blocks = converted_blocks(inner, conversion_record(inner))
        if any(block.dge_router.correction is not None for block in blocks.values()):
            ddp_kwargs.setdefault("find_unused_parameters", True)
        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def prepare_sharded(self, mesh: Any = None, **fsdp_kwargs: Any) -> FinetuneTask:
        """Shard the model with FSDP2, see `dgefx.training.shard`; before the optimiser is made."""
        self.trainable_module = shard(self.trainable_module, mesh, **fsdp_kwargs)
        return self

    def forward(self, input: Any, target: Any = None) -> dict[str, Any]:
        """One training forward.

        Args:
            input: the model's input: a tensor, or a dict of keyword arguments.
            target: for the criterion.

        Returns:
            `loss`, `output`, and the detached `task_loss`, `kd_loss` and (in train mode)
            `budget_loss`, unweighted.
        """
        output = _call(self.trainable_module, input)
        logits = logits_of(output)
        shown = output if logits is None else logits
        loss = torch.zeros((), device=shown.device if isinstance(shown, Tensor) else self.device)
        result = {"output": shown}
        if self.training:  # evaluation leaves the gates' demands alone
            budget = budget_loss(self.trainable_module, self.gamma)
            loss = loss + self.budget_loss_weight * budget
            result["budget_loss"] = budget.detach()
        if self.task_loss_weight:
            task_loss = scalar("the loss of the criterion", self.criterion(shown, target))
            loss = loss + self.task_loss_weight * task_loss
            result["task_loss"] = task_loss.detach()
        if self.teacher is not None:
            kd_loss = self._distill(input, output)
            loss = loss + self.distill_loss_weight * kd_loss
            result["kd_loss"] = kd_loss.detach()
        return {"loss": loss, **result}

    def _distill(self, input: Any, output: Any) -> Tensor:
        assert self.teacher is not None
        kind: Kind = "relative" if self.distill_distance == "relative" else "kl"
        if self.distill_distance == "auto" and logits_of(output) is None:
            kind = "relative"
        with torch.no_grad():
            wanted = _call(self.teacher, self._teacher_input(input))
        images = _images(input)
        dense, routed = reference(wanted, kind, images), compared(output, kind, images)
        if [t.shape for t in dense] != [t.shape for t in routed]:
            raise ValueError(
                f"teacher's output {[tuple(t.shape) for t in dense]} does not fit the model's "
                f"{[tuple(t.shape) for t in routed]}"
            )
        if kind == "kl":
            dense, routed = ([t / self.temperature for t in side] for side in (dense, routed))
        found = distance(dense, routed, kind, images).mean()
        return found * self.temperature**2 if kind == "kl" else found

    def _teacher_input(self, input: Any) -> Any:
        if not isinstance(self.teacher, DistillationTeacher) or not isinstance(input, Tensor):
            return input
        cfg = getattr(unwrap(self.trainable_module), "pretrained_cfg", None)
        if not cfg:
            return input
        mean, std = (
            torch.tensor(cfg[key], device=input.device, dtype=input.dtype).view(1, -1, 1, 1)
            for key in ("mean", "std")
        )
        return self.teacher.normalize_input(input, mean, std)


def _call(model: nn.Module, input: Any) -> Any:
    return model(**input) if isinstance(input, dict) else model(input)


def _images(input: Any) -> int:
    """Images in a batch."""
    tensors = input.values() if isinstance(input, dict) else [input]
    return int(next(t for t in tensors if isinstance(t, Tensor)).shape[0])
