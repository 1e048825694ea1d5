"""`python -m tests.fuzz [count] [seed]`: what becomes of many random transformers."""

from __future__ import annotations

import collections
import re
import sys
import time
import traceback
import warnings

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.check import Outcome, check
from tests.fuzz.spec import Spec, specs


def _kind(reason: str) -> str:
    """A reason without names and numbers."""
    return re.sub(r"\d[\d.e+-]*", "#", re.sub(r"blocks\.\d+\S*|second\.\d+\S*", "BLOCK", reason))


def sweep(count: int, start: int) -> tuple[list[tuple[Spec, Outcome]], list[tuple[Spec, str]]]:
    """(outcomes, failures) of `count` random transformers; none stops it."""
    outcomes: list[tuple[Spec, Outcome]] = []
    failures: list[tuple[Spec, str]] = []

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(specs())
    def run(spec: Spec) -> None:
        try:
            outcomes.append((spec, check(spec)))
        except Exception as error:
            failures.append((spec, f"{type(error).__name__}: {error}"))
            print(f"FAILED {spec!r}\n  {type(error).__name__}: {str(error)[:600]}", flush=True)
            if type(error).__name__ != "Wrong":
                print("    " + "".join(traceback.format_tb(error.__traceback__)[-2:]), flush=True)

    run()
    return outcomes, failures


def summary(outcomes: list[tuple[Spec, Outcome]], failures: list[tuple[Spec, str]]) -> str:
    whole = sum(bool(o.converted) and not o.reasons for _, o in outcomes)
    part = sum(bool(o.converted) and bool(o.reasons) for _, o in outcomes)
    none = sum(not o.converted for _, o in outcomes)
    compared = sum(o.mixed for _, o in outcomes)
    lines = [
        f"{len(outcomes) + len(failures)} random transformers: {whole} converted, {part} in part, "
        f"{none} refused, {len(failures)} wrong; {compared} blocks compared at mixed granularities"
    ]
    reasons: collections.Counter[str] = collections.Counter()
    example: dict[str, Spec] = {}
    for spec, outcome in outcomes:
        for reason in {_kind(r) for r in outcome.reasons}:
            reasons[reason] += 1
            if reason not in example or len(repr(spec)) < len(repr(example[reason])):
                example[reason] = spec
    for reason, times in reasons.most_common():
        lines.append(f"{times:5d}  {reason}\n         {example[reason]!r}")
    return "\n".join(lines)


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    start = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    outcomes, failures = sweep(count, start)
    print(summary(outcomes, failures))
    print(f"{time.perf_counter() - began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
