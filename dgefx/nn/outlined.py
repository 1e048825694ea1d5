"""`OutlinedBlock`: a dense block cut out of a flat graph, as a module of its own.

`passes.frontends.block_extraction` makes them where a model is an `fx.GraphModule`, whose blocks
are no modules that are called. Like any other block they are traced, split and replaced by a
`DGEBlock` afterwards.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn

from dgefx.nn.code import GraphCode

#: parts of a module that hold what its state dict and its tree are made of
_HELD = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


def graphs_of(module: fx.GraphModule) -> dict[str, fx.Graph]:
    """The graphs of a module by its attributes: "_graph" is the one that runs, which may be one of
    several between which it switches (torchvision's feature extractors, by `train()`)."""
    return {name: value for name, value in vars(module).items() if isinstance(value, fx.Graph)}


class OutlinedBlock(nn.Module):
    """Runs a part of a flat graph on the modules and parameters of `container`.

    Args:
        container: takes its place in the model; children, parameters and buffers are shared.
        graph: its first placeholder is the stream, one more for every further value it reads; one
            output. Targets are relative to `container`.
        label: name for tracebacks.

    Shape:
        stream and output: as the stream of the dense graph.
    """

    def __init__(self, container: nn.Module, graph: fx.Graph, label: str) -> None:
        super().__init__()
        for part in _HELD:
            self.__dict__[part] = copy.copy(vars(container)[part])
        self.training = container.training
        self._outlined_code = GraphCode(graph, label)

    def forward(self, stream: Tensor, others: tuple[Any, ...] = ()) -> Any:
        return self._outlined_code.run(self, stream, *others)


def container_of(block: nn.Module) -> nn.Module:
    """A plain module that holds what `block` holds, as containers in an `fx.GraphModule` do."""
    plain = nn.Module()
    for part in _HELD:
        plain.__dict__[part] = copy.copy(vars(block)[part])
    plain.training = block.training
    return plain


def _drop_keys(_block: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    own = (f"{prefix}dge_router.", f"{prefix}dge_constants.")
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(own)]:
        del state[key]


def _fill_in_keys(
    block: nn.Module, state: dict[str, Any], prefix: str, *_strictness_and_lists: Any
) -> None:
    """What was left out was loaded where it is shared with."""
    for name, value in [*block.named_parameters(), *block.named_buffers()]:
        if not name.startswith("dge_router."):
            state.setdefault(prefix + name, value)


def hide_from_state_dict(block: nn.Module) -> None:
    """Leave `block` out of state dicts: all it holds is in the model under another name too."""
    block.register_state_dict_post_hook(_drop_keys)
    block.register_load_state_dict_pre_hook(_fill_in_keys)
