"""Converts a user's transformer and judges everything that is done with it.

Each scenario starts from fresh copies of the dense and of the converted model, does the same to
both and ends as

* exact: equal up to rounding, or the dense model itself fails,
* raised: an error of the library that names a cause, or a warning that tells what is left out,
* wrong: another value, gradient or state without a word, or an error from the library's insides.

A whole model may also be refused, with a cause, or bluntly: with a bare exception for a reason.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import nn

import dgefx
from tests.fuzz.user_convert import converted_as
from tests.fuzz.user_errors import told
from tests.fuzz.user_run import Call, dtype_of
from tests.fuzz.user_scenarios import extra_checks, scenarios
from tests.fuzz.user_spec import UserSpec, make
from tests.fuzz.user_trial import Verdict, judge


@dataclass
class Outcome:
    """What became of a spec. kind: "refused", "blunt", or the worst of its verdicts."""

    spec: UserSpec
    kind: str
    what: str = ""
    verdicts: dict[str, Verdict] = field(default_factory=dict)


def check(
    spec: UserSpec,
    convert: Callable[..., nn.Module] = dgefx.convert,
    only: Collection[str] | None = None,
) -> Outcome:
    """Build, convert, do everything to both.

    Args:
        convert: stands in for the library's. only: names of scenarios; otherwise all.
    """
    made = make(spec)
    first = Call(spec.grid, spec.examples, variant=made.draft.variants[0])
    x = first.images(dtype_of(made.model), spec.seed)
    kwargs = made.kwargs(first.variant, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.no_grad():
                (made.model if spec.called else copy.deepcopy(made.model))(x.clone(), **kwargs)
        except Exception as error:  # habits that do not go together
            return Outcome(spec, "void", told(error))
        converted, kind, what = converted_as(made, convert, {"images": x.clone(), **kwargs})
        if converted is None:
            return Outcome(spec, kind, what)
        outcome = Outcome(spec, "exact")
        for scenario in scenarios(made):
            if only is None or scenario.name in only:
                outcome.verdicts[scenario.name] = judge(made, made.model, converted, scenario)
        if only is None or "threads" in only:
            outcome.verdicts.update(extra_checks(made, made.model, converted))
    for kind in ("wrong", "raised"):
        for verdict in outcome.verdicts.values():
            if verdict.kind == kind:
                return Outcome(spec, kind, verdict.what, outcome.verdicts)
    return outcome
