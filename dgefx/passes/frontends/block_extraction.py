"""Frontends, block extraction: blocks of `fx.GraphModule`s become modules, which later passes find.

A flat graph has no block modules that are called. Every region that `passes.frontends.graph_blocks`
finds is cut out into an `OutlinedBlock`, which takes the place of the container that its parameters
lie in: `state_dict` keys stay. Where blocks have no container of their own (`self.norms`,
`self.attns`), the block is added under a new name (`dge_block_0`), shares its modules with where
they were and is left out of the `state_dict`. Calls of ATen operators are written as calls of torch
on the way (`passes.frontends.aten`).

A module that switches between graphs, for training and for evaluation, has the blocks cut out of
all of them. A graph whose blocks are not those of the graph that was looked at raises when it runs.

The same plan is applied to the working copy and to the model that is converted. Next:
`passes.capture`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NoReturn

from torch import fx, nn

from dgefx.nn.module_tree import put
from dgefx.nn.outlined import OutlinedBlock, container_of, graphs_of, hide_from_state_dict
from dgefx.outputs import Call
from dgefx.passes.capture import record_calls
from dgefx.passes.frontends.aten import lower_aten
from dgefx.passes.frontends.graph_blocks import GraphBlock, find_graph_blocks
from dgefx.passes.ops import Op, named, op_name

_READS = named(Op.READS_SIZES)
#: in the meta of a graph module: its graphs as they were, and the names of what was outlined
_KEPT = "dgefx_dense"
_OTHER_BLOCKS = (
    "{}: this graph is not the one that was converted ({}) and its blocks do other things, as "
    "dropout in functions does in training. To train, convert the model that the graphs were "
    "traced from and trace the converted one, or set these rates to 0 before tracing"
)
#: the nodes of a graph by their indices in the graph that was looked at
_Nodes = dict[int, fx.Node]


@dataclass(frozen=True)
class Extraction:
    """What becomes of one graph module of a model.

    module: its name. graph: the attribute with the graph that was looked at. names: of its blocks'
    modules, relative to it.
    """

    module: str
    graph: str
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
        _prepare(copied, copied.graph)
        regions = tuple(find_graph_blocks(copied, given))
        if regions:
            fresh = (f"dge_block_{i}" for i in range(len(regions)))
            places = tuple(region.path or next(fresh) for region in regions)
            found.append(Extraction(name, _running(module), regions, places))
    apply_extractions(model, found)
    return found


def apply_extractions(model: nn.Module, extractions: list[Extraction]) -> None:
    """Do to `model` what `outline` did to a copy of it, in whatever mode it is."""
    for plan in extractions:
        module = model.get_submodule(plan.module)
        assert isinstance(module, fx.GraphModule)
        graphs = graphs_of(module)
        # torchvision's extractors have none at first
        vars(module).setdefault("meta", {})[_KEPT] = (copy.deepcopy(graphs), plan)
        for graph in set(graphs.values()):
            _prepare(module, graph)
        own = graphs[plan.graph]
        cut: dict[fx.Graph, _Nodes] = {own: dict(enumerate(own.nodes))}
        refusing: dict[fx.Graph, fx.Graph] = {}
        for graph in set(graphs.values()) - {own}:
            nodes = _counterparts(own, graph, plan.regions)
            if nodes is None:
                refusing[graph] = _refusing(graph, plan)
            else:
                cut[graph] = nodes
        for region, name in zip(plan.regions, plan.names, strict=True):
            _add_block(module, list(cut.values()), region, name)
            for graph, nodes in cut.items():
                if region.output in nodes:
                    _cut_out(graph, nodes, region, name)
        for attribute, graph in graphs.items():
            vars(module)[attribute] = refusing.get(graph, graph)
        module.graph.lint()
        module.recompile()


def restore(model: nn.Module) -> None:
    """Undo `apply_extractions`, in place, with the present parameters."""
    for module in model.modules():
        is_graph = isinstance(module, fx.GraphModule)
        kept = vars(module).get("meta", {}).pop(_KEPT, None) if is_graph else None
        if kept is None:
            continue
        assert isinstance(module, fx.GraphModule)
        graphs, plan = kept
        for region, name in zip(plan.regions, plan.names, strict=True):
            if region.path:
                put(module, name, container_of(module.get_submodule(name)))
            else:
                delattr(module, name)
        running = _running(module)
        vars(module).update(graphs)
        module.graph = graphs[running]  # compiles it


def _running(module: fx.GraphModule) -> str:
    """The attribute with the graph that runs; "_graph" only if no other has it."""
    names = [name for name, graph in graphs_of(module).items() if graph is module.graph]
    return next((name for name in names if name != "_graph"), "_graph")


def _prepare(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Before regions are looked for, and again before they are cut out."""
    lower_aten(graph)
    # what a tracer leaves of `B, N, C = x.shape` and `x, _ = attention(x)`: read by nothing, it
    # would count as a reader of the block's insides. Anything else may have effects
    for node in reversed(graph.nodes):
        if not node.users and node.op.startswith("call_") and op_name(node, module) in _READS:
            graph.erase_node(node)


def _is_same(node: fx.Node, other: fx.Node) -> bool:
    """Whether nodes of two graphs do the same with the same others, but for an argument that says
    that the second one is trained."""
    asked, told = node.kwargs.get("training"), other.kwargs.get("training")
    given = [repr((n.op, n.target, n.args, {**n.kwargs, "training": 0})) for n in (node, other)]
    return given[0] == given[1] and (asked is told or (asked is False and told is True))


def _counterparts(own: fx.Graph, other: fx.Graph, regions: tuple[GraphBlock, ...]) -> _Nodes | None:
    """The nodes of the same names in another graph; None where a region is there, but is not the
    same: its insides are read by others, or its operations have other arguments."""
    by_name, nodes = {node.name: node for node in other.nodes}, list(own.nodes)
    found = {i: by_name[node.name] for i, node in enumerate(nodes) if node.name in by_name}
    for region in regions:
        if found.keys().isdisjoint(region.body):
            continue  # of a graph that ends before
        for index in region.body:
            if index not in found or not _is_same(nodes[index], found[index]):
                return None
            readers, others = ({n.name for n in at[index].users} for at in (nodes, found))
            if index != region.output and readers != others:
                return None
    return found


def _refuse_to_run(message: str) -> NoReturn:
    raise RuntimeError(message)


def _refusing(graph: fx.Graph, plan: Extraction) -> fx.Graph:
    """A graph with the inputs of another that raises when it is run."""
    made = fx.Graph(tracer_cls=graph._tracer_cls)
    for node in graph.find_nodes(op="placeholder"):
        made.node_copy(node)
    message = _OTHER_BLOCKS.format(plan.module or "the model", plan.graph)
    made.output(made.call_function(_refuse_to_run, (message,)))
    return made


def _is_named(node: fx.Node) -> bool:
    return node.op in ("call_module", "get_attr")


def _add_block(
    module: fx.GraphModule, counterparts: list[_Nodes], region: GraphBlock, name: str
) -> None:
    """Make a submodule that runs one region.

    Args:
        counterparts: nodes of the graph that was looked at, and the same ones of others.
    """
    nodes, graph, copies = counterparts[0], fx.Graph(), {}
    for place, index in enumerate(region.inputs):
        copies[nodes[index]] = graph.placeholder("stream" if place == 0 else f"other_{place}")
    for index in region.body:
        node = copies[nodes[index]] = graph.node_copy(nodes[index], copies.__getitem__)
        if region.path and _is_named(node):
            node.target = str(node.target)[len(region.path) + 1 :]
        modes = {at[index].kwargs.get("training") for at in counterparts if index in at}
        if len(modes) > 1:
            with graph.inserting_before(node):
                node.kwargs = {**node.kwargs, "training": graph.get_attr("training")}
    graph.output(copies[nodes[region.output]])
    if region.path:
        block = OutlinedBlock(module.get_submodule(region.path), graph, name)
        put(module, region.path, block)
        return
    # only what the block uses, where it is in the model
    block = OutlinedBlock(container_of(fx.GraphModule(module, graph)), graph, name)
    hide_from_state_dict(block)
    for part in block.modules():
        if type(part) is nn.Module:  # containers that are new here
            part.training = module.training
    module.add_module(name, block)


def _cut_out(graph: fx.Graph, nodes: _Nodes, region: GraphBlock, name: str) -> None:
    """Replace one region of a graph by a call of its submodule."""
    end, inputs = nodes[region.output], [nodes[index] for index in region.inputs]
    if not region.path:  # copies of a graph module keep what its nodes name
        named = (nodes[index] for index in region.body if _is_named(nodes[index]))
        with graph.inserting_before(end):
            for target in dict.fromkeys(str(node.target) for node in named):
                graph.get_attr(target)
    with graph.inserting_after(end):
        call = graph.call_module(name, (inputs[0], tuple(inputs[1:])))
    call.meta = dict(end.meta)
    end.replace_all_uses_with(call)
    for index in reversed(region.body):
        graph.erase_node(nodes[index])
    # later regions may read what this one handed out
    nodes[region.output] = call
