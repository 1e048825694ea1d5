"""What a converted block returns in the place of attention maps that its model did not read.

A block may return more than its stream (`return x, weights`) to a model that throws it away, as it
did when it was converted (`passes.locate.sites`). Fewer queries have no such maps, so that whatever
reads this later is told.
"""

from __future__ import annotations

from typing import Any

_TEXT = (
    "a converted block does not compute what it returns beside its stream (attention maps, "
    "caches), which the model did not read when it was converted. Read it from "
    "dgefx.revert(model), or leave the block out with filter_fn"
)


class Unread:
    """Stands for a tensor that was not computed; raises on use."""

    def __repr__(self) -> str:
        return "<not computed by a converted block>"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name}: {_TEXT}")

    def __getitem__(self, _index: Any) -> Any:
        raise TypeError(_TEXT)

    @classmethod
    def __torch_function__(cls, *_args: Any, **_kwargs: Any) -> Any:
        raise TypeError(_TEXT)


def unread() -> Unread:
    """For the generated code."""
    return Unread()
