"""One vocabulary for operations, whatever way they were written.

`x @ y`, `torch.matmul(x, y)`, `x.matmul(y)` and a recorded tensor method are all "matmul" here,
`nn.Linear` and `F.linear` are both "linear". Every later pass speaks these names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Node, map_arg

from dgefx.passes.errors import TraceError

_ALIASES = {
    "multiply": "mul",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "subtract": "sub",
    "bmm": "matmul",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "t": "transpose",
    "adjoint": "transpose",
    "moveaxis": "movedim",
    "multiheadattention": "multi_head_attention_forward",
    "native_multi_head_attention": "multi_head_attention_forward",
    "layernorm": "layer_norm",
    "batchnorm2d": "batch_norm",
    "drop_path": "dropout",
    "alpha_dropout": "dropout",
    "nondynamicallyquantizablelinear": "linear",
    "mm": "matmul",
    "to_copy": "to",
    "unsafe_view": "view",
    "convolution": "conv2d",
    "upsample_bilinear2d": "upsample",
    "upsample_bicubic2d": "upsample",
    "upsample_nearest2d": "upsample",
}

_REFLECTED = {"radd": "add", "rmul": "mul", "rsub": "sub", "rtruediv": "div", "rmatmul": "matmul"}
_IN_PLACE = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "ifloordiv": "floordiv",
}

#: pure data movement: every output element is one input element
MOVEMENT = frozenset(
    "view reshape permute transpose flatten unflatten squeeze unsqueeze contiguous clone unbind "
    "chunk split tensor_split getitem select narrow movedim expand identity detach view_as "
    "reshape_as expand_as split_with_sizes".split()
)

#: movement whose size arguments may name the token count
VIEWS = frozenset("view reshape unflatten".split())

#: element by element, operands aligned by broadcasting
ELEMENTWISE = frozenset(
    "add sub mul div pow neg abs exp sigmoid tanh relu gelu silu where masked_fill maximum minimum "
    "clamp type_as to float half bfloat16 double dropout addcmul lerp rsqrt sqrt eq ne lt le gt ge "
    "logical_and logical_or logical_not softplus hardswish hardsigmoid elu leaky_relu".split()
)

#: leaves every token where it is (used to walk the residual stream)
TOKENWISE = ELEMENTWISE | frozenset(
    "linear layer_norm rms_norm batch_norm dropout normalize softmax identity to type".split()
)


def _normalise(name: str) -> str:
    name = name.lower()
    core = name.strip("_")
    if core in _IN_PLACE:
        return _IN_PLACE[core]
    if core in _REFLECTED and name.startswith("__"):
        return _REFLECTED[core]
    return _ALIASES.get(core, core)


def op_name(node: Node, root: nn.Module | None = None) -> str:
    """The operation of `node` in this library's vocabulary.

    Args:
        node: of any graph.
        root: the module that call_module targets belong to.
    """
    if node.op == "call_module":
        assert root is not None
        return _normalise(type(root.get_submodule(str(node.target))).__name__)
    if node.op == "call_method":
        return _normalise(str(node.target))
    if node.op == "call_function":
        # an ATen overload is called "linear.default"
        target = getattr(node.target, "overloadpacket", node.target)
        return _normalise(getattr(target, "__name__", str(target)))
    return node.op


def argument(node: Node, position: int, name: str, default: object = None) -> object:
    """An argument by position or keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def run_node(node: Node, root: nn.Module | None, args: Any, kwargs: Any) -> Any:
    """Execute one node of any of this library's graphs."""
    if node.op == "get_attr":
        value: Any = root
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    if node.op == "call_module":
        assert root is not None
        return root.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    raise TraceError(f"cannot execute {node.op} node {node}")


def map_sources(
    node: Node, edges: frozenset[tuple[Node, int | str]], pick: Callable[[Node, bool], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `node` with every producer replaced by `pick(producer, crosses)`."""

    def convert(argument: Any, place: int | str) -> Any:
        crosses = (node, place) in edges
        return map_arg(argument, lambda source: pick(source, crosses))

    args = tuple(convert(argument, i) for i, argument in enumerate(node.args))
    kwargs = {name: convert(argument, name) for name, argument in node.kwargs.items()}
    return args, kwargs
