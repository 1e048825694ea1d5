"""`DGEBlock`: a transformer block rewritten into a Dynamic Grained Encoder block.

Takes the place of the block module it was made from, keeps its parameters, buffers, children and
hooks (so `state_dict` keys, optimisers and checkpoints are unaffected) and runs the code that the
passes generated: one version for eval and one for train mode.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.copying import MODULE_ATTRIBUTES
from dgefx.nn.block_types import FUNCTION, SWITCH, called_like, mixed_type, plain_values
from dgefx.nn.call_form import CallForm
from dgefx.nn.callspec import choose_form
from dgefx.nn.grid_shape import GridShape
from dgefx.nn.methods import refused_methods
from dgefx.nn.router import Router
from dgefx.nn.symbolic import as_leaf, is_symbolic
from dgefx.nn.tables import Tables


class Constants(Tables):
    """Tensors of the trace that are neither parameters nor buffers of the block."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Constants:
        """They go to other devices, and stay of the type that they are of in the dense block, where
        `half()` does not see them either."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, value in before.items():
            if not value.is_meta:
                setattr(self, name, value.to(self.get_buffer(name).device))
        return self


def _is_empty(stream: Tensor) -> bool:
    """Whether there is nothing to route. Not asked of graphs that are to serve any batch."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return stream.numel() == 0


def _empty_block(dense: type) -> DGEBlock:
    """For pickle and deepcopy, which take `__class__` at its word."""
    made: DGEBlock = nn.Module.__new__(called_like(dense, DGEBlock))
    return made


class DGEBlock(nn.Module):
    """A converted block (arXiv 2301.03831, figure 2).

    Args:
        dense: the block it replaces; its parameters, buffers, children and hooks are shared.
        router: becomes child `dge_router`.
        forms: how the block is called, and what it runs; that of the example first.
        constants: becomes child `dge_constants` if there are any.
        grid_shape: shared by the blocks of one grid; None where the block itself knows.

    Shape:
        as the block it replaces.
    """

    #: what `__class__` answers; None: the dense block's class. Of the type, see `mixed_type`
    _dge_class: type | None = None
    #: whether `__call__` checkpoints where it is switched on. Of the type, see `called_like`
    _dge_call_heeds_switch = False

    def __new__(cls, dense: nn.Module, *_others: Any) -> DGEBlock:
        """Of a type that is called as the dense block is."""
        return _empty_block(type(dense))

    def __init__(
        self,
        dense: nn.Module,
        router: Router,
        forms: tuple[CallForm, ...],
        constants: dict[str, Tensor],
        grid_shape: GridShape | None,
    ) -> None:
        nn.Module.__init__(self)  # not that of a class that `called_like` put between
        self.__dict__.update(plain_values(type(dense)))
        for name, value in vars(dense).items():
            if name not in ("_modules", "_compiled_call_impl"):
                self.__dict__[name] = value
        for name, refused in refused_methods(type(dense), forms[0].eval_code.label).items():
            if not hasattr(type(self), name):  # what its own `__call__` may ask for
                self.__dict__.setdefault(name, refused)
        self._modules = dict(dense._modules)
        self.dge_router = router
        if constants:
            self.dge_constants = Constants(constants)
        # in a tuple: a reference for revert(), not a child
        self._dge_dense = (dense,)
        self._dge_forms = forms
        self._dge_specs = tuple(form.spec for form in forms)
        # of the conversion, shared by its blocks, and this one's name in it: see `dgefx.record`
        self._dge_record: tuple[Any, str] | None = None
        self.dge_grid_shape = grid_shape

    @property
    def __class__(self) -> type:
        """isinstance() also answers for the block this one stands in for.

        Libraries find the layers of a model that way (transformers records hidden states so).
        """
        dense = self.__dict__.get("_dge_dense")
        if dense is None:
            return type(self)
        return type(self)._dge_class or type(dense[0])

    @__class__.setter
    def __class__(self, assigned: type) -> None:
        """Take the mixins of `assigned`, a class derived from them and from what was answered.

        That is how PyTorch shards a module (`fully_shard`). Taken at its word the block would run
        the dense block's forward; it stays a `DGEBlock` with the mixins in front.

        Raises:
            TypeError: `assigned` is another kind of class.
        """
        answered: type = self.__class__
        real: type = type(self)
        object.__dict__["__class__"].__set__(self, mixed_type(assigned, answered, real))

    @property
    def dge_mixed(self) -> bool:
        """Whether a library gave it mixins, as FSDP2 does with what it shards."""
        return type(self)._dge_class is not None

    def __reduce_ex__(self, _protocol: Any) -> Any:
        if self.dge_mixed:  # it would come back without what its mixins set up
            raise TypeError(
                f"a converted block that became {type(self).__name__} can be neither pickled nor "
                f"copied; save its state dict, see dgefx.training.checkpoint"
            )
        return _empty_block, (type(self._dge_dense[0]),), self.__getstate__()

    def dense_block(self) -> nn.Module:
        """The block this one was made from, sharing its parameters, in this one's mode and
        checkpointed as this one is, with what was set on this one since.

        Raises:
            ValueError: this one is sharded, which the dense block knows nothing of.
        """
        if self.dge_mixed:
            raise ValueError(
                f"a converted block that became {type(self).__name__} cannot be reverted; load its "
                f"weights into an unsharded converted model and revert that"
            )
        (dense,) = self._dge_dense
        own = vars(dense)
        for name in {*own, *plain_values(type(dense)), SWITCH, FUNCTION} - MODULE_ATTRIBUTES:
            if name in self.__dict__ and self.__dict__[name] is not getattr(dense, name, None):
                own[name] = self.__dict__[name]
        dense.training = self.training
        for name in dense._modules:
            dense._modules[name] = self._modules.get(name)
        return dense

    @property
    def code(self) -> str:
        """The generated source of the current mode, for calls like the example's."""
        form = self._dge_forms[0]
        return (form.train_code if self.training else form.eval_code).source

    @contextmanager
    def replaying(self, output: Any) -> Iterator[None]:
        """While active the block computes nothing and returns a copy of `output` (calibration)."""

        def replay(*_args: Any, **_kwargs: Any) -> Any:
            return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, output)

        before = self.__dict__.get("forward")  # of the instance, where somebody put one
        self.__dict__["forward"] = replay
        try:
            yield
        finally:
            del self.__dict__["forward"]
            if before is not None:
                self.__dict__["forward"] = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_symbolic(args, kwargs):
            return as_leaf(self, args, kwargs)
        if self.training and torch.is_grad_enabled() and not self._dge_call_heeds_switch:
            function = getattr(self, FUNCTION, None)
            if function is not None and getattr(self, SWITCH, False):
                # in here, not around the call: its hooks run once
                return function(functools.partial(self._compute, **kwargs), *args)
        return self._compute(*args, **kwargs)

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        form = self._dge_forms[0]
        if len(self._dge_forms) > 1:
            form = self._dge_forms[choose_form(self._dge_specs, args, kwargs)]
        leaves = form.spec.bind(args, kwargs)
        if _is_empty(leaves[form.spec.stream]):
            return self.dense_block().forward(*args, **kwargs)
        mode, code = (1, form.train_code) if self.training else (0, form.eval_code)
        form.guards[mode].check(self, form.eval_code.label, leaves[form.spec.stream], leaves)
        return code.run(self, *leaves)
