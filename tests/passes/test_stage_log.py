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
    traces = ["trace in eval mode", "trace in train mode"]
    wanted = ["located", *traces, "sides", "plan, verified", "sizes"]
    assert [s.removeprefix("blocks.0, ") for s in stages][:6] == wanted
    assert stages[-1] == "blocks.0, price in MACs"
    assert "norm1: queries and context, tokens, axes (1,), prefix True, batch 0" in caplog.text
    assert "attn_k_norm: context\n" in caplog.text
    assert "def forward" in caplog.text and "unpool_add" in caplog.text
