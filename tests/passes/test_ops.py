"""The table of operations."""

import torch
from torch import fx

from dgefx.passes.ops import _TABLE, MOVEMENT, OPERATIONS, Op, named, op_name


def test_every_operation_has_one_row():
    names = [name for row, _ in _TABLE for name in row.split()]
    assert len(names) == len(set(names)) == len(OPERATIONS)
    assert named(Op.SIZED) < MOVEMENT
    assert named(Op.PRODUCT | Op.CASTS) == {"matmul", "einsum", "to", "type"}


def test_an_operation_has_one_name_however_it_is_written():
    graph = fx.Graph()
    x = graph.placeholder("x")
    calls = [
        graph.call_function(torch.matmul, (x, x)),
        graph.call_function(torch.bmm, (x, x)),
        graph.call_method("__rmatmul__", (x, x)),
        graph.call_function(torch.ops.aten.mm.default, (x, x)),
    ]
    assert {op_name(node) for node in calls} == {"matmul"}
