"""`undone_on_error`: a model is changed as a whole or not at all.

Around everything that changes a user's model in place: `convert(inplace=True)`,
`revert(inplace=True)`, and of the blocks' routers in `set_budget` and `calibrate`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from dgefx.nn.outlined import graphs_of


@contextmanager
def undone_on_error(*models: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, every module of `models` has what it had before: children,
    parameters and buffers (the same tensors; their values are not looked at), hooks, modes, other
    attributes, graphs and their code; and the CPU's random numbers go on as if nothing had been.
    """
    kept = [_Kept(module) for model in models for module in model.modules()]
    random = torch.get_rng_state()
    try:
        yield
    except BaseException:
        for module in kept:
            module.put_back()
        torch.set_rng_state(random)
        raise


class _Kept:
    """What one module had."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        # the dicts stay the same ones: handles of hooks and the dense blocks hold them too
        held = [v for v in vars(module).values() if type(v) in (dict, OrderedDict)]
        self.contents = [(value, dict(value)) for value in held]
        self.graphs: dict[fx.Graph, fx.Graph] = {}
        if isinstance(module, fx.GraphModule):
            self.graphs = {g: copy.deepcopy(g) for g in set(graphs_of(module).values())}
            self.forward = type(module).forward  # every graph module has a class of its own

    def put_back(self) -> None:
        for held, content in self.contents:
            _reset(held, content)
        _reset(vars(self.module), self.attributes)
        for graph, nodes in self.graphs.items():
            _refill(graph, nodes)
        if self.graphs:
            type(self.module).forward = self.forward


def _refill(graph: fx.Graph, content: fx.Graph) -> None:
    """The same graph, since others may hold it, with the nodes of `content`."""
    owner = graph.owning_module
    vars(graph).update(vars(content))
    graph.owning_module = owner
    for node in graph.nodes:
        node.graph = graph
    graph._root.graph = graph


def _reset(held: dict[Any, Any], content: dict[Any, Any]) -> None:
    """`content` in its order, for the order of modules and hooks says which comes first."""
    if list(held) != list(content):
        held.clear()
    held.update(content)
