"""A converted block that `torch.fx` meets while it traces the model around it.

`torch.fx.symbolic_trace` and the feature extractors of timm and torchvision run a model on proxies.
What a converted block does depends on sizes and on its mode, so it is one node of their graph, as
the modules of `torch.nn` are, and the graph module runs it in either mode and at any size. Used by
`DGEBlock.forward` and by the hook that tells blocks the size of the image.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

_INSTEAD = "extract or trace first, then convert the result"


def is_symbolic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is traced by `torch.fx` rather than computed."""
    for value in args:
        if isinstance(value, fx.Proxy):
            return True
    return any(isinstance(value, fx.Proxy) for value in kwargs.values())


def as_leaf(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call of `block` as one node of the graph that is being traced.

    Raises:
        ValueError: the tracer does not know the block as a part of what it traces, or the block has
            hooks, which would run while tracing and again whenever the node does.
    """
    values = (*args, *kwargs.values())
    tracer: Any = next(v.tracer for v in values if isinstance(v, fx.Proxy))
    try:
        path = tracer.path_of_module(block)
    except (AttributeError, NameError):  # a bare graph; a module from elsewhere
        path = ""
    if not path:
        raise ValueError(
            f"torch.fx cannot trace a converted block by itself, only the model that it is a part "
            f"of, in which it becomes one node; or {_INSTEAD}"
        )
    if block._forward_hooks or block._forward_pre_hooks:
        raise ValueError(
            f"torch.fx traces the converted block {path}, which has forward hooks: they would run "
            f"twice in the traced model. Remove them while tracing, or {_INSTEAD}"
        )
    return tracer.create_proxy("call_module", path, args, kwargs)


def refuse_inlined(module: nn.Module) -> None:
    """Raise ValueError: `module`, whose output has the token grid, is not called in the graph."""
    raise ValueError(
        f"torch.fx traces through {type(module).__name__}, which tells the converted blocks "
        f"the size of the image; name it as a leaf of the tracer, or {_INSTEAD}"
    )
