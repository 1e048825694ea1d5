"""`python -m tests.fuzz [count] [seed] [--without TEXT ...]`: what becomes of random transformers.

Specs whose text holds one of TEXT are left out.
"""

from __future__ import annotations

import argparse
import collections
import re
import time
import traceback
import warnings
from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.check import Outcome, check
from tests.fuzz.spec import BlockSpec, Spec, specs


def _kind(reason: str) -> str:
    """A reason without names and numbers."""
    return re.sub(r"\d[\d.e+-]*", "#", re.sub(r"blocks\.\d+\S*|second\.\d+\S*", "BLOCK", reason))


def sweep(
    count: int, start: int, without: Sequence[str] = ()
) -> tuple[list[tuple[Spec, Outcome]], list[tuple[Spec, str]]]:
    """(outcomes, failures) of `count` random transformers; none stops it.

    hypothesis likes to repeat an example with little changed; of those only one is taken.
    """
    outcomes: list[tuple[Spec, Outcome]] = []
    failures: list[tuple[Spec, str]] = []
    seen: set[BlockSpec] = set()

    @seed(start)
    @settings(
        max_examples=10 * count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(specs())
    def run(spec: Spec) -> None:
        enough = len(outcomes) + len(failures) >= count
        if enough or spec.block in seen or any(text in repr(spec) for text in without):
            return
        seen.add(spec.block)
        try:
            outcomes.append((spec, check(spec)))
        except Exception as error:
            failures.append((spec, f"{type(error).__name__}: {error}"))
            print(f"FAILED {spec!r}\n  {type(error).__name__}: {str(error)[:600]}", flush=True)
            if type(error).__name__ != "Wrong":
                print("    " + "".join(traceback.format_tb(error.__traceback__)[-2:]), flush=True)

        done = len(outcomes) + len(failures)
        if done % 20 == 0:
            print(f"{done}: {sum(bool(o.converted) for _, o in outcomes)} converted", flush=True)

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
    parser = argparse.ArgumentParser(description="Convert random transformers.")
    parser.add_argument("count", type=int, nargs="?", default=100)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--without", nargs="*", default=[], metavar="TEXT")
    given_arguments = parser.parse_args()
    count, start = given_arguments.count, given_arguments.seed
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    outcomes, failures = sweep(count, start, given_arguments.without)
    print(summary(outcomes, failures))
    print(f"{time.perf_counter() - began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
