"""The kernels of `dgefx::attend` compile for NVIDIA devices, on a machine that has none.

Triton's wheel ships the assembler, so this needs no driver; a process of its own, as the tests
beside this one run kernels under the interpreter, which is chosen once per process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

#: what a block can have on sm_86, sm_89 and sm_120, the least of the devices since sm_80
SHARED_BYTES = 99 * 1024
#: per thread: a few values outside the loop; tiles that are too large spill from 200 to 7000
SPILLED_BYTES = 96

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INDICES = {"offsets": "i64", "bias_row": "i64"}
WIDE = {"bias": "fp32", "lse": "fp32", "delta": "fp32", "grad_score": "fp32"}
DATA = ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")


#: element type, size of a head, whether there is a bias, queries of a group
CASES = [
    (dtype, head, bias, 200)
    for dtype in (torch.bfloat16, torch.float32)
    for head in (32, 64, 80)
    for bias in (False, True)
] + [(torch.float16, head, bias, 300) for head in (64, 128) for bias in (False, True)]
#: every type, the largest heads of each, which come nearest to the bounds, and both with a bias
FEW = [
    (torch.bfloat16, 80, False, 200),
    (torch.bfloat16, 80, True, 200),
    (torch.float32, 80, False, 200),
    (torch.float32, 80, True, 200),
    (torch.float16, 128, True, 300),
]


@pytest.mark.parametrize(
    ("arch", "cases"),
    [
        (90, "FEW"),
        pytest.param(80, "CASES", marks=pytest.mark.slow),
        pytest.param(90, "CASES", marks=pytest.mark.slow),
    ],
)
def test_compiles(arch: int, cases: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, __file__, str(arch), cases],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 3 * len(globals()[cases])
    for result in results:
        assert result["shared"] <= SHARED_BYTES, result
        assert result["spilled"] <= SPILLED_BYTES, result
        # what the units of strides are for: heads of 80 are read 16 bytes at a time
        assert result["wide_copies"] > 0, result


def compile_all(arch: int, cases: list[tuple[torch.dtype, int, bool, int]]) -> None:
    """Print one line of JSON per kernel and case."""
    from dgefx.kernels.gpu import attend_backward, attend_forward, attend_tiles

    kernels = (
        (attend_forward.attend_forward_kernel, attend_tiles.forward_tiles),
        (attend_backward.attend_query_backward_kernel, attend_tiles.query_backward_tiles),
        (attend_backward.attend_context_backward_kernel, attend_tiles.context_backward_tiles),
    )
    for dtype, head, bias, per_group in cases:
        sizes = attend_tiles.Sizes(64 * per_group, 64, 6, 197, head, head, 16 // dtype.itemsize)
        for kernel, rule in kernels:
            tiles = rule(sizes, dtype, bias)
            constants = attend_tiles.constants(sizes, tiles, bias)
            found = compile_one(kernel, arch, dtype, constants, tiles)
            case = [kernel.fn.__name__, NAMES[dtype], head, bias, *tiles]
            print(json.dumps({"case": case, **found}))


def compile_one(kernel, arch: int, dtype: torch.dtype, constants: dict, tiles) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    bias = constants["HAS_BIAS"]
    constants = {**constants, "WRITE_SCORE": bias}
    if not bias:
        constants.update(bias=None, bias_row=None, grad_score=None)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in DATA or name in INDICES or name in WIDE:
            signature[name] = "*" + (INDICES | WIDE).get(name, NAMES[dtype])
            aligned[(index,)] = [["tt.divisibility", 16]]  # as the allocator does
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages},
    )
    return {
        "shared": compiled.metadata.shared,
        "wide_copies": compiled.asm["ptx"].count("cp.async.cg"),
        **usage(compiled.asm["cubin"]),
    }


def usage(binary: bytes) -> dict[str, int]:
    """Registers per thread and bytes that did not fit into them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        told = subprocess.run(
            [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return {"registers": int(found[1]), "spilled": int(found[2])}


if __name__ == "__main__":
    compile_all(int(sys.argv[1]), globals()[sys.argv[2]])
