"""ATen operator calls in a graph written as the calls of torch that they are made by.

Graphs of `torch.export` and `make_fx` call `torch.ops.aten.linear.default` and the like. Later
passes know operations and their arguments as torch's functions and methods have them. PyTorch
generates those from the operators, with the same names and arguments, so a call is rewritten by its
name and no number changes. What has no such function stays as it is. Used by
`passes.frontends.block_extraction`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

#: where functions are that PyTorch made of its operators
_BOUND = (torch._C._VariableFunctions, torch._C._nn)
#: operators that are methods of tensors only
_METHODS = frozenset(
    "view expand contiguous repeat view_as reshape_as expand_as type_as size split".split()
)
#: operators that calls of another name make
_RENAMED = {"sym_size": "size", "_unsafe_view": "reshape", "_reshape_alias": "reshape"}
#: checks that say nothing about values, but would count as reading them
_CHECKS = frozenset(
    "_assert_tensor_metadata _assert_scalar _assert_async sym_constrain_range "
    "sym_constrain_range_for_size".split()
)


def _slice(node: fx.Node) -> tuple[Any, ...]:
    """Arguments of the indexing that `aten.slice.Tensor` is."""
    args: tuple[Any, ...] = node.args
    given: dict[str, Any] = dict(zip(("self", "dim", "start", "end", "step"), args, strict=False))
    given.update(node.kwargs)
    dim, end = given.get("dim", 0), given.get("end")
    part = slice(given.get("start"), None if end == 2**63 - 1 else end, given.get("step", 1))
    assert isinstance(dim, int)
    around: tuple[Any, ...] = (slice(None),) * dim if dim >= 0 else (Ellipsis,)
    after: tuple[Any, ...] = () if dim >= 0 else (slice(None),) * (-dim - 1)
    return given["self"], (*around, part, *after)


def _lower(node: fx.Node, name: str) -> None:
    # fx's own type of arguments is recursive: mypy takes minutes over it
    args: tuple[Any, ...] = node.args
    function = next((getattr(bound, name) for bound in _BOUND if hasattr(bound, name)), None)
    if name == "slice":
        node.target, node.args, node.kwargs = operator.getitem, _slice(node), {}
    elif name == "index":
        if all(isinstance(index, fx.Node) for index in args[1]):
            node.target, node.args = operator.getitem, (args[0], tuple(args[1]))
    elif name == "einsum":
        node.target, node.args, node.kwargs = torch.einsum, (args[0], *args[1]), {}
    elif name in _METHODS:
        node.op, node.target = "call_method", name
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "implicit"}
    elif function is not None:
        node.target = function


def lower_aten(graph: fx.Graph) -> None:
    """Rewrite a graph, in place."""
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
            continue
        name = node.target.overloadpacket.__name__
        if name in _CHECKS and not node.users:
            graph.erase_node(node)
        elif not name.endswith("_"):
            _lower(node, _RENAMED.get(name, name))
