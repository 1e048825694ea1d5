"""The habits of user code that `tests.fuzz.user_spec` draws from, by name."""

from __future__ import annotations

from tests.fuzz import user_around, user_branches, user_functions, user_hooks, user_state
from tests.fuzz.user_habit import Habit

HABITS: dict[str, Habit] = {}
for _part in (user_branches, user_state, user_hooks, user_functions, user_around):
    HABITS.update(_part.HABITS)
