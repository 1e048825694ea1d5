"""calibrate, set_budget: fitted to images, exact in cost, kept, and safe against bad input."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, TensorDataset

import dgefx
from dgefx.calibration import session
from dgefx.calibration.augment import random_views
from dgefx.calibration.distance import compared, distance, find_kind
from dgefx.calibration.images import ExampleCall, read_images
from dgefx.calibration.refine import _rate
from dgefx.calibration.sensitivity import interpolate
from dgefx.nn.budget import Choices, solve
from dgefx.nn.capacity import Plan, plans
from dgefx.record import conversion_record
from tests.helpers import TinyViT, error, images, macs, randomise, slow

SIDE = 48
X = images(12, SIDE, seed=5)


def build(depth: int = 2, **options: Any) -> nn.Module:
    """Blocks of 12 x 12 tokens, converted at 0.6."""
    torch.manual_seed(0)
    dense = randomise(TinyViT(dim=32, depth=depth, **options)).eval()
    return dgefx.convert(dense, 0.6, example_inputs=images(2, SIDE))


@pytest.fixture(scope="module")
def calibrated() -> nn.Module:
    return dgefx.calibrate(build(prefix=1), X, progress=False)


@pytest.fixture(scope="module")
def deep() -> nn.Module:
    """Calibrated, with more blocks to share a budget between."""
    return dgefx.calibrate(build(depth=4, prefix=1), X, progress=False)


def tables(model: nn.Module) -> Any:
    calibration = conversion_record(model).calibration
    assert calibration is not None
    return calibration.tables


def state(model: nn.Module) -> list[Tensor]:
    return [v.clone() for v in model.state_dict().values()]


@pytest.mark.parametrize(
    "make",
    [
        lambda: list(X),
        slow(lambda: [X[:5], X[5:]]),
        lambda: DataLoader(TensorDataset(X, torch.arange(12)), batch_size=5),
        lambda: ({"image": x, "label": 3} for x in X),
        lambda: iter([(x, 0) for x in X]),
    ],
    ids=["images", "batches", "loader with labels", "dicts", "iterator of pairs"],
)
def test_any_iterable_gives_the_same(calibrated: nn.Module, make: Callable[[], Any]) -> None:
    other = dgefx.calibrate(build(prefix=1), make(), progress=False)
    assert tables(other) == tables(calibrated)
    assert all(torch.equal(a, b) for a, b in zip(state(other), state(calibrated), strict=True))


def test_random_streams_and_weights_are_left_alone() -> None:
    model = build()
    before = {n: p.clone() for n, p in model.named_parameters()}
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    dgefx.calibrate(model, X, progress=False)
    assert torch.equal(torch.rand(3), wanted)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) and after[n].grad is None for n, p in before.items())


def test_convert_calibrates() -> None:
    torch.manual_seed(0)
    dense = randomise(TinyViT(dim=32, depth=2)).eval()
    model = dgefx.convert(dense, 0.6, example_inputs=X[:2], calibration=X)
    assert tables(model) == tables(dgefx.calibrate(build(), X, progress=False))
    assert dgefx.report(model).calibrated
    assert "calibrate" not in str(dgefx.report(model))
    assert "dgefx.calibrate" in str(dgefx.report(build()))


@pytest.mark.parametrize(
    ("rank", "hooked"), [(0, False), slow(0, True), slow(None, False), (None, True)]
)
def test_losses_are_those_of_the_block_alone(rank: int | None, hooked: bool) -> None:
    """The table against a hand-made run: one block coarse, all others dense, in the model as it is
    after calibration."""
    model = build(depth=3, prefix=1)
    if hooked:  # a hook of the user's, which a replayed block must not run twice
        model.blocks[0].register_forward_hook(lambda _m, _a, out: out * 1.5)
    dgefx.calibrate(model, X, 0.5, correction_rank=rank, progress=False)
    assert any(b.dge_router.correction is not None for b in model.blocks) == (rank is None)
    found = tables(model)
    dense = dgefx.revert(model)
    with torch.no_grad():
        wanted = dense(X).log_softmax(-1)
        for name, table in found.items():
            assert len(table.measured) >= 4
            for slots, loss in table.measured:
                dgefx.set_budget(model, 1.0)
                plan = next(p for p in table.plans if p.slots == slots)
                model.get_submodule(name).dge_router.plan = plan
                other = model(X).log_softmax(-1)
                kl = (wanted.exp() * (wanted - other)).sum(-1).mean()
                assert loss == pytest.approx(float(kl), rel=1e-3, abs=1e-7)
            losses = list(table.losses)
            assert losses == sorted(losses, reverse=True) and losses[-1] == 0.0


def lopsided() -> nn.Module:
    """The third of four blocks matters most, which no guess can know."""
    torch.manual_seed(0)
    dense = randomise(TinyViT(dim=32, depth=4, prefix=1)).eval()
    with torch.no_grad():
        for index, block in enumerate(dense.blocks):
            block.mlp[2].weight.mul_(20.0 if index == 2 else 0.5)
    return dense


def divergence(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    """Mean KL of the model's prediction from the dense one's, by torch."""
    with torch.no_grad():
        logs = (model(x).log_softmax(-1), dense(x).log_softmax(-1))
    return float(F.kl_div(*logs, log_target=True, reduction="batchmean"))


def test_calibration_beats_the_guess_and_equal_shares() -> None:
    """On images it has not seen, without any training."""
    dense = lopsided()
    guess = dgefx.convert(dense, 0.5, example_inputs=X[:2])
    model = dgefx.convert(dense, 0.5, example_inputs=X[:2], calibration=X)
    equal = copy.deepcopy(guess)
    for block in equal.blocks:
        router = block.dge_router
        found = plans(router.grid, router.config)
        mean = sum(b.dge_router.plan.slots for b in guess.blocks) / 4
        router.plan = min(found, key=lambda p: abs(p.slots - mean))
    fresh = images(16, SIDE, seed=99)
    errors = [divergence(m, dense, fresh) for m in (model, guess, equal)]
    assert errors[0] < 0.8 * min(errors[1:])


@pytest.mark.parametrize("gamma", [0.6, slow(0.9)])
def test_any_budget_after_one_calibration(gamma: float) -> None:
    """The table describes the model as it is: more budget is never worse, on images it has not
    seen, wherever it was calibrated."""
    dense = lopsided()
    model = dgefx.convert(dense, gamma, example_inputs=X[:2], calibration=X)
    fresh = images(32, SIDE, seed=98)
    budgets = (0.45, 0.6, 0.7, 0.8, 0.9)
    errors = [divergence(dgefx.set_budget(model, g), dense, fresh) for g in budgets]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
def test_refinement_brings_unseen_images_closer() -> None:
    """Images that have something in common: smooth, with more or less detail."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> Tensor:
        coarse, fine = (torch.randn(count, 3, s, s, generator=generator) for s in (6, 24))
        fine = fine * torch.rand(count, 1, 1, 1, generator=generator)
        return F.interpolate(coarse, SIDE, mode="bicubic") + F.interpolate(fine, SIDE)

    dense = lopsided()
    x, fresh = draw(24), draw(64)
    model = dgefx.convert(dense, 0.5, example_inputs=x[:2])
    plain = dgefx.calibrate(copy.deepcopy(model), x, refine_passes=0, progress=False)
    refined = dgefx.calibrate(copy.deepcopy(model), x, refine_passes=40, progress=False)
    errors = [divergence(m, dense, fresh) for m in (refined, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_views_are_of_the_images() -> None:
    """Mirrored, cropped, mixed: within the range of the batch, different each time, of its kind."""
    x = images(6, 20).clamp(0, 1)
    generator = torch.Generator().manual_seed(0)
    views = [random_views(x, generator) for _ in range(4)]
    assert all(v.shape == x.shape and v.min() >= 0 and v.max() <= 1 for v in views)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([x, *views], 2))
    assert random_views(x.bfloat16(), generator).dtype == torch.bfloat16
    flat = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 20, 20)
    for _ in range(4):  # an image of one colour has one colour in every view
        view = random_views(flat, generator).flatten(1)
        assert torch.allclose(view.amin(1), view.amax(1), atol=1e-5)


@pytest.mark.parametrize("gamma", [0.4, 0.5, 0.6, 0.8])
def test_set_budget_is_in_band(deep: nn.Module, gamma: float) -> None:
    model = copy.deepcopy(deep)
    assert any(b.dge_router.correction is not None for b in model.blocks)
    assert dgefx.set_budget(model, gamma) is model
    x = X[:2]
    ratio = macs(model, x) / macs(dgefx.revert(model), x)
    assert gamma - 0.02 <= ratio <= gamma + 0.005
    report = dgefx.report(model)
    assert report.ratio == pytest.approx(ratio, abs=1e-6)
    assert report.gamma == gamma
    assert [b.slots for b in report.blocks] == [b.dge_router.plan.capacities for b in model.blocks]


def test_more_budget_is_not_worse(deep: nn.Module) -> None:
    model = copy.deepcopy(deep)
    fresh = images(16, SIDE, seed=98)
    with torch.no_grad():
        wanted = dgefx.revert(model)(fresh)
        errors = [error(dgefx.set_budget(model, g)(fresh), wanted) for g in (0.4, 0.6, 0.8, 0.9)]
    assert errors == sorted(errors, reverse=True)
    assert error(dgefx.set_budget(model, 1.0)(fresh), wanted) <= 1e-5


def test_budget_under_the_floor_changes_nothing(calibrated: nn.Module) -> None:
    model = copy.deepcopy(calibrated)
    before, wanted = dgefx.report(model), model(X)
    with pytest.raises(ValueError, match="under this model's floor"):
        dgefx.set_budget(model, before.floor - 0.01)
    for wrong, raised in ((0.0, ValueError), (2, ValueError), ("half", TypeError)):
        with pytest.raises(raised, match="gamma must be"):
            dgefx.set_budget(model, wrong)
    assert dgefx.report(model) == before and torch.equal(model(X), wanted)


def test_set_budget_without_calibration() -> None:
    model = build()
    assert dgefx.report(dgefx.set_budget(model, 0.8)).ratio == pytest.approx(0.8, abs=0.02)
    assert not dgefx.report(model).calibrated


def test_guess_gives_early_blocks_more() -> None:
    slots = [sum(b.slots) for b in dgefx.report(build(depth=4)).blocks]
    assert slots == sorted(slots, reverse=True) and slots[0] > slots[-1]


def test_save_and_load(calibrated: nn.Module, tmp_path: Path) -> None:
    model = dgefx.set_budget(copy.deepcopy(calibrated), 0.5)
    dgefx.save(model, tmp_path)
    back = dgefx.load(tmp_path, TinyViT(dim=32, depth=2, prefix=1).eval())
    assert torch.equal(back(X), model(X))
    assert dgefx.report(back) == dgefx.report(model)
    assert tables(back) == tables(model)
    for gamma in (0.4, 0.8):
        wanted = dgefx.set_budget(model, gamma)(X)
        assert torch.equal(dgefx.set_budget(back, gamma)(X), wanted)


def test_patch_constant_input_is_still_exact(calibrated: nn.Module) -> None:
    model = dgefx.set_budget(copy.deepcopy(calibrated), 0.4)
    dense = dgefx.revert(model)
    grid = torch.randn(2, 3, 3, 32).repeat_interleave(4, 1).repeat_interleave(4, 2).flatten(1, 2)
    x = torch.cat([torch.randn(2, 1, 32), grid], 1)
    for found, wanted in zip(model.blocks, dense.blocks, strict=True):
        with torch.no_grad():
            assert error(found(x) - x, wanted(x) - x) <= 1e-5


def test_compiled_model_recompiles_once_per_budget(calibrated: nn.Module) -> None:
    model = copy.deepcopy(calibrated).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for gamma in (0.5, 0.7, 0.5, 0.7):
        assert dgefx.set_budget(compiled, gamma) is compiled
        with torch.no_grad():
            assert error(compiled(X), model(X)) <= 1e-5
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("wrong", "raised", "message"),
    [
        ([], ValueError, "images is empty"),
        (3, TypeError, "must be an iterable"),
        ([images(2, 32)], ValueError, r"item 0 has shape \(2, 3, 32, 32\).*\(3, 48, 48\)"),
        ([X[:2], images(2, SIDE, channels=1)], ValueError, "item 1 has shape"),
        ([X[:2], X[:2] * float("nan")], ValueError, "item 1 holds NaN"),
        ([X[:2].to(torch.uint8)], TypeError, "is torch.uint8.*transform"),
        (["a.jpg"], TypeError, "item 0 is str"),
        ([("a.jpg", 1)], TypeError, "holds str"),
        ([{"picture": X[0]}], ValueError, "dict with .'picture'"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_bad_images_leave_the_last_calibration(
    calibrated: nn.Module, wrong: Any, raised: type[Exception], message: str, training: bool
) -> None:
    model = copy.deepcopy(calibrated).train(training)
    record, before = copy.deepcopy(conversion_record(model)), state(model)
    with pytest.raises(raised, match=message):
        dgefx.calibrate(model, wrong, 0.5, progress=False)
    assert conversion_record(model) == record
    assert all(torch.equal(a, b) for a, b in zip(state(model), before, strict=True))
    assert all(module.training == training for module in model.modules())


def test_a_failure_halfway_leaves_the_last_calibration(calibrated: nn.Module) -> None:
    model = copy.deepcopy(calibrated).train()
    record, before = copy.deepcopy(conversion_record(model)), state(model)
    parameters = list(model.parameters())
    calls = itertools.count()

    def fail(_module: nn.Module, _args: Any) -> None:
        if next(calls) == 60:
            raise RuntimeError("out of memory")

    handle = model.head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        dgefx.calibrate(model, X, batch_size=3, progress=False)
    handle.remove()
    assert conversion_record(model) == record
    assert all(torch.equal(a, b) for a, b in zip(state(model), before, strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.training and all(m.training for m in model.modules())
    assert not any(b._forward_hooks or b.dge_router._forward_hooks for b in model.blocks)


@pytest.mark.parametrize(
    ("options", "raised", "message"),
    [
        ({"gamma": 0.01}, ValueError, "under this model's floor"),
        ({"gamma": 1.5}, ValueError, "gamma must be"),
        ({"distance": "l2"}, ValueError, "distance must be one of"),
        ({"max_images": 0}, ValueError, "max_images must be at least 1"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer"),
        ({"correction_rank": -1}, ValueError, "correction_rank must be at least 0"),
        ({"refine_passes": 1.5}, TypeError, "refine_passes must be an integer"),
    ],
)
def test_bad_options(
    calibrated: nn.Module, options: dict[str, Any], raised: type[Exception], message: str
) -> None:
    model = copy.deepcopy(calibrated)
    record = copy.deepcopy(conversion_record(model))
    with pytest.raises(raised, match=message):
        dgefx.calibrate(model, X[:4], progress=False, **options)
    assert conversion_record(model) == record
    with pytest.raises(ValueError, match="not a converted one"):
        dgefx.calibrate(TinyViT(), X)


def test_convert_with_bad_images_leaves_the_model_dense() -> None:
    dense = TinyViT(dim=32).eval()
    names = [n for n, _ in dense.named_modules()]
    with pytest.raises(ValueError, match="NaN"):
        dgefx.convert(dense, 0.6, example_inputs=X[:2], calibration=X * float("nan"), inplace=True)
    assert [n for n, _ in dense.named_modules()] == names
    with pytest.raises(ValueError, match="not a converted one"):
        conversion_record(dense)


class Outputs(nn.Module):
    """TinyViT's features, returned in different ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = randomise(TinyViT(dim=32, depth=2, prefix=1))
        self.kind = kind
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        tokens = self.body.forward_features(x)
        if self.kind == "tokens":
            return tokens
        if self.kind == "pooled":
            return F.layer_norm(tokens.mean(1), (32,))
        if self.kind == "map":
            return tokens[:, 1:].transpose(1, 2).unflatten(2, (12, 12))
        if self.kind == "tuple":
            return tokens[:, 0], [tokens[:, 1:]]
        if self.kind == "no gradient":
            return self.body.head(tokens.mean(1)).detach()
        return {"features": tokens, "steps": self.steps.long()}


@pytest.mark.parametrize("kind", ["tokens", slow("pooled"), "map", slow("tuple"), "dict"])
def test_models_without_logits(kind: str) -> None:
    model = dgefx.convert(Outputs(kind).eval(), 0.5, example_inputs=X[:2], calibration=X)
    calibration = conversion_record(model).calibration
    assert calibration is not None and calibration.distance == "relative"
    assert all(t.losses[0] > 0 for t in calibration.tables.values())
    assert dgefx.report(model).ratio == pytest.approx(0.5, abs=0.02)


def test_models_without_gradients_fall_back_to_detail() -> None:
    model = dgefx.convert(Outputs("no gradient").eval(), 0.5, example_inputs=X[:2])
    with pytest.warns(UserWarning, match="no gradients"):
        dgefx.calibrate(model, X, progress=False)
    assert all(b.dge_router.importance is None for b in model.body.blocks)


def test_distances_against_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 7, generator=generator) for _ in range(2))

    def found(dense: Any, routed: Any, kind: Any = "relative") -> Tensor:
        return distance(compared(dense, kind, 4), compared(routed, kind, 4), kind, 4)

    wanted = F.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="none").sum(1)
    assert torch.allclose(found(a, b, "kl"), wanted, atol=1e-6)
    squared = (a - b).square().sum(1) / a.square().sum(1)
    assert torch.allclose(found(a, (b,)), squared, atol=1e-6)
    assert torch.allclose(found((a, 2 * a), (b, 2 * a)), squared / 2, atol=1e-6)
    # what has no image axis does not count, wherever it stands
    scale, anchors = torch.tensor(2.0), torch.zeros(9, 4)
    assert torch.allclose(found((scale, anchors, a), (scale, anchors, b)), squared, atol=1e-6)
    # images on another axis: one distance for the whole output
    whole = (a - b).square().sum() / a.square().sum()
    assert torch.allclose(found(a.t(), b.t()), whole.expand(4), atol=1e-6)
    with pytest.raises(ValueError, match="not on a batch of 4"):
        found(a[0], b[0], "kl")


def test_kind_of_output() -> None:
    model = nn.Linear(3, 5)
    out = model(torch.randn(2, 3))
    assert find_kind(model, out, {out.data_ptr()}) == "kl"
    assert find_kind(model, out, set()) == "relative"
    assert find_kind(model, {"logits": out}, set()) == "kl"
    assert find_kind(model, torch.randn(2, 5, 4, 4), set()) == "relative"
    classifier = timm.create_model("test_vit", num_classes=5)
    assert find_kind(classifier, out, set()) == "kl"


def test_importance_finds_what_the_output_reads() -> None:
    """The output reads only tokens that carry a mark; their regions get the slots, although the
    others have more detail."""

    class Marked(TinyViT):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.forward_features(x)
            mark = (x[:, 2:3, ::4, ::4] > 2).flatten(2).transpose(1, 2)
            return self.head((tokens * mark).sum(1))

    dense = randomise(Marked(dim=32, depth=2)).eval()
    x = images(16, SIDE, seed=3)
    x[:, 2] = 0.0
    x[:, 2, :16, :16] = 3.0  # top left 4 x 4 tokens: marked, and flat
    x[:, :2, :16, :16] *= 0.8
    model = dgefx.convert(dense, 0.5, example_inputs=x[:2])
    before = dgefx.granularity_maps(model, x)["blocks.0"][:, :2, :2].float().mean()
    dgefx.calibrate(model, x, correction_rank=0, progress=False)
    dgefx.set_budget(model, 0.5)
    after = dgefx.granularity_maps(model, x)
    own = after["blocks.0"][:, :2, :2].float().mean()
    assert own < before
    assert own < after["blocks.0"].float().mean()


@example([[(0, 0), (11, 1)]], 1.0)
@example([[(0, 0), (17, 0), (20, 1)], [(1, 0)], [(6, 0), (19, 0)], [(6, 0), (19, 0)]], 0.875)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30)), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.floats(0.0, 1.0),
)
def test_solver_equals_brute_force(blocks: list[list[tuple[int, int]]], part: float) -> None:
    """The least loss among all combinations within the budget, up to the solver's resolution: it
    divides what is above the floor into 16 000 units and rounds every block's cost up."""
    choices = {}
    for index, options in enumerate(blocks):
        options = sorted(options)
        choices[str(index)] = Choices(
            tuple(Plan((i,)) for i in range(len(options))),
            tuple(float(cost) for cost, _ in options),
            tuple(float(loss) for _, loss in options),
        )
    low = sum(min(c.macs) for c in choices.values())
    high = sum(max(c.macs) for c in choices.values())
    budget = low + round(part * (high - low))
    dense, rest = 1000.0, 5.0  # SLACK asks for at most 10 unspent
    gamma = (rest + budget) / dense
    chosen = solve(choices, rest, dense, gamma)
    combos = [
        (
            sum(c.macs[i] for c, i in zip(choices.values(), pick, strict=True)),
            sum(c.losses[i] for c, i in zip(choices.values(), pick, strict=True)),
        )
        for pick in itertools.product(*(range(len(c.macs)) for c in choices.values()))
    ]
    rounding = len(choices) * (budget - low) / 16000
    within = [(cost, loss) for cost, loss in combos if cost <= budget - rounding]
    close = [pair for pair in within if pair[0] >= budget - 10 + rounding]
    picks = [chosen[name].capacities[0] for name in choices]
    cost = sum(c.macs[i] for c, i in zip(choices.values(), picks, strict=True))
    loss = sum(c.losses[i] for c, i in zip(choices.values(), picks, strict=True))
    assert cost <= budget
    spent = cost >= budget - 10 - rounding
    assert spent or not close  # it spends the budget where it surely can
    best = min((other for _, other in (close if spent else within)), default=loss)
    assert loss <= best + 1e-9


def test_addresses_are_compared_while_their_tensors_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """A freed logit's address may be that of the features that follow."""
    alive: list[bool] = []

    def spy(model: Any, output: Any, addresses: set[int]) -> Any:
        alive.append(logit() is not None)
        return find_kind(model, output, addresses)

    class Normed(TinyViT):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal logit
            out = self.head(self.forward_features(x).mean(1))
            logit = weakref.ref(out)
            return F.layer_norm(out, (5,)) * 2.0

    logit: Any = None
    monkeypatch.setattr(session, "find_kind", spy)
    model = dgefx.convert(randomise(Normed(dim=32)).eval(), 0.6, example_inputs=X[:2])
    dgefx.calibrate(model, X[:4], progress=False)
    assert alive == [True]
    assert conversion_record(model).calibration.distance == "relative"


def test_interpolation_is_monotone_between_the_measured() -> None:
    candidates = [Plan((i,)) for i in (4, 8, 12, 16)]
    assert interpolate(candidates, {0: 3.0, 2: 1.0}) == (3.0, 2.0, 1.0, 0.0)
    assert interpolate(candidates, {0: 0.5, 2: 1.0}) == (1.0, 1.0, 1.0, 0.0)


class Sometimes(TinyViT):
    """NaN or an error for images that carry a mark."""

    def __init__(self, wrong: str) -> None:
        super().__init__(dim=32, depth=2)
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.wrong == "dense":
            return torch.where(x[:, :1, 0, 0] > 50, torch.nan, out)
        coarse = any(any(b.dge_router.plan.capacities[1:]) for b in self.blocks)
        return out * torch.nan if coarse else out


@pytest.mark.parametrize("wrong", ["dense", "routed"])
def test_nan_outputs_are_refused(wrong: str) -> None:
    model = dgefx.convert(Sometimes("dense").eval(), 0.6, example_inputs=X[:2])
    model.wrong = wrong
    x = X.clone()
    x[11, 0, 0, 0] = 99.0  # in the last of the batches
    record = copy.deepcopy(conversion_record(model))
    message = "the dense model yields" if wrong == "dense" else r"with block blocks\.0 alone"
    with pytest.raises(ValueError, match=message):
        dgefx.calibrate(model, x, batch_size=4, progress=False)
    assert conversion_record(model) == record


class Failing(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, error: Exception) -> Tensor:
        Failing.error = error
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, _gradient: Tensor) -> Any:
        raise Failing.error


FAULTS = [
    torch.OutOfMemoryError("no memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    torch.AcceleratorError("an illegal memory access"),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_faults_are_not_taken_for_missing_gradients(error: RuntimeError, where: str) -> None:
    model = build()

    def fail(_module: nn.Module, args: Any) -> Any:
        if where == "backward":
            return Failing.apply(args[0], error)
        if torch.is_grad_enabled():
            raise error
        return None

    model.head.register_forward_pre_hook(fail)
    with pytest.raises(type(error), match=str(error)[:20]):
        dgefx.calibrate(model, X[:4], progress=False)


def test_operations_without_a_derivative_fall_back() -> None:
    model = build()

    def cut(_module: nn.Module, args: Any) -> Any:
        return Failing.apply(args[0], RuntimeError("derivative is not implemented"))

    model.head.register_forward_pre_hook(cut)
    with pytest.warns(UserWarning, match="no gradients"):
        dgefx.calibrate(model, X[:4], progress=False)
    assert dgefx.report(model).calibrated


def test_models_that_run_without_gradients_only() -> None:

    def change_in_place(module: nn.Module, _args: Any) -> None:
        module.head.bias.mul_(1.0)

    model = build()
    model.register_forward_pre_hook(change_in_place)
    with pytest.warns(UserWarning, match="no gradients"):
        dgefx.calibrate(model, X[:4], progress=False)
    with torch.inference_mode():  # which is left for the time
        model = dgefx.calibrate(build(), X[:4], progress=False)
    assert model.blocks[0].dge_router.importance is not None


def test_linear_router_without_gradients_is_told() -> None:
    config = dgefx.DGEConfig(router="linear")
    dense = Outputs("no gradient").eval()
    model = dgefx.convert(dense, 0.5, example_inputs=X[:2], config=config)
    with pytest.warns(UserWarning, match="corrections are not refined"):
        dgefx.calibrate(model, X, progress=False)


@pytest.mark.parametrize("passes", [1, 2, 5, 10, 20])
def test_any_number_of_refinement_steps(passes: int) -> None:
    rates = [_rate(step, passes) for step in range(passes + 1)]
    assert max(rates) == 1.0 and all(0 < rate <= 1 for rate in rates[:-1])
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    if passes in (1, 10):
        dgefx.calibrate(build(), X, refine_passes=passes, progress=False)  # one batch


def test_frozen_model_with_an_operation_in_place(tmp_path: Path) -> None:
    class InPlace(TinyViT):
        def forward_features(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x)
                x.mul_(1.01)
            return x

    dense = randomise(InPlace(dim=32)).eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = dgefx.convert(dense, 0.5, example_inputs=X[:2], calibration=X)
    assert model.blocks[0].dge_router.importance is not None
    assert any(b.dge_router.correction is not None for b in model.blocks)
    assert not any(p.requires_grad for p in model.parameters())
    dgefx.save(model, tmp_path)
    assert not any(p.requires_grad for p in dgefx.load(tmp_path, dense).parameters())


def test_linear_router_calibrates_without_a_warning() -> None:
    config = dgefx.DGEConfig(router="linear")
    dense = randomise(TinyViT(dim=32)).eval()
    model = dgefx.convert(dense, 0.6, example_inputs=X[:2], config=config)
    before = model.blocks[0].dge_router.gate.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dgefx.calibrate(model, X, progress=False)
    gate = model.blocks[0].dge_router.gate
    assert torch.equal(gate.weight, before) and gate.weight.requires_grad


def test_inside_inference_mode() -> None:
    model = build()
    with torch.inference_mode():
        dgefx.calibrate(model, X.clone(), 0.5, progress=False)
    assert model.blocks[0].dge_router.importance is not None
    model.train()(X).square().mean().backward()


@pytest.mark.parametrize("options", [{}, {"correction_rank": 0}, {"refine_passes": 0}])
def test_progress_bar_reaches_its_end(
    capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    """tqdm drops the percentage when there is more work than announced."""
    dgefx.calibrate(build(), X, batch_size=6, **options)
    last = capsys.readouterr().err.rstrip().split("\r")[-1]
    assert re.search(r"100%.* (\d+)/\1 ", last)


class MapStyle:
    """Has no end but its length."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index % len(X)], 0


class Counted(DataLoader[Any]):
    opened = 0

    def __iter__(self) -> Any:
        Counted.opened += 1
        return super().__iter__()


def test_data_sets_loaders_and_reused_buffers(calibrated: nn.Module) -> None:
    buffer = torch.empty(4, 3, SIDE, SIDE)
    makes = (MapStyle(), (buffer.copy_(part) for part in X.split(4)))
    for data in makes:
        other = dgefx.calibrate(build(prefix=1), data, progress=False)
        assert tables(other) == tables(calibrated)
    loader = Counted(TensorDataset(X), batch_size=4)
    torch.manual_seed(0)
    dense = randomise(TinyViT(dim=32)).eval()
    dgefx.convert(dense, 0.6, example_inputs=X[:2], calibration=loader)
    assert Counted.opened == 1


def test_one_image_is_enough() -> None:
    first, second = (dgefx.calibrate(build(), x, progress=False) for x in (X[0], [X[0]]))
    assert tables(first) == tables(second)
    assert conversion_record(first).calibration.images == 1


def test_no_batch_of_one_image_unless_asked_for() -> None:
    example = ExampleCall([[{"shape": [2, 3, 4, 4], "dtype": "float32"}], {}], TinyViT())

    def sizes(count: int, batch_size: int) -> list[int]:
        batches = read_images(torch.zeros(count, 3, 4, 4), example, 99, batch_size)
        return [len(batch[0]) for batch in batches]

    assert sizes(17, 8) == [8, 7, 2] and sizes(16, 8) == [8, 8] and sizes(1, 8) == [1]
    assert sizes(3, 2) == [2, 1] and sizes(3, 1) == [1, 1, 1]


def test_corrections_leave_room_for_a_budget_at_the_floor() -> None:
    model = build()
    gamma = dgefx.report(model).floor + 0.002
    with pytest.warns(UserWarning, match="no room for the corrections"):
        dgefx.calibrate(model, X, gamma, progress=False)
    report = dgefx.report(model)
    assert report.floor <= report.ratio <= gamma
    with pytest.raises(ValueError, match="under this model's floor"):
        # refused before the model is run at all
        handle = model.register_forward_pre_hook(lambda _m, _a: pytest.fail("the model was run"))
        try:
            dgefx.calibrate(model, X, 0.05, progress=False)
        finally:
            handle.remove()


def test_wrapped_blocks_are_found_or_refused(calibrated: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(calibrated)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    assert dgefx.report(dgefx.set_budget(model, 0.7)).ratio == pytest.approx(0.7, abs=0.02)
    assert macs(model, X[:2]) / macs(dgefx.revert(calibrated), X[:2]) == pytest.approx(
        dgefx.report(model).ratio, abs=1e-6
    )
    with pytest.raises(ValueError, match=r"'blocks\.0'.*wrapped by torch.compile"):
        dgefx.save(model, tmp_path)
    model.blocks[0] = nn.Sequential(calibrated.blocks[0])
    for call in (lambda: dgefx.set_budget(model, 0.6), lambda: dgefx.calibrate(model, X)):
        with pytest.raises(
            ValueError, match=r"block blocks\.0 was converted but is now Sequential"
        ):
            call()


def test_compiled_in_place_calibrates_like_eager(calibrated: nn.Module, tmp_path: Path) -> None:
    counter = CompileCounterWithBackend("eager")
    model = build(prefix=1)
    model.compile(fullgraph=True, backend=counter)
    dgefx.calibrate(model, X, progress=False)
    assert counter.frame_count == 0 and tables(model) == tables(calibrated)
    dgefx.save(torch.compile(calibrated, backend="eager"), tmp_path)
    back = dgefx.load(tmp_path, TinyViT(dim=32, depth=2, prefix=1).eval())
    assert torch.equal(back(X), calibrated(X))


def test_a_forward_of_the_users_stays(calibrated: nn.Module) -> None:
    model = copy.deepcopy(calibrated)
    inner = model.blocks[0].forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.blocks[0].forward = forward
    dgefx.calibrate(model, X[:4], progress=False)
    assert model.blocks[0].__dict__["forward"] is forward


def test_other_images_of_the_batch_do_not_matter(calibrated: nn.Module) -> None:
    x = X[:3].clone()
    x[1] = torch.nan
    with torch.no_grad():
        found = calibrated(x)
        assert torch.allclose(found[::2], calibrated(X[:3])[::2], atol=1e-5)


def test_hugging_face_and_pyramid_models() -> None:
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=SIDE,
        patch_size=4,
        num_labels=7,
    )
    hf = transformers.ViTForImageClassification(config).eval()
    loader = [{"pixel_values": X[:3], "labels": torch.zeros(3)}, {"pixel_values": X[3:6]}]
    for inputs in (X[:2], {"pixel_values": X[:2]}):
        model = dgefx.convert(hf, 0.5, example_inputs=inputs, calibration=loader)
        assert conversion_record(model).calibration.distance == "kl"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pvt = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), num_classes=5).eval()
        x = images(4, 64)
        model = dgefx.convert(pvt, 0.6, example_inputs=x[:2], calibration=x)
    assert dgefx.report(model).ratio == pytest.approx(0.6, abs=0.02)
    assert dgefx.report(model).calibrated


def test_half_precision_model(tmp_path: Path) -> None:
    model = build().to(torch.bfloat16)
    x = X[:4].bfloat16()
    dgefx.calibrate(model, X[:4], 0.5, progress=False)
    assert model(x).dtype == torch.bfloat16
    assert torch.isfinite(model(x)).all()
    for converted in (model, build().to(torch.float32)):
        dgefx.calibrate(converted, X[:4], 0.5, progress=False).bfloat16()  # fitted tensors too
        assert any(b.dge_router.correction is not None for b in converted.blocks)
        dgefx.save(converted, tmp_path)
        back = dgefx.load(tmp_path, TinyViT(dim=32, depth=2).eval().bfloat16())
        assert torch.equal(back(x), converted(x))
        kinds = [{n: t.dtype for n, t in m.state_dict().items()} for m in (back, converted)]
        assert kinds[0] == kinds[1]


def test_training_after_calibration(calibrated: nn.Module) -> None:
    model = copy.deepcopy(calibrated).train()
    dgefx.set_budget(model, 0.5)
    model(X).square().mean().backward()
    corrected = [b.dge_router for b in model.blocks if b.dge_router.correction is not None]
    used = [r for r in corrected if any(r.plan.capacities[1:])]
    assert used
    for router in used:
        assert router.correction_down.grad.abs().sum() > 0
        assert router.correction_up.grad.abs().sum() > 0
