"""Fine-tuning a converted model to its budget, on timm's training tasks.

Needs timm (`pip install dgefx[train]`); the rest of dgefx does not.
"""

try:
    import timm as _timm  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "dgefx.training is built on timm's training tasks; install timm (pip install dgefx[train])"
    ) from error

from dgefx.budget_loss import budget_loss, measured_ratio
from dgefx.training.checkpoint import load_checkpoint, save_checkpoint
from dgefx.training.fit import fit_gates, settle_gates
from dgefx.training.gates import GateSchedule, gates_of, set_gates
from dgefx.training.log import CsvLog, TensorBoardLog
from dgefx.training.loop import train
from dgefx.training.optim import param_groups
from dgefx.training.shard import shard
from dgefx.training.task import FinetuneTask

__all__ = [
    "CsvLog",
    "FinetuneTask",
    "GateSchedule",
    "TensorBoardLog",
    "budget_loss",
    "fit_gates",
    "gates_of",
    "load_checkpoint",
    "measured_ratio",
    "param_groups",
    "save_checkpoint",
    "set_gates",
    "settle_gates",
    "shard",
    "train",
]
