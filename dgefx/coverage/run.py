"""Every case in a process of its own, so that a crash or a hang costs one row of the table.

Between `cases` and `table`; the process is `worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from dgefx.coverage.cases import Case
from dgefx.coverage.measure import Block, Result


@dataclass(frozen=True)
class Options:
    """jobs: models at a time. timeout: seconds per model. backend: of `torch.compile`. base: only
    time the conversion."""

    jobs: int = 1
    timeout: float = 900.0
    backend: str = "eager"
    base: bool = False

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, found {self.jobs}")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be a number of seconds over 0, found {self.timeout}")


class Running:
    """The processes of one run, of which none goes on after `end`, nor one that begins later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[str]] = set()
        self._ended = False

    def add(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._processes.add(process)
            ended = self._ended
        if ended:
            _kill(process)

    def remove(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._processes.discard(process)

    def end(self) -> None:
        with self._lock:
            self._ended = True
            processes = list(self._processes)
        for process in processes:
            _kill(process)


def run_cases(
    cases: Sequence[Case], options: Options, done: Callable[[Result], None] = lambda _r: None
) -> list[Result]:
    """Measure every case; results in the order of the cases.

    Args:
        done: called with each result as it comes, in the order of the cases.
    """
    running = Running()
    pool = ThreadPoolExecutor(options.jobs)
    try:
        results = []
        for result in pool.map(lambda case: run_case(case, options, running), cases):
            done(result)
            results.append(result)
        return results
    finally:  # also when interrupted: processes in a group of their own do not see it
        pool.shutdown(wait=False, cancel_futures=True)
        running.end()
        pool.shutdown()


def run_case(case: Case, options: Options, running: Running | None = None) -> Result:
    """Measure one case in a process of its own, kept in `running` while it runs."""
    threads = max(1, torch.get_num_threads() // options.jobs)  # heeds OMP_NUM_THREADS
    settings = {"base": options.base, "backend": options.backend, "threads": threads}
    command = [sys.executable, "-m", "dgefx.coverage.worker", case.name, json.dumps(settings)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # the whole group can be ended: compilers start processes too
    )
    running = Running() if running is None else running
    running.add(process)
    try:
        output, log = process.communicate(timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return _failed(case, "timeout", f"not done after {options.timeout:g} s")
    finally:
        _kill(process)
        running.remove(process)
    lines = output.strip().splitlines()
    if process.returncode == 0 and lines:
        return parse(lines[-1])
    last = (log.strip().splitlines() or [""])[-1]
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        last = f"ended by {name} (out of memory ends in SIGKILL). {last}"
    return _failed(case, "crash", last[:300])


def kept(path: Path, cases: Sequence[Case]) -> dict[str, Result]:
    """Results of `cases` from a file of JSON lines, by name; none if there is no such file.

    Raises:
        ValueError: a line is no result.
    """
    if not path.exists():
        return {}
    names, found = {case.name for case in cases}, {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            result = parse(line)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}, is no result: {error}") from error
        if result.name in names:
            found[result.name] = result
    return found


def _kill(process: subprocess.Popen[str]) -> None:
    """End what is left of the process and of those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parse(line: str) -> Result:
    """A result from its JSON line."""
    values = json.loads(line)
    values["blocks"] = [Block(**block) for block in values["blocks"]]
    return Result(**values)


def _failed(case: Case, status: str, error: str) -> Result:
    return Result(case.name, case.family, case.note, case.over_grid, status=status, error=error)
