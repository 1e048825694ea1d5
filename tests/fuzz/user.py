"""`python -m tests.fuzz.user [count] [seed]`: what becomes of user code around and inside blocks.

`--habit NAME ...` draws these habits only; `--replay "UserSpec(...)"` tells all about one spec and
`--source` prints its code; `--shrink "UserSpec(...)"` looks for a simpler one that is as wrong.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import time
import warnings

import torch

from tests.fuzz import user_spec as names
from tests.fuzz.user_check import Outcome, check
from tests.fuzz.user_habits import HABITS
from tests.fuzz.user_spec import UserSpec, draw, make, simpler

KINDS = ("exact", "refused", "raised", "blunt", "wrong", "void")


def drawn(count: int, start: int, only: list[str] | None = None) -> list[UserSpec]:
    """Specs whose first habits take turns."""
    order = list(only or HABITS)
    random.Random(start).shuffle(order)
    return [draw(f"{start} {i}", order[i % len(order)]) for i in range(count)]


def judged(spec: UserSpec) -> Outcome:
    """`check`, of which a failure is no verdict on the library."""
    try:
        return check(spec)
    except Exception as error:
        raise RuntimeError(f"the check itself fails on {spec!r}") from error


def kind_of(what: str) -> str:
    """A verdict without names and numbers."""
    what = re.sub(r"blocks\.\d+\S*", "BLOCK", re.sub(r"\(found.*?dense.*?\)", "", what))
    what = re.sub(r"\d[\d.e+-]*", "#", what)
    return re.sub(r"(off by|rounding) \S+|and # others|\{[^}]*\}", "", what)[:160]


def shrink(spec: UserSpec) -> UserSpec:
    """The simplest spec found that ends the same way."""
    first = judged(spec)
    place = first.what.split(",")[0].split(":")[0]
    again = True
    while again:
        again = False
        for candidate in simpler(spec):
            found = judged(candidate)
            if found.kind == first.kind and found.what.startswith(place):
                spec, again = candidate, True
                break
    return spec


def summary(outcomes: list[Outcome]) -> str:
    total = collections.Counter(o.kind for o in outcomes)
    lines = [", ".join(f"{total[kind]} {kind}" for kind in KINDS)]
    lines.append(f"{'habit':28}" + "".join(f"{kind:>9}" for kind in KINDS))
    for habit in HABITS:
        found = collections.Counter(o.kind for o in outcomes if habit in o.spec.habits)
        if found:
            lines.append(f"{habit:28}" + "".join(f"{found[kind] or '.':>9}" for kind in KINDS))
    for kind in ("wrong", "blunt", "refused", "raised", "void"):
        groups: dict[str, list[Outcome]] = collections.defaultdict(list)
        for outcome in outcomes:
            if outcome.kind == kind:
                groups[kind_of(outcome.what.replace("\n", " "))].append(outcome)
        for what, members in sorted(groups.items(), key=lambda pair: -len(pair[1])):
            habits = collections.Counter(h for o in members for h in o.spec.habits)
            often = ", ".join(f"{h} {n}" for h, n in habits.most_common(5))
            best = min(members, key=lambda o: len(repr(o.spec)))
            lines.append(f"{kind} {len(members)}: {what}\n    [{often}]\n    {best.spec!r}")
    return "\n".join(lines)


def _replay(text: str, show_source: bool, simplify: bool) -> int:
    spec = eval(text, vars(names))
    if simplify:
        spec = shrink(spec)
    if show_source:
        print(make(spec).source)
    outcome = judged(spec)
    print(f"{spec!r}\n{outcome.kind}: {outcome.what}")
    for name, verdict in outcome.verdicts.items():
        print(f"  {name:20} {verdict.kind:7} {verdict.what}")
    return int(outcome.kind in ("wrong", "blunt"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert transformers as users write them.")
    parser.add_argument("count", type=int, nargs="?", default=100)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--habit", nargs="*", choices=list(HABITS))
    parser.add_argument("--replay", metavar="SPEC")
    parser.add_argument("--shrink", metavar="SPEC")
    parser.add_argument("--source", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if asked.replay or asked.shrink:
        return _replay(asked.replay or asked.shrink, asked.source, bool(asked.shrink))
    began, outcomes = time.perf_counter(), []
    for spec in drawn(asked.count, asked.seed, asked.habit):
        outcomes.append(outcome := judged(spec))
        if outcome.kind in ("wrong", "blunt"):
            print(f"{outcome.kind.upper()} {spec!r}\n    {outcome.what[:300]}", flush=True)
        if len(outcomes) % 50 == 0:
            print(f"{len(outcomes)} in {time.perf_counter() - began:.0f} s", flush=True)
    print(summary(outcomes))
    print(f"{time.perf_counter() - began:.0f} s")
    return int(any(o.kind in ("wrong", "blunt") for o in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
