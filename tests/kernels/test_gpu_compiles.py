"""Every Triton kernel compiles to machine code for an A100 and an H100; needs no GPU and no driver.

The interpreter, which the other tests use without a GPU, takes much that the compiler refuses.
It is a setting of the whole process, so the compiler runs in one of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest

CAPABILITIES = (80, 90)
#: fails on a kernel that needs more shared memory than a block may have on the smaller of the two
SHARED_MEMORY = 163 * 1024


class Row(NamedTuple):
    """One kernel to compile.

    types: of the arguments that are not compile-time constants, in order: "*bf16", "*i64", "i32".
    constants: compile-time arguments by name.
    """

    module: str  # in dgefx.kernels.gpu
    kernel: str
    types: str
    constants: dict[str, Any]
    options: dict[str, int] = {}  # num_warps, num_stages  # noqa: RUF012


def collects(dtype: str, mean: bool, zero_idle: bool, rows: int, channels: int) -> Row:
    blocks = {"BLOCK_ROWS": rows, "BLOCK_CHANNELS": channels, "UNROLL": 4}
    types = f"*{dtype} *{dtype} *i64 *i64 *i64 *i64 i32 i32"
    return Row("collect", "collect_kernel", types, {"MEAN": mean, "ZERO_IDLE": zero_idle, **blocks})


def spreads(dtype: str, whole: bool, gate: str, rows: int, channels: int) -> Row:
    """The forward of `unpool_add` (whole) or the backward of `pool`."""
    flags = {"HAS_RESIDUAL": whole, "HAS_MINUS": whole, "HAS_SCALE": whole, "MEAN": not whole}
    blocks = {"BLOCK_ROWS": rows, "BLOCK_CHANNELS": channels}
    types = f"*{dtype} *{dtype} *{dtype} *{gate} *i64 *i64 *i64 *{dtype} i32 i32"
    return Row("spread", "spread_kernel", types, {**flags, **blocks})


ROWS = [
    collects("bf16", True, False, 8, 128),
    collects("fp16", False, True, 8, 128),
    collects("fp32", True, True, 32, 16),
    spreads("bf16", True, "fp32", 8, 128),
    spreads("fp16", True, "fp16", 16, 64),
    spreads("fp32", False, "fp32", 32, 16),
    Row(
        "allocate",
        "allocate_patches_kernel",
        "*i64 *i64 *i64 *i1 *i64 *i64 *i64 i32 i32 i32 i32",
        {"BLOCK": 1024},
    ),
    Row(
        "allocate",
        "allocate_tokens_kernel",
        "*i64 *i64 *i64 *i64 *i64 i32 i32 i32",
        {"BLOCK": 256},
    ),
]

#: reads rows from standard input, writes one [shared memory, message] each
COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def build(module, kernel, types, constants, options, capability):
    function = getattr(importlib.import_module("dgefx.kernels.gpu." + module), kernel)
    free = [name for name in function.arg_names if name not in constants]
    types = types.split()
    assert len(free) == len(types), (free, types)
    signature = {name: "constexpr" for name in constants} | dict(zip(free, types))
    signature = {name: signature[name] for name in function.arg_names}
    # as a launch would find them: tensors begin at multiples of 16 bytes
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names) if signature[name][0] == "*"
    }
    source = ASTSource(function, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=options)
    assert built.asm["cubin"] and ".target sm_%d" % capability in built.asm["ptx"]
    return built.metadata.shared

found = []
for row in json.load(sys.stdin):
    try:
        found.append([build(*row), ""])
    except Exception as error:
        found.append([0, type(error).__name__ + ": " + str(error)])
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def built() -> dict[tuple[int, int], tuple[int, str]]:
    """(shared memory, message of the compiler) by row and capability; one process builds all."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton")
    keys = [(index, capability) for index in range(len(ROWS)) for capability in CAPABILITIES]
    rows = [[*ROWS[index], capability] for index, capability in keys]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps(rows),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(keys, (tuple(pair) for pair in json.loads(done.stdout)), strict=True))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("index", range(len(ROWS)), ids=lambda i: f"{ROWS[i].kernel}-{i}")
def test_compiles(
    index: int, capability: int, built: dict[tuple[int, int], tuple[int, str]]
) -> None:
    shared, message = built[index, capability]
    assert not message, message
    assert shared <= SHARED_MEMORY
