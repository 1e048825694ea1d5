"""Converted models, and blocks of them, in other models: the record goes with the blocks."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

import dgefx
from dgefx.nn import DGEBlock
from tests.helpers import TinyViT, error, images, macs, randomise

X = images(4, 32)
NAMES = ("blocks.0", "blocks.1")


@pytest.fixture(scope="module")
def made() -> nn.Module:
    return dgefx.convert(randomise(TinyViT(dim=32, prefix=1)).eval(), 0.6, example_inputs=X[:2])


@pytest.fixture
def part(made: nn.Module) -> nn.Module:
    return copy.deepcopy(made)


class Detector(nn.Module):
    """Takes what its encoder takes, normalised; calls its argument otherwise."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(5, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.encoder(3.0 * pixels))


def around(part: nn.Module) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "sequential": nn.Sequential(part, nn.Linear(5, 3)).eval(),
        "attribute": Detector(part).eval(),
        "compiled": torch.compile(part, backend="eager"),
        "compiled inside": nn.Sequential(torch.compile(part, backend="eager"), nn.Linear(5, 3)),
        "data parallel": nn.DataParallel(part),
        "container": nn.ModuleDict({"encoder": part}),
        "layers": part.blocks,
        "layers inside": nn.ModuleList([part.blocks, nn.Linear(5, 3)]),
    }


def test_a_record_is_found_wherever_the_blocks_are(part: nn.Module) -> None:
    report = dgefx.report(part)
    for name, whole in around(part).items():
        assert dgefx.report(whole) == report, name
        assert dgefx.set_budget(whole, 0.7) is whole
        assert dgefx.report(part).gamma == 0.7, name
        assert not any(isinstance(m, DGEBlock) for m in dgefx.revert(whole).modules()), name
        assert any(isinstance(m, DGEBlock) for m in whole.modules())
        dgefx.set_budget(whole, 0.6)
        assert float(dgefx.budget_loss(whole)) == 0.0
    assert dgefx.report(part) == report


def test_in_distributed_data_parallel(part: nn.Module, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(part)
        assert dgefx.report(wrapped) == dgefx.report(part)
        assert dgefx.report(dgefx.set_budget(wrapped, 0.7)).gamma == 0.7
        assert list(dgefx.granularity_maps(wrapped, X)) == list(NAMES)
        assert type(dgefx.revert(wrapped)) is TinyViT
        for model in (wrapped, Detector(wrapped)):
            with pytest.raises(ValueError, match="before it is wrapped"):
                dgefx.calibrate(model, X)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["sequential", "attribute"])
def test_calls_that_run_images_run_what_they_are_given(part: nn.Module, kind: str) -> None:
    whole = around(part)[kind]
    dense = dgefx.revert(whole)
    assert type(dense) is type(whole)
    assert dgefx.measured_ratio(whole, X) == pytest.approx(macs(whole, X) / macs(dense, X))
    # the encoder gets what the whole makes of the images
    given = X if kind == "sequential" else 3.0 * X
    for options in ({}, {"images": X}):
        maps = dgefx.granularity_maps(whole, options or X)
        wanted = dgefx.granularity_maps(part, given)
        assert list(maps) == list(NAMES)
        assert all(torch.equal(maps[name], wanted[name]) for name in NAMES)
    dgefx.calibrate(whole, X, 0.7, refine_passes=1, progress=False)
    assert dgefx.report(part).calibrated and dgefx.report(whole).gamma == 0.7
    spent = macs(part, X) / macs(dgefx.revert(part), X)
    assert dgefx.report(whole).ratio == pytest.approx(spent, abs=1e-6)
    with pytest.raises(ValueError, match="the size its budget holds at"):
        dgefx.calibrate(whole, images(2, 48))


def test_a_keyword_of_the_part_is_not_one_of_the_whole() -> None:
    class Named(TinyViT):
        def forward(self, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(pixel_values * scale)

    given = {"pixel_values": X[:2], "scale": 2.0}
    part = dgefx.convert(randomise(Named()).eval(), 0.6, example_inputs=given)
    assert list(dgefx.granularity_maps(Detector(part), {"pixel_values": X})) == list(NAMES)
    assert list(dgefx.granularity_maps(part, {"pixel_values": X})) == list(NAMES)


def test_several_parts_are_named(part: nn.Module) -> None:
    whole = nn.ModuleDict({"student": part, "teacher": copy.deepcopy(part)})
    calls: list[Any] = [
        dgefx.report,
        lambda m: dgefx.set_budget(m, 0.7),
        lambda m: dgefx.calibrate(m, X),
        lambda m: dgefx.granularity_maps(m, X),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"2 parts .*'student', 'teacher'.* pass one of them"):
            call(whole)
    dgefx.set_budget(whole["student"], 0.7)
    assert [dgefx.report(whole[name]).gamma for name in whole] == [0.7, 0.6]
    assert not any(isinstance(m, DGEBlock) for m in dgefx.revert(whole).modules())


class Two(nn.Module):
    """Two backbones of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far, self.head = TinyViT(dim=32), TinyViT(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.near(x) + self.far(x))


def test_save_and_load_with_parts(tmp_path: Path) -> None:
    model = randomise(Two()).eval()
    model.near = dgefx.convert(model.near, 0.6, example_inputs=X[:2])
    one = copy.deepcopy(model)
    model.far = dgefx.convert(model.far, 0.8, example_inputs=X[:2])
    dgefx.calibrate(model.far, X, 0.8, refine_passes=1, progress=False)
    for index, saved in enumerate((one, model)):
        dgefx.save(saved, tmp_path / str(index))
        back = dgefx.load(tmp_path / str(index), Two().eval())
        assert error(back(X), saved(X)) == 0.0
        assert dgefx.report(back.near).blocks == dgefx.report(saved.near).blocks
    assert dgefx.report(back.far).blocks == dgefx.report(model.far).blocks
    assert (dgefx.report(back.near).gamma, dgefx.report(back.far).gamma) == (0.6, 0.8)
    with pytest.raises(ValueError, match="does not fit"):
        dgefx.load(tmp_path / "1", TinyViT())


def test_blocks_without_their_model_are_not_saved(part: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'blocks\.0', 'blocks\.1'.*taken out.*state_dict"):
        dgefx.save(nn.Sequential(part.blocks), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_copies_have_one_record_of_their_own(part: nn.Module) -> None:
    whole, report = nn.Sequential(part, nn.Linear(5, 3)), dgefx.report(part)
    keys = list(part.state_dict())
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole)), copy.deepcopy(whole)[0]):
        assert dgefx.report(twin) == report
        dgefx.set_budget(twin, 0.8)
        assert dgefx.report(part) == report
        assert len({id(m._dge_record[0]) for m in twin.modules() if isinstance(m, DGEBlock)}) == 1
    assert list(part.state_dict()) == keys == list(TinyViT(dim=32, prefix=1).state_dict())


def test_a_graph_module_inside_another_model() -> None:
    part = dgefx.convert(fx.symbolic_trace(TinyViT().eval()), 0.6, example_inputs=X[:2])
    whole = nn.Sequential(part, nn.Linear(5, 3))
    for model in (whole, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert dgefx.report(dgefx.set_budget(model, 0.7)).gamma == 0.7


def test_a_block_replaced_by_its_copy_or_by_another(part: nn.Module) -> None:
    wrapped = copy.deepcopy(part)
    part.blocks[1] = copy.deepcopy(part.blocks[1])
    wrapped.blocks[0] = nn.Sequential(wrapped.blocks[0])
    for model in (part, wrapped):
        dgefx.set_budget(model, 1.0)
        assert error(model(X), dgefx.revert(model)(X)) < 1e-5
    part.blocks[0] = nn.Identity()
    with pytest.raises(ValueError, match=r"block blocks\.0 was converted but is now Identity"):
        dgefx.set_budget(part, 0.6)
    with pytest.raises(ValueError, match=r"block blocks\.0 was converted but is not in the model"):
        dgefx.set_budget(nn.Sequential(part.blocks[1]), 0.6)


def test_layers_of_hugging_face_taken_out() -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=4,
    )
    dense = randomise(transformers.ViTModel(config)).eval()
    model = dgefx.convert(dense, 0.6, example_inputs={"pixel_values": X[:2]})
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    tokens = torch.randn(2, 65, 32)
    outer = nn.Sequential(nn.Linear(32, 32), *layers)
    assert dgefx.report(outer) == dgefx.report(model)
    with torch.no_grad():
        dgefx.set_budget(outer, 1.0)
        model(pixel_values=X[:2])
        assert error(outer(tokens), dgefx.revert(outer)(tokens)) < 1e-5


def test_training_finds_the_part(part: nn.Module) -> None:
    pytest.importorskip("timm")
    from dgefx.training import FinetuneTask

    whole = nn.Sequential(part, nn.Linear(5, 3))
    task = FinetuneTask(whole, task_loss_weight=0.0, verbose=False)
    assert (task.gamma, task.ratio) == (0.6, dgefx.report(part).ratio)
    task.train()(X)["loss"].backward()
    assert all(p.grad is not None for p in whole.parameters())
