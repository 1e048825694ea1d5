"""Running an `fx.GraphModule` under the capture recorder, node by node.

A copy of its graph tells after every node what its value is, so that captured values are known by
the node that made them, under any calling convention. Used by `passes.frontends.graph_blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from dgefx.outputs import Call
from dgefx.passes.capture import Capture, Recorder, capture


@dataclass
class NodeValues:
    """A capture of a graph module.

    value_of: indices of the graph's nodes whose value a captured node is; several where modules
    hand through what they get. tensors: indices of the nodes whose values are, or hold, tensors.
    """

    capture: Capture
    value_of: dict[fx.Node, list[int]] = field(default_factory=dict)
    tensors: set[int] = field(default_factory=set)


def watch(module: fx.GraphModule, call: Call) -> NodeValues:
    """Run `module` once on `call` and note what each of its nodes did.

    Args:
        module: in eval mode; not changed.
    """
    recorder = Recorder(module)
    watched = NodeValues(Capture(recorder.graph, None))

    def ran(index: int, value: Any) -> None:
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        if leaves:
            watched.tensors.add(index)
        if isinstance(value, Tensor):
            watched.value_of.setdefault(recorder.node_of(value), []).append(index)

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, copies)
    graph.output(result)
    graph.set_codegen(module.graph._codegen)
    for index, node in enumerate(module.graph.nodes):
        if node.op not in ("output", "placeholder"):
            with graph.inserting_after(copies[node]):
                graph.call_function(ran, (index, copies[node]))
    first = next((n for n in graph.nodes if n.op != "placeholder"), None)
    if first is not None:
        with graph.inserting_before(first):
            for index, node in enumerate(module.graph.nodes):
                if node.op == "placeholder":
                    graph.call_function(ran, (index, copies[node]))
    told = fx.GraphModule(module, graph)
    watched.capture = capture(told.eval(), *call, recorder=recorder)
    return watched
