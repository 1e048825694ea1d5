"""The forms of attention that the passes know, and the search for the cores of a graph."""

from __future__ import annotations

from torch import nn
from torch.fx import Graph, Node

from dgefx.passes.attention.core import AttentionCore, AttentionForm, SearchedGraph, Values
from dgefx.passes.attention.fused import FusedAttention
from dgefx.passes.attention.module import ModuleAttention
from dgefx.passes.attention.sampling import SamplingAttention
from dgefx.passes.attention.unfused import UnfusedAttention
from dgefx.passes.ops import op_name

_forms: dict[str, AttentionForm] = {}


def register_attention(form: AttentionForm) -> AttentionForm:
    """Let conversions find attention of a further form."""
    _forms[form.name] = form
    return form


register_attention(UnfusedAttention())
register_attention(FusedAttention())
register_attention(ModuleAttention())
register_attention(SamplingAttention())


def form_names() -> list[str]:
    """Of all forms, in the order of their registration."""
    return list(_forms)


def form_named(name: str) -> AttentionForm | None:
    """The form with calls of this name in `passes.ops`."""
    return _forms.get(name)


def form_of(node: Node, root: nn.Module | None = None) -> AttentionForm | None:
    """The form whose call a node is, whether it is attention or not."""
    return form_named(op_name(node, root))


def search_cores(searched: SearchedGraph) -> list[AttentionCore]:
    """All attention cores of a graph, in order."""
    cores = {core.output: core for form in _forms.values() for core in form.find(searched)}
    return [cores[node] for node in searched.graph.nodes if node in cores]


def find_cores(graph: Graph, values: Values, root: nn.Module | None = None) -> list[AttentionCore]:
    """As `search_cores`, of a flat capture or a traced block.

    Args:
        values: of its nodes. root: the module that call_module targets belong to.
    """
    return search_cores(SearchedGraph(graph, values, root))
