"""What the benchmarks share: paired timers, limits of the machine, the time budget, tables, JSON.

Imported by `kernels.py` and `models.py`, which lie beside it. Contestants are always called in turn
in one run, and speed-ups are medians of the quotients of neighbouring measurements, so that a
machine that others slow down for a while slows both sides of a quotient down.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Call = Callable[[], object]
Row = dict[str, Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: relative error of one rounding to the dtype: half a unit in the last place
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

#: more than the caches of any GPU; written between timed calls
FLUSH_BYTES = 256 * 2**20


def synchronise(device: torch.device) -> None:
    """Wait for what was queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Deadline:
    """`minutes` from now. What would not end by then, should it take as long as the longest of its
    kind so far, is not begun but listed as skipped."""

    def __init__(self, minutes: float) -> None:
        self._end, self._longest = time.perf_counter() + 60 * minutes, 0.0

    def took(self, seconds: float) -> None:
        self._longest = max(self._longest, seconds)

    def near(self, more: float = 0.0) -> bool:
        """Whether there is no time for another one, and `more` seconds after it."""
        return time.perf_counter() + self._longest + more > self._end


def wall_times(
    calls: Mapping[str, Call], device: torch.device, runs: int, seconds: float = 60.0
) -> dict[str, list[float]]:
    """Milliseconds per call on the host's clock, up to the end on the device, called in turn.

    Args:
        runs: calls of each. seconds: stop before that many, from the third round on.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(runs):
        if done >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def device_times(
    calls: Mapping[str, Call], device: torch.device, runs: int, seconds: float = 20.0
) -> dict[str, list[float]]:
    """Milliseconds per call on the device's own clock; on the CPU, `wall_times`.

    On CUDA the device is kept busy until the host has queued a whole burst of calls, so that the
    host's overheads are not measured, and its caches are flushed before every call.
    """
    if device.type != "cuda":
        return wall_times(calls, device, runs, seconds)
    burst = 5
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    # cycles of a busy GPU at 2 GHz while the host queues a burst, at most 0.1 s
    cycles = {n: int(min(2 * burst * _queueing(c, device), 0.1) * 2e9) for n, c in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(runs):
        if done >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(burst)]
            torch.cuda._sleep(cycles[name])
            for start, end in events:
                flush.zero_()
                start.record()
                call()
                end.record()
            synchronise(device)
            times[name].append(statistics.median(a.elapsed_time(b) for a, b in events))
    return times


def _queueing(call: Call, device: torch.device) -> float:
    """Seconds that the host takes to queue a call."""
    found = []
    for _ in range(3):
        synchronise(device)
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    synchronise(device)
    return min(found)


def speed_up(base: Sequence[float], own: Sequence[float]) -> float:
    """Median of the paired quotients."""
    return statistics.median(a / b for a, b in zip(base, own, strict=True))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of `copy_` of a large tensor, read and written bytes both counted."""
    count = 2**28 if device.type == "cuda" else 2**24
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    times = device_times({"copy": lambda: target.copy_(source)}, device, 15)["copy"]
    return 2 * source.nbytes / (1e-3 * statistics.median(times[3:]))


def matmul_throughput(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = device_times({"matmul": lambda: a @ b}, device, 12)["matmul"]
    return 2 * side**3 / (1e-3 * statistics.median(times[2:]))


def why(error: Exception) -> str:
    """One line on what an exception says; out of memory in those words."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def environment(device: torch.device) -> Row:
    """What a figure depends on besides the code."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "float32 matmul": torch.get_float32_matmul_precision(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_table(title: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Rows as a table; missing values stay empty, numbers are set right with three digits."""
    table = Table(title=title, title_justify="left")
    numbers = [any(isinstance(r.get(c), (int, float)) for r in rows) for c in columns]
    for column, number in zip(columns, numbers, strict=True):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console = Console()
    # a file or a pipe has no width of its own
    width = console.width if console.is_terminal else 200
    Console(width=width).print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_json(file: Path | None, env: Row, rows: Sequence[Row], **more: object) -> None:
    """The rows with what they were measured on; nothing without a file."""
    if file is not None:
        content = {"environment": env, **more, "rows": list(rows)}
        file.write_text(json.dumps(content, indent=2) + "\n")
