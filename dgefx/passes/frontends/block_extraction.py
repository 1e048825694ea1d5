"""Pass 0, outline: the blocks of `fx.GraphModule`s become modules, so that later passes find them.

A flat graph has no block modules that are called. Every region that `passes.frontends.graph_blocks`
finds is cut out into an `OutlinedBlock`, which takes the place of the container that its parameters
lie in: `state_dict` keys stay. Where blocks have no container of their own (`self.norms`,
`self.attns`), the block is added under a new name (`dge_block_0`), shares its modules with where
they were and is left out of the `state_dict`. Calls of ATen operators are written as calls of torch
on the way (`passes.frontends.aten`).

The same plan is applied to the working copy and to the model that is converted. Next:
`passes.capture`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import fx, nn

from dgefx.nn.module_tree import put
from dgefx.nn.outlined import OutlinedBlock, container_of, hide_from_state_dict
from dgefx.outputs import Call
from dgefx.passes.capture import record_calls
from dgefx.passes.frontends.aten import lower_aten
from dgefx.passes.frontends.graph_blocks import GraphBlock, find_graph_blocks
from dgefx.passes.ops import Op, named, op_name

_READS = named(Op.READS_SIZES)
#: in the meta of a graph module: its graph as it was, and the names of what was outlined
_KEPT = "dgefx_dense"


@dataclass(frozen=True)
class Extraction:
    """What becomes of one graph module of a model.

    module: its name. names: of its blocks' modules, relative to it.
    """

    module: str
    regions: tuple[GraphBlock, ...]
    names: tuple[str, ...]


def outline(model: nn.Module, call: Call) -> list[Extraction]:
    """Cut the blocks out of every graph module of `model`, in place.

    Args:
        model: in eval mode; a working copy. call: its example call.

    Returns:
        what was done, for `apply_extractions`.
    """
    names = [name for name, m in model.named_modules() if isinstance(m, fx.GraphModule)]
    calls = record_calls(model, set(names), *call) if names else {}
    found = []
    for name, given in calls.items():
        module = model.get_submodule(name)
        assert isinstance(module, fx.GraphModule)
        copied = fx.GraphModule(module, copy.deepcopy(module.graph))
        _prepare(copied)
        regions = tuple(find_graph_blocks(copied, given))
        if regions:
            fresh = (f"dge_block_{i}" for i in range(len(regions)))
            places = tuple(region.path or next(fresh) for region in regions)
            found.append(Extraction(name, regions, places))
    apply_extractions(model, found)
    return found


def apply_extractions(model: nn.Module, extractions: list[Extraction]) -> None:
    """Do to `model` what `outline` did to a copy of it."""
    for plan in extractions:
        module = model.get_submodule(plan.module)
        assert isinstance(module, fx.GraphModule)
        module.meta[_KEPT] = (copy.deepcopy(module.graph), plan)
        _prepare(module)
        nodes = list(module.graph.nodes)
        for region, name in zip(plan.regions, plan.names, strict=True):
            _cut_out(module, nodes, region, name)
        module.graph.lint()
        module.recompile()


def restore(model: nn.Module) -> None:
    """Undo `apply_extractions`, in place, with the present parameters."""
    for module in model.modules():
        kept = module.meta.pop(_KEPT, None) if isinstance(module, fx.GraphModule) else None
        if kept is None:
            continue
        assert isinstance(module, fx.GraphModule)
        graph, plan = kept
        for region, name in zip(plan.regions, plan.names, strict=True):
            if region.path:
                put(module, name, container_of(module.get_submodule(name)))
            else:
                delattr(module, name)
        module.graph = graph  # compiles it


def _prepare(module: fx.GraphModule) -> None:
    """Before regions are looked for, and again before they are cut out."""
    lower_aten(module.graph)
    # what a tracer leaves of `B, N, C = x.shape` and `x, _ = attention(x)`: read by nothing, it
    # would count as a reader of the block's insides. Anything else may have effects
    for node in reversed(module.graph.nodes):
        if not node.users and node.op.startswith("call_") and op_name(node, module) in _READS:
            module.graph.erase_node(node)


def _is_named(node: fx.Node) -> bool:
    return node.op in ("call_module", "get_attr")


def _cut_out(module: fx.GraphModule, nodes: list[fx.Node], region: GraphBlock, name: str) -> None:
    """Replace one region by a call of a new submodule."""
    graph, copies = fx.Graph(), {}
    for place, index in enumerate(region.inputs):
        copies[nodes[index]] = graph.placeholder("stream" if place == 0 else f"other_{place}")
    for index in region.body:
        copies[nodes[index]] = graph.node_copy(nodes[index], copies.__getitem__)
    graph.output(copies[nodes[region.output]])
    for node in graph.nodes:
        if region.path and _is_named(node):
            node.target = str(node.target)[len(region.path) + 1 :]
    if region.path:
        block = OutlinedBlock(module.get_submodule(region.path), graph, name)
        put(module, region.path, block)
    else:
        # only what the block uses, where it is in the model
        block = OutlinedBlock(container_of(fx.GraphModule(module, graph)), graph, name)
        hide_from_state_dict(block)
        for part in block.modules():
            if type(part) is nn.Module:  # containers that are new here
                part.training = module.training
        module.add_module(name, block)
        # copies of a graph module keep what its nodes name
        with module.graph.inserting_before(nodes[region.output]):
            for target in dict.fromkeys(str(n.target) for n in graph.nodes if _is_named(n)):
                module.graph.get_attr(target)
    end, inputs = nodes[region.output], [nodes[index] for index in region.inputs]
    with module.graph.inserting_after(end):
        call = module.graph.call_module(name, (inputs[0], tuple(inputs[1:])))
    call.meta = dict(end.meta)
    end.replace_all_uses_with(call)
    for index in reversed(region.body):
        module.graph.erase_node(nodes[index])
    # later regions may read what this one handed out
    nodes[region.output] = call
