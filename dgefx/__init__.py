"""dgefx: any vision transformer, rewritten into a Dynamic Grained Encoder."""

from dgefx.calibrate import calibrate, set_budget
from dgefx.config import DGEConfig
from dgefx.convert import convert, explain, report, revert
from dgefx.maps import granularity_maps, plot_granularity, plot_sensitivity
from dgefx.report import BlockReport, Report
from dgefx.serialize import load, save

__version__ = "0.1.0"

__all__ = [
    "BlockReport",
    "DGEConfig",
    "Report",
    "calibrate",
    "convert",
    "explain",
    "granularity_maps",
    "load",
    "plot_granularity",
    "plot_sensitivity",
    "report",
    "revert",
    "save",
    "set_budget",
]
