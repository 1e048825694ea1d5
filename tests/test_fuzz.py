"""Acceptance: random transformers convert exactly or are refused with a reason; none is wrong."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.__main__ import summary, sweep
from tests.fuzz.check import check
from tests.fuzz.spec import AttentionSpec, BlockSpec, Spec, WindowSpec, specs


@settings(
    max_examples=4,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # shrinking takes minutes: python -m tests.fuzz.shrink "Spec(...)"
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(specs())
def test_a_few(spec: Spec) -> None:
    check(spec)


@pytest.mark.parametrize(
    "spec",
    [
        # writes its update into its input
        Spec(block=BlockSpec(residual="add_")),
        # a norm's cast returns the stream itself
        Spec(block=BlockSpec(norm="rms_written")),
        Spec(block=BlockSpec(twice=True, residual="scaled", mlp="none")),
        Spec(embed="unfold"),
        Spec(embed="cut"),
        # a grid too small for a plan with every level
        Spec(
            grid=(3, 3),
            depth=3,
            block=BlockSpec(AttentionSpec(core="at", heads=1), WindowSpec(size=(5, 5)), mlp="none"),
        ),
        Spec(block=BlockSpec(AttentionSpec(core="einsum_dots"), WindowSpec())),
        # reads the size of its queries: not to be projected for that alone
        Spec(block=BlockSpec(AttentionSpec(core="bmm"))),
        # reads the number of keys off the attention weights: not to be computed on all tokens
        Spec(block=BlockSpec(AttentionSpec(core="bmm_sizes"))),
        # as many heads as the grid has rows
        Spec(grid=(4, 4), block=BlockSpec(AttentionSpec(core="bmm_sizes", heads=4))),
        # and reads the dtype of its queries
        Spec(grid=(4, 4), block=BlockSpec(AttentionSpec(core="bmm", heads=4, float32=True))),
        Spec(block=BlockSpec(AttentionSpec(core="einsum_dots", heads=1))),
        Spec(block=BlockSpec(AttentionSpec(core="transposed_softmax"))),
        # has head channels as many as columns, which alone is wanted of queries of all tokens
        Spec(grid=(11, 8), block=BlockSpec(AttentionSpec(core="bmm", scale="temperature"))),
        # a convolution of the first block lays out the grid of the second
        Spec(
            layout="BCN",
            grid=(11, 7),
            depth=2,
            block=BlockSpec(norm="group", mlp="depthwise5", residual="reversed"),
            seed=442,
        ),
        # reads the device of tokens on their way to windows
        Spec(
            layout="BHWC",
            grid=(4, 8),
            depth=2,
            block=BlockSpec(AttentionSpec(core="at"), WindowSpec(size=(5, 5), shift=True)),
        ),
        # lays its values out by the number of windows, read off the attention weights
        Spec(
            grid=(3, 7),
            block=BlockSpec(AttentionSpec(core="bmm"), WindowSpec(kind="grid", size=(2, 2))),
        ),
    ],
    ids=repr,
)
def test_found_before(spec: Spec) -> None:
    outcome = check(spec)
    assert outcome.converted and not outcome.reasons


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_many(seed: int) -> None:
    """With -s: how many converted, and the reasons of the others."""
    outcomes, failures = sweep(120, seed)
    print(summary(outcomes, failures))
    assert len(outcomes) + len(failures) == 120
    assert not failures, "\n".join(f"{spec!r}: {message}" for spec, message in failures)
    converted = [outcome for _, outcome in outcomes if outcome.converted]
    assert len(converted) > 70, "the random transformers hardly test conversion any more"
    assert sum(outcome.mixed for outcome in converted) > 25
