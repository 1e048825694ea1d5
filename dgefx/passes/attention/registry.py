"""The forms of attention that the passes know, and the search for the cores of a graph."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType

from torch import nn
from torch.fx import Graph, Node

from dgefx.passes.attention.core import AttentionCore, AttentionForm, SearchedGraph, Values
from dgefx.passes.attention.flex import FlexAttention
from dgefx.passes.attention.fused import FusedAttention
from dgefx.passes.attention.module import ModuleAttention
from dgefx.passes.attention.sampling import SamplingAttention
from dgefx.passes.attention.unfused import UnfusedAttention
from dgefx.passes.ops import OwnFunction, op_name, set_own_functions

#: by their names; another one after every change, so that a conversion in another thread, which
#: reads it without a lock, has all of it
_forms: Mapping[str, AttentionForm] = MappingProxyType({})
_one_change_at_a_time = threading.Lock()


def _set_forms(*forms: AttentionForm) -> None:
    global _forms
    _forms = MappingProxyType({form.name: form for form in forms})
    set_own_functions(
        {
            name: OwnFunction(form.operation, form.stand_in)
            for form in forms
            for name in form.functions
        }
    )


_set_forms(
    UnfusedAttention(), FusedAttention(), ModuleAttention(), SamplingAttention(), FlexAttention()
)


def register_attention(form: AttentionForm) -> AttentionForm:
    """Let `convert`, `explain` and `load` find attention of a further form, from now on.

    Returns:
        the form, for `unregister_attention`.

    Raises:
        TypeError: not an instance of `AttentionForm`.
        ValueError: its name or one of its functions is registered already, or it lists no function.
    """
    if not isinstance(form, AttentionForm):
        raise TypeError(
            f"register_attention takes an instance of dgefx.AttentionForm, not {form!r}: "
            f"register_attention(AttentionForm('my_attention', functions=[my_attention]))"
        )
    if not form.functions and type(form).find is AttentionForm.find:
        raise ValueError(f"{form.name!r} lists no functions, so no call of it would be found")
    with _one_change_at_a_time:
        if form.name in _forms:
            raise ValueError(
                f"an attention form {form.name!r} is registered already; choose another name, or "
                f"call dgefx.unregister_attention({form.name!r}) before"
            )
        for other in _forms.values():
            for function in set(other.functions) & set(form.functions):
                raise ValueError(f"{function} belongs to the attention form {other.name!r} already")
        _set_forms(*_forms.values(), form)
    return form


def unregister_attention(form: AttentionForm | str) -> None:
    """Forget a form. Models that were converted with it go on to work.

    Raises:
        ValueError: there is none.
    """
    name = form if isinstance(form, str) else form.name
    with _one_change_at_a_time:
        if name not in _forms:
            raise ValueError(f"no attention form {name!r}; there are {', '.join(_forms)}")
        _set_forms(*(kept for kept in _forms.values() if kept.name != name))


def form_names() -> list[str]:
    """Of all forms, in the order of their registration."""
    return list(_forms)


def form_named(name: str) -> AttentionForm | None:
    """The form with calls of this name in `passes.ops`."""
    return next((form for form in _forms.values() if form.operation == name), None)


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
