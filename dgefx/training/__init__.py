"""Fine-tuning a converted model to its budget, on timm's training tasks.

Needs timm (the extra `train`); the rest of dgefx does not.
"""

from importlib.util import find_spec

if find_spec("timm") is None:
    raise ImportError("dgefx.training is built on timm's training tasks: pip install timm")

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
