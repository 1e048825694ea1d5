"""Two processes on the CPU, for tests of what is distributed.

They are forked from a server that has imported what takes seconds, for all tests of a process.
"""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[int, Path], Any]

RANKS = 2


def start_on_ranks(function: Callable[..., None], *args: Any) -> None:
    """Run `function(rank, *args)`, which must be importable; failures of a rank raise here."""
    multiprocessing.set_forkserver_preload(["dgefx.training", "torch.testing", "torchvision"])
    mp.start_processes(function, args, nprocs=RANKS, start_method="forkserver")


def run_on_ranks(work: Work, folder: Path) -> list[Any]:
    """What `work(rank, folder)` returns, by rank; `work` must be importable.

    Rank 0 may use `folder` for files of its own; failures of a rank raise here.
    """
    start_on_ranks(_run, work, str(folder))
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
