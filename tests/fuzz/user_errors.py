"""Whose an exception is: the library's own words, the user's own check, or something that broke."""

from __future__ import annotations

import linecache
import re
from pathlib import Path
from types import FrameType

import dgefx

_LIBRARY = str(Path(dgefx.__file__).parent)
_RAISED = re.compile(r"^\s*(\S+: )?\w*(Error|Exception|Interrupt|StopIteration)\b")


def _innermost(error: BaseException) -> tuple[FrameType, int] | None:
    trace = error.__traceback__
    if trace is None:
        return None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame, trace.tb_lineno


def _line(error: BaseException) -> tuple[str, str]:
    """(file, source line) that raised."""
    found = _innermost(error)
    if found is None:
        return "", ""
    filename = found[0].f_code.co_filename
    return filename, linecache.getline(filename, found[1]).strip()


def is_the_librarys(error: BaseException) -> bool:
    """Whether the library itself raises it."""
    filename, line = _line(error)
    ours = filename.startswith(_LIBRARY) and line.startswith("raise")
    return ours and isinstance(error, (ValueError, TypeError, RuntimeError))


def names_a_cause(error: BaseException) -> bool:
    """Whether the library says in words of its own what is the matter."""
    return is_the_librarys(error) and not blunt(error)


def blunt(error: BaseException) -> str | None:
    """A line of a message that gives a bare exception for a reason, or asks for a report."""
    for line in str(error).splitlines():
        if _RAISED.match(line) or re.search(r"[Pp]lease report", line):
            return line.strip()
    return None


def is_users_own(error: BaseException) -> bool:
    """Whether the user's code raises it itself."""
    filename, line = _line(error)
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    if filename.startswith("<user"):
        return line.startswith(("raise", "assert"))
    users = [linecache.getline(f, n).strip() for f, n in frames if f.startswith("<user")]
    return bool(users) and users[-1].startswith("torch._assert")


def told(error: BaseException) -> str:
    filename, line = _line(error)
    return f"{type(error).__name__}: {str(error)[:300]} [at {filename.rsplit('/', 1)[-1]}: {line}]"
