"""`BlockExample`: one dense block and how the model called it, and the calls that are made of that.

What all of `passes.plan` runs blocks on: the example call, with another stream, on another grid, of
other images, in another floating type, with another mask.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgefx.outputs import Call, tensors_in
from dgefx.passes.errors import Refused
from dgefx.passes.layout import Layout
from dgefx.passes.trace.deterministic import seed_all
from dgefx.passes.trace.module_access import size_attributes


@dataclass(frozen=True)
class BlockExample:
    """A block of the working copy, as the model called it.

    block: dense, in eval mode, never changed. call: (args, kwargs), of two images at least.
    layout, shape: of its stream. rank: which of the arguments of that shape the stream is.
    """

    name: str
    block: nn.Module
    call: Call
    layout: Layout
    shape: tuple[int, ...]
    rank: int = 0

    @property
    def images(self) -> int:
        """Images, or parts that count as images, in the stream."""
        return self.layout.images(self.shape)

    def _leaf(self, leaves: list[Any]) -> int:
        fitting = (
            index
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and tuple(leaf.shape) == self.shape
        )
        found = next(itertools.islice(fitting, self.rank, None), None)
        if found is None:
            raise Refused(
                f"no argument of the block holds its stream of shape {self.shape}",
                "no block module",
            )
        return found

    @property
    def stream(self) -> Tensor:
        """The stream among the arguments."""
        leaves = pytree.tree_leaves(self.call)
        found: Tensor = leaves[self._leaf(leaves)]
        return found

    @property
    def before(self) -> Tensor:
        """What the block's result is its update of: the stream, or zeros of a block that hands out
        the update alone."""
        return torch.zeros_like(self.stream) if self.layout.update else self.stream

    def with_stream(self, stream: Tensor) -> BlockExample:
        """The call with another stream, which may be of another shape."""
        leaves, spec = pytree.tree_flatten(self.call)
        leaves[self._leaf(leaves)] = stream
        call: Call = pytree.tree_unflatten(leaves, spec)
        return dataclasses.replace(self, call=call, shape=tuple(stream.shape))

    def with_noise(self, generator: torch.Generator) -> BlockExample:
        """The call with a random stream."""
        return self.with_stream(torch.randn(self.shape, generator=generator).to(self.stream))

    def at_grid(self, grid: tuple[int, int]) -> BlockExample:
        """The call with a random stream, and its sizes, of another grid."""
        here, layout = self.layout.grid, dataclasses.replace(self.layout, grid=grid)
        size = self.layout.shape_at(self.shape, grid)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(4))
        made = dataclasses.replace(self.with_stream(noise.to(self.stream)), layout=layout)
        leaves, spec = pytree.tree_flatten(made.call)
        for index in range(1, len(leaves)):
            pair = leaves[index - 1 : index + 1]
            if all(isinstance(size, int) for size in pair) and tuple(pair) == here:
                leaves[index - 1], leaves[index] = grid
        return dataclasses.replace(made, call=pytree.tree_unflatten(leaves, spec))

    def of_images(self, chosen: Tensor) -> BlockExample:
        """The call with these images of the stream, and of all that has as many on its first axis.

        Args:
            chosen: (images,) int64.
        """
        axis = self.layout.axis("B")
        images = self.shape[axis]

        def pick(value: Any, axis: int = 0) -> Any:
            if not isinstance(value, Tensor) or not value.dim() or value.shape[axis] != images:
                return value
            return value.index_select(axis, chosen.to(value.device))

        leaves, spec = pytree.tree_flatten(self.call)
        made, index = list(map(pick, leaves)), self._leaf(leaves)
        stream = made[index] = pick(leaves[index], axis)
        call: Call = pytree.tree_unflatten(made, spec)
        return dataclasses.replace(self, call=call, shape=tuple(stream.shape))

    def with_numbers(self, before: int, after: int) -> list[BlockExample]:
        """The call with all numbers of one value changed to another, if there are any."""
        leaves, spec = pytree.tree_flatten(self.call)
        changed = [after if type(leaf) is int and leaf == before else leaf for leaf in leaves]
        if all(one is other for one, other in zip(leaves, changed, strict=True)):
            return []
        return [dataclasses.replace(self, call=pytree.tree_unflatten(changed, spec))]

    def in_type(self, dtype: torch.dtype) -> BlockExample:
        """The call with floating point tensors of this type; those that ask for a gradient keep
        theirs, and are handed on as what was computed from them."""

        def cast(value: Tensor) -> Tensor:
            if value.requires_grad:
                return value * 1.0  # a block may write into its input
            return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()

        return dataclasses.replace(self, call=pytree.tree_map_only(Tensor, cast, self.call))

    def with_argument(self, names: tuple[str, ...], name: str, value: Any) -> BlockExample:
        """The call with another value of one argument.

        Args:
            names: of the positional parameters.
        """
        args, kwargs = self.call
        place = names.index(name) if name in names else len(args)
        if place < len(args):
            call: Call = ((*args[:place], value, *args[place + 1 :]), kwargs)
        else:
            call = (args, {**kwargs, name: value})
        return dataclasses.replace(self, call=call)

    def tell_grid(self, block: nn.Module, grid: tuple[int, int]) -> None:
        """Set the sizes that a model tells its blocks by attributes, in a copy of the block."""
        for (part, name), axis in size_attributes(block, grid).items():
            setattr(block.get_submodule(part), name, self.layout.grid[axis])

    def copied(self) -> Call:
        """The call on copies of its tensors: a block may write its update into its input."""
        call: Call = pytree.tree_map_only(Tensor, torch.clone, self.call)
        return call

    def run(
        self, module: nn.Module, mode: TorchFunctionMode | None = None, seed: int = 0
    ) -> Tensor:
        """The first floating point tensor that `module` gives for the call.

        Args:
            mode: to run in, such as `Deterministic`.
        """
        seed_all(seed)
        args, kwargs = self.copied()
        with contextlib.nullcontext() if mode is None else mode:
            found = tensors_in(module(*args, **kwargs))
        return next(tensor for tensor in found if tensor.is_floating_point())
