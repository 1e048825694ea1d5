"""The forms of attention that the passes know, and the search for the cores of a graph."""

from __future__ import annotations

from torch import nn
from torch.fx import Graph, Node

from dgefx.passes.attention.core import AttentionCore, AttentionForm, SearchedGraph, Values
from dgefx.passes.attention.flex import FlexAttention
from dgefx.passes.attention.fused import FusedAttention
from dgefx.passes.attention.module import ModuleAttention
from dgefx.passes.attention.sampling import SamplingAttention
from dgefx.passes.attention.unfused import UnfusedAttention
from dgefx.passes.ops import op_name, set_own_names, stand_ins

_forms: dict[str, AttentionForm] = {}
#: by what their calls are called in `passes.ops`
_operations: dict[str, AttentionForm] = {}


def _name_functions() -> None:
    functions = [(name, form) for form in _forms.values() for name in form.functions]
    set_own_names({name: form.operation for name, form in functions})
    _operations.clear()
    _operations.update({form.operation: form for form in _forms.values()})
    stand_ins.clear()
    stand_ins.update({name: form.stand_in for name, form in functions if form.stand_in})


def _add(form: AttentionForm) -> None:
    _forms[form.name] = form
    _name_functions()


_add(UnfusedAttention())
_add(FusedAttention())
_add(ModuleAttention())
_add(SamplingAttention())
_add(FlexAttention())


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
    if form.name in _forms:
        raise ValueError(
            f"an attention form {form.name!r} is registered already; choose another name, or call "
            f"dgefx.unregister_attention({form.name!r}) before"
        )
    if not form.functions and type(form).find is AttentionForm.find:
        raise ValueError(f"{form.name!r} lists no functions, so no call of it would be found")
    for other in _forms.values():
        for function in set(other.functions) & set(form.functions):
            raise ValueError(f"{function} belongs to the attention form {other.name!r} already")
    _add(form)
    return form


def unregister_attention(form: AttentionForm | str) -> None:
    """Forget a form. Models that were converted with it go on to work.

    Raises:
        ValueError: there is none.
    """
    name = form if isinstance(form, str) else form.name
    if name not in _forms:
        raise ValueError(f"no attention form {name!r}; there are {', '.join(_forms)}")
    del _forms[name]
    _name_functions()


def form_names() -> list[str]:
    """Of all forms, in the order of their registration."""
    return list(_forms)


def form_named(name: str) -> AttentionForm | None:
    """The form with calls of this name in `passes.ops`."""
    return _operations.get(name)


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
