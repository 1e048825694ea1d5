"""One thread per test process: with pytest-xdist, more would only fight over the cores.

Without a GPU, Triton kernels run in Triton's interpreter, which must be asked for before anything
imports Triton.
"""

from __future__ import annotations

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What the imports made stays: the garbage collector need not go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """Code that an earlier test compiled would be compiled anew for dynamic shapes and other
    modules, up to four times slower, and would count against this test's limit of recompiles."""
    torch._dynamo.reset()
