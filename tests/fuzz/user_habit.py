"""What a habit is: a function that adds code to a draft, with its own random choices."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.fuzz.user_draft import Draft

Habit = Callable[[Draft, random.Random], None]


def collector() -> tuple[dict[str, Habit], Callable[[Habit], Habit]]:
    """(habits by name, decorator that puts one there)."""
    habits: dict[str, Habit] = {}

    def habit(function: Habit) -> Habit:
        habits[function.__name__] = function
        return function

    return habits, habit
