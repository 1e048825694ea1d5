"""What every stage decided for a block, for who wants to see it.

Python's own logging, by the block's name: `logging.getLogger("dgefx.passes.blocks.3")` at level
DEBUG shows one block, `logging.getLogger("dgefx.passes")` all of them; see docs/architecture.md.
"""

from __future__ import annotations

import logging


def log_stage(block: str, stage: str, result: object) -> None:
    """Log the result of a stage; it is made text only if somebody listens."""
    logging.getLogger(f"dgefx.passes.{block}").debug("%s, %s:\n%s", block, stage, result)
