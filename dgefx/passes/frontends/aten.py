"""ATen operator calls in a graph written as the calls of torch that they are made by.

Graphs of `torch.export` and `make_fx` call `torch.ops.aten.linear.default` and the like. Later
passes know operations and their arguments as torch's Python functions have them; the functions here
take the same arguments in the same order and call the same operators, so no number changes. What
is not listed stays as it is. Used by `passes.frontends.block_extraction`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

#: calls of the same name with the same arguments in the same order
_FUNCTIONS = (
    "add sub mul div matmul bmm mm cat stack permute transpose reshape flatten unflatten squeeze "
    "unsqueeze unbind chunk split split_with_sizes select narrow movedim roll flip softmax exp "
    "sigmoid tanh relu mean sum amax where masked_fill clamp maximum minimum sqrt rsqrt pow neg "
    "abs eq ne lt le gt ge logical_and logical_or logical_not clone batch_norm index_select arange "
    "zeros ones full zeros_like ones_like addmm t clamp_min"
).split()
_METHODS = "view expand contiguous repeat view_as reshape_as expand_as type_as size".split()
_NN_FUNCTIONS = (
    "linear layer_norm rms_norm conv2d gelu silu dropout scaled_dot_product_attention pad "
    "softplus hardswish hardsigmoid leaky_relu group_norm max_pool2d avg_pool2d "
    "adaptive_avg_pool2d"
).split()
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


def _torch_call(name: str) -> tuple[str, Callable[..., Any] | str] | None:
    if name in _METHODS:
        return "call_method", name
    if name in _FUNCTIONS:
        return "call_function", getattr(torch, name)
    if name in _NN_FUNCTIONS:
        return "call_function", getattr(F, name)
    return None


def _lower(node: fx.Node, name: str) -> None:
    # fx's own type of arguments is recursive: mypy takes minutes over it
    args: tuple[Any, ...] = node.args
    kwargs: dict[str, Any] = {**node.kwargs}
    if name == "slice":
        node.op, node.target = "call_function", operator.getitem
        node.args, node.kwargs = _slice(node), {}
        return
    if name == "sym_size":
        name = "size"
    elif name in ("_unsafe_view", "_reshape_alias"):
        name = "reshape"
    elif name == "index" and all(isinstance(a, fx.Node) for a in args[1]):
        node.target, node.args = operator.getitem, (args[0], tuple(args[1]))
        return
    elif name == "einsum":
        node.target, node.args, node.kwargs = torch.einsum, (args[0], *args[1]), {}
        return
    found = _torch_call(name)
    if found is None:
        return
    node.op, node.target = found
    if name in ("layer_norm", "group_norm"):
        node.args = args[:5]  # without cudnn_enable
    elif name == "expand":
        kwargs.pop("implicit", None)
        node.kwargs = kwargs


def lower_aten(module: fx.GraphModule) -> None:
    """Rewrite the graph of `module`, in place."""
    changed = False
    for node in list(module.graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if node.op != "call_function" or packet is None or node.target.namespace != "aten":
            continue
        name = packet.__name__
        changed = True
        if name in _CHECKS and not node.users:
            module.graph.erase_node(node)
        elif not name.endswith("_"):
            _lower(node, name)
    if changed:
        module.graph.lint()
        module.recompile()
