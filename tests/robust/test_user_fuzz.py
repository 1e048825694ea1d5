"""User code around and inside blocks: random draws of `tests.fuzz.user`, and that its check can
tell wrong from right."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.fuzz.user import drawn, kind_of, summary
from tests.fuzz.user_check import Outcome, check
from tests.fuzz.user_habits import HABITS
from tests.fuzz.user_spec import UserSpec, make, simpler

SPEC = UserSpec(width=16)


def _judged_with(
    change: Callable[[nn.Module], object], spec: UserSpec = SPEC, only: tuple[str, ...] = ("eval",)
) -> Outcome:
    """The verdict on a "converted" model that is a copy of the dense one with `change`."""

    def convert(model: nn.Module, gamma: float, example_inputs: dict[str, Tensor]) -> nn.Module:
        made = copy.deepcopy(model)
        change(made)
        return made

    return check(spec, convert, only)


@pytest.mark.parametrize("spec", drawn(3, 2026), ids=repr)
def test_a_few(spec: UserSpec) -> None:
    outcome = check(spec)
    assert outcome.kind not in ("wrong", "blunt"), outcome.what


@pytest.mark.slow
def test_many() -> None:
    """With -s: how many of what."""
    outcomes = [check(spec) for spec in drawn(300, 0)]
    print(summary(outcomes))
    assert not [o for o in outcomes if o.kind in ("wrong", "blunt")]
    assert sum(o.kind == "exact" for o in outcomes) > 100, "hardly any code of users converts"


def test_every_habit_makes_a_model_that_runs() -> None:
    for habit in HABITS:
        made = make(UserSpec((habit,)))
        images = torch.randn(2, 3, 16, 16)
        for variant in made.draft.variants:
            made.model(images, **made.kwargs(variant, images))


@pytest.mark.parametrize("habit", ["keeps_last", "torch_random", "hook_changes", "optional_mask"])
def test_a_copy_of_the_dense_model_is_right(habit: str) -> None:
    only = ("train", "cast", "later", "arguments")
    outcome = _judged_with(lambda model: None, UserSpec((habit,), cast="bfloat16"), only)
    assert outcome.kind == "exact" and len(outcome.verdicts) >= 3, outcome.verdicts


def test_another_value_is_wrong() -> None:
    def change(model: nn.Module) -> None:
        model.blocks[1].mlp.fc2.weight.data[0] *= 1.01

    outcome = _judged_with(change)
    assert outcome.kind == "wrong" and outcome.verdicts["eval"].what.startswith("eval, call 1")


def test_another_value_in_half_precision_only_is_wrong() -> None:
    def change(model: nn.Module) -> None:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            return output * 1.1 if output.dtype == torch.float16 else output

        model.blocks[0].mlp.register_forward_hook(hook)

    outcome = _judged_with(change, UserSpec(cast="float16"), ("eval", "cast"))
    assert outcome.verdicts["eval"].kind == "exact" and outcome.verdicts["cast"].kind == "wrong"


def test_another_gradient_is_wrong() -> None:
    def change(model: nn.Module) -> None:
        model.blocks[0].register_forward_hook(lambda _m, _a, output: 2 * output - output.detach())

    outcome = _judged_with(change)
    assert "gradient of" in outcome.verdicts["eval"].what


def test_a_gradient_where_there_was_none_is_wrong() -> None:
    def change(model: nn.Module) -> None:
        model.requires_grad_(True)

    spec = next(s for s in drawn(9, 0, ["frozen_backbone"]) if "ready" in make(s).draft.code)
    outcome = _judged_with(change, spec)
    assert outcome.kind == "wrong" and "gradient of" in outcome.what


def _forgets(module: nn.Module, _args: object, _output: object) -> None:
    vars(module).pop("last", None)


def test_stale_state_is_wrong() -> None:
    def change(model: nn.Module) -> None:
        for module in model.modules():
            module.register_forward_hook(_forgets)

    outcome = _judged_with(change, UserSpec(("keeps_last",)))
    assert outcome.kind == "wrong" and ".last" in outcome.what


def test_a_setting_that_is_no_longer_read_is_wrong() -> None:
    def change(model: nn.Module) -> None:
        for block in model.blocks:
            block.register_forward_pre_hook(lambda m, _a: setattr(m.attn, "scale", 8**-0.5))

    outcome = _judged_with(change, UserSpec(("attention_scale_later",)), ("eval", "later"))
    assert outcome.verdicts["eval"].kind == "exact" and outcome.verdicts["later"].kind == "wrong"


def test_dropout_at_another_rate_is_wrong() -> None:
    def change(model: nn.Module) -> None:
        for block in model.blocks:
            block.register_forward_pre_hook(lambda m, _a: setattr(m.attn, "p", 0.4))

    outcome = _judged_with(change, UserSpec(("attention_dropout_later",)), ("train",))
    assert outcome.verdicts["train"].kind == "wrong"


class _SharedGrid(nn.Module):
    """Keeps the height of the last image as an attribute, where a thread finds another's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.blocks = model, model.blocks
        model.embed.register_forward_hook(lambda m, _a, o: setattr(self, "rows", o.shape[-2]))
        model.norm.register_forward_hook(lambda _m, _a, o: o * self.rows)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images) / (images.shape[2] // 2)


def test_what_two_threads_share_is_wrong() -> None:
    def convert(model: nn.Module, gamma: float, example_inputs: dict[str, Tensor]) -> nn.Module:
        return _SharedGrid(copy.deepcopy(model))

    outcome = check(UserSpec(grid=(6, 10)), convert, ("threads",))
    assert outcome.verdicts["threads"].kind == "wrong"


@pytest.mark.parametrize("error", [IndexError("tuple index"), ValueError("not of the library")])
def test_an_error_from_inside_is_wrong(error: Exception) -> None:
    def change(model: nn.Module) -> None:
        def broken(_module: nn.Module, args: tuple[Tensor]) -> None:
            if args[0].shape[0] == 3:
                raise error

        model.blocks[0].register_forward_pre_hook(broken)

    outcome = _judged_with(change)
    assert outcome.kind == "wrong" and "crashes" in outcome.what


def test_errors_of_convert() -> None:
    def broken(model: nn.Module, gamma: float, example_inputs: object) -> nn.Module:
        raise KeyError("attn")

    def changing(model: nn.Module, gamma: float, example_inputs: object) -> nn.Module:
        model.blocks[0].last = 1
        return copy.deepcopy(model)

    assert "crashes" in check(SPEC, broken).what
    assert "changes the user's model" in check(SPEC, changing).what
    refused = check(UserSpec(("data_any",), core="written"))
    assert refused.kind == "refused" and "looked at" in refused.what


def test_simpler_specs_and_kinds() -> None:
    spec = UserSpec(("in_place", "keeps_last"), 3, (6, 10), dtype="float64")
    found = simpler(spec)
    assert UserSpec(("keeps_last",), 3, (6, 10), dtype="float64") in found
    assert UserSpec(("in_place", "keeps_last"), 3, dtype="float64") in found
    assert eval(repr(spec)) == spec
    first = kind_of("eval, call 1 (2 of 8x8 eval): output 0 off by 1.0e-02, rounding 1e-7")
    assert first == kind_of("eval, call 1 (2 of 6x8 eval): output 0 off by 3.0e-04, rounding 0.0")
