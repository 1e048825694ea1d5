"""What every tensor holds by now, while a block is traced that writes into its tensors.

A value of a block is read by two sides, so nothing may change it. A tensor of the traced code is
known here by the node that first made it; writing to it makes a new node, and whatever reads the
tensor later reads that one. Tensors that share memory with it (views, bases) follow: a base gets
the written part put in, a view is made again from its changed base when it is next read. What
cannot follow raises when it is read. Used by `passes.trace.tracer` and `passes.trace.in_place`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from dgefx.passes.errors import TraceError
from dgefx.passes.labels import moved
from dgefx.passes.walk import breadth_first

Emit = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], fx.Node]


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """`tensor[index] = value`, as a new tensor."""
    changed = tensor.clone()
    changed[index] = value
    return changed


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a value."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (int, float, torch.Size)):
        return []
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(value: Any) -> set[int]:
    """The memory that a value's tensors lie in."""
    return {t.untyped_storage().data_ptr() for t in tensors_of(value) if t.numel()}


def shares_memory(first: Any, second: Any) -> bool:
    """Whether two values have tensors in the same memory."""
    return not _memory(first).isdisjoint(_memory(second))


def _is_same(first: Any, second: Any) -> bool:
    """Whether two tensors in the same memory are the very same elements in the same order."""
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    kinds = [(t.dtype, t.shape, t.stride(), t.storage_offset()) for t in (first, second)]
    return kinds[0] == kinds[1]


class TensorVersions:
    """What every tensor of the traced code holds by now.

    Args:
        root: the traced module.
        values: of every node in the example call; none of them ever changes.
        emit: makes and executes a node.
    """

    def __init__(self, root: nn.Module, values: dict[fx.Node, Any], emit: Emit) -> None:
        self._root, self._values, self._emit = root, values, emit
        self._latest: dict[fx.Node, fx.Node] = {}
        self._tensor_of: dict[fx.Node, fx.Node] = {}  # a later version -> the tensor's first node
        self._sources: dict[fx.Node, list[fx.Node]] = {}
        self._views: dict[fx.Node, list[fx.Node]] = {}
        self._stale: set[fx.Node] = set()
        self._whole: set[fx.Node] = set()  # views of all of their source, as it is
        self._lost: dict[fx.Node, fx.Node] = {}  # tensor -> the write that it did not follow

    # -- reading -----------------------------------------------------------------------------

    def tensor(self, node: fx.Node) -> fx.Node:
        """The tensor that `node` is a version of."""
        return self._tensor_of.get(node, node)

    def add(self, node: fx.Node) -> None:
        """Note which tensors a new one shares memory with."""
        memory = _memory(self._values[node])
        if not memory or node.op in ("placeholder", "get_attr"):
            return
        for source in dict.fromkeys(map(self.tensor, node.all_input_nodes)):
            value = self._values.get(self._latest.get(source, source))
            if not memory.isdisjoint(_memory(value)):
                if _is_same(self._values[node], value):
                    self._whole.add(node)
                self._sources.setdefault(node, []).append(source)
                self._views.setdefault(source, []).append(node)

    def current(self, node: fx.Node) -> fx.Node:
        """The node that holds a tensor's value now.

        Raises:
            TraceError: it was changed through another tensor in a way that is not followed.
        """
        tensor = self.tensor(node)
        if tensor in self._lost:
            raise TraceError(
                f"{tensor.name} is read after {self._lost[tensor].name} changed it through a view"
            )
        if tensor in self._stale:
            args, kwargs = fx.map_arg((tensor.args, tensor.kwargs), self.current)
            self._set(tensor, self._emit(tensor.op, tensor.target, args, kwargs))
        return self._latest.get(tensor, tensor)

    # -- writing -----------------------------------------------------------------------------

    def is_alone(self, node: fx.Node) -> bool:
        """Whether no other tensor shares its memory, and no module holds it."""
        tensor = self.tensor(node)
        shared = tensor in self._sources or tensor in self._views
        return not shared and tensor.op != "get_attr"

    def is_unread(self, node: fx.Node) -> bool:
        """Whether changing the tensor in place would be seen by nothing but the writer."""
        now = self.current(node)
        return self.is_alone(node) and now.op.startswith("call_") and not now.users

    def write(self, node: fx.Node, new: fx.Node) -> None:
        """The tensor of `node` holds `new` from now on, and so does all that shares its memory."""
        tensor = self.tensor(node)
        group = set(breadth_first([tensor], self._sharing))
        if any(n.op == "get_attr" for n in group):
            raise TraceError(f"{new.name} changes a parameter, buffer or constant in place")
        touched = [n for n in group if n is not tensor and self._overlap(n, tensor, group)]
        self._set(tensor, new)
        followed = self._put_into_sources(tensor, new)
        remade = set(breadth_first(followed, lambda n: self._views.get(n, ())))
        for other in touched:
            if other not in remade:
                self._lost[other] = new
            elif other not in followed:
                self._stale.add(other)

    def _set(self, tensor: fx.Node, node: fx.Node) -> None:
        self._latest[tensor] = node
        self._tensor_of[node] = tensor
        self._stale.discard(tensor)

    def _put_into_sources(self, tensor: fx.Node, new: fx.Node) -> list[fx.Node]:
        """Write up the chain of views; the tensors that could be written to, outermost last."""
        written = [tensor]
        while True:
            sources = self._sources.get(tensor, [])
            if len(sources) != 1 or sources[0] in self._lost:
                return written
            merged = self._merged(tensor, sources[0], new)
            if merged is None:
                return written
            tensor, new = sources[0], merged
            self._set(tensor, new)
            written.append(tensor)

    def _merged(self, view: fx.Node, source: fx.Node, new: fx.Node) -> fx.Node | None:
        """The source of a view after the view was changed to `new`."""
        whole = self._values[self._latest.get(source, source)]
        if not isinstance(whole, Tensor):
            return None  # one of several parts
        if view.target is operator.getitem:
            return self._emit(
                "call_function", set_item, (self.current(source), view.args[1], new), {}
            )
        part, rest = self._elements(view), self._elements(source)
        if part is None or rest is None or not torch.equal(part.flatten(), rest.flatten()):
            return None
        if part.shape == rest.shape:
            return new
        return self._emit("call_method", "reshape_as", (new, self.current(source)), {})

    # -- who shares what ---------------------------------------------------------------------

    def _sharing(self, tensor: fx.Node) -> Iterable[fx.Node]:
        return (*self._sources.get(tensor, ()), *self._views.get(tensor, ()))

    def _overlap(self, first: fx.Node, second: fx.Node, group: set[fx.Node]) -> bool:
        """Whether two tensors of a group have elements in common; True where that is not known."""
        if sum(n not in self._sources for n in group) != 1:
            return True
        a, b = (tensors_of(self._elements(tensor)) for tensor in (first, second))
        if not a or not b:
            return True
        flat = [torch.cat([t.flatten() for t in labels]) for labels in (a, b)]
        return bool(torch.isin(*flat).any())

    def _elements(self, tensor: fx.Node) -> Any:
        """Which elements of its group's base a tensor holds: labels in the shape of its value."""
        sources = self._sources.get(tensor, [])
        if not sources:
            return _numbered(self._values[self._latest.get(tensor, tensor)])
        if len(sources) > 1:
            return None
        labels = self._elements(sources[0])
        if labels is None or tensor in self._whole:
            return labels

        versions = [n for n in tensor.all_input_nodes if self.tensor(n) is sources[0]]
        try:
            given = dict.fromkeys(versions, labels)
            found = moved(tensor, given, self._values.__getitem__, self._root)
        except Exception:  # no view of integers: a module, a change of type
            return None
        shapes = [[t.shape for t in tensors_of(v)] for v in (found, self._values[tensor])]
        return found if shapes[0] == shapes[1] else None


def _numbered(value: Any) -> Any:
    """Labels of their own for all elements of a value."""
    sizes = [t.numel() for t in tensors_of(value)]
    labels = iter(torch.arange(sum(sizes)).split(sizes))

    def number(leaf: Any) -> Any:
        return next(labels).to(leaf.device).view(leaf.shape) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(number, value)
