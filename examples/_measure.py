"""What the examples measure: accuracy, and paired run times of two models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from timm.task import ClassificationEvaluator
from timm.task.evaluator import evaluation_sample_limit
from torch import Tensor, nn
from tqdm import tqdm

ROUNDS = 15
Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Speed:
    """Medians over paired runs: milliseconds per batch, and dense time over the other's time."""

    dense_ms: float
    other_ms: float
    speed_up: float


@dataclass(frozen=True)
class Row:
    """One line of the final table; `macs` per image, `ratio` relative to the dense model's."""

    label: str
    accuracy: float
    macs: float
    ratio: float
    milliseconds: float
    speed_up: float


@torch.inference_mode()
def top1(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device,
    label: str,
    *,
    amp: torch.dtype | None = None,
    distributed: bool = False,
    progress: bool = True,
) -> float:
    """Accuracy in percent; `distributed`: over the parts of the images that the processes have."""
    model.eval()
    evaluator = ClassificationEvaluator(device, max_samples=evaluation_sample_limit(loader))
    bar = tqdm(loader, desc=f"test {label}", unit="batch", leave=False, disable=not progress)
    for images, targets in bar:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            output = model(images.to(device))
        evaluator.update(output, targets.to(device))
    return evaluator.compute(distributed=distributed)["top1"]


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile does not work on this machine at all (say, no C++ compiler), or None."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def _seconds(model: Model, images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def compare(dense: Model, other: Model, images: Tensor) -> Speed:
    """Time both models on the same batch, in alternating pairs, after a warm-up that compiles."""
    for model in (dense, other):
        for _ in tqdm(range(3), desc="compile and warm up", unit="run", leave=False):
            model(images)
    pairs = []
    for _ in tqdm(range(ROUNDS), desc="time", unit="pair", leave=False):
        pairs.append((_seconds(dense, images), _seconds(other, images)))
    dense_s, other_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Speed(1e3 * dense_s, 1e3 * other_s, statistics.median(d / o for d, o in pairs))


def table(rows: list[Row], title: str) -> Table:
    """What the whole run comes to."""
    result = Table(title=title)
    result.add_column("model", no_wrap=True)
    headings = ("top-1\n%", "GMACs", "MAC\nratio", "ms per\nbatch", "speed-up", "limit\n1/ratio")
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            row.label,
            f"{row.accuracy:.1f}",
            f"{row.macs / 1e9:.3f}",
            f"{row.ratio:.3f}",
            f"{row.milliseconds:.1f}",
            f"{row.speed_up:.2f} x",
            f"{1 / row.ratio:.2f} x",
        )
    return result


@dataclass(frozen=True)
class Result:
    """One line of a fine-tuning's table; `ratio` measured, relative to the dense model's MACs."""

    label: str
    accuracy: float
    macs: float
    ratio: float


def results_table(results: list[Result], title: str) -> Table:
    """What a fine-tuning comes to."""
    result = Table(title=title)
    result.add_column("model", no_wrap=True)
    for heading in ("top-1 %", "GMACs", "measured MAC ratio"):
        result.add_column(heading, justify="right")
    for row in results:
        macs = f"{row.macs / 1e9:.3f}"
        result.add_row(row.label, f"{row.accuracy:.1f}", macs, f"{row.ratio:.3f}")
    return result
