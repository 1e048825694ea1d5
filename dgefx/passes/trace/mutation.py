"""In-place operations made functional while a block is traced.

A value of a block is read by two sides, so nothing may change it. A tensor of the traced code is
known here by the node that first made it; writing to it makes a new node, and whatever reads the
tensor later reads that one. Tensors that share memory with it (views, bases) follow: a base gets
the written part put in, a view is made again from its changed base when it is next read. What
cannot follow raises when it is read. Used by `passes.trace.tracer`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from dgefx.passes.errors import TraceError
from dgefx.passes.ops import Op, named

Emit = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], fx.Node]
Run = Callable[[fx.Node, Any, Any], Any]


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """`tensor[index] = value`, as a new tensor."""
    changed = tensor.clone()
    changed[index] = value
    return changed


_RENAMED = {"and": "and_", "or": "or_"}

#: `x += y` and the like, with what they compute
AUGMENTED: dict[Any, Any] = {
    getattr(operator, f"i{name}"): getattr(operator, _RENAMED.get(name, name))
    for name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
}

#: the same as methods, which they are where only the right side is symbolic
_AUGMENTED_METHODS = {f"__{function.__name__}__": plain for function, plain in AUGMENTED.items()}

#: set every element anew: no functional twin, and no reading of what was there
_FILLS = {f"{name}_" for name in named(Op.FILLS)}


def is_fill(node: fx.Node) -> bool:
    """Whether a node writes to memory that was made for it."""
    return node.op == "call_method" and str(node.target) in _FILLS


@dataclass(frozen=True)
class Change:
    """An in-place call on its first argument, and the call that computes the same.

    fills: it has to run in place, on memory that nothing else reads.
    """

    kind: str
    target: Any
    kwargs: dict[str, Any]
    fills: bool = False


def as_change(kind: str, target: Any, kwargs: dict[str, Any]) -> Change | None:
    """How to compute an in-place call without changing anything; None: it is not in place.

    Raises:
        TraceError: an in-place call that cannot be told apart or done otherwise.
    """
    name = target if kind == "call_method" else getattr(target, "__name__", "")
    if kind not in ("call_method", "call_function"):
        return None
    if kwargs.get("out") is not None:
        raise TraceError(f"{name} writes into a tensor given as out=")
    if name == "__setitem__":
        raise TraceError("a computed value is written into a constant tensor")
    if kind == "call_function":
        if target in AUGMENTED:
            return Change(kind, AUGMENTED[target], kwargs)
        if kwargs.get("inplace") is True:
            return Change(kind, target, {**kwargs, "inplace": False})
    elif target in _AUGMENTED_METHODS:
        return Change("call_function", _AUGMENTED_METHODS[target], kwargs)
    if not name.endswith("_") or name.endswith("__") or name.startswith("_"):
        return None
    if name in _FILLS:
        return Change(kind, target, kwargs, fills=True)
    if kind == "call_method":
        twin = getattr(Tensor, name[:-1], None)
        return Change(kind, name[:-1], kwargs) if callable(twin) else _no_twin(name)
    if not str(getattr(target, "__module__", "torch") or "torch").startswith("torch"):
        return None  # a user's function
    twin = getattr(torch, name[:-1], None) or getattr(torch.nn.functional, name[:-1], None)
    return Change(kind, twin, kwargs) if callable(twin) else _no_twin(name)


def _no_twin(name: str) -> Change:
    raise TraceError(f"{name} changes a tensor in place and has no form that does not")


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a value."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(value: Any) -> set[int]:
    """The memory that a value's tensors lie in."""
    return {t.untyped_storage().data_ptr() for t in tensors_of(value) if t.numel()}


def shares_memory(first: Any, second: Any) -> bool:
    """Whether two values have tensors in the same memory."""
    return not _memory(first).isdisjoint(_memory(second))


def is_same_tensor(first: Any, second: Any) -> bool:
    """Whether both are the very same elements in the same order."""
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    kept = first.dtype == second.dtype and first.shape == second.shape
    if not kept or not shares_memory(first, second):
        return False
    places = [(t.stride(), int(t.storage_offset())) for t in (first, second)]
    return places[0] == places[1]


class Versions:
    """What every tensor of the traced code holds by now.

    Args:
        values: of every node in the example call; none of them ever changes.
        emit: makes and executes a node. run: executes a node on other arguments.
    """

    def __init__(self, values: dict[fx.Node, Any], emit: Emit, run: Run) -> None:
        self._values, self._emit, self._run = values, emit, run
        self._latest: dict[fx.Node, fx.Node] = {}
        self._tensor_of: dict[fx.Node, fx.Node] = {}  # a later version -> the tensor's first node
        self._sources: dict[fx.Node, list[fx.Node]] = {}
        self._views: dict[fx.Node, list[fx.Node]] = {}
        self._stale: set[fx.Node] = set()
        self._same: set[fx.Node] = set()  # views of all of their source, as it is
        self._lost: dict[fx.Node, fx.Node] = {}  # tensor -> the write that it did not follow

    # -- reading -----------------------------------------------------------------------------

    def tensor(self, node: fx.Node) -> fx.Node:
        """The tensor that `node` is a version of."""
        return self._tensor_of.get(node, node)

    def made(self, node: fx.Node) -> None:
        """Note which tensors a new one shares memory with."""
        memory = _memory(self._values[node])
        if not memory or node.op in ("placeholder", "get_attr"):
            return
        for source in dict.fromkeys(self.tensor(n) for n in node.all_input_nodes):
            value = self._values.get(self._latest.get(source, source))
            if not memory.isdisjoint(_memory(value)):
                if is_same_tensor(self._values[node], value):
                    self._same.add(node)
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

    def value(self, node: fx.Node) -> Any:
        """What a tensor holds now in the example call."""
        return self._values[self.current(node)]

    # -- writing -----------------------------------------------------------------------------

    def is_alone(self, node: fx.Node) -> bool:
        """Whether no other tensor shares its memory."""
        tensor = self.tensor(node)
        return tensor not in self._sources and tensor not in self._views

    def is_unread(self, node: fx.Node) -> bool:
        """Whether changing the tensor in place would be seen by nothing but the writer."""
        now = self.current(node)
        return self.is_alone(node) and now.op.startswith("call_") and not now.users

    def write(self, node: fx.Node, new: fx.Node) -> None:
        """The tensor of `node` holds `new` from now on, and so does all that shares its memory."""
        tensor = self.tensor(node)
        group = list(self._group(tensor))
        if any(n.op == "get_attr" for n in group):
            raise TraceError(f"{new.name} changes a parameter, buffer or constant in place")
        touched = [n for n in group if n is not tensor and self._overlap(n, tensor, group)]
        self._set(tensor, new)
        followed = self._put_into_sources(tensor, new)
        reached = self._all_views(followed)
        for other in touched:
            if other in followed:
                continue
            if other in reached:
                self._stale.add(other)
            else:
                self._lost[other] = new

    def rename(self, node: fx.Node, new: fx.Node) -> None:
        """The tensor of `node` becomes a view of itself (`x.unsqueeze_(0)`)."""
        if not self.is_alone(node) or self.tensor(node).op == "get_attr":
            raise TraceError(f"{new.name} changes the shape of a tensor that is seen elsewhere")
        self._set(self.tensor(node), new)

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

    def _group(self, tensor: fx.Node) -> Iterator[fx.Node]:
        """All tensors that share memory with one, itself among them."""
        seen, front = {tensor}, [tensor]
        while front:
            node = front.pop()
            yield node
            for other in itertools.chain(self._sources.get(node, ()), self._views.get(node, ())):
                if other not in seen:
                    seen.add(other)
                    front.append(other)

    def _all_views(self, tensors: list[fx.Node]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        front = list(tensors)
        while front:
            for view in self._views.get(front.pop(), ()):
                if view not in found:
                    found.add(view)
                    front.append(view)
        return found

    def _overlap(self, first: fx.Node, second: fx.Node, group: list[fx.Node]) -> bool:
        """Whether two tensors of a group have elements in common; True where that is not known."""
        if sum(n not in self._sources for n in group) != 1:
            return True
        a, b = self._elements(first), self._elements(second)
        if a is None or b is None:
            return True
        return bool(torch.isin(_flat(a), _flat(b)).any())

    def _elements(self, tensor: fx.Node) -> Any:
        """Which elements of its group's base a tensor holds: numbers in the shape of its value."""
        sources = self._sources.get(tensor, [])
        if not sources:
            return _numbered(self._values[self._latest.get(tensor, tensor)])
        if len(sources) > 1:
            return None
        numbers = self._elements(sources[0])
        if numbers is None or tensor in self._same:
            return numbers

        def pick(node: fx.Node) -> Any:
            return numbers if self.tensor(node) is sources[0] else self._values[node]

        args, kwargs = fx.map_arg((tensor.args, tensor.kwargs), pick)
        try:
            found = self._run(tensor, args, kwargs)
        except Exception:  # no view of integers: a module, a change of type
            return None
        shapes = [[t.shape for t in tensors_of(v)] for v in (found, self._values[tensor])]
        return found if shapes[0] == shapes[1] else None


def _flat(numbers: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors_of(numbers)])


def _numbered(value: Any) -> Any:
    """Numbers of their own for all elements of a value."""
    start = 0

    def number(leaf: Any) -> Any:
        nonlocal start
        if not isinstance(leaf, Tensor):
            return leaf
        start += leaf.numel()
        return torch.arange(start - leaf.numel(), start, device=leaf.device).view(leaf.shape)

    return pytree.tree_map(number, value)
