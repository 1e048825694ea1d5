"""What every stage decided for one block is logged under the block's name, and for no other."""

from __future__ import annotations

import logging

import pytest
import timm

import dgefx


def test_stages_of_one_block_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model("test_vit", img_size=32, depth=2).eval()
    with caplog.at_level(logging.DEBUG, logger="dgefx.passes.blocks.0"):
        dgefx.explain(model)
    assert {record.name for record in caplog.records} == {"dgefx.passes.blocks.0"}
    stages = [record.getMessage().partition(":")[0] for record in caplog.records]
    wanted = ["located", "trace in eval mode", "trace in train mode", "plan, verified", "sizes"]
    assert [s.removeprefix("blocks.0, ") for s in stages][:5] == wanted
    assert "def forward" in caplog.text and "unpool_add" in caplog.text
