"""The stencil's kernels compile for CUDA, without a GPU: in a process of its own, as this one may
have Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# not importorskip: an import here would come before the interpreter is chosen elsewhere
if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton for this system", allow_module_level=True)

PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dgefx.kernels.gpu.stencil import coefficients_kernel, stencil_kernel, tile_of

POINTERS = dict(patch="*i64", base="*i64", row="*i64", place="*i32", start="*i32", reads="*i32",
                coefficients="*fp32", partial="*fp32")
SIZES = dict.fromkeys(("queries", "channels", "height", "width"), "i32")

def build(kernel, dtype, channels=512, **constants):
    values = dict.fromkeys(("hidden", "grad", "out"), "*" + dtype)
    block_q, block_c = tile_of(channels)
    constants = {**constants, "BLOCK_Q": block_q, "BLOCK_C": block_c}
    known = {**POINTERS, **SIZES, **values, **dict.fromkeys(constants, "constexpr")}
    signature = {name: known[name] for name in kernel.arg_names}
    # what the launcher finds out by itself: aligned pointers, channels a multiple of 16
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if known[name].startswith("*") or name == "channels"
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
    assert built.asm["cubin"]
    print(kernel.__name__, dtype, constants, len(built.asm["cubin"]), built.metadata.shared)
    return built

for dtype in sys.argv[2:]:
    for adjoint in (False, True):
        build(stencil_kernel, dtype, ADJOINT=adjoint)
    build(coefficients_kernel, dtype)
# narrower tiles, which Triton 3.6 lays out in another way
build(stencil_kernel, "fp32", channels=64, ADJOINT=False)
build(coefficients_kernel, "fp32", channels=64)
"""


@pytest.mark.parametrize(
    ("capability", "dtypes"),
    [
        (90, ["bf16", "fp32"]),
        pytest.param(90, ["fp16"], marks=pytest.mark.slow),
        pytest.param(80, ["bf16", "fp16", "fp32"], marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_cuda(capability: int, dtypes: list[str], tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability), *dtypes],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("kernel") == 3 * len(dtypes) + 2
