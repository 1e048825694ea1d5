"""What a stage raises where a block stays dense."""

from __future__ import annotations

from dgefx.passes.reasons import KindName, Reason


class Refused(ValueError):
    """A block that stays dense; the message is the reason shown in the report."""

    def __init__(self, reason: str, kind: KindName = "other") -> None:
        super().__init__(reason)
        self.kind: KindName = kind

    @classmethod
    def because(cls, reason: Reason) -> Refused:
        return cls(reason.text, reason.kind)


class TraceError(ValueError):
    """A block that cannot be traced; the message says where."""
