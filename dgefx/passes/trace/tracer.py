"""`ConcolicTracer`: runs a block's forward on proxies that carry the values of the example call.

Python control flow on sizes and flags takes the branch that the model takes; a branch on the values
of a tensor is refused. Calls of `torch.nn` modules stay calls (parameters, dropout and hooks stay
alive), and so do modules that treat every token alike; everything else is traced through. Used by
`passes.trace.trace`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.nn.modules.batchnorm import _NormBase

from dgefx.nn.block_types import FUNCTION, SWITCH
from dgefx.nn.callspec import CallSpec
from dgefx.passes.errors import TraceError
from dgefx.passes.ops import run_node
from dgefx.passes.trace.calls import Calls, autocast_state
from dgefx.passes.trace.decisions import Decisions
from dgefx.passes.trace.in_place import functional_form, is_fill, write, write_by_module, write_item
from dgefx.passes.trace.module_access import ModuleState, heard
from dgefx.passes.trace.proxies import ConcolicProxy, DeviceName, teach_einops
from dgefx.passes.trace.tensor_versions import TensorVersions, shares_memory, tensors_of
from dgefx.passes.trace.token_wise import is_token_wise
from dgefx.passes.user_code import place_now
from dgefx.passes.walk import breadth_first

_MADE_LIKE = {"new_zeros": torch.zeros, "new_ones": torch.ones, "new_full": torch.full}


def _wraps_layer(module: nn.Module) -> bool:
    """Whether a module wraps one layer, `base_layer`, that it can merge itself into.

    Such an adapter (as those of PEFT) can be merged, switched off or taken out later, so it stays
    a call; what it does while traced says nothing about that.
    """
    layer = getattr(module, "base_layer", None)
    merges = all(callable(getattr(module, name, None)) for name in ("merge", "unmerge"))
    return isinstance(layer, nn.Module) and merges and not any(layer.children())


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module stays a call, by its class."""
    # what keeps running statistics changes its buffers in training; some add an activation
    if isinstance(module, (nn.MultiheadAttention, _NormBase)) or _wraps_layer(module):
        return True
    if not type(module).__module__.startswith("torch.nn"):
        return False
    # also one that was given children, as an adapter in a hook
    return isinstance(module, nn.Linear) or not any(module.children())


class ConcolicTracer(fx.Tracer):
    """See the module docstring; runs once.

    Args:
        root: a copy of the block, without the user's hooks.
        spec: the example call.
        decisions: to note down what Python asks.
        leaves: modules to keep as calls although they are not from `torch.nn`.
        in_place: modules that change their argument in the block, though not in the traced copy.
        sizes: (module, attribute) that the model tells the block its grid by; they stay reads.
        grad: whether gradients are on outside of the block.
    """

    def __init__(
        self,
        root: nn.Module,
        spec: CallSpec,
        decisions: Decisions,
        *,
        leaves: Collection[nn.Module],
        in_place: Collection[nn.Module],
        sizes: Collection[tuple[str, str]],
        grad: bool,
    ) -> None:
        super().__init__()
        self.root, self.spec = root, spec
        self.decisions, self.values = decisions, decisions.values
        self.tensors = TensorVersions(root, self.values, self.emit)
        self.state, self.calls = ModuleState(), Calls(self)
        self.executing = False
        #: modules whose forward was gone through -> whether it handed on what it was given
        self.entered: dict[str, bool] = {}
        self._in_place, self._sizes = in_place, sizes
        self._stays: dict[nn.Module, bool] = {m: True for m in leaves}
        self._token_wise: list[str] = []
        self.changed_constants: list[Tensor] = []
        self._grad, self._autocast = grad, autocast_state()
        self._grad_is_off = False
        self._without_grad: set[fx.Node] = set()
        self._paths = {module: name for name, module in root.named_modules()}
        #: one proxy each, so that what is asked for every tensor once finds it again
        self._attributes: dict[str, fx.Proxy] = {}
        self._tensor_names: dict[Tensor, str] = {}
        for name, value in (*root.named_parameters(), *root.named_buffers()):
            self._tensor_names.setdefault(value, name)

    def run(self) -> fx.Graph:
        """The graph of the example call. Nothing that another thread runs is touched."""
        with self.calls.heard(), heard(self.root, self):
            with self.own_code():
                teach_einops()
                _LazyGraphModule.force_recompile(self.root)  # type: ignore[arg-type]
                self.graph = fx.Graph(tracer_cls=type(self))
                self.tensor_attrs = {
                    value: f"{path}.{name}" if path else name
                    for module, path in self._paths.items()
                    for name, value in vars(module).items()
                    if isinstance(value, (Tensor, torch.ScriptObject))
                }
                values = self.spec.bind((), self.spec.example)
                inputs = list(map(self._input, self.spec.input_names(), values))
            result = type(self.root).forward(self.root, **self.spec.assemble(inputs))
            self.create_node("output", "output", (self.create_arg(result),), {})
        self._stop_gradients()
        return self.graph

    @contextlib.contextmanager
    def own_code(self) -> Iterator[None]:
        """While the tracer's own code runs, or a value: what it does is not the block's."""
        if self.executing:
            yield
            return
        self._grad_is_off = self._grad and not torch.is_grad_enabled()
        if autocast_state() != self._autocast:
            raise TraceError("the block switches torch.autocast on for a part of its forward")
        self.executing = True
        # every call costs while they are heard, whoever makes it
        sys.setprofile(None)
        try:
            with torch.no_grad():
                yield
        finally:
            self.executing = False
            sys.setprofile(self.calls.note)

    # -- nodes and their values --------------------------------------------------------------

    def proxy(self, node: fx.Node) -> ConcolicProxy:
        return ConcolicProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["place"] = place_now()
        if self._grad_is_off:
            self._without_grad.add(node)
        return node

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *_rest: Any, **_more: Any
    ) -> Any:
        if kind == "call_method" and target in _MADE_LIKE and isinstance(args[0], fx.Proxy):
            # asks for type and device, which does not make what is made the data of the proxy
            asked = {name: getattr(args[0], name) for name in ("dtype", "device")}
            kind, target = "call_function", _MADE_LIKE[target]
            args, kwargs = args[1:], asked | kwargs
        for value in (*args, *kwargs.values()):
            if isinstance(value, DeviceName):
                value.look()
        with self.own_code():
            form = functional_form(kind, target, kwargs)
            if form is not None:
                return write(self, form, args)
            if kind == "call_module" and self.root.get_submodule(target) in self._in_place:
                return write_by_module(self, target, args, kwargs)
            node = self.emit(kind, target, self.create_arg(args), self.create_arg(kwargs))
            self.tensors.add(node)
            return self.proxy(node)

    def create_arg(self, a: Any) -> Any:
        """A proxy stands for what its tensor holds now; constants get a value."""
        if a is None or isinstance(a, (int, float, str)):
            return a
        with self.own_code():
            if isinstance(a, fx.Proxy):
                return self.tensors.current(a.node)
            if isinstance(a, Tensor) and any(shares_memory(a, t) for t in self.changed_constants):
                raise TraceError("a constant tensor is read after a computed value changed it")
            made = super().create_arg(a)
            if isinstance(made, fx.Node) and made not in self.values:
                self.values[made] = self._execute(made)
            return made

    def _input(self, name: str, value: Any) -> fx.Proxy:
        node = self.create_node("placeholder", name, (), {})
        self.values[node] = value.clone() if isinstance(value, Tensor) else value
        return self.proxy(node)

    def emit(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.create_node(kind, target, args, kwargs)
        self.values[node] = self._execute(node)
        return node

    def _execute(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        # whoever reads a parameter later sees its change in the block too
        sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
        # inference tensors do not count how often they were changed
        before = [
            (n, t, t._version)
            for n in sources
            for t in tensors_of(self.values[n])
            if not t.is_inference()
        ]
        try:
            users = self._is_users_module(node)
            with self.calls.numpy_may_draw() if users else contextlib.nullcontext():
                value = run_node(node, self.root, args, kwargs)
        except Exception as error:
            raise TraceError(f"{node.format_node()} failed while tracing: {error}") from error
        for source, tensor, version in before:
            if tensor._version != version and not is_fill(node):
                raise TraceError(f"{node.format_node()} changes {source.name} in place")
        return value

    def _is_users_module(self, node: fx.Node) -> bool:
        """Whether a node calls what may draw numbers otherwise than PyTorch does."""
        if node.op != "call_module":
            return False
        module = self.root.get_submodule(str(node.target))
        return not type(module).__module__.startswith("torch.")

    def set_item(self, proxy: ConcolicProxy, index: Any, value: Any) -> None:
        """`proxy[index] = value`."""
        with self.own_code():
            write_item(self, proxy.node, index, value)

    def _stop_gradients(self) -> None:
        """Detach what the block made under `torch.no_grad()` where it is used outside of it."""
        for node in list(self.graph.nodes):
            users = [user for user in node.users if user not in self._without_grad]
            if node not in self._without_grad or not users:
                continue
            # a parameter that was read there learns by what is made of it elsewhere
            if not isinstance(self.values[node], Tensor) or not node.op.startswith("call_"):
                continue
            with self.graph.inserting_after(node):
                stopped = self.graph.call_method("detach", (node,))
            self.values[stopped] = self.values[node]
            for user in users:
                user.replace_input_with(node, stopped)

    # -- modules -----------------------------------------------------------------------------

    def path_of_module(self, mod: nn.Module) -> str:
        if mod not in self._paths:
            raise TraceError(f"{type(mod).__name__} is no submodule of the block")
        return self._paths[mod]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """The result of a call; `forward` makes it without asking."""
        if self.executing:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if m not in self._stays:
            with self.own_code():
                self._stays[m] = _is_leaf(m)
                if not self._stays[m] and self._is_token_wise(m, args, kwargs):
                    self._stays[m] = True
                    self._token_wise.append(path)
        if self._stays[m]:
            return self.create_proxy("call_module", path, args, kwargs)
        self.entered.setdefault(path, True)
        result = forward(*args, **kwargs)
        if not args or result is not args[0]:
            self.entered[path] = False
        return result

    def _is_token_wise(self, m: nn.Module, args: Any, kwargs: Any) -> bool:
        if kwargs or len(args) != 1 or not isinstance(args[0], fx.Proxy):
            return False
        value = self.values[self.tensors.current(args[0].node)]
        inside = [part for part in m.modules() if part in self._in_place]
        with self.calls.numpy_may_draw():
            try:
                for part in inside:
                    part.inplace = True  # type: ignore[assignment]
                return isinstance(value, Tensor) and is_token_wise(m, value)
            finally:
                for part in inside:
                    part.inplace = False  # type: ignore[assignment]

    def token_wise(self) -> frozenset[str]:
        """Names of the modules that stay calls because they treat every token alike."""
        return frozenset(self._token_wise)

    def read_tensor(self, value: Tensor) -> Any:
        """What code gets that reads a parameter or buffer."""
        name = None if self.executing else self._tensor_names.get(value)
        return value if name is None else self._attribute(name)

    def read_setting(self, module: nn.Module, name: str, value: Any) -> Any:
        """What code gets that reads a plain attribute."""
        path = self._paths.get(module)
        if path is None or self.state.was_written(path, name):
            return value
        if name in (SWITCH, FUNCTION):  # the converted block heeds it itself
            return False if name == SWITCH else value
        if (path, name) in self._sizes:
            return self._attribute(f"{path}.{name}" if path else name)
        self.state.read(path, name, value)
        return value

    def write_setting(self, module: nn.Module, name: str, before: Any, value: Any) -> None:
        """An attribute is set anew."""
        if not self.executing and module in self._paths:
            self.state.write(self._paths[module], name, before, value)

    def _attribute(self, target: str) -> fx.Proxy:
        if target not in self._attributes:
            self._attributes[target] = self.create_proxy("get_attr", target, (), {})
        return self._attributes[target]

    def settings_read(self) -> Any:
        """Those that decide something: what a drop path reads in eval mode does not."""
        return tuple(
            setting
            for setting in self.state.settings()
            if setting.name == "training" or not self.entered.get(setting.module, False)
        )

    # -- what Python asks --------------------------------------------------------------------

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.decisions.branch(self.tensors.current(obj.node))

    def keys(self, obj: fx.Proxy) -> Any:
        return self.values[self.tensors.current(obj.node)].keys()

    def holds_data(self, held: Any) -> bool:
        """Whether the block has put something into a container that its input is part of."""
        parts = list(held.values()) if isinstance(held, dict) else list(held)
        starts = [v.node for v in pytree.tree_leaves(parts) if isinstance(v, fx.Proxy)]

        def sources(node: fx.Node) -> list[fx.Node]:
            return [n for n in node.all_input_nodes if tensors_of(self.values[n])]

        reached = breadth_first(starts, sources)
        return any(n.op == "placeholder" and isinstance(self.values[n], Tensor) for n in reached)
