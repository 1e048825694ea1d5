"""One vocabulary for operations, whatever way they were written, and one table of what they do.

`x @ y`, `torch.matmul(x, y)`, `x.matmul(y)` and a recorded tensor method are all "matmul" here,
`nn.Linear` and `F.linear` are both "linear". Every later pass speaks these names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from enum import Flag, auto
from typing import Any, NamedTuple

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
    "nelement": "numel",
    "ndimension": "dim",
    "unsafe_view": "view",
    "convolution": "conv2d",
    "upsample_bilinear2d": "upsample",
    "upsample_bicubic2d": "upsample",
    "upsample_nearest2d": "upsample",
    "grid_sampler": "grid_sample",
}

_REFLECTED = {"radd": "add", "rmul": "mul", "rsub": "sub", "rtruediv": "div", "rmatmul": "matmul"}
_IN_PLACE = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "ifloordiv": "floordiv",
}


class Op(Flag):
    """What an operation does; most do several of these."""

    MOVES = auto()  # every output element is one input element
    SIZED = auto()  # moves data; its arguments are the shape of its result
    SHIFTS = auto()  # moves data along an axis that it keeps, and may fill up
    SAME = auto()  # moves nothing either
    JOINS = auto()  # makes one tensor of several
    SELECTS = auto()  # takes elements by an index
    PAIRS = auto()  # between real pairs and complex numbers
    ELEMENTWISE = auto()  # element by element, operands aligned by broadcasting
    BINARY = auto()  # elementwise, joins two tensors: either may carry the stream
    CASTS = auto()  # changes the type alone
    TOKENWISE = auto()  # leaves every token where it is
    CHANNELS = auto()  # reads all of the last axis at once: what lies there is one token afterwards
    SCALES = auto()  # its numbers change values alone, not what happens to them
    PRODUCT = auto()  # sums products of two values over an axis
    REDUCES = auto()  # takes an axis away
    SPATIAL = auto()  # works on (B, C, H, W)
    VOLUME = auto()  # works on (B, C, D, H, W)
    RANDOM = auto()  # draws random numbers
    FILLS = auto()  # as a method with "_": sets every element anew
    UNINITIALISED = auto()  # makes a tensor of no known values
    READS_ELEMENTS = auto()  # makes a number or boolean of a tensor's elements
    READS_SIZES = auto()  # asks a value for what its elements do not tell
    READS_TYPE = auto()  # asks for, or changes, the type
    CHECKS_RANGE = auto()  # the same for all sane data
    SHAPED_BY_DATA = auto()  # gives as many elements as the elements that it is given say


_TABLE: tuple[tuple[str, Op], ...] = (
    ("view reshape unflatten expand", Op.MOVES | Op.SIZED),
    ("permute transpose movedim flatten squeeze unsqueeze", Op.MOVES),
    ("unbind chunk split split_with_sizes tensor_split select narrow", Op.MOVES),
    ("view_as reshape_as expand_as", Op.MOVES),
    ("contiguous clone detach identity", Op.MOVES | Op.SAME | Op.TOKENWISE),
    ("getitem", Op.MOVES | Op.SELECTS | Op.READS_SIZES),
    ("roll pad", Op.SHIFTS),
    ("cat stack", Op.JOINS),
    ("gather index_select take_along_dim index", Op.SELECTS),
    ("masked_select", Op.SELECTS | Op.SHAPED_BY_DATA),
    ("nonzero argwhere unique unique_consecutive bincount", Op.SHAPED_BY_DATA),
    ("view_as_complex view_as_real", Op.PAIRS),
    ("add sub mul div", Op.ELEMENTWISE | Op.BINARY | Op.TOKENWISE | Op.SCALES),
    ("where type_as lerp addcmul maximum minimum", Op.ELEMENTWISE | Op.BINARY | Op.TOKENWISE),
    ("pow neg abs exp sqrt rsqrt clamp masked_fill", Op.ELEMENTWISE | Op.TOKENWISE),
    ("sigmoid tanh relu gelu silu softplus elu leaky_relu", Op.ELEMENTWISE | Op.TOKENWISE),
    ("hardswish hardsigmoid", Op.ELEMENTWISE | Op.TOKENWISE),
    ("eq ne lt le gt ge", Op.ELEMENTWISE | Op.TOKENWISE),
    ("logical_and logical_or logical_not", Op.ELEMENTWISE | Op.TOKENWISE),
    ("float half bfloat16 double", Op.ELEMENTWISE | Op.TOKENWISE),
    ("dropout", Op.ELEMENTWISE | Op.TOKENWISE | Op.SCALES),
    ("to", Op.ELEMENTWISE | Op.CASTS | Op.TOKENWISE),
    ("type", Op.CASTS | Op.TOKENWISE | Op.READS_TYPE),
    ("dtype is_floating_point is_complex", Op.READS_TYPE),
    ("linear layer_norm rms_norm", Op.TOKENWISE | Op.CHANNELS),
    ("batch_norm normalize softmax", Op.TOKENWISE),
    ("matmul einsum", Op.PRODUCT),
    ("max amax mean sum", Op.REDUCES),
    ("conv2d conv_transpose2d max_pool2d avg_pool2d adaptive_avg_pool2d", Op.SPATIAL),
    ("max_pool2d_with_indices interpolate upsample group_norm groupnorm", Op.SPATIAL),
    ("conv3d conv_transpose3d max_pool3d avg_pool3d adaptive_avg_pool3d", Op.VOLUME),
    ("rand randn randint randperm rand_like randn_like randint_like", Op.RANDOM),
    ("multinomial poisson", Op.RANDOM),
    ("uniform normal random exponential", Op.RANDOM | Op.FILLS),
    ("bernoulli", Op.RANDOM | Op.FILLS | Op.SCALES),
    ("fill zero copy", Op.FILLS),
    ("empty new_empty empty_like", Op.UNINITIALISED),
    ("item tolist equal allclose is_nonzero", Op.READS_ELEMENTS),
    ("getattr size dim numel", Op.READS_SIZES),
    ("isfinite isinf isnan", Op.CHECKS_RANGE),
)

#: name -> what it does, each name once
OPERATIONS: dict[str, Op] = {name: does for names, does in _TABLE for name in names.split()}


def named(does: Op) -> frozenset[str]:
    """The names of the operations that do any of these."""
    return frozenset(name for name, own in OPERATIONS.items() if own & does)


MOVEMENT = named(Op.MOVES)
ELEMENTWISE = named(Op.ELEMENTWISE)
TOKENWISE = named(Op.TOKENWISE)
RANDOM = named(Op.RANDOM)


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
        own = own_function(target)
        return own.operation if own else _normalise(getattr(target, "__name__", str(target)))
    return node.op


class OwnFunction(NamedTuple):
    """A function that is one operation whatever it does inside.

    stand_in: computes the same by operations that are known, see
        `passes.attention.core.AttentionForm`.
    """

    operation: str
    stand_in: Callable[..., Any] | None = None


#: by their full names, by the last part of these; another dictionary after every change, so that
#: who reads one meanwhile has all of it
_own_functions: dict[str, dict[str, OwnFunction]] = {}


def full_name(function: Any) -> str:
    """ "namespace::name" of an operator, "package.module.name" of a Python function; of what was
    compiled, that of the function itself."""
    function = getattr(function, "_torchdynamo_orig_callable", function)
    function = getattr(function, "_opoverload", function)  # of `torch.library.custom_op`
    function = getattr(function, "overloadpacket", function)
    name = getattr(function, "__qualname__", getattr(function, "__name__", ""))
    return str(
        getattr(function, "_qualified_op_name", None)
        or f"{getattr(function, '__module__', '')}.{name}"
    )


def own_function(function: Any) -> OwnFunction | None:
    """What a function was made by `set_own_functions`."""
    found = _own_functions.get(getattr(function, "__name__", ""))
    return found.get(full_name(function)) if found else None


def set_own_functions(functions: Mapping[str, OwnFunction]) -> None:
    """Let functions be operations of their own, and these alone.

    Args:
        functions: by their full names.
    """
    global _own_functions
    table: dict[str, dict[str, OwnFunction]] = {}
    for full, function in functions.items():
        table.setdefault(re.split(r"\.|::", full)[-1], {})[full] = function
    _own_functions = table


def own_functions() -> frozenset[str]:
    """The last parts of the names of Python functions among them whose modules are imported."""

    def is_imported(full: str) -> bool:
        parts = full.split(".")
        return any(".".join(parts[:count]) in sys.modules for count in range(1, len(parts)))

    return frozenset(last for last, found in _own_functions.items() if any(map(is_imported, found)))


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
