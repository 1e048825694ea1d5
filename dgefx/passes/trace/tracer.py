"""Pass 3, trace: one block module as its own symbolic graph.

A concolic tracer: proxies are symbolic, and every one carries the value it has for the example
call, so Python control flow on sizes and flags takes the branch that the model takes; a branch on
the values of a tensor is refused. Calls of `torch.nn` modules stay calls (parameters, dropout and
hooks stay alive); everything else is traced through. A block is traced once in eval and once in
train mode, since `self.training` is decided while tracing. Next: `passes.emit.rewrite`.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import itertools
import operator
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from dgefx.ambient import working_dtype
from dgefx.nn.callspec import CallSpec
from dgefx.passes.errors import TraceError
from dgefx.passes.ops import RANDOM, Op, named, op_name, run_node
from dgefx.passes.trace.attributes import Attributes, containers, told_sizes, watched
from dgefx.passes.trace.calls import Calls, autocast_state
from dgefx.passes.trace.decisions import Decisions, has_shape_of_data
from dgefx.passes.trace.einops_proxies import know_proxies
from dgefx.passes.trace.interception import original, watched_modules, wrapped_functions
from dgefx.passes.trace.mutation import (
    AUGMENTED,
    Change,
    Versions,
    as_change,
    is_fill,
    set_item,
    shares_memory,
    tensors_of,
)
from dgefx.passes.trace.text import Text
from dgefx.passes.trace.tokenwise import keeps_tokens_apart
from dgefx.passes.user_code import is_internal, place_now, said

#: results that are numbers or booleans made of the elements of a tensor
_READS_ELEMENTS = named(Op.READS_ELEMENTS)
#: attributes and methods of a tensor that are about its gradient, and no part of a graph
_ASKS_OF_GRADIENTS = frozenset(
    "requires_grad grad grad_fn is_leaf register_hook retain_grad requires_grad_ is_inference "
    "register_post_accumulate_grad_hook".split()
)
_UNPACK = dis.opmap["UNPACK_SEQUENCE"]
#: what blocks ask before they clamp half precision; the same for all sane data
_GUARDS_OVERFLOW = named(Op.CHECKS_RANGE)


class ConcolicProxy(fx.Proxy):
    """A symbolic value that knows what it is in the example call."""

    tracer: ConcolicTracer

    @property
    def _value(self) -> Any:
        return self.tracer.versions.value(self.node)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array"):  # numpy looks for these
            raise AttributeError(name)
        if name in _ASKS_OF_GRADIENTS:
            raise TraceError(f"the block asks for {name} of a value, which a trace would fix")
        if name == "dtype" and self.tracer.decisions.fixed:
            return self._value.dtype
        if name == "ndim" and isinstance(self._value, Tensor):
            return self._value.ndim  # the same at any size, and a key that einops looks up
        return ConcolicAttribute(self, name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.set_item(self, index, value)

    def __len__(self) -> int:
        return len(self.tracer.counted(self))

    def __repr__(self) -> str:
        value = self._value
        if isinstance(value, torch.device):
            return Text(str(value), lambda: self._look(value))
        if isinstance(value, torch.dtype):
            self._look(value)
            return str(value)
        return super().__repr__()

    def _look(self, value: Any) -> None:
        self.tracer.decisions.looked_into.append(value)

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __index__(self) -> int:
        return operator.index(self.tracer.fixed(self))

    def __int__(self) -> int:
        return int(self.tracer.fixed(self))

    def __float__(self) -> float:
        return float(self.tracer.fixed(self))

    def __array__(self, *_types: Any) -> Any:
        """What `np.sqrt(N)` makes of a size."""
        value = self.tracer.fixed(self)
        if not isinstance(value, (int, float)):
            raise TraceError(f"numpy is given the values of {self.node.name}; use torch")
        return torch.tensor(value, dtype=torch.float64).numpy()

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.tracer.fixed(self), digits)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Python takes every proxy for callable: `cond() if callable(cond) else cond` of a flag
        if isinstance(self._value, bool):
            return self._value
        return super().__call__(*args, **kwargs)

    def __contains__(self, item: Any) -> bool:
        if isinstance(self._value, (Tensor, tuple, list)):
            return any(part == item for part in self.tracer.iter(self))
        return item in self._value

    def __iter__(self) -> Iterator[Any]:
        """`a, b = x` says itself how many there are, and decides nothing by it. As that of
        `fx.Proxy`, which disassembles all of the block's code to know."""
        frame = sys._getframe(1)
        code, place = frame.f_code.co_code, frame.f_lasti
        if code[place] == _UNPACK:
            return (operator.getitem(self, index) for index in range(code[place + 1]))
        return self.tracer.iter(self)

    def __hash__(self) -> int:
        value = self._value
        if isinstance(value, torch.dtype):  # a set that it is not in asks no more
            self._look(value)
        return hash(value) if isinstance(value, (torch.dtype, torch.device)) else id(self)


def _augmented(function: Any) -> Any:
    """`x += y` of a proxy; without it Python would take `x = x + y`, which no other name sees."""

    def method(self: ConcolicProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in AUGMENTED:
    setattr(ConcolicProxy, f"__{_function.__name__}__", _augmented(_function))


class ConcolicAttribute(ConcolicProxy, fx.proxy.Attribute):
    """`x.shape`, or `x.view` before it is called."""


def _wraps_layer(module: nn.Module) -> bool:
    """Whether a module wraps one layer, `base_layer`, that it can merge itself into.

    Such an adapter (as those of PEFT) can be merged, switched off or taken out later, so it stays
    a call; what it does while traced says nothing about that.
    """
    layer = getattr(module, "base_layer", None)
    can_merge = callable(getattr(module, "merge", None)) and callable(
        getattr(module, "unmerge", None)
    )
    return isinstance(layer, nn.Module) and can_merge and not any(layer.children())


_MADE_LIKE = {"new_zeros": torch.zeros, "new_ones": torch.ones, "new_full": torch.full}


class ConcolicTracer(fx.Tracer):
    """See the module docstring.

    Args:
        spec: the example call.
        leaves: modules to keep as calls although they are not from `torch.nn`.
        in_place: modules that change their argument in the block, though not in the traced copy.
        dtype: the floating type whose branches are taken, if not that of the block; see
            `passes.trace.decisions`.
        grad: whether gradients are on outside of the block.
    """

    def __init__(
        self,
        spec: CallSpec,
        leaves: frozenset[nn.Module] = frozenset(),
        in_place: frozenset[nn.Module] = frozenset(),
        dtype: torch.dtype | None = None,
        grad: bool = True,
    ) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.spec = spec
        self.leaves = leaves
        self.in_place = in_place
        self.values: dict[fx.Node, Any] = {}
        self.versions = Versions(self.values, self._emit, self._run)
        self._changed_constants: list[Tensor] = []
        self._apart: dict[nn.Module, bool] = {}
        self._told: dict[str, fx.Proxy] = {}
        self.decisions = Decisions(self.values, dtype or working_dtype())
        self._grad = grad
        self._without_grad: set[fx.Node] = set()
        self._autocast = autocast_state()
        #: modules whose forward was gone through
        self.entered: dict[str, type] = {}
        #: those of them that do not hand on what they are given
        self.busy: set[str] = set()
        self.executing = False
        self.calls = Calls(lambda: not self.executing)

    @contextlib.contextmanager
    def own_code(self) -> Iterator[None]:
        """While the tracer's own code runs, or a value: what it does is not the block's."""
        if self.executing:
            yield
            return
        self.executing = True
        try:
            with self.calls.paused():
                yield
        finally:
            self.executing = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        with self.own_code():
            return self._is_leaf(m)

    def _is_leaf(self, m: nn.Module) -> bool:
        # what keeps running statistics changes its buffers in training; some add an activation
        if m in self.leaves or isinstance(m, (nn.MultiheadAttention, _NormBase)) or _wraps_layer(m):
            return True
        if self._apart.get(m, False):
            return True
        if not type(m).__module__.startswith("torch.nn"):
            return False
        # also one that was given children, as an adapter in a hook
        return isinstance(m, nn.Linear) or not any(m.children())

    def trace(self, root: nn.Module, concrete_args: Any = None) -> fx.Graph:  # type: ignore[override]
        """As that of `fx.Tracer`, but nothing that another thread runs is touched."""
        proxies: dict[str, Any] = {}

        def read(name: str, value: Any) -> Any:
            return self.getattr(name, value, proxies)

        with contextlib.ExitStack() as watching:
            with self.own_code():
                know_proxies(ConcolicProxy)
                _LazyGraphModule.force_recompile(root)  # type: ignore[arg-type]
                self.root = root
                self.submodule_paths = {module: name for name, module in root.named_modules()}
                self.graph = fx.Graph(tracer_cls=type(self))
                self.tensor_attrs = {
                    value: f"{name}.{key}" if name else key
                    for name, module in root.named_modules()
                    for key, value in vars(module).items()
                    if isinstance(value, (Tensor, torch.ScriptObject))
                }
                run, args = self.create_args_for_root(type(root).forward, True, concrete_args)
                watching.enter_context(watched_modules(root, self.call_module, read))
            result = run(*args)
        self.create_node("output", "output", (self.create_arg(result),), {})
        self.submodule_paths = None
        return self.graph

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names = self.spec.input_names()
        example = self.spec.bind((), self.spec.example)
        proxies = []
        for name, value in zip(names, example, strict=True):
            self._next_input = _copied(value)
            proxies.append(self.create_proxy("placeholder", name, (), {}))

        def run(root: nn.Module, *leaves: Any) -> Any:
            return root_fn(root, **self.spec.assemble(list(leaves)))

        return run, [self.root, *proxies]

    def proxy(self, node: fx.Node) -> ConcolicProxy:
        return ConcolicProxy(node, self)

    # -- nodes and their values --------------------------------------------------------------

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["place"] = place_now()
        return node

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> Any:
        if kind == "call_method" and target in _MADE_LIKE and isinstance(args[0], fx.Proxy):
            return self._made_like(target, args, kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Text):
                value.look()
        with self.own_code():
            change = as_change(kind, target, kwargs)
            if change is not None:
                return self._change(change, args)
            if kind == "call_module" and self.root.get_submodule(target) in self.in_place:
                return self._change_by_module(target, args, kwargs)
            proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
            node = proxy.node
            self._note_modes(node)
            if kind == "placeholder":
                self.values[node] = self._next_input
            else:
                self.values[node] = self._execute(node)
            self.versions.made(node)
            return proxy

    def create_arg(self, a: Any) -> Any:
        """A proxy stands for what its tensor holds now; constants get a value."""
        if isinstance(a, fx.Proxy):
            return self.versions.current(a.node)
        if isinstance(a, Tensor) and any(shares_memory(a, t) for t in self._changed_constants):
            raise TraceError("a constant tensor is read after a computed value changed it")
        with self.own_code():  # what fx notes down on the root
            made = super().create_arg(a)
        if isinstance(made, fx.Node) and made not in self.values:
            self.values[made] = self._execute(made)
        return made

    def _made_like(self, target: str, args: Any, kwargs: Any) -> Any:
        """`x.new_zeros(size)` asks x for its type and device, which does not make it x's data."""
        asked = {name: getattr(args[0], name) for name in ("dtype", "device")}
        return self.create_proxy("call_function", _MADE_LIKE[target], args[1:], asked | kwargs)

    def _note_modes(self, node: fx.Node) -> None:
        """Under which of PyTorch's modes the block makes a node."""
        if self._grad and not torch.is_grad_enabled():
            self._without_grad.add(node)
        if autocast_state() != self._autocast:
            raise TraceError("the block switches torch.autocast on for a part of its forward")

    def _emit(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.create_node(kind, target, args, kwargs)
        self._note_modes(node)
        self.values[node] = self._execute(node)
        return node

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        calls_module = node.op == "call_module"
        drawing = self.calls.without_numpy() if calls_module else contextlib.nullcontext()
        with self.own_code(), torch.no_grad(), drawing:
            return run_node(node, self.root, args, kwargs)

    def _execute(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        # whoever reads a parameter later sees its change in the block too
        sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
        before = [(n, t, _changes(t)) for n in sources for t in tensors_of(self.values[n])]
        try:
            value = self._run(node, args, kwargs)
        except Exception as error:
            raise TraceError(f"{node.format_node()} failed while tracing: {error}") from error
        for source, tensor, count in before:
            if _changes(tensor) != count and not is_fill(node):
                raise TraceError(f"{node.format_node()} changes {source.name} in place")
        return value

    # -- in-place operations -----------------------------------------------------------------

    def set_item(self, proxy: ConcolicProxy, index: Any, value: Any) -> None:
        """`proxy[index] = value`."""
        if not isinstance(self.versions.value(proxy.node), Tensor):
            raise TraceError(f"an item of {proxy.node.name}, which is no tensor, is set")
        places, new = self.create_arg(index), self.create_arg(value)
        now = self.versions.current(proxy.node)
        if now.target is set_item and now.args[1:] == (places, new):
            return  # `x[i] += y` has written through its view of x already
        changed = self._emit("call_function", set_item, (now, places, new), {})
        self.versions.write(proxy.node, changed)

    def _change(self, change: Change, args: Any) -> Any:
        """Make an in-place call functional; its tensor holds the result from now on."""
        written, *others = args
        if not isinstance(written, fx.Proxy) or not isinstance(
            self.versions.value(written.node), Tensor
        ):
            return self._change_constant(change, args)
        node = written.node
        fresh = change.fills and self.versions.is_unread(node)
        rest = self.create_arg(tuple(others))
        kwargs = self.create_arg(change.kwargs)
        now = self.versions.current(node)
        source = (
            self._emit("call_method", "clone", (now,), {}) if change.fills and not fresh else now
        )
        old = self.values[now]
        new = self._emit(change.kind, change.target, (source, *rest), kwargs)
        value = self.values[new]
        if not change.fills and shares_memory(old, value):
            self.versions.rename(node, new)
        elif value.shape != old.shape or value.dtype != old.dtype:
            raise TraceError(f"{new.format_node()} has another shape or type in place")
        else:
            self.versions.write(node, new)
        return self.proxy(self.versions.tensor(node))

    def _change_constant(self, change: Change, args: Any) -> Any:
        """A number, or a tensor that was made without proxies: `mask += x` binds a new value."""
        written = args[0]
        if isinstance(written, Tensor):
            if change.fills:
                raise TraceError(f"{change.target} fills a constant tensor with computed values")
            proxy = self.create_proxy(change.kind, change.target, args, change.kwargs)
            self._changed_constants.append(written)
            return proxy
        return self.create_proxy(change.kind, change.target, args, change.kwargs)

    def _change_by_module(self, target: str, args: Any, kwargs: Any) -> Any:
        """A module like nn.ReLU(inplace=True): it stays, on a copy of what others read too."""
        written = next((a for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy)), None)
        if written is None:
            raise TraceError(f"{target} changes a constant tensor in place")
        unread = self.versions.is_unread(written.node)
        old = self.versions.current(written.node)
        new = self._emit("call_module", target, self.create_arg(args), self.create_arg(kwargs))
        if shares_memory(self.values[old], self.values[new]):  # dropout in eval mode
            self.versions.made(new)
            return self.proxy(new)
        if not unread:
            with self.graph.inserting_before(new):
                copied = self._emit("call_method", "clone", (old,), {})
            new.replace_input_with(old, copied)
        self.versions.write(written.node, new)
        return self.proxy(self.versions.tensor(written.node))

    # -- what Python asks --------------------------------------------------------------------

    def told(self, module: str, name: str) -> fx.Proxy:
        """A size that the model sets as an attribute: read anew in every call."""
        target = f"{module}.{name}" if module else name
        if target not in self._told:
            self._told[target] = self.create_proxy("get_attr", target, (), {})
        return self._told[target]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.executing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.executing:
            return forward(*args, **kwargs)
        if m not in self._apart and not self.is_leaf_module(m, ""):
            self._apart[m] = self._keeps_tokens_apart(m, args, kwargs)
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        self.entered[path] = type(m)
        result = super().call_module(m, forward, args, kwargs)
        if not args or result is not args[0]:
            self.busy.add(path)
        return result

    def _keeps_tokens_apart(self, m: nn.Module, args: Any, kwargs: Any) -> bool:
        if kwargs or len(args) != 1 or not isinstance(args[0], fx.Proxy):
            return False
        value = self.versions.value(args[0].node)
        inside = [part for part in m.modules() if part in self.in_place]
        with self.own_code(), self.calls.without_numpy():
            try:
                for part in inside:
                    part.inplace = True  # type: ignore[assignment]
                return isinstance(value, Tensor) and keeps_tokens_apart(m, value)
            finally:
                for part in inside:
                    part.inplace = False  # type: ignore[assignment]

    def stop_gradients(self, graph: fx.Graph) -> None:
        """Detach what the block made under `torch.no_grad()` where it is used outside of it."""
        for node in list(graph.nodes):
            users = [user for user in node.users if user not in self._without_grad]
            if node not in self._without_grad or not users:
                continue
            if not isinstance(self.values[node], Tensor) or node.op == "placeholder":
                continue
            with graph.inserting_after(node):
                stopped = graph.call_method("detach", (node,))
            self.values[stopped] = self.values[node]
            for user in users:
                user.replace_input_with(node, stopped)

    def holds_data(self, held: Any) -> bool:
        """Whether the block has put something into a container that its input is part of."""
        values = list(held.values()) if isinstance(held, dict) else list(held)
        front = [v.node for v in pytree.tree_leaves(values) if isinstance(v, fx.Proxy)]
        seen = set(front)
        while front:
            node = front.pop()
            if node.op == "placeholder" and isinstance(self.values[node], Tensor):
                return True
            sources = (n for n in node.all_input_nodes if tensors_of(self.values[n]))
            fresh = [n for n in sources if n not in seen]
            seen.update(fresh)
            front += fresh
        return False

    def apart(self) -> frozenset[str]:
        """Names of the modules that stay calls because they treat every token alike."""
        return frozenset(self.path_of_module(m) for m, apart in self._apart.items() if apart)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse_data(obj.node)
        return self.decisions.branch(self.versions.current(obj.node))

    def fixed(self, obj: fx.Proxy) -> Any:
        """The value that Python makes a number of, which it stays."""
        self.refuse_data(obj.node)
        now = self.versions.current(obj.node)
        self.decisions.number(now)
        return self.values[now]

    def counted(self, obj: fx.Proxy) -> Any:
        """The value whose parts Python counts."""
        now = self.versions.current(obj.node)
        value = self.values[now]
        if not tensors_of(value):
            return self.fixed(obj)
        if has_shape_of_data(now, self.values, self.root):
            raise TraceError(f"a branch or number follows the value of {now.name}, by its size")
        self.decisions.number(now)
        return value

    def refuse_data(self, node: fx.Node) -> None:
        """Raise TraceError where Python is about to fix a number that follows the block's data,
        random numbers, or a parameter, which may be trained. The size of what is selected by the
        data's values follows them.
        """
        front, seen = [node], {node}
        while front:
            now = front.pop()
            value = self.values[now]
            given = now.op == "placeholder" and isinstance(value, Tensor)
            if given or (now.op == "get_attr" and isinstance(value, nn.Parameter)):
                raise TraceError(f"a branch or number follows the value of {node.name}")
            name = op_name(now, self.root)
            if name in _GUARDS_OVERFLOW:
                continue
            if name.rstrip("_") in RANDOM:
                raise TraceError(f"a branch or number follows random numbers, which {name} draws")
            for source in now.all_input_nodes:
                # from a tensor to a number only by reading its elements: a size is none of them
                read = (
                    not tensors_of(self.values[source])
                    or bool(tensors_of(self.values[now]))
                    or name in _READS_ELEMENTS
                    or has_shape_of_data(source, self.values, self.root)
                )
                if source not in seen and read:
                    seen.add(source)
                    front.append(source)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = self.counted(obj)
        count = value.shape[0] if isinstance(value, Tensor) else len(value)
        return iter([operator.getitem(obj, i) for i in range(count)])

    def keys(self, obj: fx.Proxy) -> Any:
        return self.versions.value(obj.node).keys()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _changes(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


class _KeepRandom(TorchFunctionMode):
    """Random numbers that a block draws by itself stay calls; as constants they would be fixed."""

    def __init__(self, tracer: ConcolicTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.tracer.executing or name.rstrip("_") not in RANDOM:
            return func(*args, **kwargs)
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if name.endswith("_") or torch.overrides.is_tensor_method_or_property(func):
            raise TraceError(f"{name} draws random numbers into a constant tensor")
        return self.tracer.create_proxy("call_function", func, args, kwargs)


@dataclass
class Trace:
    """A block's own graph, and what it holds for. `root` is a copy of the block (without hooks)
    that it runs on."""

    graph: fx.Graph
    root: nn.Module
    spec: CallSpec
    values: dict[fx.Node, Any]
    constants: dict[str, Tensor]  # tensors that are no parameter or buffer of the block
    grid: tuple[int, int] | None
    decisions: Decisions
    apart: frozenset[str]  # modules that stay calls, see `passes.trace.tokenwise`
    entered: dict[str, type]  # modules that were gone through, and of what class they are
    settings: dict[tuple[str, str], Any]  # (module, attribute) -> what forward read there
    written: tuple[str, ...]  # attributes that forward sets
    functions: tuple[str, ...]  # autograd functions, whose own backward is not in the graph
    asks_grad: bool  # whether the block asked if gradients are on
    knows_autocast: bool  # whether the block runs otherwise where autocast is on


#: marks modules of a traced copy that had hooks: they must be called, not bypassed
HOOKED = "_dgefx_hooked"


def strip_user_hooks(model: nn.Module) -> nn.Module:
    """Remove forward hooks from a copy, so that user code never sees a proxy.

    Those of torch itself (weight norm, spectral norm) compute parameters and stay.
    """
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                owner = hook if hasattr(hook, "__module__") else type(hook)
                setattr(module, HOOKED, True)
                if not str(owner.__module__).startswith("torch."):
                    del hooks[key]
    return model


def copy_block(block: nn.Module, shares_parameters: bool = False) -> nn.Module:
    """A copy of a block, which shares its hooks: they may belong to all of the model.

    Args:
        shares_parameters: for what runs beside the block, and leaves its parameters as they are.
    """
    hooks = (
        hook
        for module in block.modules()
        for kept in (module._forward_hooks, module._forward_pre_hooks)
        for hook in kept.values()
        if not str(getattr(hook, "__module__", type(hook).__module__)).startswith("torch.")
    )
    kept = itertools.chain(hooks, block.parameters() if shares_parameters else ())
    return copy.deepcopy(block, {id(value): value for value in kept})


def shadow(block: nn.Module) -> nn.Module:
    """A copy to trace and try things on."""
    return strip_user_hooks(copy_block(block))


def _childless(root: nn.Module) -> frozenset[nn.Module]:
    return frozenset(
        m for m in root.modules() if next(m.children(), None) is None and m is not root
    )


def _make_functional(root: nn.Module) -> frozenset[nn.Module]:
    """Switch `inplace` off in a copy, so that running its nodes changes no value of the trace.

    Returns:
        the modules that had it on.
    """
    found = [m for m in root.modules() if getattr(m, "inplace", False) is True]
    for module in found:
        module.inplace = False  # type: ignore[assignment]
    return frozenset(found)


_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


def _tensor_dicts(root: nn.Module) -> list[dict[Any, Any]]:
    """Plain dictionaries of tensors that modules keep besides parameters and buffers."""
    return [
        value
        for module in root.modules()
        for name, value in vars(module).items()
        if name not in _OWN_ATTRIBUTES
        and isinstance(value, dict)
        and value
        and all(isinstance(v, Tensor) and not isinstance(v, nn.Parameter) for v in value.values())
    ]


def _has_caches(block: nn.Module, spec: CallSpec) -> bool:
    """Whether the block gives the same without what its dictionaries of tensors hold.

    They are caches then, and reading them would fix what is a function of parameters.
    """
    outputs = []
    for forget in (False, True):
        probe = shadow(block).eval()
        for held in _tensor_dicts(probe) if forget else []:
            held.clear()
        try:
            outputs.append(tensors_of(probe(**pytree.tree_map(_copied, spec.example))))
        except Exception:  # whatever misses them
            return False
    pairs = zip(*outputs, strict=True)
    return all(torch.allclose(a, b, equal_nan=True) for a, b in pairs)


def trace(
    block: nn.Module,
    spec: CallSpec,
    training: bool,
    dtype: torch.dtype | None = None,
    grid: tuple[int, int] | None = None,
    grad: bool = True,
) -> Trace:
    """Trace `block` as `spec` calls it.

    Args:
        block: not changed; a copy is traced.
        training: trace the train-mode graph (dropout, drop path) instead of the eval one.
        dtype: take the branches of this floating type; None: of that of the block.
        grid: of its tokens; attributes that tell it stay reads.
        grad: whether gradients are on around the block.

    Raises:
        TraceError: with what could not be traced, and in which line of the block's code.
    """
    errors: list[Exception] = []
    for opaque, fixed in ((False, False), (True, False), (False, True)):
        # PyTorch's own limits of a type take no proxy for one
        if fixed and "finfo" not in str(errors[0]):
            break
        try:
            return _trace_copy(block, spec, training, opaque, fixed, dtype, grid, grad)
        except Exception as found:  # any user code may raise anything while traced
            errors.append(found)
    error = errors[0]
    if not isinstance(error, TraceError) and is_internal(error):
        raise error
    raise TraceError(f"cannot be traced: {said(error)}") from error


def _trace_copy(
    block: nn.Module,
    spec: CallSpec,
    training: bool,
    opaque: bool,
    fixed: bool,
    dtype: torch.dtype | None,
    grid: tuple[int, int] | None,
    grad: bool,
) -> Trace:
    """One attempt; `opaque` keeps custom modules and wrapped functions as calls, `fixed` makes the
    types of values constants."""
    root = shadow(block)
    root.train(training)
    in_place = _make_functional(root)
    leaves = _childless(root) if opaque else frozenset()
    tracer = ConcolicTracer(spec, leaves, in_place, dtype, grad)
    tracer.decisions.fixed = fixed
    told = {} if grid is None else told_sizes(root, grid)

    def live(module: str, name: str, value: Any) -> Any:
        return tracer.told(module, name) if (module, name) in told else value

    attributes = Attributes(lambda: not tracer.executing, live)

    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(grad):
        kept = containers(root)
        if _tensor_dicts(root) and _has_caches(block, spec):
            for held in _tensor_dicts(root):
                held.clear()
        with (
            wrapped_functions(root, opaque),
            _KeepRandom(tracer),
            watched(root, attributes),
            tracer.calls.noted(),
        ):
            graph = tracer.trace(root)
    tracer.stop_gradients(graph)
    filled = [
        name
        for name, (held, count) in kept.items()
        # a dictionary of what is made of parameters alone is a cache
        if tracer.holds_data(held) or (len(held) != count and not isinstance(held, dict))
    ]
    _drop_unread(graph)
    names = {n for n, _ in root.named_parameters(remove_duplicate=False)}
    names |= {n for n, _ in root.named_buffers(remove_duplicate=False)}
    constants = {}
    for node in graph.nodes:
        if node.op != "get_attr" or node.target in names:
            continue
        target, value = str(node.target), tracer.values[node]
        if isinstance(value, Tensor) and attribute_of(block, target) is None:
            constants[target] = run_node(node, root, (), {})
    return Trace(
        graph,
        root,
        spec,
        tracer.values,
        constants,
        grid,
        tracer.decisions,
        tracer.apart(),
        tracer.entered,
        {
            (module, name): original(value)
            for (module, name), value in attributes.reads.items()
            # what a drop path reads in eval mode decides nothing
            if name == "training" or module not in tracer.entered or module in tracer.busy
        },
        (*attributes.changed(), *filled),
        tracer.calls.functions(),
        tracer.calls.asks_grad,
        tracer.calls.knows_autocast or fixed,
    )


def attribute_of(block: nn.Module, target: str) -> Tensor | None:
    """The tensor that is a plain attribute of the block's, which the model may set anew."""
    owner, _, name = target.rpartition(".")
    try:
        value = vars(block.get_submodule(owner)).get(name)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None


def _drop_unread(graph: fx.Graph) -> None:
    """Remove what was written into bases that nothing reads afterwards."""
    for node in reversed(graph.nodes):
        if node.target is set_item and not node.users:
            graph.erase_node(node)
