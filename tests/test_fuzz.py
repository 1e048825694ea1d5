"""Acceptance: random transformers convert exactly or are refused with a reason; none is wrong."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.__main__ import summary, sweep
from tests.fuzz.check import check
from tests.fuzz.spec import Spec, specs


@settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # shrinking takes minutes: python -m tests.fuzz.shrink "Spec(...)"
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(specs())
def test_a_few(spec: Spec) -> None:
    check(spec)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_many(seed: int) -> None:
    """With -s: how many converted, and the reasons of the others."""
    outcomes, failures = sweep(120, seed)
    print(summary(outcomes, failures))
    assert len(outcomes) + len(failures) == 120
    assert not failures, "\n".join(f"{spec!r}: {message}" for spec, message in failures)
    converted = [outcome for _, outcome in outcomes if outcome.converted]
    assert len(converted) > 60, "the random transformers hardly test conversion any more"
    assert sum(outcome.mixed for outcome in converted) > 20
