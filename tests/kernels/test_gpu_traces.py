"""What a compiler sees of the row operators on CUDA: one kernel each, for any number of rows.

Traced with tensors that have no memory, so without a GPU; the numbers of tokens, queries and images
are unknown to the tracer, which raises where a launch would depend on one. In a process of its own,
as a kernel of Triton's interpreter cannot be traced.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json
import torch, triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from dgefx.kernels.allocate_op import allocate
from dgefx.kernels.pool_op import pool
from dgefx.kernels.transfer_op import collect, spread
from dgefx.kernels.unpool_op import unpool_add

class Driver:  # all that torch asks of it, to find out what a kernel writes
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
environment = ShapeEnv()
mode = FakeTensorMode(shape_env=environment)

def unknown():
    with environment.ignore_fresh_unbacked_symbols():  # not every call has all of them
        size = environment.create_unbacked_symint()
    torch._check(size >= 0)
    return size

def zeros(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype, device="cuda")

with mode:
    rows, queries, images, total = (unknown() for _ in range(4))
    tokens, updated = (zeros(n, 96, dtype=torch.bfloat16) for n in (rows, queries))
    gate = zeros(queries, dtype=torch.float32)
    fields = zeros(queries), zeros(queries), zeros(rows), zeros(70), zeros(98)
    tables = zeros(images, 12), zeros(70), zeros(70), zeros(70, dtype=torch.bool), zeros(3, 98)
    ends = zeros(images, 3), zeros(total)

calls = {
    "pool": (lambda *a: pool(*a, 16), (tokens, *fields)),
    "collect": (lambda *a: collect(*a, 16, False, True), (tokens, *fields)),
    "spread": (lambda *a: spread(*a, 16, True), (updated, *fields)),
    "unpool_add": (lambda *a: unpool_add(*a, 16), (tokens, updated, updated, gate, *fields)),
    "unpool_add_no_gate": (
        lambda x, q, y, *a: unpool_add(x, q, y, None, *a, 16), (tokens, updated, updated, *fields)
    ),
    "allocate": (lambda *a: allocate(*a[:-1], a[-1].shape[0]), (*tables, *ends)),
}
found = {}
for name, (call, inputs) in calls.items():
    with torch.no_grad(), mode:
        graph = make_fx(dispatch_functionalize(call), tracing_mode="symbolic")(*inputs).graph
    found[name] = [
        sorted(node.kwargs["tensors_to_clone"])
        for node in graph.nodes
        if "triton_kernel_wrapper" in str(node.target)
    ]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What `PROGRAM` prints (one line), then what `COPIES` prints, of one process."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + COPIES, str(tmp_path_factory.mktemp("copies"))],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_every_operator_is_its_kernels_and_they_write_their_results_alone(
    printed: list[str],
) -> None:
    rows = ["pool", "collect", "spread", "unpool_add", "unpool_add_no_gate"]
    wanted = {name: [["out"]] for name in rows}
    wanted["allocate"] = [["patch", "patch_slot"], ["token_slot"]]
    assert json.loads(printed[0]) == wanted


COPIES = """
import importlib, importlib.util, pkgutil, sys, triton
import dgefx.kernels.gpu
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.codegen.wrapper import (
    user_defined_triton_kernel_transitive_closure_source_code as copy_source,
)

for found in pkgutil.iter_modules(dgefx.kernels.gpu.__path__):
    module = importlib.import_module("dgefx.kernels.gpu." + found.name)
    for name, kernel in vars(module).items():
        if not isinstance(kernel, triton.JITFunction) or kernel.fn.__module__ != module.__name__:
            continue
        path = f"{sys.argv[1]}/{found.name}_{name}.py"
        with open(path, "w") as file:
            file.write(TritonKernel.gen_common_triton_imports())
            file.write("\\n@triton.jit\\n" + copy_source(kernel))
        spec = importlib.util.spec_from_file_location(name, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        print(name)
"""


def test_kernels_stand_alone_in_the_module_that_inductor_copies_them_to(
    printed: list[str],
) -> None:
    """It evaluates their annotations too, without the imports of ours."""
    assert {"stencil_kernel", "coefficients_kernel", "collect_kernel"} <= {*printed[1:]}
