"""One scenario: the same calls of the dense and of the converted model, compared.

Half precision is not compared with a wider reference, as code may branch on the dtype: two results
may differ by a few times of what the dense model's change when its parameters are rounded
otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.fuzz.user_errors import is_users_own, names_a_cause, told
from tests.fuzz.user_run import (
    Call,
    ToldDropout,
    Values,
    dtype_of,
    errors,
    fresh,
    perturbed,
    run,
)
from tests.fuzz.user_spec import Made

#: relative error up to which two values are equal without a look at rounding
FLOOR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-4}
#: beyond it: how much more than the dense model's own reaction to rounded parameters
ROUNDING = 8.0


@dataclass
class Scenario:
    """Calls in a row. change: what is done first, to both models."""

    name: str
    calls: list[Call]
    change: Callable[[nn.Module], None] | None = None


@dataclass(frozen=True)
class Verdict:
    kind: str  # "exact", "raised" or "wrong"
    what: str = ""


EXACT = Verdict("exact")


def judge(made: Made, dense: nn.Module, converted: nn.Module, scenario: Scenario) -> Verdict:
    """Runs the scenario on copies of both."""
    return _Trial(made, dense, converted, scenario).verdict()


class _Trial:
    def __init__(
        self, made: Made, dense: nn.Module, converted: nn.Module, scenario: Scenario
    ) -> None:
        self.made, self.scenario = made, scenario
        self.dense, self.converted = dense, converted
        self._noisy: list[list[Values]] | None = None
        self._dtype = torch.float32  # of the changed models

    def _changed(self, model: nn.Module) -> nn.Module:
        copied = fresh(model)
        if self.scenario.change is not None:
            self.scenario.change(copied)
        return copied

    def _run_all(self, model: nn.Module) -> list[Values]:
        """Of all calls up to one that a check of the user's ends."""
        found: list[Values] = []
        for call in self.scenario.calls:
            try:
                found.append(run(self.made, model, call))
            except (RuntimeError, ValueError, AssertionError):
                break
        return found

    def _noise(self, index: int) -> dict[str, float]:
        """Error per value of call `index` when parameters are rounded otherwise."""
        if self._noisy is None:
            model = self._changed(self.dense)
            autocast = any(call.autocast for call in self.scenario.calls)
            eps = torch.finfo(torch.bfloat16 if autocast else self._dtype).eps
            self._noisy = [self._run_all(fresh(model))]
            for seed in range(3):
                self._noisy.append(self._run_all(perturbed(model, eps, seed)))
        plain, *noisy_runs = self._noisy
        found = [errors(v[index], plain[index]) for v in noisy_runs if len(v) > index]
        return {name: max((e[name] for e in found), default=0.0) for name in plain[index]}

    def _in_rows(self, found: Values, wanted: Values) -> Values:
        """`found` with what hooks saw laid out as in the dense model."""
        seen = self.made.draft.seen_by_hooks
        laid = dict(found)
        for name, value in wanted.items():
            other = found.get(name)
            if not (isinstance(value, Tensor) and isinstance(other, Tensor)):
                continue
            if any(text in name for text in seen) and value.numel() == other.numel():
                laid[name] = other.reshape(value.shape)
        return laid

    def _worst(self, index: int, found: Values, wanted: Values) -> str:
        """The value that differs most beyond rounding, or nothing."""
        call = self.scenario.calls[index]
        found = self._in_rows(found, wanted)
        floor = FLOOR[torch.bfloat16 if call.autocast else self._dtype]
        off = {name: e for name, e in errors(found, wanted).items() if not e <= floor}
        off = {n: e for n, e in off.items() if not any(memo in n for memo in self.made.draft.memos)}
        if not off:
            return ""
        noise = self._noise(index)
        off = {name: e for name, e in off.items() if not e <= ROUNDING * noise.get(name, 0.0)}
        if not off:
            return ""
        outputs = [name for name in off if name.startswith("output")]
        worst = outputs[0] if outputs else max(off, key=lambda name: off[name])
        more = f", and {len(off) - 1} others" if len(off) > 1 else ""
        value = found.get(worst, "nothing")
        seen = f" (found {value!r}, dense {wanted[worst]!r})" if off[worst] == float("inf") else ""
        seen = "" if len(seen) > 160 else seen
        rounding = noise.get(worst, 0.0)
        return f"{worst} off by {off[worst]:.1e}, rounding {rounding:.1e}{seen}{more}"

    def _equal_without_chance(self, index: int) -> bool:
        """Whether only the elements that a dropout draws differ."""
        values = []
        for model in (self.dense, self.converted):
            copied = self._changed(model)
            with ToldDropout():
                values.append([run(self.made, copied, c) for c in self.scenario.calls[: index + 1]])
        floor = FLOOR[self._dtype]
        return all(
            e <= max(floor, ROUNDING * self._noise(i).get(name, 0.0))
            for i in range(index + 1)
            for name, e in errors(self._in_rows(values[1][i], values[0][i]), values[0][i]).items()
        )

    def verdict(self) -> Verdict:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            verdict = self._verdict()
        warned = [str(w.message) for w in said]
        told_by = [text for text in warned if any(w in text for w in self.made.draft.told_by)]
        if verdict.kind == "wrong" and told_by and "crashes" not in verdict.what:
            return Verdict("raised", f"warned: {told_by[0]}")
        return verdict

    def _verdict(self) -> Verdict:
        dense, name = self._changed(self.dense), self.scenario.name
        self._dtype = dtype_of(dense)
        try:
            converted = self._changed(self.converted)
        except Exception as error:
            return self._failed(f"{name}, the change", error)
        for index, call in enumerate(self.scenario.calls):
            where = f"{name}, call {index + 1} ({call})"
            dense_error = wanted = found = converted_error = None
            try:
                wanted = run(self.made, dense, call)
            except Exception as error:
                dense_error = error
            try:
                found = run(self.made, converted, call)
            except Exception as error:
                converted_error = error
            if dense_error is not None:
                if converted_error is None and is_users_own(dense_error):
                    return Verdict("wrong", f"{where}: only dense raises {told(dense_error)}")
                return EXACT  # the dense model fails
            if converted_error is not None:
                return self._failed(where, converted_error)
            assert wanted is not None and found is not None
            worst = self._worst(index, found, wanted)
            if worst and not self._equal_without_chance(index):
                return Verdict("wrong", f"{where}: {worst}")
        return EXACT

    def _failed(self, where: str, error: Exception) -> Verdict:
        if names_a_cause(error):
            return Verdict("raised", f"{where}: {error}")
        return Verdict("wrong", f"{where}: crashes with {told(error)}")
