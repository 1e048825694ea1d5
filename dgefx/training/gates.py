"""How the gates of a converted model are trained: noise, temperature, path.

Set by hand with `set_gates`, or step by step by a `GateSchedule` (which also warms gamma up).
Read by `dgefx.nn.gate.Gate` in train mode only: evaluation takes the arg max of the plain logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dgefx.calibrate import check_gamma, set_budget
from dgefx.nn.gate import Gate, Path
from dgefx.record import conversion_record, converted_blocks, unwrap
from dgefx.training.checks import check_number

_PATHS = ("sparse", "dense")


def gates_of(model: nn.Module) -> dict[str, Gate]:
    """The learned gates of a converted model by block name; empty with the detail router.

    Args:
        model: may be wrapped by torch.compile and DistributedDataParallel.
    """
    inner = unwrap(model)
    blocks = converted_blocks(inner, conversion_record(inner))
    gates = {name: block.dge_router.gate for name, block in blocks.items()}
    return {name: gate for name, gate in gates.items() if gate is not None}


def _check_dense_path(model: nn.Module) -> None:
    """Batch norms would take statistics over granularities that were not chosen."""
    inner = unwrap(model)
    for name, block in converted_blocks(inner, conversion_record(inner)).items():
        norms = [n for n, m in block.named_modules() if isinstance(m, _BatchNorm)]
        if norms and block.dge_router.gate is not None:
            raise ValueError(
                f'path="dense" computes all granularities, which would be in the batch statistics '
                f'of {norms} in block {name}; use path="sparse", or convert batch norms to frozen '
                f"ones first"
            )


def set_gates(
    model: nn.Module,
    *,
    noise: bool | None = None,
    temperature: float | None = None,
    path: Path | None = None,
) -> None:
    """Set how the learned gates are trained, in place; None leaves a setting as it is.

    Does nothing to a model with the detail router, which has no gates.

    Args:
        model: converted; may be wrapped by torch.compile and DistributedDataParallel.
        noise: draw levels with Gumbel noise in training (arXiv 2301.03831, equation 5).
        temperature: of the softmax whose probabilities carry the gradients.
        path: "sparse" computes only the chosen queries in training; "dense", the paper's, those of
            all granularities, so that every level's probability has a gradient. Same output.

    Raises:
        TypeError, ValueError: naming the argument, not a converted model, or `path="dense"` of one
            with batch norms in its converted blocks. The model is unchanged then.
    """
    if noise is not None and not isinstance(noise, bool):
        raise TypeError(f"noise must be True or False, found {noise!r}")
    if path is not None and path not in _PATHS:
        raise ValueError(f"path must be one of {_PATHS}, found {path!r}")
    if temperature is not None:
        temperature = check_number("temperature", temperature, positive=True)
    if path == "dense":
        _check_dense_path(model)
    for gate in gates_of(model).values():
        if noise is not None:
            gate.noise = noise
        if path is not None:
            gate.path = path
        if temperature is not None:
            gate.temperature.fill_(temperature)


@dataclass(frozen=True)
class GateSchedule:
    """What changes over a fine-tuning, as a function of the step alone: nothing to save or resume.

    Gamma falls linearly from `gamma_start` to `gamma` over the first `warmup` of the steps. Where
    the budget holds by construction it falls in `stages` equal parts, since a compiled model
    recompiles for each; where gates are free it is the target of the budget loss and falls
    smoothly. The temperature falls geometrically over all steps. Noise is on for the first `noise`
    of the steps, then gates take their arg max, as in evaluation: a budget kept by drawn levels is
    not one kept by arg max.

    Args:
        gamma: MACs to keep in the end, in (0, 1].
        steps: optimiser steps in all.
        gamma_start: MACs to keep at step 0, at least `gamma`.
        warmup: share of the steps in which gamma falls, in [0, 1]; 0: gamma from the start.
        stages: number of budgets on the way, at least 1.
        temperature: (first, last) of the gates' softmax.
        noise: share of the steps with Gumbel noise, in [0, 1].

    Raises:
        TypeError, ValueError: naming the argument.
    """

    gamma: float
    steps: int
    gamma_start: float = 1.0
    warmup: float = 0.0
    stages: int = 4
    temperature: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        check_gamma(self.gamma_start)
        if self.gamma_start < self.gamma:
            raise ValueError(
                f"gamma_start must be at least gamma, found {self.gamma_start} under {self.gamma}"
            )
        for name in ("steps", "stages"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, found {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        for name in ("warmup", "noise"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be a share of the steps in [0, 1], found {value!r}")
        if not isinstance(self.temperature, (tuple, list)) or len(self.temperature) != 2:
            raise TypeError(f"temperature must be (first, last), found {self.temperature!r}")
        for value in self.temperature:
            check_number("temperature", value, positive=True)

    def gamma_at(self, step: int) -> float:
        """Target of the budget loss at a step."""
        # the last step is at gamma even where all of them are warm-up
        ramp = min(self.warmup * self.steps, self.steps - 1)
        if step >= ramp:
            return self.gamma
        done = step / ramp
        return self.gamma_start + (self.gamma - self.gamma_start) * done

    def stage_at(self, step: int) -> float:
        """The same in `stages` equal parts, never under `gamma_at`."""
        if self.gamma_at(step) == self.gamma:
            return self.gamma
        done = (self.gamma_start - self.gamma_at(step)) / (self.gamma_start - self.gamma)
        done = math.floor(done * self.stages + 1e-9) / self.stages
        return self.gamma_start + (self.gamma - self.gamma_start) * done

    def temperature_at(self, step: int) -> float:
        """Temperature of the gates at a step."""
        first, last = self.temperature
        done = min(step / max(self.steps - 1, 1), 1.0)
        return float(first * (last / first) ** done)

    def noise_at(self, step: int) -> bool:
        """Whether levels are drawn with noise at a step."""
        return step < self.noise * self.steps

    def is_over(self, step: int) -> bool:
        """Whether a step is like the last one."""
        last = self.steps - 1
        return all(
            at(step) == at(last) for at in (self.gamma_at, self.temperature_at, self.noise_at)
        )

    def apply(self, model: nn.Module, step: int) -> float:
        """Set `model` to a step, in place.

        Returns:
            gamma, for `dgefx.budget_loss`.

        Raises:
            TypeError, ValueError: not a converted model, or gamma under its floor. The model is
                unchanged then.
        """
        inner = unwrap(model)
        record = conversion_record(inner)
        held = record.config.capacity is not None
        if self.gamma < record.report.floor:
            raise ValueError(
                f"the schedule ends at gamma={self.gamma:g}, under this model's floor of "
                f"{record.report.floor:.3f}"
            )
        # gates without a capacity ask as they like, so for them the model's gamma is a label
        wanted = self.stage_at(step) if held else self.gamma
        if record.gamma != wanted:
            set_budget(inner, wanted)
        set_gates(inner, noise=self.noise_at(step), temperature=self.temperature_at(step))
        return wanted if held else self.gamma_at(step)
