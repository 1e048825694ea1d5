"""Two processes on the CPU, for tests of what is distributed."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[int, Path], Any]

RANKS = 2


def run_on_ranks(work: Work, folder: Path) -> list[Any]:
    """What `work(rank, folder)` returns, by rank; `work` must be importable.

    Rank 0 may use `folder` for files of its own; failures of a rank raise here.
    """
    mp.spawn(_run, (work, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"result{rank}.pt") for rank in range(RANKS)]


def _run(rank: int, work: Work, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(minutes=5),
    )
    result = work(rank, Path(folder))
    torch.save(result, Path(folder) / f"result{rank}.pt")
    dist.barrier()  # a rank that leaves first would break the other's last collective
    dist.destroy_process_group()
