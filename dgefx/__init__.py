"""dgefx: any vision transformer, rewritten into a Dynamic Grained Encoder."""

from dgefx.budget_loss import budget_loss, measured_ratio
from dgefx.calibrate import calibrate, set_budget
from dgefx.config import DGEConfig
from dgefx.convert import convert, explain, report, revert
from dgefx.maps import granularity_maps, plot_granularity, plot_sensitivity
from dgefx.passes.attention.core import AttentionForm
from dgefx.passes.attention.registry import register_attention, unregister_attention
from dgefx.report import BlockReport, Report
from dgefx.serialize import load, save

__version__ = "0.1.0"

__all__ = [
    "AttentionForm",
    "BlockReport",
    "DGEConfig",
    "Report",
    "budget_loss",
    "calibrate",
    "convert",
    "explain",
    "granularity_maps",
    "load",
    "measured_ratio",
    "plot_granularity",
    "plot_sensitivity",
    "register_attention",
    "report",
    "revert",
    "save",
    "set_budget",
    "unregister_attention",
]
