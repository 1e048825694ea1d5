"""What `str` makes of a device while a block is traced.

As a key of a cache (`self.tables[str(x.device)]`, as in LeViT) it decides nothing; code that looks
into it, as `str(x.device).startswith("mps")`, decides by it. Used by `passes.trace.tracer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Text(str):
    """A string that tells when something looks into it.

    Args:
        look: called then.
    """

    look: Callable[[], None]

    def __new__(cls, text: str, look: Callable[[], None]) -> Text:
        made = super().__new__(cls, text)
        made.look = look
        return made

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__") and name != "look":
            self.look()
        return super().__getattribute__(name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Text):  # of keys of a dictionary, one is found again
            self.look()
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __radd__(self, before: str) -> str:
        self.look()
        return before + str.__str__(self)

    __hash__ = str.__hash__


def _looks(name: str) -> Any:
    plain = getattr(str, name)

    def method(self: Text, *args: Any) -> Any:
        self.look()
        return plain(self, *args)

    return method


_LOOKS = "contains getitem iter len add mod format lt le gt ge"
for _name in _LOOKS.split():
    setattr(Text, f"__{_name}__", _looks(f"__{_name}__"))
