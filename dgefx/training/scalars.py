"""`Scalars`: the numbers of each update of `train` on their way to the host, and to its log.

They are known once the forward is over. Sent for then, they are there while the device still works
on the backward: reading them before the optimiser's step lets no update be made from a loss that is
not finite, and leaves the device something to do meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Row = dict[str, Any]


class Scalars:
    """One transfer per update.

    Args:
        log: called with every row that was read.
        world: number of ranks to average over.
    """

    def __init__(self, log: Callable[[Row], object] | None, world: int) -> None:
        self.log, self.world = log, world
        self.shown: dict[str, str] = {}
        self._sent: tuple[Row, list[str], Tensor, torch.cuda.Event | None] | None = None

    def send(self, row: Row, values: dict[str, Tensor]) -> None:
        """Begin to fetch the scalars of an update, from the device that they are on."""
        stacked = torch.stack([value.float() for value in values.values()])
        if self.world > 1:
            # also lets every rank see, and stop at, a loss that is not finite on one of them
            dist.all_reduce(stacked)
            stacked = stacked / self.world
        event = None
        if stacked.is_cuda:
            stream = torch.cuda.current_stream(stacked.device)
            stacked = stacked.to("cpu", non_blocking=True)  # into pinned memory
            event = stream.record_event()
        self._sent = row, list(values), stacked, event

    def read(self) -> None:
        """Wait for them, check and log them.

        Raises:
            FloatingPointError: one is not finite; names the step and the parts.
        """
        assert self._sent is not None
        (row, names, stacked, event), self._sent = self._sent, None
        if event is not None:
            event.synchronize()
        values = dict(zip(names, stacked.tolist(), strict=True))
        if not all(math.isfinite(value) for value in values.values()):
            parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise FloatingPointError(
                f"the loss is not finite at step {row['step']} (epoch {row['epoch']}, lr "
                f"{row['lr']:.3g}): {parts}; a lower learning rate, clip_grad, or amp=None may help"
            )
        self.shown = {name: f"{values[name]:.3f}" for name in ("loss",) if name in values}
        if self.log is not None:
            self.log({**row, **values})
