"""`CallForm`: one way in which a block is called, and what a `DGEBlock` runs then."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dgefx.nn.callspec import CallSpec
from dgefx.nn.code import GraphCode
from dgefx.nn.guards import Guards


@dataclass(frozen=True)
class CallForm:
    """spec: how the block is called. The code, and what it holds for, of eval and of train mode."""

    spec: CallSpec
    eval_code: GraphCode
    train_code: GraphCode
    guards: tuple[Guards, Guards] = (Guards(), Guards())

    def labelled(self, name: str) -> CallForm:
        """The same for a block of another name."""
        return dataclasses.replace(
            self,
            eval_code=self.eval_code.labelled(name),
            train_code=self.train_code.labelled(f"{name} train"),
        )
