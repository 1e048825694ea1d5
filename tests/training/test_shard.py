"""`shard`: the converted forward, sharded, and the class that a sharded block has."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

import dgefx
from dgefx.nn.block import DGEBlock
from dgefx.training.optim import param_groups
from dgefx.training.shard import reshard, shard
from tests.helpers import Block, TinyViT, error, images
from tests.training.ranks import RANKS, run_on_ranks

STEPS = 3
CONFIGS = {
    "detail": dgefx.DGEConfig(),
    # no capacity: gates ask, and their demand is in the loss, as a budget term has it
    "asking": dgefx.DGEConfig(router="linear", budget="average", capacity=None),
}


def build(kind: str) -> nn.Module:
    """The same on every rank. Gates are wide open: fresh ones ask for the finest everywhere."""
    model = dgefx.convert(
        TinyViT(depth=2).eval(), 0.5, example_inputs=images(2, 32), config=CONFIGS[kind]
    )
    generator = torch.Generator().manual_seed(1)
    for block in model.blocks:
        if (gate := block.dge_router.gate) is not None:
            nn.init.normal_(gate.weight, generator=generator)
            nn.init.zeros_(gate.bias)
    return model


def train(model: nn.Module, batches: list[Tensor]) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Losses of a few AdamW steps, one batch each."""
    model.train()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
    losses = []
    for batch in batches:
        loss = model(batch).square().mean()
        for block in model.blocks:
            if (gate := block.dge_router.gate) is not None:
                assert 4 < gate.demand < 64  # of 4 to 64 queries: the levels are mixed
                loss = loss + 1e-3 * gate.demand
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, optimizer


def batches_of(rank: int | None) -> list[Tensor]:
    """A rank's part of every batch; the whole batches for None."""
    whole = [images(2 * RANKS, 32, seed=step) for step in range(STEPS)]
    return whole if rank is None else [batch[2 * rank : 2 * rank + 2] for batch in whole]


def attempt(action: Any) -> str:
    """The error that `action` raises, as text."""
    try:
        action()
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return ""


def work(rank: int, folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    batch = images(2, 32, seed=9)
    mesh = init_device_mesh("cpu", (RANKS,))
    for kind in CONFIGS:
        model = build(kind).eval()
        with torch.no_grad():
            unsharded = model(batch)
        assert shard(model, mesh if kind == "detail" else None) is model
        with torch.no_grad():  # leaves the root's parameters whole: the optimiser must not see it
            difference = error(model(batch), unsharded)
        losses, optimizer = train(model, batches_of(rank))
        for loss in losses:
            dist.all_reduce(loss)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        result[kind] = {
            "difference": difference,
            "losses": torch.stack(losses) / RANKS,
            "sharded": all(isinstance(p, DTensor) for p in held),
            "local": sum(p.to_local().numel() for p in held),
        }
    block = model.blocks[0]
    result["types"] = {
        "fsdp": isinstance(block, FSDPModule),
        "dense": isinstance(block, Block),
        "converted": isinstance(block, DGEBlock),
        "shared": type(block) is type(model.blocks[1]),
    }
    with torch.no_grad():
        reshard(model)
        result["report"] = dgefx.report(model).ratio
    result["copy"] = attempt(lambda: copy.deepcopy(model))
    result["pickle"] = attempt(lambda: pickle.dumps(block))
    result["revert"] = attempt(lambda: dgefx.revert(model, inplace=True))
    result["save"] = attempt(lambda: dgefx.save(model, folder / f"saved{rank}"))
    result["again"] = attempt(lambda: shard(model))
    result["compiled"] = attempt(lambda: shard(torch.compile(model)))
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_on_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_runs_the_converted_forward(results: list[Any], kind: str) -> None:
    model, batch = build(kind).eval(), images(2, 32, seed=9)
    with torch.no_grad():
        coarse = error(dgefx.revert(model)(batch), model(batch))
    assert coarse > 1e-2
    for result in results:
        assert result[kind]["difference"] < 1e-6


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_trains_as_one_process_on_the_whole_batch(results: list[Any], kind: str) -> None:
    model = build(kind)
    losses, _ = train(model, batches_of(None))
    for result in results:
        # float32 sums over the batch in another order, some 1e-7 a step; AdamW carries that on
        torch.testing.assert_close(
            result[kind]["losses"], torch.stack(losses), rtol=1e-5, atol=1e-5
        )
    assert losses[-1] < losses[0]


def test_parameters_are_sharded(results: list[Any]) -> None:
    whole = sum(p.numel() for p in build("asking").parameters())
    for result in results:
        assert result["asking"]["sharded"]
    assert sum(result["asking"]["local"] for result in results) == whole


def test_types_of_a_sharded_block(results: list[Any]) -> None:
    for result in results:
        assert all(result["types"].values()), result["types"]


def test_what_a_sharded_model_cannot_do_is_refused(results: list[Any]) -> None:
    for result in results:
        assert "deepcopy" in result["copy"]
        assert "state dict" in result["pickle"]
        assert "revert does not know" in result["revert"]
        assert result["save"]
        assert "already" in result["again"]
        assert "torch.compile" in result["compiled"]
        assert 0 < result["report"] <= 1


class Mixin:
    """Stands for `FSDPModule`."""

    def extra(self) -> str:
        return "extra"


class MixedBlock(Mixin, Block):
    """What PyTorch makes of a class that it was told is `Block`."""


def test_assigned_class_gives_mixins_and_keeps_the_converted_forward() -> None:
    model = build("detail").eval()
    block, batch = model.blocks[0], images(2, 32)
    with torch.no_grad():
        before = model(batch)
    block.__class__ = MixedBlock
    assert block.__class__ is MixedBlock
    assert isinstance(block, Mixin) and isinstance(block, Block) and isinstance(block, DGEBlock)
    assert type(block).forward is DGEBlock.forward
    assert block.extra() == "extra"
    with torch.no_grad():
        assert torch.equal(model(batch), before)
    assert type(model.blocks[1]) is DGEBlock  # the others are as they were
    # a second wrapper finds the class that the first one left
    block.__class__ = type("Outer", (Mixin2, MixedBlock), {})
    assert [c.__name__ for c in type(block).__mro__[:5]] == [
        "Outer",
        "Mixin2",
        "MixedBlock",
        "Mixin",
        "DGEBlock",
    ]
    assert isinstance(block, Block)


class Mixin2:
    """The mixin of another library."""


def test_other_classes_are_refused() -> None:
    block = build("detail").blocks[0]
    for wrong in (nn.Linear, Block, type("Sub", (Block,), {}), type("Far", (Mixin, nn.Linear), {})):
        with pytest.raises(TypeError, match="mixins"):
            block.__class__ = wrong
    assert type(block) is DGEBlock
    block.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match="mixins"):  # its property would be on the wrong class
        parametrize.register_parametrization(block, "scale", nn.Identity())


def test_unsharded_blocks_copy_and_pickle() -> None:
    model, batch = build("detail").eval(), images(2, 32)
    with torch.no_grad():
        want = model(batch)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(batch), want)
            assert type(other.blocks[0]) is DGEBlock
    blocks = copy.deepcopy(model).blocks
    blocks[0].__class__ = MixedBlock
    for action in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state dict"):
            action(blocks[0])
    with pytest.raises(ValueError, match="cannot be reverted"):
        blocks[0].dense_block()


def test_errors() -> None:
    with pytest.raises(TypeError, match="model"):
        shard("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a converted one"):
        shard(TinyViT())
    with pytest.raises(ValueError, match=r"torch\.compile"):
        shard(torch.compile(build("detail")))  # type: ignore[arg-type]
